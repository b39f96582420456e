"""Calls of one query each, beside hnswlib's at equal recall, and the same queries in one call.

python -m benchmarks.cpu.one_query

writes `results/one-query.json`. In a small index a call costs more than its walk; a ratio below 1
says that hnswlib answers more of them.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from benchmarks import datasets
from benchmarks.peers import K
from benchmarks.race import Side, in_turn, race_builds, ratios
from benchmarks.record import RESULTS, SETTING, about, rounded

SIDES = ["ours-int4", "ours-int8", "ours-fp32", "hnswlib"]
ROWS = (2_000, 40_000, 331_479)
RECALL = 0.95


def seconds_a_query(side: Side, rung: Any, queries: np.ndarray, size: int) -> float:
    """Processor time, with one thread and `size` queries a call."""
    started = time.process_time()
    for start in range(0, len(queries), size):
        side.peer.search(queries[start : start + size], K, rung, 1)
    return (time.process_time() - started) / len(queries)


def measured(rows: int, count: int, rounds: int) -> dict:
    """Medians over the turns, and ratios within them, at the first ef that reaches RECALL."""
    dataset = datasets.load("glove", rows)
    sides, _ = race_builds(SIDES, dataset, SETTING, threads=2, rounds=1)
    rungs = {side: side.brackets(RECALL)[0][1] for side in sides}
    alone: dict[str, list[float]] = {side.name: [] for side in sides}
    batched: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds):
        queries = np.roll(dataset.queries, -turn * count, axis=0)[:count]
        for side in in_turn(sides, turn):
            alone[side.name].append(seconds_a_query(side, rungs[side], queries, 1))
            batched[side.name].append(seconds_a_query(side, rungs[side], queries, count))
    return {
        "rows": len(dataset.base),
        "ef": {side.name: rung for side, rung in rungs.items()},
        "recall": {side.name: side.recall(rung) for side, rung in rungs.items()},
        "microseconds_alone": {name: 1e6 * median(times) for name, times in alone.items()},
        "microseconds_batched": {name: 1e6 * median(times) for name, times in batched.items()},
        "calls_per_s_ratios": ratios({name: [1 / t for t in ts] for name, ts in alone.items()}),
        "batched_per_s_ratios": ratios({name: [1 / t for t in ts] for name, ts in batched.items()}),
    }


@click.command()
@click.option("--queries", default=1_000, show_default=True, help="A turn.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--out", type=Path, default=RESULTS / "one-query.json", show_default=True)
def main(queries: int, rounds: int, out: Path) -> None:
    """One query a call, beside hnswlib."""
    found = {**about(["hnswlib"]), "queries": queries, "rounds": rounds, "sizes": []}
    for rows in ROWS:
        found["sizes"].append(measured(rows, queries, rounds))
        click.echo(json.dumps(rounded(found["sizes"][-1])))
    out.write_text(json.dumps(rounded(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
