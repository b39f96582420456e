"""The engine equals `reference.py`: key for key, hop for hop, distance for distance computed.

Vectors are small integers, so that every summation order gives the same float and ties abound.
int8 and int4 distances are a fixed chain of operations and are held to it on any data.
"""

from typing import NamedTuple

import numpy as np
import pytest
import reference

from hnsw_gpu.engine import search
from hnsw_gpu.engine import vectors as vectors_module
from hnsw_gpu.engine.graph import Graph, check_graph
from hnsw_gpu.engine.search import WORDS_A_VISIT, search_graph

METRICS = ["l2", "ip", "cosine"]
DTYPES = ["fp32", "fp16", "int8", "int4"]
EXPANDS = [1, 2, 4, 8]
EF_UPPERS = [1, 4]
EFS = [1, 2, 31, 64, 200]
KS = [1, 12]  # below, and for some ef above


class Case(NamedTuple):
    """A graph, what to ask of it, and the oracle's keys."""

    graph: Graph
    metric: str
    rows: np.ndarray  # encoded
    queries: np.ndarray  # encoded
    table: reference.KeyTable


def make_case(
    graph: Graph, vectors: np.ndarray, queries: np.ndarray, metric: str, dtype: str
) -> Case:
    return Case(
        graph,
        metric,
        vectors_module.encode(vectors, metric, dtype),
        vectors_module.encode_queries(queries, metric, dtype),
        reference.key_table(vectors, queries, metric, dtype),
    )


def random_case(
    n: int, dim: int, queries: int, metric: str, dtype: str, seed: int, M: int = 4
) -> Case:
    """Integer vectors on a random graph; half of the queries are stored vectors."""
    rng = np.random.default_rng(seed)
    # int8 distances tie where codes are the same few
    largest = 1 if dtype == "int8" else 3
    pool = reference.integer_vectors(n + queries // 2, dim, metric, rng, largest)
    vectors = pool[:n]
    asked = np.concatenate([vectors[: queries - queries // 2], pool[n:]])
    graph = reference.random_graph(vectors, M, seed)
    return make_case(graph, vectors, asked, metric, dtype)


def packed(mask: np.ndarray) -> np.ndarray:
    """bool (..., n) as uint32 (..., words): bit id & 31 of word id >> 5, the spare bits set."""
    n = mask.shape[-1]
    words = np.zeros((*mask.shape[:-1], (n + 31) // 32), dtype=np.uint32)
    for bit in range(32 * words.shape[-1]):
        is_set = mask[..., bit] if bit < n else True
        words[..., bit // 32] |= np.where(is_set, np.uint32(1) << np.uint32(bit % 32), np.uint32(0))
    return words


def assert_parity(
    case: Case,
    *,
    k: int,
    ef: int,
    expand: int = 1,
    ef_upper: int = 1,
    allowed: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> None:
    """Twice on one thread (scratch must reset) and once on two."""
    settings = {"k": k, "ef": ef, "expand": expand, "ef_upper": ef_upper}
    wanted = reference.search(
        case.graph,
        case.table,
        **settings,
        allowed=allowed,
        own=None if own is None else own.tolist(),
    )
    for threads in (1, 1, 2):
        found = search_graph(
            case.graph,
            case.rows,
            case.queries,
            case.metric,
            **settings,
            allowed=None if allowed is None else packed(allowed),
            own=own,
            threads=threads,
        )
        assert found.keys.dtype == np.uint64
        assert found.hops.dtype == np.int32
        said = f"{settings} threads={threads}"
        np.testing.assert_array_equal(found.keys, wanted.keys, err_msg=f"keys {said}")
        np.testing.assert_array_equal(found.hops, wanted.hops, err_msg=f"hops {said}")
        # R7 lets an engine compute more of them; this one promises not to.
        np.testing.assert_array_equal(
            found.distances, wanted.distances, err_msg=f"distances {said}"
        )
        np.testing.assert_array_equal(found.blocked, wanted.blocked, err_msg=f"blocked {said}")


# --- every setting --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(m, d) for m in METRICS for d in DTYPES], ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    metric, dtype = request.param
    made = random_case(300, 16, queries=4, metric=metric, dtype=dtype, seed=11)
    assert made.graph.top >= 3
    assert check_graph(made.graph) == []
    distances = [key >> 32 for key in made.table[0]]
    if dtype != "int4":  # which estimates differ, by scale if by nothing else
        assert len(set(distances)) < len(distances) / 2, "too few ties"
    return made


@pytest.mark.parametrize("mode", ["plain", "shared", "per query", "self", "self per query"])
@pytest.mark.parametrize("ef_upper", EF_UPPERS)
@pytest.mark.parametrize("expand", EXPANDS)
def test_every_setting(case: Case, expand: int, ef_upper: int, mode: str) -> None:
    rng = np.random.default_rng(12)
    n, count = len(case.rows), len(case.queries)
    # Ten ids of one in eight: often fewer are allowed than k, or than were seen.
    shares = {"shared": (n,), "per query": (count, n), "self per query": (count, n)}
    allowed = rng.random(shares[mode]) < 0.125 if mode in shares else None
    if allowed is not None and mode != "shared":
        allowed[0] = False  # nothing
        allowed[1] = True  # everything
    own = rng.integers(0, n, count).astype(np.int32) if mode.startswith("self") else None
    for ef in EFS:
        for k in KS:
            assert_parity(
                case, k=k, ef=ef, expand=expand, ef_upper=ef_upper, allowed=allowed, own=own
            )


@pytest.mark.parametrize("mode", ["plain", "shared", "self"])
def test_k_beyond_the_nodes(case: Case, mode: str) -> None:
    n = len(case.rows)
    allowed = np.arange(n) % 3 == 0 if mode == "shared" else None
    own = np.arange(len(case.queries), dtype=np.int32) if mode == "self" else None
    for k in (n - 1, n, n + 40):
        assert_parity(case, k=k, ef=1, expand=2, ef_upper=4, allowed=allowed, own=own)


# --- graphs and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_every_row_length(metric: str, dtype: str) -> None:
    # Rows of every number of 32-byte blocks from 1 to some, and long ones; the last place counts.
    for dim in (3, 7, 8, 9, 15, 17, 20, 21, 31, 32, 33, 52, 53, 63, 64, 65, 100, 127, 129, 768):
        n = 20 if dim > 3 else 4  # there are but six unit vectors of three places
        made = random_case(n, dim, queries=4, metric=metric, dtype=dtype, seed=dim)
        assert_parity(made, k=20, ef=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_one_dimension(metric: str, dtype: str) -> None:
    vectors = np.arange(-20, 20, dtype=np.float32)[:, None]
    graph = reference.random_graph(vectors, 4, seed=1)
    made = make_case(graph, vectors, vectors[::7], metric, dtype)
    assert_parity(made, k=10, ef=10, expand=2)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 64, 65])
def test_few_nodes(n: int) -> None:
    rng = np.random.default_rng(n)
    vectors = reference.integer_vectors(n, 5, "l2", rng)
    own = rng.integers(0, n, 5).astype(np.int32)
    for seed in range(4):
        graph = reference.random_graph(vectors, 2, seed)
        made = make_case(graph, vectors, rng.integers(-3, 4, (5, 5)), "l2", "fp32")
        for allowed in (None, rng.random(n) < 0.5, rng.random((5, n)) < 0.5):
            assert_parity(made, k=3, ef=8, expand=4, ef_upper=4, allowed=allowed)
            assert_parity(made, k=3, ef=8, expand=4, ef_upper=4, allowed=allowed, own=own)


def test_no_queries_and_no_nodes() -> None:
    made = random_case(40, 8, queries=4, metric="l2", dtype="fp32", seed=3)
    nobody = made._replace(queries=made.queries[:0], table=[])
    assert_parity(nobody, k=3, ef=8)
    empty = Graph(
        neighbors0=np.zeros((0, 8), dtype=np.int32),
        layer_offsets=np.zeros(1, dtype=np.int64),
        nodes=np.zeros(0, dtype=np.int32),
        neighbors=np.zeros((0, 4), dtype=np.int32),
        below=np.zeros(0, dtype=np.int32),
    )
    found = search_graph(empty, made.rows[:0], made.queries, "l2", k=3, ef=8)
    assert found.keys.tolist() == [[reference.KEY_NONE] * 3] * 4
    assert found.hops.tolist() == [0] * 4


def test_unreachable_part_stays_unseen() -> None:
    # R8, R9: the answer holds what was seen; nothing is looked for behind the graph's back.
    made = random_case(60, 8, queries=5, metric="l2", dtype="fp32", seed=4)
    rows = made.graph.neighbors0.copy()
    rows[(rows >= 30) & (np.arange(60) < 30)[:, None]] = -1
    for row in rows:  # filled from the left
        kept = row[row >= 0]
        row[:] = -1
        row[: len(kept)] = kept
    flat = Graph(
        neighbors0=rows,
        layer_offsets=np.zeros(1, dtype=np.int64),
        nodes=np.zeros(0, dtype=np.int32),
        neighbors=np.zeros((0, 4), dtype=np.int32),
        below=np.zeros(0, dtype=np.int32),
    )
    made = made._replace(graph=flat)
    assert_parity(made, k=50, ef=50)
    assert_parity(made, k=5, ef=50, allowed=np.arange(60) >= 30)
    assert_parity(made, k=5, ef=50, own=np.full(5, 40, dtype=np.int32))


@pytest.mark.parametrize("expand", [1, 4])
@pytest.mark.parametrize("ef", [97, 800, 1200])
def test_large_beams(ef: int, expand: int) -> None:
    # Keys enter them sorted, at places that a binary search finds, beyond 96 of them or 768.
    made = random_case(1500, 6, queries=6, metric="l2", dtype="int4", seed=9)
    is_allowed = np.random.default_rng(9).random(1500) < 0.5
    for allowed in (None, is_allowed):
        for k in (10, ef):
            assert_parity(made, k=k, ef=ef, expand=expand, allowed=allowed)
    assert_parity(made, k=ef, ef=ef, expand=expand, own=np.arange(6, dtype=np.int32))


def test_many_queries_share_scratch() -> None:
    # More than one chunk of queries: slots and scratch go from query to query.
    made = random_case(200, 8, queries=700, metric="ip", dtype="int8", seed=5)
    allowed = np.random.default_rng(5).random((700, 200)) < 0.3
    assert_parity(made, k=5, ef=12, expand=2)
    assert_parity(made, k=5, ef=12, allowed=allowed)
    assert_parity(made, k=5, ef=12, own=np.arange(700, dtype=np.int32) % 200)


def wide_tree(visited: int, width: int, count: int) -> Graph:
    """A tree of `visited` of `count` nodes under id 0, without ids 1..31; leaves link to 0, 32."""
    ids = np.concatenate([[0], np.arange(32, 31 + visited)]).astype(np.int32)
    rows = np.full((count, width), -1, dtype=np.int32)
    rows[ids, :2] = 0, 32
    for parent in range(-(-(visited - 1) // width)):
        children = ids[1 + parent * width : 1 + (parent + 1) * width]
        rows[ids[parent], : len(children)] = children
    return Graph(
        neighbors0=rows,
        layer_offsets=np.zeros(1, dtype=np.int64),
        nodes=np.zeros(0, dtype=np.int32),
        neighbors=np.zeros((0, width // 2), dtype=np.int32),
        below=np.zeros(0, dtype=np.int32),
    )


@pytest.mark.parametrize("beyond", [0, 1, 60])
def test_visits_around_those_that_are_remembered(beyond: int) -> None:
    # The first queries visit everything from node 0, alone in its word of the visited set. Those
    # that follow in the same scratch come to node 0 by a link: it must be new to them.
    remembered = 40
    count, visited = 32 * WORDS_A_VISIT * remembered, remembered + beyond
    graph = wide_tree(visited, width=20, count=count)
    digits = np.random.default_rng(6).permutation(count)
    vectors = np.stack([digits % 35, digits // 35 % 35, digits // 1225], axis=1).astype(np.float32)
    vectors[:60] = 17  # what has children is near every query: it is expanded
    queries = np.full((10, 3), 17, dtype=np.float32) + np.eye(10, 3, dtype=np.float32)
    made = make_case(graph, vectors, queries, "l2", "fp32")
    last = 30 + visited
    own = np.array([0] * 8 + [last, last - 1], dtype=np.int32)
    assert_parity(made, k=2, ef=50, expand=8, own=own)
    counts = reference.search(graph, made.table[:1], k=2, ef=50, own=own[:1].tolist()).distances
    assert counts.tolist() == [visited]


# --- int8 and int4 on any data --------------------------------------------------------------------


def real_vectors(n: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of very different sizes, a zero row among them."""
    vectors = rng.normal(size=(n, dim)) * 10.0 ** rng.integers(-3, 4, (n, 1))
    vectors[n // 2] = 0
    return vectors.astype(np.float32)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 19, 20, 21, 31, 33, 64, 100, 127, 128, 257, 768])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes_on_real_data(metric: str, dim: int, dtype: str) -> None:
    rng = np.random.default_rng(dim)
    vectors, queries = real_vectors(80, dim, rng), real_vectors(6, dim, rng)
    if metric == "cosine":  # which has no distance to a zero vector
        vectors[len(vectors) // 2] = queries[len(queries) // 2] = 1
    graph = reference.random_graph(vectors, 4, seed=dim)
    assert_parity(make_case(graph, vectors, queries, metric, dtype), k=20, ef=31, expand=2)


def test_int8_sums_past_the_floats() -> None:
    # At 4096 dims the sum of squared codes, and a dot product, pass 2**24: both round to float32.
    rng = np.random.default_rng(7)
    vectors = (rng.uniform(0.9, 1.0, (12, 4096)) * rng.uniform(1, 9, (12, 1))).astype(np.float32)
    graph = reference.random_graph(vectors, 4, seed=7)
    for metric in ("l2", "ip"):
        assert_parity(make_case(graph, vectors, vectors[:6] * 1.01, metric, "int8"), k=12, ef=12)


def test_int8_distance_is_never_negative() -> None:
    # R1: between rows of the same codes and nearly the same scale, rounding goes below zero.
    rng = np.random.default_rng(8)
    scales = 1 + np.arange(60, dtype=np.float32) * np.float32(2**-23)
    vectors = rng.normal(size=30).astype(np.float32) * scales[:, None]
    graph = reference.random_graph(vectors, 4, seed=8)
    made = make_case(graph, vectors, vectors, "l2", "int8")
    rows = [reference.quantise(vector) for vector in vectors]
    raw = [(a.norm + b.norm) - np.float32(2) * reference.int8_dot(a, b) for a in rows for b in rows]
    assert min(raw) < 0, "nothing to cut off"
    floor = reference.ordered(np.float32(0))
    assert min(min(keys) for keys in made.table) >> 32 == floor
    assert_parity(made, k=5, ef=60)


# --- R8 and R11 -----------------------------------------------------------------------------------


def test_allowing_everything_changes_nothing(case: Case) -> None:
    everything = packed(np.ones(len(case.rows), dtype=bool))
    for k, ef in ((1, 1), (7, 2), (10, 64)):
        plain = search_graph(case.graph, case.rows, case.queries, case.metric, k=k, ef=ef)
        same = search_graph(
            case.graph, case.rows, case.queries, case.metric, k=k, ef=ef, allowed=everything
        )
        np.testing.assert_array_equal(same.keys, plain.keys)
        np.testing.assert_array_equal(same.hops, plain.hops)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_batch_and_threads_do_not_change_a_bit(metric: str, dtype: str) -> None:
    # R11, on real numbers: here the order of summation would show.
    rng = np.random.default_rng(9)
    vectors = rng.normal(size=(500, 50)).astype(np.float32)
    graph = reference.random_graph(vectors, 6, seed=9)
    rows = vectors_module.encode(vectors, metric, dtype)
    queries = vectors_module.encode_queries(
        rng.normal(size=(600, 50)).astype(np.float32), metric, dtype
    )
    whole = search_graph(graph, rows, queries, metric, k=10, ef=40, expand=2, threads=1)
    for batch, threads in ((600, 2), (512, 2), (7, 1), (1, 1)):
        for start in range(0, 600, batch):
            part = slice(start, start + batch)
            found = search_graph(
                graph, rows, queries[part], metric, k=10, ef=40, expand=2, threads=threads
            )
            np.testing.assert_array_equal(found.keys, whole.keys[part])
            np.testing.assert_array_equal(found.hops, whole.hops[part])


def test_scratch_waits_for_the_next_search_where_it_is_small(monkeypatch) -> None:
    made = random_case(300, 16, queries=6, metric="l2", dtype="fp32", seed=11)
    for limit, kept in ((search.KEPT_BYTES, 1), (8 * 64, 0)):
        monkeypatch.setattr(search, "_spare", [])
        monkeypatch.setattr(search, "KEPT_BYTES", limit)
        for ef in (64, 64, 20):  # the last has a beam of another size
            assert_parity(made, k=5, ef=ef)
            assert len(search._spare) == kept
            assert not any(scratch.visited.any() for _, scratch in search._spare)
