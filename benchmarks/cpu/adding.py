"""What a small change costs where much is there already, and how searches and adds share an index.

python -m benchmarks.cpu.adding

writes `results/adding.json`. Ratios to the smallest index are results; times are of one machine.
"""

import json
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.record import RESULTS, about, rounded
from hnsw_gpu import Index

DIM = 16
SIZES = (10_000, 100_000, 1_000_000)
WARM = 50  # changes before those that count
CHANGES = 300
MOST = 2 * (WARM + CHANGES)  # some to be timed, others to be counted


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def built(count: int) -> Index:
    index = Index(DIM, "l2", ef_construction=40)
    index.add(rows(count, 0))
    return index


def changes_of(index: Index) -> dict[str, Callable[[int], object]]:
    """What may be done to one label, by name; the number of a turn, below MOST, says to which."""
    new, other, old = rows(MOST, 1)[:, None], rows(MOST, 2)[:, None], index.vectors(np.arange(MOST))
    few = np.arange(5)

    def search_after_a_delete(turn: int) -> None:
        index.delete([3 * MOST + turn])
        index.search(new[turn], 10, threads=1)

    return {
        "add": lambda turn: index.add(new[turn], threads=1),
        "add a copy": lambda turn: index.add(old[turn : turn + 1], threads=1),
        "update": lambda turn: index.update([MOST + turn], other[turn], threads=1),
        "delete": lambda turn: index.delete([2 * MOST + turn]),
        "search after one more delete": search_after_a_delete,
        "undelete": lambda turn: index.undelete([2 * MOST + turn]),
        "search among five": lambda turn: index.search(new[turn], 5, allow=few, threads=1),
    }


def single_changes(count: int) -> list[dict]:
    """Median milliseconds of changing one label, and median bytes that it allocates at its peak."""
    found = []
    for name, change in changes_of(built(count)).items():
        seconds, allocated = [], []
        for turn in range(MOST // 2):
            started = time.perf_counter()
            change(turn)
            seconds.append(time.perf_counter() - started)
        tracemalloc.start()
        for turn in range(MOST // 2, MOST):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            change(turn)
            allocated.append(tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.stop()
        ms, peak = 1e3 * median(seconds[WARM:]), median(allocated[WARM:])
        found.append({"change": name, "rows": count, "ms": ms, "peak_bytes": peak})
    return found


def replacing(count: int, part: int, rounds: int) -> dict:
    """The same `part` labels given other vectors, again and again: time and bytes a round.

    By processor time, of which the rounds that rebuild take their share.
    """
    index, labels = built(count), np.arange(part)
    started, first = time.process_time(), index.nbytes
    index.add(rows(part, 1))
    adding, seconds, held, recalls = time.process_time() - started, [], [], []
    for number in range(rounds):
        new = rows(part, 2 + number)
        started = time.process_time()
        index.add(new, labels, replace=True)
        seconds.append(time.process_time() - started)
        held.append(index.nbytes)
        if number % 10 == 9:
            asked = rows(200, 1_000_000 + number)
            wanted = index.exact_search(asked, 10).labels
            found = index.search(asked, 10, ef=64).labels
            hits = [len(np.intersect1d(*pair)) for pair in zip(found, wanted, strict=True)]
            recalls.append(sum(hits) / wanted.size)
    half = rounds // 2
    return {
        "rows": count,
        "replaced": part,
        "rounds": rounds,
        "seconds_of_adding": sum(seconds) / rounds / adding,
        "second_half_of_first": sum(seconds[half:]) / sum(seconds[:half]),
        "most_bytes_of_first": max(held) / first,
        "last_bytes_of_first": held[-1] / first,
        "recall_lowest": min(recalls),
        "recall_highest": max(recalls),
    }


def together(count: int, threads: int, seconds: float) -> dict:
    """Threads that add 20 rows a call beside as many that search: calls, and how long they took."""
    index, end = built(count), time.perf_counter() + seconds
    adds: list[float] = []
    searches: list[float] = []

    def repeat(call, taken: list[float]) -> None:
        while time.perf_counter() < end:
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)

    workers = []
    for number in range(threads):
        more = rows(20, number)
        add, search = (
            lambda more=more: index.add(more + np.random.default_rng().normal(), threads=1),
            lambda more=more: index.search(more[:1], 10, threads=1),
        )
        workers += [
            threading.Thread(target=repeat, args=(add, adds)),
            threading.Thread(target=repeat, args=(search, searches)),
        ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {
        "rows": count,
        "threads_of_each": threads,
        "seconds": seconds,
        "adds": len(adds),
        "searches": len(searches),
        "search_ms_p50": 1e3 * float(np.quantile(searches, 0.5)),
        "search_ms_p99": 1e3 * float(np.quantile(searches, 0.99)),
        "add_ms_p50": 1e3 * float(np.quantile(adds, 0.5)),
    }


@click.command()
@click.option("--out", type=Path, default=RESULTS / "adding.json", show_default=True)
def main(out: Path) -> None:
    """Small changes of large indexes, and searches beside them."""
    single = [one for count in SIZES for one in single_changes(count)]
    first = {one["change"]: one["ms"] for one in reversed(single)}
    for one in single:
        one["ratio"] = one["ms"] / first[one["change"]]
    results = {
        **about([]), "metric": "l2", "dim": DIM, "ef_construction": 40,
        "single_changes": single, "together": together(100_000, 8, 20.0),
        "replacing": replacing(20_000, 1_000, 200),
    }  # fmt: skip
    click.echo(json.dumps(rounded(results), indent=1))
    out.write_text(json.dumps(rounded(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
