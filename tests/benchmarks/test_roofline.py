"""The model of a search on a GPU: its counts, its bounds, what is committed."""

import json

import oracle
import ptx
import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw, which comes with the extra `bench`")

import hnsw_gpu
from benchmarks.gpu import roofline
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.engine.vectors import encode_queries, row_length
from hnsw_gpu.gpu import launch_plan

pytestmark = pytest.mark.slow

SAVED = roofline.RESULTS / "roofline.json"


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


@pytest.mark.parametrize("dtype", roofline.DTYPES)
def test_counts_are_those_of_the_walk(tools, index, dtype) -> None:
    counted = roofline.count(tools, index, dtype, QUERIES, 20)
    row_bytes = row_length(24, dtype) * {"fp32": 4, "fp16": 2, "int8": 1}[dtype]
    assert counted.bytes["rows"] == pytest.approx(counted.distances * row_bytes)
    assert counted.distances >= counted.exact_distances
    links = index._state.graph.neighbors0.shape[1] * 4
    assert 0 < counted.bytes["neighbors0"] <= counted.hops * links
    # a step lists the neighbours of up to `expand` nodes, 128 links at most
    assert counted.hops / roofline.EXPAND <= counted.steps <= counted.hops + 1
    # at least one instruction for every chunk of a row, of which a warp reads 32
    assert counted.instructions.distances >= counted.distances * row_bytes / 16 / 32
    assert counted.instructions.others >= 100 * counted.steps
    if dtype == "fp32":
        rows = index._state.rows[: len(index._state.graph.neighbors0)]
        asked = encode_queries(QUERIES, "cosine", "fp32")
        walked = search_graph(index._state.graph, rows, asked, "cosine", k=10, ef=20, expand=4)
        assert (counted.hops, counted.exact_distances) == (
            walked.hops.mean(),
            walked.distances.mean(),
        )


def test_bounds() -> None:
    card = roofline.Card(90, sms=10, clock_hz=1e9, bytes_per_s=1e12)
    found = roofline.bounds(card, resident=160, size=1e6, executed=50_000, steps=40)
    assert found["memory"] == pytest.approx(1e6)
    assert found["issue"] == pytest.approx(4 * 10 * 1e9 / 50_000)
    assert found["waiting"] == pytest.approx(160 / (40 * 2 * 600e-9 + 50_000 * 6 / 1e9))


def test_what_is_committed_follows_from_its_counts() -> None:
    saved = json.loads(SAVED.read_text())
    about = saved["about"]
    assert about["dataset"] == "glove" and about["rows"] == 331_479
    assert saved["assumed"]["cards"] == {
        name: card._asdict() for name, card in roofline.CARDS.items()
    }
    cells = [(one["dtype"], one["ef"]) for one in saved["points"]]
    assert cells == [(dtype, ef) for dtype in roofline.DTYPES for ef in roofline.EFS]
    for one in saved["points"]:
        row_bytes = row_length(100, one["dtype"]) * {"fp32": 4, "fp16": 2, "int8": 1}[one["dtype"]]
        assert one["bytes"]["rows"] == pytest.approx(one["distances"] * row_bytes, rel=1e-4)
        assert 0 <= one["forgotten"] <= 0.05
        for name, card in roofline.CARDS.items():
            given = one["cards"][name]
            limits = launch_plan.of_arch(card.arch)._replace(sms=card.sms)
            plan = launch_plan.plan(
                "cosine", one["dtype"], 100, 16, roofline.walk(one["ef"]),
                queries=10**6, nodes=331_479, limits=limits, registers=given["registers"],
            )  # fmt: skip
            assert given["resident"] == plan.resident * plan.queries_per_block
            assert given["shared_bytes"] == plan.shared_mem // plan.queries_per_block
            executed = one["instructions"]
            assert executed["query"] == pytest.approx(
                executed["distance"] * one["distances"] + executed["step"] * one["steps"],
                rel=1e-4,
            )
            size = sum(one["bytes"].values())
            expected = roofline.bounds(
                card, given["resident"], size, executed["query"], one["steps"]
            )
            assert given["queries_per_s"] == pytest.approx(expected, rel=1e-4)
            assert given["bound_by"] == min(expected, key=lambda bound: expected[bound])
