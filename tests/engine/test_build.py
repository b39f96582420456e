"""The builder equals `reference.py` array for array, whatever the threads.

Vectors are small integers, so that every summation order gives the same float and ties abound.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference

from hnsw_gpu import Index
from hnsw_gpu.engine import build, candidates, graph, repair
from hnsw_gpu.engine.graph import Graph
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.engine.vectors import encode, encode_queries

METRICS = ["l2", "ip", "cosine"]
DTYPES = ["fp32", "fp16", "int8", "int4"]


def integer_vectors(n: int, dim: int, metric: str, dtype: str, seed: int) -> np.ndarray:
    # int8 distances tie where codes are the same few
    largest = 1 if dtype == "int8" else 3
    return reference.integer_vectors(n, dim, metric, np.random.default_rng(seed), largest)


def built(
    rows: np.ndarray,
    metric: str,
    *,
    M: int,
    ef_construction: int,
    seed: int = 0,
    threads: int = 1,
    stops: tuple[int, ...] = (),
    by_codes: bool | None = None,
) -> Graph:
    """The engine's graph of `rows`, added in one call, or in calls that end at `stops`."""
    made = build.empty_graph(M)
    for stop in (*stops, len(rows)):
        for grown in inserted(
            made, rows[:stop], metric, ef_construction=ef_construction, seed=seed, threads=threads,
            by_codes=by_codes,
        ):  # fmt: skip
            made = grown
    return build.packed(made)


def inserted(made: Graph, rows: np.ndarray, metric: str, *, seed: int, **settings) -> Iterator:
    """What `insert_nodes` yields, into links that are copies of a graph's."""
    count, M = len(made.neighbors0), made.neighbors.shape[1]
    levels = build.draw_levels(seed, count, len(rows), M)
    neighbors0 = np.empty((len(rows), 2 * M), dtype=np.int32)
    neighbors0[:count] = made.neighbors0
    room = build.with_room(made, count, levels)
    room = room._replace(neighbors0=neighbors0, neighbors=room.neighbors.copy())
    return build.insert_nodes(made, room, rows, levels, metric, **settings)


def twin(
    table: reference.KeyTable,
    *,
    M: int,
    ef_construction: int,
    seed: int = 0,
    stops: tuple[int, ...] = (),
    growth: int = 50,
    largest_batch: int = 2048,
    metric: str = "l2",
    codes: reference.KeyTable | None = None,
) -> Graph:
    """The oracle's graph."""
    made = reference.empty_graph(M)
    for stop in (*stops, len(table)):
        made = reference.insert_nodes(
            made,
            table,
            stop,
            ef_construction=ef_construction,
            seed=seed,
            growth=growth,
            largest_batch=largest_batch,
            own_factor=1.1 if metric == "ip" else 1.2,
            codes=codes,
        )
    return made


def assert_same(found: Graph, wanted: Graph, said: object = "") -> None:
    for name, array, other in zip(Graph._fields, found, wanted, strict=True):
        assert array.dtype == other.dtype, name
        np.testing.assert_array_equal(array, other, err_msg=f"{name} {said}")


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1])
def test_levels(seed: int) -> None:
    for M in (2, 5, 16):
        levels = build.draw_levels(seed, 0, 3000, M)
        assert levels.dtype == np.int32
        assert levels.tolist() == [reference.draw_level(seed, node, M) for node in range(3000)]
        # Adding in pieces draws the same levels.
        pieces = [build.draw_levels(seed, a, b, M) for a, b in ((0, 7), (7, 7), (7, 3000))]
        np.testing.assert_array_equal(np.concatenate(pieces), levels)


def test_levels_thin_out_by_M() -> None:
    levels = build.draw_levels(3, 0, 200_000, 16)
    for level, share in ((1, 1 / 16), (2, 1 / 256)):
        wanted = 200_000 * share
        assert abs((levels >= level).sum() - wanted) < 4 * wanted**0.5


def test_mix_is_splitmix64() -> None:
    # The first outputs for seed 1234567, as published with the generator.
    step = 0x9E3779B97F4A7C15
    outputs = [reference.mix(1234567 + i * step) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_graph_equals_the_oracle(metric: str, dtype: str) -> None:
    vectors = integer_vectors(220, 16, metric, dtype, seed=21)
    rows = encode(vectors, metric, dtype)
    table = reference.node_table(vectors, metric, dtype)
    for M, ef_construction in itertools.product((2, 4, 8), (1, 5, 40)):
        settings: dict[str, Any] = {"M": M, "ef_construction": ef_construction, "seed": M}
        wanted = twin(table, **settings, metric=metric)
        for threads in (1, 2):
            assert_same(built(rows, metric, **settings, threads=threads), wanted, settings)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 9, 64, 65, 500])
def test_every_size(n: int) -> None:
    vectors = integer_vectors(n, 5, "l2", "fp32", seed=n) if n else np.empty((0, 5), np.float32)
    rows = encode(vectors, "l2", "fp32")
    table = reference.node_table(vectors, "l2", "fp32")
    for seed in range(3):
        wanted = twin(table, M=3, ef_construction=20, seed=seed)
        assert_same(built(rows, "l2", M=3, ef_construction=20, seed=seed), wanted)


@pytest.mark.parametrize("stops", [(1,), (10, 11, 150), (3, 100, 299), tuple(range(30, 300, 30))])
def test_adding_in_pieces(stops: tuple[int, ...]) -> None:
    vectors = integer_vectors(300, 8, "ip", "fp32", seed=22)
    rows = encode(vectors, "ip", "fp32")
    table = reference.node_table(vectors, "ip", "fp32")
    for M in (2, 6):
        wanted = twin(table, M=M, ef_construction=24, stops=stops, metric="ip")
        assert_same(built(rows, "ip", M=M, ef_construction=24, stops=stops, threads=2), wanted)


def test_stopping_after_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BATCH_DIVISOR", 2)  # batches of half of the graph: fewer stops
    vectors = integer_vectors(200, 8, "l2", "fp32", seed=26)
    rows = encode(vectors, "l2", "fp32")
    table = reference.node_table(vectors, "l2", "fp32")
    stops = []
    for made in inserted(build.empty_graph(3), rows, "l2", ef_construction=24, seed=0, threads=1):
        stops.append(len(made.neighbors0))
        wanted = twin(table[: stops[-1]], M=3, ef_construction=24, growth=2)
        assert_same(build.packed(made), wanted, stops)
    assert stops == [1, 2, 3, 4, 6, 9, 13, 19, 28, 42, 63, 94, 141, 200]


def test_batches_up_to_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    # With the real limit this would take thousands of nodes.
    monkeypatch.setattr(build, "BATCH", 37)
    monkeypatch.setattr(build, "BATCH_DIVISOR", 1)
    vectors = integer_vectors(300, 8, "l2", "fp32", seed=23)
    rows = encode(vectors, "l2", "fp32")
    wanted = twin(
        reference.node_table(vectors, "l2", "fp32"),
        M=4,
        ef_construction=24,
        growth=1,
        largest_batch=37,
    )
    for threads in (1, 2):
        assert_same(built(rows, "l2", M=4, ef_construction=24, threads=threads), wanted)


@pytest.mark.parametrize("order", ["sorted", "clustered"])
def test_orders_that_are_hard_on_batches(order: str) -> None:
    # A batch that lies together, or far from all before it, must see itself.
    rng = np.random.default_rng(24)
    if order == "sorted":
        vectors = np.stack([np.arange(300) // 20, np.arange(300) % 20], axis=1)
    else:
        vectors = np.unique(
            rng.integers(0, 4, (600, 5)) + 20 * rng.integers(0, 3, (600, 1)), axis=0
        )
    vectors = vectors[:300].astype(np.float32)
    rows = encode(vectors, "l2", "fp32")
    wanted = twin(reference.node_table(vectors, "l2", "fp32"), M=4, ef_construction=16)
    for threads in (1, 2):
        assert_same(built(rows, "l2", M=4, ef_construction=16, threads=threads), wanted)


# --- walks on codes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_walks_on_codes_equal_the_oracle(
    metric: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = integer_vectors(250, 16, metric, dtype, seed=28)
    vectors[::2] += 600  # codes do not tell these apart
    rows = encode(vectors, metric, dtype)
    table, codes = (reference.node_table(vectors, metric, name) for name in (dtype, "int8"))
    answers = []
    is_rough = reference.is_rough
    monkeypatch.setattr(
        reference, "is_rough", lambda keys: (answers.append(is_rough(keys)), answers[-1])[1]
    )
    for M, ef_construction in ((2, 5), (4, 24), (6, 40)):
        settings: dict[str, Any] = {"M": M, "ef_construction": ef_construction}
        wanted = twin(table, **settings, metric=metric, codes=codes)
        for threads in (1, 2):
            made = built(rows, metric, **settings, threads=threads, by_codes=True)
            assert_same(made, wanted, settings)
    assert len(answers) / 10 < sum(answers) < len(answers) * 0.9


def test_codes_that_mislead_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(29)
    rows = encode((1000 + rng.normal(size=(3000, 8))).astype(np.float32), "l2", "fp32")
    walks = []
    real = candidates.walk

    def recorded(made, walked, *rest, **settings):
        walks.append((len(made.neighbors0), walked.dtype))
        return real(made, walked, *rest, **settings)

    monkeypatch.setattr(candidates, "walk", recorded)
    queries = encode_queries(rows[:500, :8] + np.float32(0.1), "l2", "fp32")
    found = {}
    for by_codes in (False, True):
        walks.clear()
        made = built(rows, "l2", M=6, ef_construction=40, by_codes=by_codes)
        found[by_codes] = search_graph(made, rows, queries, "l2", k=10, ef=20).keys
        last = max([0] + [count for count, dtype in walks if dtype == np.int8])
        assert last == 0 if not by_codes else 900 < last < 1100
        assert any(count < 900 for count, dtype in walks if dtype == np.float32)
    same = np.mean([len(np.intersect1d(*pair)) for pair in zip(*found.values(), strict=True)])
    assert same > 9.8


@pytest.mark.parametrize(
    ("count", "length", "start", "dtype", "is_quicker"),
    [
        (100_000, 96, 0, np.float32, True),
        (100_000, 96, 0, np.float16, True),
        (100_000, 96, 0, np.int8, False),
        (100_000, 96, 87_500, np.float32, True),
        (100_000, 96, 87_501, np.float32, False),
        (200_000, 88, 0, np.float32, False),
        (1 << 13, 1024, 0, np.float32, True),
        ((1 << 13) - 1, 1024, 0, np.float32, False),
    ],
)
def test_codes_pay_where_many_long_rows_are_added(
    count: int, length: int, start: int, dtype: type, is_quicker: bool
) -> None:
    rows = np.broadcast_to(np.zeros((), dtype), (count, length))
    assert candidates.codes_pay(rows, start) is is_quicker


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_is_built_by_codes(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "LEAST_NUMBERS", 0)
    made = []
    real = candidates.RowCodes.__init__
    monkeypatch.setattr(
        candidates.RowCodes, "__init__", lambda *given: (made.append(given), real(*given))[1]
    )
    vectors = np.random.default_rng(30).normal(size=(1000, 100)).astype(np.float32)
    index = Index(100, "cosine", dtype)
    index.add(vectors[:500])
    index.add(vectors[500:])
    index.add(vectors[:9] + 1)  # few
    assert len(made) == (2 if dtype in ("fp32", "fp16") else 0)
    index.check()
    assert (index.search(vectors, 1)[0][:, 0] == np.arange(1000)).mean() > 0.99


# --- selection ------------------------------------------------------------------------------------


def test_oracle_selects_strictly() -> None:
    # On a line, point at 0: 1 hides 2 (nearer to 1 than to 0) and ties with nothing; -1 is kept.
    positions = np.array([0, 1, 2, -1, -3], dtype=np.float32)[:, None]
    table = reference.node_table(positions, "l2", "fp32")
    assert reference.select(table[0][1:], table, limit=5) == [1, 3]
    # 2 and -2 and (0, 2): equally far from the point; a candidate as near to a kept one goes.
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [-1, 0]], dtype=np.float32)
    table = reference.node_table(corners, "l2", "fp32")
    # [1, 1] is nearer to [1, 0] than to the point; the other corners are 2 apart, 1 from the point.
    assert reference.select(table[0][1:], table, limit=5) == [1, 3, 4]
    assert reference.select(table[0][1:], table, limit=2) == [1, 3]
    # An equilateral triangle (in three dimensions): a tie, so the second is rejected.
    triangle = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    table = reference.node_table(triangle, "l2", "fp32")
    assert reference.select(table[0][1:], table, limit=5) == [1]
    # Relaxed, a tie is kept, and so is what is nearer to 1 by less than the factor; no copy is.
    assert reference.select(table[0][1:], table, limit=5, factor=1.1) == [1, 2]
    near = np.array([0, 2, 3.9, 4.1, 2], dtype=np.float32)[:, None]
    table = reference.node_table(near, "l2", "fp32")
    assert reference.select(table[0][1:], table, limit=5, factor=4.2) == [1, 3]
    # Filled, those rejected follow that are not four times nearer to a kept one: no copies.
    assert reference.select(table[0][1:], table, limit=5) == [1]
    assert reference.select(table[0][1:], table, limit=5, is_filled=True) == [1, 3]
    assert reference.select(table[0][1:], table, limit=1, is_filled=True) == [1]


# --- what comes of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_search_of_a_built_graph_equals_the_oracle(metric: str, dtype: str) -> None:
    vectors = integer_vectors(400, 16, metric, dtype, seed=25)
    rows = encode(vectors, metric, dtype)
    made = built(rows, metric, M=5, ef_construction=40)
    repair.repair(made, rows, metric, ef_construction=40, threads=1)
    assert graph.check_graph(made) == []
    asked = vectors[::40]
    queries = encode_queries(asked, metric, dtype)
    table = reference.key_table(vectors, asked, metric, dtype)
    for expand, ef_upper, ef in itertools.product((1, 2, 4, 8), (1, 4), (1, 2, 31, 64, 200)):
        settings: dict[str, Any] = {"k": 5, "ef": ef, "expand": expand, "ef_upper": ef_upper}
        wanted = reference.search(made, table, **settings)
        found = search_graph(made, rows, queries, metric, **settings)
        np.testing.assert_array_equal(found.keys, wanted.keys, err_msg=str(settings))
        np.testing.assert_array_equal(found.hops, wanted.hops, err_msg=str(settings))
