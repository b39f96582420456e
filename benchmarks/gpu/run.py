"""The GPU engine timed: `python -m benchmarks.gpu.run race`, which `run.sh` calls. See README.md.

`check` is a small search by every kernel, for compute-sanitizer to watch.
"""

import contextlib
import functools
import importlib.util
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

import hnsw_gpu
from benchmarks import datasets
from benchmarks.datasets import Dataset
from benchmarks.gpu import stand_in
from benchmarks.gpu.check import check_index
from benchmarks.gpu.kernel_times import Clock, measure, peak_bandwidth
from benchmarks.gpu.report import draw, gpu_facts, report
from benchmarks.gpu.sides import PEERS, Sizes, chosen_ef, cores, judge, raced, wall
from benchmarks.peers import EFS, K, Setting
from benchmarks.record import RESULTS, SETTING, about, rounded
from hnsw_gpu import inputs
from hnsw_gpu.engine.vectors import encode_queries

QUERIES = 10_000  # distinct ones; larger batches repeat them
JUDGED = 1_000  # of those, by which recall is taken
ROWS = 1_000_000
ROWS_A_CORE = 125_000  # that the synthetic graphs may have, to be built within minutes
COPIED_BYTES = 1 << 30  # before each timed kernel; see kernel_times.py
MEANINGLESS = "The kernels were emulated on the CPU: times, bandwidths and ratios mean nothing."


class Set(NamedTuple):
    """A data set and how its index keeps the rows."""

    dim: int
    dtype: str
    refine: str = ""
    source: str = ""  # in `datasets`; else drawn


SETS = {
    "glove": Set(100, "fp32", source="glove"),
    "glove-int4": Set(100, "int4", "fp16", source="glove"),
    "synthetic-128": Set(128, "fp32"),
    "synthetic-128-int4": Set(128, "int4", "fp16"),
    "synthetic-768": Set(768, "fp16"),
    "synthetic-768-int4": Set(768, "int4", "fp16"),
    "verses768": Set(768, "fp16", source="verses768"),
    "verses768-int8": Set(768, "int8", "fp16", source="verses768"),
}


# What loading a data set raises where a package, a program, the network or memory lacks.
CANNOT_BE_HAD = (ImportError, OSError, MemoryError, subprocess.CalledProcessError)


def default_rows() -> int:
    return min(ROWS, ROWS_A_CORE * cores())


GPU = Sizes(
    ROWS, QUERIES, JUDGED, [1, 10, 100, 1_000, 10_000, 100_000], [1, 8], 7, COPIED_BYTES, SETTING
)
EMULATED = Sizes(300, 60, 40, [1, 7, 50], [1], 2, 1 << 20, Setting(M=4, ef_construction=32))


def numbers(_context: click.Context, option: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of numbers") from error
    if min(found) < 1:
        raise click.BadParameter(f"{text!r}: {option.name} are at least 1")
    return found


def names(_context: click.Context, option: click.Parameter, text: str) -> list[str]:
    known = PEERS if option.name == "peers" else SETS
    chosen = [name for name in text.split(",") if name]
    for name in chosen:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return chosen


engine_option = click.option(
    "--engine",
    type=click.Choice(["gpu", "emulated"]),
    default="gpu",
    show_default=True,
    help="emulated: by the tests' stand-in for CuPy, on tiny sizes; its times mean nothing.",
)


@contextlib.contextmanager
def using(engine: str) -> Iterator[None]:
    """`device="cuda"` is a GPU, or the stand-in; a ClickException says what is missing."""
    with contextlib.ExitStack() as stack:
        try:
            if engine == "emulated":
                stack.enter_context(stand_in.installed())
            hnsw_gpu.Index(2, "l2", device="cuda")
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
        yield


@click.group()
def main() -> None:
    """Measure the GPU engine."""


@main.command()
@engine_option
@click.option("--datasets", "sets", default=",".join(SETS), show_default=True, callback=names)
@click.option("--peers", default=",".join(PEERS), show_default=True, callback=names)
@click.option(
    "--rows",
    type=click.IntRange(min=100),
    help=f"At most so many a data set. [default: {ROWS_A_CORE:,} a core, at most {ROWS:,}]",
)
@click.option("--batches", callback=numbers, help="[default: 1,10,100,1000,10000,100000]")
@click.option("--expands", callback=numbers, help="Beside the index's own. [default: 1,8]")
@click.option("--rounds", type=click.IntRange(min=1), help="Of each timing. [default: 7]")
@click.option("--recall", default=0.95, show_default=True, help="Recall@10 that ef is chosen for.")
@click.option(
    "--seconds",
    default=300.0,
    show_default=True,
    help="When so many have passed, no further data set or peer is begun.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="[default: results]")
def race(
    engine: str,
    sets: list[str],
    peers: list[str],
    rows: int | None,
    batches: list[int] | None,
    expands: list[int] | None,
    rounds: int | None,
    recall: float,
    seconds: float,
    out: Path | None,
) -> None:
    """Times of the kernel and of whole searches, and the roofline, in OUT/gpu.json and .png."""
    is_emulated = engine == "emulated"
    if is_emulated and (out is None or out.resolve() == RESULTS.resolve()):
        raise click.UsageError("the emulated engine's times mean nothing: say --out FOLDER")
    preset = EMULATED if is_emulated else GPU._replace(rows=default_rows())
    given: dict[str, Any] = {"rows": rows, "batches": batches, "expands": expands, "rounds": rounds}
    sizes = preset._replace(**{name: value for name, value in given.items() if value is not None})
    start = time.monotonic()
    run = Run(sizes, recall, has_time=lambda: time.monotonic() - start < seconds)
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    with using(engine):
        results: dict[str, Any] = {"engine": engine, "about": about([]) | gpu_facts()}
        if is_emulated:
            results["note"] = MEANINGLESS
        try:
            run.measure(sets, [name for name in peers if run.is_there(name)])
        finally:  # what was measured before an error is kept
            results["about"] |= {
                **sizes._asdict(),
                "setting": sizes.setting._asdict(),
                "recall": recall,
                "seconds": time.monotonic() - start,
            }
            results |= {"results": run.results, "left_out": run.left_out}
            (folder / "gpu.json").write_text(json.dumps(rounded(results), indent=1) + "\n")
    report(results)
    draw(results, folder / "gpu.png")


class Run:
    """Collects the results of data sets, one index on the GPU at a time."""

    def __init__(self, sizes: Sizes, recall: float, has_time: Callable[[], bool]) -> None:
        self.sizes, self.recall, self.has_time = sizes, recall, has_time
        self.results: dict[str, Any] = {}
        self.left_out: list[str] = []

    def leave_out(self, line: str) -> None:
        self.left_out.append(line)
        click.echo(f"left out: {line}", err=True)

    def is_there(self, peer: str) -> bool:
        is_there = importlib.util.find_spec(PEERS[peer]) is not None
        if not is_there:
            self.leave_out(f"{peer}: the package {PEERS[peer]} is not installed")
        return is_there

    def measure(self, sets: list[str], peers: list[str]) -> None:
        """All of ours first, so that peers, which take their time, cannot crowd it out.

        Peers keep whole rows: they are raced where ours does.
        """
        loaded: dict[str, Dataset] = {}
        for name in sets:
            try:
                self._begin(name)
                loaded[name] = load(name, self.sizes)
                self.results[name] = ours(loaded[name], SETS[name], self.sizes, self.recall)
            except (LeftOut, *CANNOT_BE_HAD) as error:
                self.leave_out(f"{name}: {error}")
        for name in (name for name in self.results if not SETS[name].refine):
            for peer in peers:
                try:
                    self._begin(f"{peer} on {name}")
                    self.results[name]["peers"][peer] = raced(
                        peer, loaded[name], SETS[name].dtype, self.sizes, self.recall
                    )
                except LeftOut as error:
                    self.leave_out(f"{peer} on {name}: {error}")
                except Exception as error:  # whatever a peer raises, the others are measured
                    self.leave_out(f"{peer} on {name}: {type(error).__name__}: {error}")

    def _begin(self, what: str) -> None:
        if not self.has_time():
            raise LeftOut("no time left (--seconds)")
        click.echo(f"{what} ...", err=True)


class LeftOut(Exception):
    """Why a part is not measured."""


def load(name: str, sizes: Sizes) -> Dataset:
    """Rows and queries, unit length; exact answers of the first queries only."""
    source = SETS[name].source
    if not source:
        vectors = draw_vectors(sizes.rows + sizes.queries, SETS[name].dim)
        base, queries = vectors[: sizes.rows], vectors[sizes.rows :]
    else:
        base, queries = datasets.SOURCES[source]()
        # in no order, because rows may be sorted (words by frequency)
        rng = np.random.default_rng(0)
        base = base[np.sort(rng.permutation(len(base))[: sizes.rows])]
        queries = queries[rng.permutation(len(queries))[: sizes.queries]]
    truth, _ = datasets.nearest(base, queries[: sizes.judged], K)
    return Dataset(name, base, queries, truth)


def draw_vectors(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """float32 (count, dim), unit length: 1,000 clusters in 32 dimensions, and noise in all.

    Like embeddings, they have far fewer directions than dimensions: recall@10 of 0.95 takes an ef
    of about 50 at 40,000 rows.
    """
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((32, dim), np.float32)
    centers = rng.standard_normal((1_000, 32), np.float32)
    vectors = np.empty((count, dim), np.float32)
    noise = np.float32(0.3 * 32**0.5)
    for start in range(0, count, 65_536):
        part = vectors[start : start + 65_536]
        latent = centers[rng.integers(0, len(centers), len(part))]
        latent += rng.standard_normal(latent.shape, np.float32)
        part[...] = latent @ basis + noise * rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def ours(dataset: Dataset, kept: Set, sizes: Sizes, target: float) -> dict:
    """The index of a data set on the GPU: a series of batches for each `expand`."""
    index = hnsw_gpu.Index(
        kept.dim,
        "cosine",
        kept.dtype,
        refine=kept.refine or None,
        device="cpu",
        **sizes.setting._asdict(),
    )
    start = time.perf_counter()
    index.add(dataset.base)
    build = time.perf_counter() - start
    index.to("cuda")
    engine = index._gpu
    assert engine is not None

    def recall_at(ef: int, expand: int | None = None) -> float:
        return judge(dataset, lambda part: index.search(part, K, ef=ef, expand=expand).labels)

    own_ef = chosen_ef(EFS, target, recall_at)
    own = index._expand(own_ef[0])
    encoded = [
        encode_queries(dataset.queries, "cosine", each)
        for each in (kept.dtype, kept.refine or kept.dtype)
    ]
    clock, peak, series = Clock(sizes.copied_bytes), peak_bandwidth(), []
    for expand in sorted({own, *sizes.expands}):
        ef, reached = own_ef
        if expand != own:
            ef, reached = chosen_ef(EFS, target, functools.partial(recall_at, expand=expand))
        asked = inputs.walk(K, ef, None, expand, dtype=kept.dtype)
        walk = engine._planned(asked, keeps_allowed=False)
        points = []
        for batch in sizes.batches:
            point = measure(clock, engine, encoded, walk, batch, sizes.rounds, peak)
            search = functools.partial(index.search, k=K, ef=ef, expand=expand)
            point["numpy"] = wall(search, dataset.queries, batch, sizes.rounds)
            points.append(point)
        series.append(
            {
                "expand": expand,
                "is_own": expand == own,
                "ef": ef,
                "recall": reached,
                "points": points,
            }
        )
    held = engine.nbytes
    index.to("cpu")
    return {
        "rows": len(dataset.base),
        "dim": kept.dim,
        "dtype": kept.dtype,
        "refine": kept.refine,
        "distinct_queries": len(dataset.queries),
        "judged_queries": len(dataset.truth),
        "build_seconds": build,
        "gpu_bytes": held,
        "peak_bytes_per_s": peak,
        "roofline_by": "peak" if peak else "copy",
        "series": series,
        "peers": {},
    }


@main.command()
@engine_option
@click.option("--rows", default=300, show_default=True, type=click.IntRange(min=50))
def check(engine: str, rows: int) -> None:
    """Small searches by every kernel and number of warps, equal to the CPU's, key for key."""
    with using(engine):
        import cupy

        cupy.cuda.set_allocator(None)  # so that who reads beyond an array leaves its memory
        for dtype, refine in (("fp32", False), ("fp16", False), ("int8", True), ("int4", True)):
            count = check_index(cupy, dtype, refine, rows)
            click.echo(f"{dtype}{' + refine' if refine else ''}: {count} answers as on the CPU")


if __name__ == "__main__":
    main()
