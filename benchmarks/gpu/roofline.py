"""What bounds a search on a GPU: a model, from what the kernel does, not from any clock.

    python -m benchmarks.gpu.roofline

Bytes, steps and instructions are counted, by executing the kernels' PTX on a data set, at the ef
where each dtype reaches the recall of the others. What memory, the rate of issuing instructions and
waiting allow follows from the data sheets in `CARDS`. README.md says how to read the results.
"""

import contextlib
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

import hnsw_gpu
from benchmarks import datasets
from benchmarks.gpu import run
from benchmarks.gpu.stand_in import TESTS
from benchmarks.record import RESULTS, SETTING, about, rounded
from hnsw_gpu import inputs
from hnsw_gpu.engine import CpuEngine, Queries, Walk, search_graph, thread_count
from hnsw_gpu.engine.vectors import encode, encode_queries
from hnsw_gpu.gpu import kernel_source, launch_plan

K, EXPAND = 10, 4
EFS = (64, 128, 256)  # of fp32, whose recall the others must reach
REFINE = {"fp32": "", "fp16": "", "int8": "fp32", "int4": "fp16"}  # by dtype
QUERIES = 100  # of which is counted
JUDGED = 3_000  # by which recall is taken
ARCH = 90  # whose PTX is executed
MEMORY_SECONDS = 600e-9  # from a load to its value, under load
WAITS_A_STEP = 2  # for the links, and then for the rows
CYCLES = 6  # from an instruction of a warp to its next: most take 4 to 6, shared memory about 25


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
    ptx: Any
    costs: Any
    cuda_toolkit: Any


@contextlib.contextmanager
def tools() -> Iterator[Tools]:
    folders = [str(TESTS), str(TESTS.parent)]
    sys.path[:0] = folders
    names = ("emulated", "ptx", "ptx.costs", "cuda_toolkit")
    try:
        yield Tools(*(importlib.import_module(name) for name in names))
    finally:
        for folder in folders:
            sys.path.remove(folder)


# --- counting ---


class Instructions(NamedTuple):
    """Executed by a warp for a query."""

    distances: float  # of distance.cuh, in a walk
    others: float
    rerank: float  # by compare.cu, where there are refine rows


class Counted(NamedTuple):
    """Means of a query. A step lists the neighbours of what is expanded, and reads their rows."""

    hops: float
    distances: float
    exact_distances: float  # of an engine that remembers all it visited
    steps: float
    bytes: dict[str, float]
    instructions: Instructions


def engine_of(index: hnsw_gpu.Index, dtype: str) -> CpuEngine:
    """The graph of an fp32 index, with rows of a dtype and those that refine it."""
    vectors, refine = index._state.rows[: index._state.node_count, : index.dim], REFINE[dtype]
    fine = encode(vectors, "cosine", refine) if refine else None
    rows = encode(vectors, "cosine", dtype)
    return CpuEngine(index._state.graph, rows, fine, "cosine", dtype, refine)


def walk(dtype: str, ef: int) -> Walk:
    rerank = inputs.reranked("auto", K, ef, dtype) or 0
    return Walk(K, ef, EXPAND, threads=thread_count(None), rerank=rerank)


def shape(dtype: str, ef: int) -> launch_plan.BeamShape:
    return launch_plan.BeamShape(ef=ef, k=walk(dtype, ef).kept(REFINE[dtype]), expand=EXPAND)


def recall(index: hnsw_gpu.Index, engine: CpuEngine, dataset: datasets.Dataset, ef: int) -> float:
    """By the CPU, whose walk is the kernel's."""
    keys = engine.walk(Queries(dataset.queries), walk(engine.dtype, ef)).keys
    labels, _ = index._state.labels.keys_to_labels(keys, K)
    return datasets.recall(dataset, labels, K)


def least_ef(recall_at: Callable[[int], float], target: float) -> int:
    """The smallest ef that reaches a recall."""
    low, high = 0, K
    while recall_at(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if recall_at(middle) >= target else (middle, high)
    return high


def count(tool: Tools, engine: CpuEngine, queries: np.ndarray, ef: int) -> Counted:
    """With one warp a query, and the plan's visited cache."""
    dim, nodes = queries.shape[1], engine.node_count
    asked = encode_queries(queries, "cosine", engine.dtype)
    beam = shape(engine.dtype, ef)
    buckets, tag_bits = launch_plan.visited_cache(beam, nodes)
    M = engine.graph.neighbors.shape[1]
    build = tool.emulated.Build("cosine", engine.dtype, dim, M, tag_bits=tag_bits, arch=ARCH)
    read: dict[str, int] = {}
    how = {"k": beam.k, "ef": ef, "expand": EXPAND}
    found = tool.emulated.search(
        build, engine.graph, engine.rows, asked, **how,
        visited_buckets=buckets, bytes_read=read, seed=None,
    )  # fmt: skip
    wanted = search_graph(engine.graph, engine.rows, asked, "cosine", **how)
    assert (found.hops == wanted.hops).all(), "the executed walk is not the CPU's"
    profile = build.library("search").profile
    of_distances = tool.costs.distance_instructions(profile)
    others = int(profile.executions.sum()) - of_distances
    rerank = 0
    if engine.refine:
        finer = build._replace(dtype=engine.refine)
        tool.emulated.compare(
            finer, engine.refine_rows, encode_queries(queries, "cosine", engine.refine),
            candidates=found.keys, k=K, shares=1, seed=None, bytes_read=read,
        )  # fmt: skip
        rerank = int(finer.library("compare").profile.executions.sum())
    executed = (of_distances, others, rerank)
    return Counted(
        hops=float(found.hops.mean()),
        distances=float(found.distances.mean()),
        exact_distances=float(wanted.distances.mean()),
        steps=tool.costs.steps(profile) / len(queries),
        bytes={name: size / len(queries) for name, size in read.items()},
        instructions=Instructions(*(total / len(queries) for total in executed)),
    )


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


class Held(NamedTuple):
    """Queries of a large batch that a GPU holds at once, and what of each decides that."""

    resident: int
    shared_bytes: int
    registers: int  # of a lane, as compiled


def held(tool: Tools, engine: CpuEngine, dim: int, ef: int, card: Card) -> Held:
    planned = functools.partial(
        launch_plan.plan,
        *("cosine", engine.dtype, dim, engine.graph.neighbors.shape[1], shape(engine.dtype, ef)),
        queries=10**6,
        nodes=engine.node_count,
        limits=launch_plan.of_arch(card.arch)._replace(sms=card.sms),
    )
    registers = compiled_registers(tool, tuple(planned().definitions.items()), card.arch)
    plan = planned(registers=registers)
    queries = plan.queries_per_block
    return Held(plan.resident * queries, plan.shared_mem // queries, registers)


@functools.cache
def compiled_registers(tool: Tools, definitions: tuple[tuple[str, int], ...], arch: int) -> int:
    toolkit = tool.cuda_toolkit.find()
    options = tool.cuda_toolkit.options(toolkit, kernel_source.options(dict(definitions)))
    job = tool.cuda_toolkit.Job(kernel_source.source("search"), "search", options, arch)
    return int(tool.cuda_toolkit.compile_one(str(toolkit.nvrtc), job).registers)


def model(
    tool: Tools, index: hnsw_gpu.Index, dataset: datasets.Dataset, recalls: tuple[float, ...]
) -> list[dict]:
    """A point for each storage dtype and recall, by default those that fp32 has at EFS."""
    points, asked = [], part_of(dataset, QUERIES).queries
    for dtype in REFINE:
        engine = engine_of(index, dtype)
        recall_at = functools.cache(functools.partial(recall, index, engine, dataset))
        recalls = recalls or tuple(map(recall_at, EFS))
        for target in recalls:
            ef = least_ef(recall_at, target)
            click.echo(f"{dtype}, ef {ef} ...", err=True)
            counted = count(tool, engine, asked, ef)
            points.append(point(tool, engine, index.dim, ef, recall_at(ef), counted))
    return points


def point(
    tool: Tools, engine: CpuEngine, dim: int, ef: int, reached: float, counted: Counted
) -> dict:
    size = sum(counted.bytes.values())
    cards = {}
    for name, card in CARDS.items():
        own = held(tool, engine, dim, ef, card)
        limits = bounds(card, own.resident, size, sum(counted.instructions), counted.steps)
        binding = min(limits, key=lambda bound: limits[bound])
        cards[name] = {**own._asdict(), "queries_per_s": limits, "bound_by": binding}
    return {
        "dtype": engine.dtype,
        "ef": ef,
        "recall": reached,
        **counted._asdict(),
        "forgotten": counted.distances / counted.exact_distances - 1,
        "instructions": {
            "distance": counted.instructions.distances / counted.distances,
            "step": counted.instructions.others / counted.steps,
            "rerank": counted.instructions.rerank,
            "query": sum(counted.instructions),
        },
        "cards": cards,
    }


def report(points: list[dict]) -> None:
    """A line a point: counts, then thousand queries/s by each bound, the least one marked."""
    for one in points:
        told = one["instructions"]
        click.echo(
            f"{one['dtype']}, ef {one['ef']}, recall {one['recall']:.3f}: "
            f"{one['distances']:.0f} distances "
            f"(+{one['forgotten']:.1%}), {one['steps']:.1f} steps, "
            f"{sum(one['bytes'].values()) / 1e3:,.0f} kB a query; "
            f"{told['distance']:.1f} instructions a distance, {told['step']:.0f} a step"
        )
        for name, card in one["cards"].items():
            limits = ", ".join(
                f"{bound} {rate / 1e3:,.0f}{'*' if bound == card['bound_by'] else ''}"
                for bound, rate in card["queries_per_s"].items()
            )
            click.echo(
                f"  {name:9} {limits} thousand queries/s; {card['resident']} queries at once"
            )


def part_of(dataset: datasets.Dataset, queries: int) -> datasets.Dataset:
    """The data set with an even sample of its queries."""
    chosen = np.linspace(0, len(dataset.queries) - 1, queries).astype(int)
    return dataset._replace(queries=dataset.queries[chosen], truth=dataset.truth[chosen])


@click.command()
@click.option(
    "--dataset",
    "name",
    default="glove",
    type=click.Choice([name for name, kept in run.SETS.items() if not kept.refine]),
)
@click.option("--rows", default=run.ROWS, show_default=True, help="At most so many.")
@click.option("--recall", "recalls", multiple=True, type=float, help="[default: fp32's at EFS]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="[default: results]")
def main(name: str, rows: int, recalls: tuple[float, ...], out: Path | None) -> None:
    """Count searches of a data set, and say which limit binds where."""
    dataset = run.load(name, run.GPU._replace(rows=rows, queries=JUDGED, judged=JUDGED))
    index = hnsw_gpu.Index(dataset.base.shape[1], "cosine", device="cpu", **SETTING._asdict())
    index.add(dataset.base)
    with tools() as tool:
        if missing := tool.ptx.missing():
            raise click.ClickException(missing)
        points = model(tool, index, dataset, recalls)
        version = tool.cuda_toolkit.find().version
    report(points)
    found = {
        "about": {
            "date": about([])["date"],
            "hnsw_gpu": hnsw_gpu.__version__,
            "nvrtc": version,
            "dataset": name,
            "rows": len(dataset.base),
            "dim": index.dim,
            "queries": QUERIES,
            "judged": JUDGED,
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
    path = out or RESULTS / ("roofline.json" if name == "glove" else f"roofline-{name}.json")
    path.write_text(json.dumps(rounded(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
