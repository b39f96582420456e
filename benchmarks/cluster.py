"""A cluster: two workers and four against one on this machine, and a model of larger ones.

    python -m benchmarks.cluster --out benchmarks/results/cluster.json

Measured: queries/s of a collection in this process and of one actor, two and four (a replica each,
one thread each), the time of single calls, and of merging the answers of up to 64 shards; seconds
of a build and of a deduplication by as many workers, and in this process; bytes of a row by dtype.
Counted: recall and distances of one index and of the same rows in more shards.

The model takes the searches, and says for 1 to 64 shards of up to 100 million rows what a shard
holds, what a query sends, and how long callers wait by the number of replicas: every shard is a
queue with a server a replica, arrivals are Poisson, a call takes a measured time, of which the
search's grows with the logarithm of the rows, and an answer is there when the last shard's is.
Nothing of the network but its bytes is in it.

What the process that drives holds is measured with ten times as many rows too.
"""

import functools
import heapq
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

import hnsw_gpu
from benchmarks import datasets
from benchmarks.record import about, rounded
from hnsw_gpu.cluster import steps_on_ray
from hnsw_gpu.collection import merged_answers
from hnsw_gpu.collection.building import build_collection
from hnsw_gpu.deduplication import Settings, dedup_files
from hnsw_gpu.engine import encode_queries, search_graph
from hnsw_gpu.files import Here, StepRunner
from hnsw_gpu.searching import Searching

BATCH, K, CALLERS = 256, 10, 4  # rows a call, results a query, threads that ask a cluster
SHARDS = (1, 2, 4, 8, 16, 32, 64)
REPLICAS = (1, 2, 3)
SHARD_ROWS = (1_000_000, 10_000_000, 100_000_000)
LOAD = 0.7  # of what one replica of a shard can answer
ARRIVALS = 20_000
JOB_SHARDS = 6
DRIVEN_ROWS = (100_000, 1_000_000)
WORKERS = (1, 2, 4)
DEDUP = Settings(threshold=0.97, method="hnsw", ef_construction=64, ef=32)
DIMS = (100, 256, 768)
STORED = (("fp32", ""), ("int8", "fp32"), ("int4", "fp16"))  # dtype and refine
SIZED_ROWS = 3_000
CUT_ROWS, CUT_IN, CUT_EFS = 60_000, (1, 4, 8), (16, 32, 64, 128)  # rows, shards, and ef


def latencies(
    service: np.ndarray, shards: int, replicas: int, rate: float, rng: np.random.Generator
) -> np.ndarray:
    """float64 (ARRIVALS,) seconds from a query to the answer of its last shard.

    service: float64 (m,) seconds of a shard's searches, drawn from with replacement.
    """
    arrived = np.cumsum(rng.exponential(1 / rate, ARRIVALS))
    last = np.zeros(ARRIVALS)
    for _ in range(shards):
        free = [0.0] * replicas  # when each server is, a heap
        takes = rng.choice(service, ARRIVALS)
        for i in range(ARRIVALS):
            ends = max(arrived[i], heapq.heappop(free)) + takes[i]
            heapq.heappush(free, ends)
            last[i] = max(last[i], ends - arrived[i])
    return last


def model(measured: dict[str, Any], dim: int) -> list[dict[str, Any]]:
    """Of every number of shards, rows a shard and replicas: bytes, and quantiles of the wait."""
    rng = np.random.default_rng(0)
    base = np.asarray(measured["call_s"])
    search_s = median(measured["call_in_process_s"])
    found = []
    for rows in SHARD_ROWS:
        service = base + search_s * (math.log(rows) / math.log(measured["rows"]) - 1)
        rate = LOAD / float(service.mean())
        for shards in SHARDS:
            merge_s = measured["merge_s"][str(shards)] / BATCH
            for replicas in REPLICAS:
                waits = latencies(service, shards, replicas, rate, rng) + merge_s
                found.append(
                    {
                        "shard_rows": rows,
                        "shards": shards,
                        "replicas": replicas,
                        "shard_bytes": round(rows * measured["bytes_a_row"]),
                        "sent_bytes_a_query": shards * (4 * dim + 12 * K),
                        "merge_s_a_query": merge_s,
                        "queries_per_s": rate,
                        "p50_s": float(np.quantile(waits, 0.5)),
                        "p99_s": float(np.quantile(waits, 0.99)),
                    }
                )
    return found


def rate_of(
    search: Callable[[np.ndarray], object], queries: np.ndarray, seconds: float, callers: int
) -> float:
    """Queries/s of threads that call, each with batches of its own."""
    until = time.perf_counter() + seconds

    def ask(_: int) -> int:
        calls = 0
        while time.perf_counter() < until:
            search(queries)
            calls += 1
        return calls

    started = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        calls = sum(pool.map(ask, range(callers)))
    return calls * len(queries) / (time.perf_counter() - started)


def calls_of(index: Searching, queries: np.ndarray) -> list[float]:
    """Seconds of searches of a query each, ascending."""
    seconds = []
    for i in range(500):
        started = time.perf_counter()
        index.search(queries[i % len(queries)], K, threads=1)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)


def anonymous_bytes(pid: int) -> int:
    """What a process holds that lies in no file."""
    told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kB) << 10 for kB in re.findall(r"^Anonymous: +(\d+) kB", told, re.M))


def measure(folder: Path, queries: np.ndarray, seconds: float) -> dict[str, Any]:
    """Figures of a collection of one shard."""
    index = hnsw_gpu.load(folder)
    index.warm_up()
    found: dict[str, Any] = {"rows": len(index), "bytes_a_row": index.nbytes / len(index)}
    rates = {}
    for threads in (1, 2):
        rates[f"in_process_{threads}_threads"] = rate_of(
            functools.partial(index.search, k=K, threads=threads), queries, seconds, 1
        )
    for workers in WORKERS:
        with hnsw_gpu.Cluster(folder, replicas=workers, address="local", cpus=1) as cluster:
            cluster.search(queries, K)
            rates[f"{workers}_workers"] = rate_of(
                functools.partial(cluster.search, k=K), queries, seconds, CALLERS
            )
            if workers == 1:
                found["call_s"] = calls_of(cluster, queries)
                found["call_in_process_s"] = calls_of(index, queries)
                [replica] = cluster.status()["shards"][0]["replicas"]
                in_memory = index.nbytes - index.memory(0)["rows"]  # which are mapped
                found["actor_bytes_beside_shard"] = anonymous_bytes(replica["pid"]) - in_memory
    part = index.search(queries, K)
    found["merge_s"] = {}
    for shards in SHARDS:
        merged_answers([part] * shards, K)
        started = time.perf_counter()
        for _ in range(20):
            merged_answers([part] * shards, K)
        found["merge_s"][str(shards)] = (time.perf_counter() - started) / 20
    found["queries_per_s"] = rates
    found["efficiency_of_two_workers"] = rates["2_workers"] / rates["1_workers"] / 2
    return found


def job_seconds(rows: Path, place: Path, shard_rows: int, runner: StepRunner) -> dict[str, float]:
    """Of a build and of a deduplication of the same shards."""
    begun = time.perf_counter()
    build_collection([rows], place / "docs", shard_rows=shard_rows, runner=runner)
    built = time.perf_counter()
    dedup_files([rows], place / "unique", DEDUP, shard_rows=shard_rows, runner=runner)
    return {"build": built - begun, "dedup": time.perf_counter() - built}


def on_ray(workers: int, work: Callable[[StepRunner], dict[str, float]]) -> dict[str, float]:
    """By so many workers of one thread, whose code is loaded: the second time counts."""
    import ray

    ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        with steps_on_ray() as runner:
            work(runner)
            return work(runner)
    finally:
        ray.shutdown()


def measure_jobs(rows: Path, shard_rows: int, rounds: int) -> dict[str, Any]:
    """A build and a deduplication by workers, and in this process, in turn."""

    def work(runner: StepRunner) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as place:
            return job_seconds(rows, Path(place), shard_rows, runner)

    sides: dict[str, Callable[[], dict[str, float]]] = {
        **{f"{w}_workers": functools.partial(on_ray, w, work) for w in WORKERS},
        **{f"in_process_{w}_threads": functools.partial(work, Here(w)) for w in WORKERS[:2]},
    }
    work(Here(1))  # code is compiled
    turns = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
    found: dict[str, Any] = {"shards": JOB_SHARDS, "shard_rows": shard_rows, "rounds": rounds}
    for job in ("build", "dedup"):
        found[job] = {
            "seconds": {name: median(turn[name][job] for turn in turns) for name in sides},
            "efficiency_of_two_workers": median(
                turn["1_workers"][job] / turn["2_workers"][job] / 2 for turn in turns
            ),
            "two_workers_over_two_threads": median(
                turn["2_workers"][job] / turn["in_process_2_threads"][job] for turn in turns
            ),
        }
    return found


# Most bytes that are a driver's own, but for what it takes to be connected.
DRIVER = """
import re, sys, threading, time
from pathlib import Path
import numpy as np
import hnsw_gpu
from hnsw_gpu.cli import main
from hnsw_gpu.cluster import steps_on_ray

def held():
    told = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", told)[1]) << 10

def most(work):
    peak, is_done = [held()], threading.Event()
    def watch():
        while not is_done.wait(0.005):
            peak[0] = max(peak[0], held())
    watching = threading.Thread(target=watch)
    watching.start()
    work()
    is_done.set()
    watching.join()
    return peak[0]

def search(place):
    with hnsw_gpu.Cluster(place) as cluster:
        for _ in range(20):
            cluster.search(np.zeros((100, 4), np.float32) + 1, 10)

how = "--shard-rows 100000 --M 4 --ef-construction 8 --ray local".split()
with steps_on_ray("local"):
    for place in sys.argv[1:]:
        rows, docs, out = f"{place}.npy", f"{place}.docs", f"{place}.out"
        dedup = ["dedup", rows, "-o", out, "--ef", "8", "--threshold", "0.9999999"]
        print(
            "most",
            most(lambda: main(["build", rows, "-o", docs, *how], standalone_mode=False)),
            most(lambda: main([*dedup, *how], standalone_mode=False)),
            most(lambda: search(docs)),
        )
"""


def driver() -> list[dict[str, int]]:
    """Most bytes that the process which drives a job, or searches, holds by the rows of it."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("first", *map(str, DRIVEN_ROWS))]
        for place, count in zip(places, (1000, *DRIVEN_ROWS), strict=True):
            rows = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
            np.save(f"{place}.npy", rows)
        told = subprocess.run(
            [sys.executable, "-c", DRIVER, *map(str, places)],
            check=True, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
        ).stdout  # fmt: skip
    peaks = [list(map(int, line.split())) for line in re.findall("^most (.*)", told, re.M)]
    return [
        {"rows": rows, **dict(zip(("build", "dedup", "search"), peak, strict=True))}
        for rows, peak in zip(DRIVEN_ROWS, peaks[1:], strict=True)  # code is loaded, first
    ]


def cut() -> dict[str, Any]:
    """Recall@k and distances a query by ef, of the same words in one shard and in more."""
    base, queries = datasets.load("glove", CUT_ROWS, BATCH)[1:3]
    found = []
    for shards in CUT_IN:
        with tempfile.TemporaryDirectory() as place:
            np.save(rows := Path(place) / "rows.npy", base)
            manifest = build_collection(
                [rows], Path(place) / "docs", shard_rows=-(-CUT_ROWS // shards)
            )
            opened = hnsw_gpu.load(Path(place) / "docs")
            truth = opened.exact_search(queries, K).distances[:, -1:]
            for ef in CUT_EFS:
                recall = float((opened.search(queries, K, ef=ef).distances <= truth).mean())
                parts = [_distances(Path(place) / "docs" / e.file, queries, ef)
                         for e in manifest.shards]  # fmt: skip
                found.append(
                    {"shards": shards, "ef": ef, "recall": recall, "distances": sum(parts)}
                )
    return {"rows": CUT_ROWS, "dim": base.shape[1], "results": found}


def _distances(shard: Path, queries: np.ndarray, ef: int) -> float:
    """Mean distances that a search of a shard computes."""
    state = hnsw_gpu.Index.load(shard, device="cpu")._state
    kept = state.parameters
    asked = encode_queries(queries, kept.metric, kept.dtype)
    rows = state.rows[: state.node_count]
    found = search_graph(state.graph, rows, asked, kept.metric, k=K, ef=ef)
    return float(found.distances.mean())


def sizes() -> list[dict[str, Any]]:
    """Bytes of a row: in memory, of these refine rows, which a map leaves on disk; in a file."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        for dim in DIMS:
            vectors = np.random.default_rng(dim).normal(size=(SIZED_ROWS, dim)).astype(np.float32)
            for dtype, refine in STORED:
                index = hnsw_gpu.Index(dim, dtype=dtype, refine=refine)
                index.add(vectors)
                index.save(file := Path(place) / "index.hnsw")
                found.append(
                    {
                        "dim": dim,
                        "dtype": dtype,
                        "refine": refine,
                        "bytes_a_row": index.nbytes / SIZED_ROWS,
                        "refine_bytes_a_row": index.memory(0)["refine rows"] / SIZED_ROWS,
                        "file_bytes_a_row": file.stat().st_size / SIZED_ROWS,
                    }
                )
    return found


def draw(result: dict[str, Any], out: Path) -> None:
    """Waits by shards and replicas, for the largest shards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for replicas in REPLICAS:
        points = [
            point for point in result["model"]
            if point["replicas"] == replicas and point["shard_rows"] == SHARD_ROWS[-1]
        ]  # fmt: skip
        for name, style in (("p50_s", "--"), ("p99_s", "-")):
            axes.plot(
                [point["shards"] for point in points],
                [point[name] * 1e3 for point in points],
                style, color=f"C{replicas}", label=f"{name[:3]}, replicas={replicas}",
            )  # fmt: skip
    axes.set(xscale="log", xlabel=f"shards of {SHARD_ROWS[-1]:,} rows", ylabel="wait, ms (model)")
    axes.legend()
    figure.savefig(out, bbox_inches="tight", dpi=150)


@click.command()
@click.option("--rows", default=120_000, show_default=True)
@click.option("--dim", default=64, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="Of every measured rate.")
@click.option("--rounds", default=2, show_default=True, help="Turns of each timed job.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .json to write.")
def main(rows: int, dim: int, seconds: float, rounds: int, out: Path) -> None:
    """Measure workers against one, and bytes of a row; model more."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, dim))
    vectors = centres[rng.integers(0, len(centres), rows + BATCH)]
    vectors = (vectors + 0.5 * rng.normal(size=vectors.shape)).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "rows.npy", vectors[:rows])
        folder = Path(place) / "docs.collection"
        build_collection([Path(place) / "rows.npy"], folder, shard_rows=rows)
        measured = measure(folder, vectors[rows:], seconds)
        few = rows // 2 // JOB_SHARDS  # rows of a shard: jobs are repeated
        np.save(Path(place) / "fewer.npy", vectors[: few * JOB_SHARDS])
        jobs = measure_jobs(Path(place) / "fewer.npy", few, rounds)
    result = {
        "about": about([]),
        "dim": dim,
        "measured": measured,
        "jobs": jobs,
        "sizes": sizes(),
        "cut": cut(),
        "driver_bytes": driver(),
        "model": model(measured, dim),
    }
    out.write_text(json.dumps(rounded(result), indent=1) + "\n")
    draw(result, out.with_suffix(".png"))
    for name, of in (("search", measured), ("build", jobs["build"]), ("dedup", jobs["dedup"])):
        click.echo(f"{name}: efficiency of two workers {of['efficiency_of_two_workers']:.2f}")


if __name__ == "__main__":
    main()
