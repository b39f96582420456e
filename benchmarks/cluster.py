"""A cluster's search: two workers against one on this machine, and a model of larger ones.

    python -m benchmarks.cluster --out benchmarks/results/cluster.json

Measured: queries/s of a collection in this process and of one actor and two (a replica each, one
thread each), the time of single calls, and of merging the answers of up to 64 shards. The model
takes these, and says for 1 to 64 shards of up to 100 million rows what a shard holds, what a query
sends, and how long callers wait by the number of replicas: every shard is a queue with a server a
replica, arrivals are Poisson, a search takes a measured time, longer by the logarithm of the rows,
and an answer is there when the last shard's is. Nothing of the network but its bytes is in it.
"""

import functools
import heapq
import json
import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

import hnsw_gpu
from benchmarks.record import about, rounded
from hnsw_gpu.collection import merged_answers
from hnsw_gpu.collection.building import build_collection

BATCH, K, CALLERS = 256, 10, 4  # rows a call, results a query, threads that ask
SHARDS = (1, 2, 4, 8, 16, 32, 64)
REPLICAS = (1, 2, 3)
SHARD_ROWS = (1_000_000, 10_000_000, 100_000_000)
LOAD = 0.7  # of what one replica of a shard can answer
ARRIVALS = 2000


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
    found = []
    for rows in SHARD_ROWS:
        service = base * math.log(rows) / math.log(measured["rows"])
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


def rate_of(search: Callable[[np.ndarray], object], queries: np.ndarray, seconds: float) -> float:
    """Queries/s of CALLERS threads, each with batches of its own."""
    until = time.perf_counter() + seconds

    def ask(_: int) -> int:
        calls = 0
        while time.perf_counter() < until:
            search(queries)
            calls += 1
        return calls

    started = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as callers:
        calls = sum(callers.map(ask, range(CALLERS)))
    return calls * len(queries) / (time.perf_counter() - started)


def measure(folder: Path, queries: np.ndarray, seconds: float) -> dict[str, Any]:
    """Figures of a collection of one shard."""
    index = hnsw_gpu.load(folder)
    index.warm_up()
    found: dict[str, Any] = {"rows": len(index), "bytes_a_row": index.nbytes / len(index)}
    rates = {}
    for threads in (1, 2):
        rates[f"in_process_{threads}_threads"] = rate_of(
            functools.partial(index.search, k=K, threads=threads), queries, seconds
        )
    for workers in (1, 2):
        with hnsw_gpu.Cluster(folder, replicas=workers, address="local", cpus=1) as cluster:
            cluster.search(queries, K)
            rates[f"{workers}_workers"] = rate_of(
                functools.partial(cluster.search, k=K), queries, seconds
            )
            if workers == 1:
                calls = []
                for i in range(500):
                    started = time.perf_counter()
                    cluster.search(queries[i % len(queries)], K)
                    calls.append(time.perf_counter() - started)
                found["call_s"] = sorted(calls)
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
@click.option("--rows", default=200_000, show_default=True)
@click.option("--dim", default=64, show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Of every measured rate.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .json to write.")
def main(rows: int, dim: int, seconds: float, out: Path) -> None:
    """Measure two workers against one; model more."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, dim))
    vectors = centres[rng.integers(0, len(centres), rows + BATCH)]
    vectors = (vectors + 0.5 * rng.normal(size=vectors.shape)).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "rows.npy", vectors[:rows])
        folder = Path(place) / "docs.collection"
        build_collection([Path(place) / "rows.npy"], folder, shard_rows=rows)
        measured = measure(folder, vectors[rows:], seconds)
    result = {"about": about([]), "dim": dim, "measured": measured, "model": model(measured, dim)}
    out.write_text(json.dumps(rounded(result), indent=1) + "\n")
    draw(result, out.with_suffix(".png"))
    click.echo(f"efficiency of two workers: {measured['efficiency_of_two_workers']:.2f}")


if __name__ == "__main__":
    main()
