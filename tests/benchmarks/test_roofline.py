"""The model of a search on a GPU: its counts, its bounds, what is committed."""

import json

import oracle
import ptx
import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw, which comes with the extra `bench`")

import hnsw_gpu
from benchmarks.gpu import roofline
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.engine.vectors import empty_rows, encode_queries
from hnsw_gpu.gpu import launch_plan

pytestmark = pytest.mark.slow

ROWS = {  # of what is committed, by data set
    "glove": 331_479,
    "verses768": 50_000,
    "synthetic-128": 1_000_000,
}


def saved(name: str) -> dict:
    suffix = "" if name == "glove" else f"-{name}"
    return json.loads((roofline.RESULTS / f"roofline{suffix}.json").read_text())


@pytest.fixture(scope="module")
def tools():
    if ptx.missing():
        pytest.skip(ptx.missing())
    with roofline.tools() as found:
        yield found


@pytest.fixture(scope="module")
def index() -> hnsw_gpu.Index:
    made = hnsw_gpu.Index(24, "cosine", M=8, ef_construction=40, device="cpu")
    made.add(oracle.gaussian(1500, 24, seed=1, clusters=20, spread=0.5))
    return made


QUERIES = oracle.gaussian(9, 24, seed=2, clusters=20, spread=0.5)


@pytest.mark.parametrize("dtype", roofline.REFINE)
def test_counts_are_those_of_the_walk(tools, index, dtype) -> None:
    engine = roofline.engine_of(index, dtype)
    counted = roofline.count(tools, engine, QUERIES, 30)
    row_bytes = empty_rows(1, 24, dtype).nbytes
    assert counted.bytes["rows"] == pytest.approx(counted.distances * row_bytes)
    assert counted.distances >= counted.exact_distances
    links = index._state.graph.neighbors0.shape[1] * 4
    assert 0 < counted.bytes["neighbors0"] <= counted.hops * links
    # a step lists the neighbours of up to `expand` nodes, 128 links at most
    assert counted.hops / roofline.EXPAND <= counted.steps <= counted.hops + 1
    # at least one instruction for every chunk of a row, of which a warp reads 32
    assert counted.instructions.distances >= counted.distances * row_bytes / 16 / 32
    assert counted.instructions.others >= 100 * counted.steps
    refine, kept = roofline.REFINE[dtype], 20 if dtype == "int4" else 30
    fine = kept * empty_rows(1, 24, refine).nbytes if refine else 0
    assert counted.bytes.get("refine_rows", 0) == fine
    assert (counted.instructions.rerank > 0) == bool(refine)
    if dtype == "fp32":
        rows = index._state.rows[: len(index._state.graph.neighbors0)]
        asked = encode_queries(QUERIES, "cosine", "fp32")
        walked = search_graph(index._state.graph, rows, asked, "cosine", k=10, ef=30, expand=4)
        assert (counted.hops, counted.exact_distances) == (
            walked.hops.mean(),
            walked.distances.mean(),
        )


def test_least_ef() -> None:
    for target, expected in ((0.101, 11), (0.01, 1), (0.5, 50), (0.777, 78)):
        assert roofline.least_ef(lambda ef: ef / 100, target) == expected


def test_bounds() -> None:
    card = roofline.Card(90, sms=10, clock_hz=1e9, bytes_per_s=1e12)
    found = roofline.bounds(card, resident=160, size=1e6, executed=50_000, steps=40)
    assert found["memory"] == pytest.approx(1e6)
    assert found["issue"] == pytest.approx(4 * 10 * 1e9 / 50_000)
    assert found["waiting"] == pytest.approx(160 / (40 * 2 * 600e-9 + 50_000 * 6 / 1e9))


@pytest.mark.parametrize("name", ROWS)
def test_what_is_committed_follows_from_its_counts(name) -> None:
    about, assumed, points = saved(name).values()
    assert (about["dataset"], about["rows"]) == (name, ROWS[name])
    assert assumed["cards"] == {name: card._asdict() for name, card in roofline.CARDS.items()}
    recalls = len(points) // len(roofline.REFINE)
    assert [one["dtype"] for one in points] == [d for d in roofline.REFINE for _ in range(recalls)]
    for one in points:
        row_bytes = empty_rows(1, about["dim"], one["dtype"]).nbytes
        assert one["bytes"]["rows"] == pytest.approx(one["distances"] * row_bytes, rel=1e-4)
        assert 0 <= one["forgotten"] <= 0.06
        for card_name, card in roofline.CARDS.items():
            given = one["cards"][card_name]
            limits = launch_plan.of_arch(card.arch)._replace(sms=card.sms)
            plan = launch_plan.plan(
                "cosine", one["dtype"], about["dim"], 16, roofline.shape(one["dtype"], one["ef"]),
                queries=10**6, nodes=about["rows"], limits=limits, registers=given["registers"],
            )  # fmt: skip
            assert given["resident"] == plan.resident * plan.queries_per_block
            assert given["shared_bytes"] == plan.shared_mem // plan.queries_per_block
            executed = one["instructions"]
            assert executed["query"] == pytest.approx(
                executed["distance"] * one["distances"]
                + executed["step"] * one["steps"]
                + executed["rerank"],
                rel=1e-4,
            )
            size = sum(one["bytes"].values())
            expected = roofline.bounds(
                card, given["resident"], size, executed["query"], one["steps"]
            )
            assert given["queries_per_s"] == pytest.approx(expected, rel=1e-4)
            assert given["bound_by"] == min(expected, key=lambda bound: expected[bound])


@pytest.mark.parametrize("name", ROWS)
def test_int4_reads_a_third_of_fp32_and_six_tenths_of_int8(name) -> None:
    """At the same recall."""
    points = saved(name)["points"]
    by_dtype = {d: [one for one in points if one["dtype"] == d] for d in roofline.REFINE}
    for fp32, int8, int4 in zip(*(by_dtype[d] for d in ("fp32", "int8", "int4")), strict=True):
        size, of_fp32, of_int8 = (sum(one["bytes"].values()) for one in (int4, fp32, int8))
        assert min(int4["recall"], int8["recall"]) >= fp32["recall"] - 5e-4
        assert size <= of_fp32 / 3
        assert size <= 0.6 * of_int8
