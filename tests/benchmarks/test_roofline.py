"""The model of a search on a GPU: its counts, its estimate of instructions, what is committed."""

import json
import shutil

import cuda_toolkit
import emulator
import numpy as np
import oracle
import pytest
from cuda_toolkit import Instruction
from emulator import Meeting

pytest.importorskip("matplotlib", reason="the benchmarks draw, which comes with the extra `bench`")

import hnsw_gpu
from benchmarks.gpu import roofline
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.engine.vectors import encode_queries, row_length
from hnsw_gpu.gpu import kernel_source, launch_plan

pytestmark = pytest.mark.slow

SAVED = roofline.RESULTS / "roofline.json"


def toolkit() -> cuda_toolkit.Toolkit:
    try:
        return cuda_toolkit.find()
    except LookupError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def tools():
    if emulator.missing("count"):
        pytest.skip(emulator.missing("count"))
    if shutil.which("addr2line") is None:
        pytest.skip("no addr2line, which is of binutils")
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
    if dtype == "fp32":
        rows = index._state.rows[: len(index._state.graph.neighbors0)]
        asked = encode_queries(QUERIES, "cosine", "fp32")
        walked = search_graph(index._state.graph, rows, asked, "cosine", k=10, ef=20, expand=4)
        assert (counted.hops, counted.exact_distances) == (
            walked.hops.mean(),
            walked.distances.mean(),
        )


@pytest.mark.parametrize("dtype", roofline.DTYPES)
def test_every_collective_is_found_in_the_machine_code(tools, index, dtype) -> None:
    """Or its count would say nothing of the instructions around it. Barriers may be merged."""
    found = toolkit()
    meetings = roofline.count(tools, index, dtype, QUERIES, 20).meetings
    for arch in roofline.ARCHS:
        code = roofline.machine_code(tools, found, index, dtype, arch)
        collectives = {
            one.place for one in code if one.opcode.split(".")[0] in roofline.COLLECTIVES
        }
        asked = {m.place for m in meetings if not m.word.startswith("__sync")}
        assert len(asked) > 10
        missing = [kernel_line(place) for place in asked - collectives]
        assert all("row_norm" in line for line in missing), missing  # which only l2 makes use of
        executed = roofline.instructions(code, meetings, {"beam.cuh": 5.3, "visited.cuh": 2})
        assert executed.distances / 9 > 5 and executed.others > executed.distances > 0


def kernel_line(place: tuple) -> str:
    """The text of a collective's call."""
    file, line = next(at for at in place if at[0] != "warp.cuh")
    return (kernel_source.folder() / file).read_text().splitlines()[line - 1]


PROBE = """extern "C" __global__ void probe(const int* turns, int* out) {
    int sum = threadIdx.x;
#pragma unroll 1
    for (int i = 0; i < turns[0]; i++)
        sum = __shfl_xor_sync(0xffffffffu, sum * 3 + i, 1);
    if (__any_sync(0xffffffffu, sum == 7)) sum++;
    out[threadIdx.x] = sum;
}"""


@pytest.mark.parametrize("turns", [1, 50])
def test_the_estimate_of_a_loop(tools, tmp_path, turns) -> None:
    """The instructions of a loop are taken as often as it turned, all others once."""
    library = emulator.compile("probe", source=PROBE, sanitizer="count")
    library.launch((1,), (32,), (np.array([turns], np.int32), np.zeros(32, np.int32)))
    meetings = library.meetings()
    options = cuda_toolkit.options(toolkit(), ())
    source = f'#line 1 "probe.cu"\n{PROBE}'
    job = cuda_toolkit.Job(source, "probe", options, 90)
    code = cuda_toolkit.listing(toolkit(), job, tmp_path)
    (loop,) = (
        i - one.target + 1
        for i, one in enumerate(code)
        if 0 <= one.target < i and one.opcode != "BRA.DIV" and "SHFL" in opcodes(code, one, i)
    )
    end = next(i for i, one in enumerate(code) if one.opcode == "EXIT") + 1
    executed = roofline.instructions(code, meetings, {})
    assert executed.distances == 0
    assert executed.others == pytest.approx(end - loop + turns * loop)


def opcodes(code: list, branch: Instruction, i: int) -> set[str]:
    return {one.opcode.split(".")[0] for one in code[branch.target : i]}


def at(opcode: str, *lines: int, target: int = -1, file: str = "beam.cuh") -> Instruction:
    return Instruction(opcode, tuple((file, line) for line in lines), target)


def test_instructions_by_hand() -> None:
    code = [
        at("IMAD", 1),  # 0: as the vote, the only collective outside the loop
        at("VOTE.ANY", 2),
        at("LDS", 10, 5),  # 2: a loop in which no lanes meet, within the one that does
        at("BRA", 10, 5, target=2),
        at("SHFL.IDX", 11, 5),  # a number of 64 bits: two shuffles a collective
        at("SHFL.IDX", 11, 5),
        at("FFMA", 12, 5, file="distance.cuh"),
        at("BRA.DIV", 5, target=11),
        at("BRA", 5, target=2),  # back to 2
        at("EXIT", 2),
        at("BRA", 2, target=10),  # waits for nothing: a jump to itself is no loop
        at("IADD3", 2),  # 11: for lanes that have come apart
    ]
    inlined = (("beam.cuh", 11), ("beam.cuh", 5))
    meetings = [
        Meeting("__ballot_sync", (("beam.cuh", 2),), ("f",), 32),
        Meeting("__shfl_sync<unsigned long long>", inlined, ("f", "g"), 96),
    ]
    executed = roofline.instructions(code, meetings, {"beam.cuh": 7})
    assert executed == (3, 3 * 1 + 2 * 3 * 7 + 2 * 3 + 2 * 3)
    converging = [*code[:2], at("VOTE.ANY", 10, 5), *code[3:]]
    assert roofline.instructions(converging, meetings, {"beam.cuh": 7}) == (3, 3 * 1 + 6 * 3)


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
                queries=10**6, nodes=331_479, limits=limits,
            )  # fmt: skip
            assert given["resident"] == plan.resident * plan.queries_per_block
            assert one["shared_bytes"] == plan.shared_mem // plan.queries_per_block
            executed = one["instructions"][f"sm_{card.arch}"]
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
