"""What bounds a search on a GPU: a model, from what the kernel does, not from any clock.

    python -m benchmarks.gpu.roofline

Bytes, steps and collectives are counted: the emulator executes the unmodified kernel on GloVe.
Instructions are estimated: every instruction of the machine code is taken to be executed as often
as the collective next to it, which was counted. What memory, the rate of issuing instructions and
waiting allow follows from the data sheets in `CARDS`. README.md says how to read the results.
"""

import contextlib
import importlib
import json
import math
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

import hnsw_gpu
from benchmarks import datasets
from benchmarks.gpu.stand_in import TESTS
from benchmarks.record import RESULTS, SETTING, about, rounded
from hnsw_gpu.engine import search
from hnsw_gpu.engine.vectors import encode, encode_queries
from hnsw_gpu.gpu import kernel_source, launch_plan

K, EXPAND = 10, 4
EFS = (64, 128, 256)
DTYPES = ("fp32", "fp16", "int8")
QUERIES = 100
ARCHS = (75, 80, 86, 89, 90, 100, 120)
LANES = 32
MEMORY_SECONDS = 600e-9  # from a load to its value, under load
WAITS_A_STEP = 2  # for the links, and then for the rows
CYCLES = 6  # from an instruction of a warp to its next: most take 4 to 6, shared memory about 25
COLLECTIVES = ("SHFL", "VOTE", "MATCH")


class Card(NamedTuple):
    """From the data sheets: dense boost clock and memory bandwidth."""

    arch: int
    sms: int
    clock_hz: float
    bytes_per_s: float


CARDS = {
    "H100 SXM": Card(90, 132, 1.98e9, 3350e9),
    "RTX 4090": Card(89, 128, 2.52e9, 1008e9),
    "A10": Card(86, 72, 1.695e9, 600e9),
    "L40S": Card(89, 142, 2.52e9, 864e9),
    "T4": Card(75, 40, 1.59e9, 320e9),
}


class Tools(NamedTuple):
    """Of the tests, which find the kernel's behaviour out."""

    emulated: Any
    emulator: Any
    cuda_toolkit: Any


@contextlib.contextmanager
def tools() -> Iterator[Tools]:
    sys.path.insert(0, str(TESTS))
    try:
        yield Tools(*(importlib.import_module(name) for name in Tools._fields))
    finally:
        sys.path.remove(str(TESTS))


# --- counting ---


class Counted(NamedTuple):
    """Means of a query. A step lists the neighbours of what is expanded, and reads their rows."""

    hops: float
    distances: float
    exact_distances: float  # of an engine that remembers all it visited
    steps: float
    bytes: dict[str, float]
    meetings: list


def count(tool: Tools, index: hnsw_gpu.Index, dtype: str, queries: np.ndarray, ef: int) -> Counted:
    """With one warp a query, and the plan's visited cache."""
    graph = index._state.graph
    nodes = len(graph.neighbors0)
    rows = encode(index._state.rows[:nodes, : index.dim], "cosine", dtype)
    asked = encode_queries(queries, "cosine", dtype)
    buckets, tag_bits = launch_plan.visited_cache(walk(ef), nodes)
    build = tool.emulated.Build(
        "cosine", dtype, index.dim, index.M, tag_bits=tag_bits, sanitizer="count"
    )
    read: dict[str, int] = {}
    how = {"k": K, "ef": ef, "expand": EXPAND}
    found = tool.emulated.search(
        build, graph, rows, asked, **how, visited_buckets=buckets, bytes_read=read
    )
    wanted = search.search_graph(graph, rows, asked, "cosine", **how)
    assert (found.hops == wanted.hops).all(), "the emulated walk is not the CPU's"
    meetings = [
        meeting._replace(lanes=meeting.lanes / len(queries))
        for meeting in build.library("search").meetings()
    ]
    (gathered,) = (m for m in meetings if m.functions[:2] == ("sync_warp", "gather"))
    return Counted(
        hops=float(found.hops.mean()),
        distances=float(found.distances.mean()),
        exact_distances=float(wanted.distances.mean()),
        steps=gathered.lanes / LANES,
        bytes={name: size / len(queries) for name, size in read.items()},
        meetings=meetings,
    )


def walk(ef: int) -> launch_plan.BeamShape:
    return launch_plan.BeamShape(ef=ef, k=K, expand=EXPAND)


# --- instructions ---


class Instructions(NamedTuple):
    """Executed by a warp for a query; estimates."""

    distances: float  # of distance.cuh
    others: float


def instructions(code: list, meetings: list, turns: dict[str, float]) -> Instructions:
    """Of machine code in order, given how often each collective was met (lanes a query).

    turns: of a loop in which no lanes meet, by the file that it is in; 1 in others. What lies
    behind the rest is never reached: code for lanes that have come apart, and a jump to itself.
    """
    ends = [one.target for one in code if one.opcode == "BRA.DIV"]
    ends += [i for i, one in enumerate(code) if one.target == i]
    body = code[: min(ends)]
    met = executions(body, meetings)
    loops = [range(one.target, i + 1) for i, one in enumerate(body) if 0 <= one.target < i]
    alone = [loop for loop in loops if met.keys().isdisjoint(loop) and not converges(body, loop)]
    around = [
        frozenset(n for n, loop in enumerate(loops) if i in loop and loop not in alone)
        for i in range(len(body))
    ]
    executed = {True: 0.0, False: 0.0}  # is it of a distance?
    for i, one in enumerate(body):

        def likeness(j: int, i: int = i, one: Any = one) -> tuple:
            same_loops = around[i] == around[j]
            return same_loops, shared_calls(one.place, body[j].place), -abs(i - j)

        is_again = one.place and any(i in loop for loop in alone)
        is_distance = any(file == "distance.cuh" for file, _ in one.place)
        times = met[max(met, key=likeness)]
        executed[is_distance] += times * (turns.get(one.place[0][0], 1) if is_again else 1)
    return Instructions(executed[True], executed[False])


def converges(body: list, loop: range) -> bool:
    """Is it the compiler's own, by votes, that waits until the lanes agree? It turns once."""
    return any(body[i].opcode.startswith("VOTE") for i in loop)


def executions(body: list, meetings: list) -> dict[int, float]:
    """Of each instruction by which lanes meet: number in the code -> executions a query."""
    met = Counter[tuple]()
    for meeting in meetings:
        words = 2 if "long long" in meeting.word else 1  # of 32 bits, which one shuffle moves
        met[meeting.place] += words * meeting.lanes / LANES
    found: dict[int, float] = {}
    for place, count_ in met.items():
        here = [i for i, one in enumerate(body) if one.place == place]
        collectives = [i for i in here if body[i].opcode.split(".")[0] in COLLECTIVES]
        waits = [i for i in here if body[i].opcode.split(".")[0].strip(";") in ("NOP", "BAR")]
        for i in collectives or waits:
            found[i] = count_ / len(collectives or waits)
    return found


def shared_calls(one: tuple, other: tuple) -> int:
    """How many of the outermost calls of two places are the same."""
    count_ = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count_ += 1
    return count_


def machine_code(tool: Tools, toolkit: Any, index: hnsw_gpu.Index, dtype: str, arch: int) -> list:
    nodes = len(index._state.graph.neighbors0)
    _, tag_bits = launch_plan.visited_cache(walk(EFS[0]), nodes)
    definitions = kernel_source.definitions("cosine", dtype, index.dim, index.M, 1, tag_bits)
    options = tool.cuda_toolkit.options(toolkit, kernel_source.options(definitions))
    job = tool.cuda_toolkit.Job(kernel_source.source("search"), "search", options, arch)
    with tempfile.TemporaryDirectory() as folder:
        return list(tool.cuda_toolkit.listing(toolkit, job, Path(folder)))


# --- the model ---


def bounds(
    card: Card, resident: int, size: float, executed: float, steps: float
) -> dict[str, float]:
    """Queries/s that the memory, the issuing of instructions and waiting allow, each by itself.

    resident: queries that the GPU holds at once. size: bytes read for a query.
    """
    seconds = steps * WAITS_A_STEP * MEMORY_SECONDS + executed * CYCLES / card.clock_hz
    return {
        "memory": card.bytes_per_s / size,
        "issue": 4 * card.sms * card.clock_hz / executed,  # an SM issues for four warps at a time
        "waiting": resident / seconds,
    }


def resident_queries(index: hnsw_gpu.Index, dtype: str, ef: int, card: Card) -> tuple[int, int]:
    """Queries on the GPU at once, of a large batch, and bytes of shared memory of each."""
    limits = launch_plan.of_arch(card.arch)._replace(sms=card.sms)
    nodes = len(index._state.graph.neighbors0)
    plan = launch_plan.plan(
        "cosine", dtype, index.dim, index.M, walk(ef), queries=10**6, nodes=nodes, limits=limits
    )
    return plan.resident * plan.queries_per_block, plan.shared_mem // plan.queries_per_block


def model(tool: Tools, index: hnsw_gpu.Index, dataset: datasets.Dataset) -> list[dict]:
    """A point for each storage dtype and ef."""
    toolkit = tool.cuda_toolkit.find()
    points = []
    for dtype in DTYPES:
        code = {arch: machine_code(tool, toolkit, index, dtype, arch) for arch in ARCHS}
        for ef in EFS:
            click.echo(f"{dtype}, ef {ef} ...", err=True)
            counted = count(tool, index, dtype, dataset.queries, ef)
            buckets, _ = launch_plan.visited_cache(walk(ef), len(index._state.graph.neighbors0))
            turns = {"beam.cuh": math.log2(ef) + 1, "visited.cuh": buckets / LANES}
            executed = {arch: instructions(code[arch], counted.meetings, turns) for arch in ARCHS}
            points.append(point(index, dataset, dtype, ef, counted, executed))
    return points


def point(
    index: hnsw_gpu.Index,
    dataset: datasets.Dataset,
    dtype: str,
    ef: int,
    counted: Counted,
    executed: dict[int, Instructions],
) -> dict:
    size = sum(counted.bytes.values())
    cards = {}
    for name, card in CARDS.items():
        resident, shared = resident_queries(index, dtype, ef, card)
        limits = bounds(card, resident, size, sum(executed[card.arch]), counted.steps)
        binding = min(limits, key=lambda bound: limits[bound])
        cards[name] = {"resident": resident, "queries_per_s": limits, "bound_by": binding}
    found = {
        "dtype": dtype,
        "ef": ef,
        **{name: value for name, value in counted._asdict().items() if name != "meetings"},
        "forgotten": counted.distances / counted.exact_distances - 1,
        "shared_bytes": shared,
        "instructions": {
            f"sm_{arch}": {
                "distance": one.distances / counted.distances,
                "step": one.others / counted.steps,
                "query": sum(one),
            }
            for arch, one in executed.items()
        },
        "cards": cards,
    }
    if dtype == "fp32":
        labels = index.search(dataset.queries, K, ef=ef, expand=EXPAND).labels
        found["recall"] = datasets.recall(dataset, labels, K)
    return found


def report(points: list[dict]) -> None:
    """A line a point: counts, then thousand queries/s by each bound, the least one marked."""
    for one in points:
        recall = f", recall {one['recall']:.3f}" if "recall" in one else ""
        click.echo(
            f"{one['dtype']}, ef {one['ef']}{recall}: {one['distances']:.0f} distances "
            f"(+{one['forgotten']:.1%}), {one['steps']:.1f} steps, "
            f"{sum(one['bytes'].values()) / 1e3:,.0f} kB a query"
        )
        for name, card in one["cards"].items():
            told = one["instructions"][f"sm_{CARDS[name].arch}"]
            limits = ", ".join(
                f"{bound} {rate / 1e3:,.0f}{'*' if bound == card['bound_by'] else ''}"
                for bound, rate in card["queries_per_s"].items()
            )
            click.echo(
                f"  {name:9} {limits} thousand queries/s; {told['distance']:.1f} instructions a "
                f"distance, {told['step']:.0f} a step, {card['resident']} queries at once"
            )


def part_of(dataset: datasets.Dataset, queries: int) -> datasets.Dataset:
    """The data set with an even sample of its queries."""
    chosen = np.linspace(0, len(dataset.queries) - 1, queries).astype(int)
    return dataset._replace(queries=dataset.queries[chosen], truth=dataset.truth[chosen])


@click.command()
@click.option("--dataset", "name", default="glove", type=click.Choice(list(datasets.SOURCES)))
@click.option("--queries", default=QUERIES, show_default=True, type=click.IntRange(min=1))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="[default: results]")
def main(name: str, queries: int, out: Path | None) -> None:
    """Count a search on GloVe-100, estimate its instructions, and say which limit binds where."""
    dataset = part_of(datasets.load(name), queries)
    index = hnsw_gpu.Index(dataset.base.shape[1], "cosine", device="cpu", **SETTING._asdict())
    index.add(dataset.base)
    with tools() as tool:
        if missing := tool.emulator.missing("count"):
            raise click.ClickException(missing)
        if shutil.which("addr2line") is None:
            raise click.ClickException("there is no addr2line, which is of binutils")
        points = model(tool, index, dataset)
        version = tool.cuda_toolkit.find().version
    report(points)
    found = {
        "about": {
            "date": about([])["date"],
            "hnsw_gpu": hnsw_gpu.__version__,
            "nvrtc": version,
            "dataset": name,
            "rows": len(dataset.base),
            "queries": queries,
            "metric": "cosine",
            "k": K,
            "expand": EXPAND,
            **SETTING._asdict(),
        },
        "assumed": {
            "memory_seconds": MEMORY_SECONDS,
            "waits_a_step": WAITS_A_STEP,
            "cycles": CYCLES,
            "cards": {name: card._asdict() for name, card in CARDS.items()},
        },
        "points": points,
    }
    path = out or RESULTS / "roofline.json"
    path.write_text(json.dumps(rounded(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
