"""How the cost of a search grows with the number of rows: the paper promises log n."""

import math
from statistics import median

import numpy as np

from benchmarks import datasets
from benchmarks.peers import K, Ours, Setting, make
from benchmarks.race import Side, interpolate, race_searches, time_in_turn
from hnsw_gpu.engine.search import Result, search_graph
from hnsw_gpu.engine.vectors import encode_queries


def measure(
    dataset_name: str,
    sizes: list[int],
    setting: Setting,
    ef: int,
    target: float,
    rounds: int,
    least_seconds: float,
) -> dict:
    """Microseconds, hops and distances a query, one thread, at a fixed ef and a fixed recall.

    An index for each of `sizes`, as far as there are rows; they are timed in turn.
    """
    rows = len(datasets.load(dataset_name).base)
    sides = [build(dataset_name, n, setting) for n in sorted({min(n, rows) for n in sizes})]
    count, turns = time_in_turn({side: (ef,) for side in sides}, 1, rounds, least_seconds)
    fixed_ef = []
    for side in sides:
        seconds = median(turn[side, ef][0] for turn in turns)
        fixed_ef.append(point(side, ef, seconds / count * 1e6, side.recall(ef)))
    race = race_searches(sides, target, 1, rounds, least_seconds)
    fixed_recall = []
    for side in sides:
        if side.name in race["ef"]:
            microseconds = 1e6 / race["queries_per_s"][side.name]
            fixed_recall.append(point_at_recall(side, race["ef"][side.name], microseconds, target))
    return {
        "dataset": dataset_name,
        "fixed_ef": {"ef": ef, "points": fixed_ef, "fits": fits(fixed_ef)},
        "fixed_recall": {"recall": target, "points": fixed_recall, "fits": fits(fixed_recall)},
    }


def build(dataset_name: str, size: int, setting: Setting) -> Side:
    dataset = datasets.load(dataset_name, rows=size)
    peer = make("ours-fp32", dataset.base.shape[1])
    peer.build(dataset.base, setting, threads=2)
    return Side(str(len(dataset.base)), peer, dataset)


def point(side: Side, ef: int, microseconds: float, recall: float) -> dict:
    counts = counted(side, ef)
    return {
        "rows": len(side.dataset.base),
        "microseconds": microseconds,
        "hops": float(counts.hops.mean()),
        "distances": float(counts.distances.mean()),
        "recall": recall,
    }


def point_at_recall(side: Side, bracket: list[int], microseconds: float, target: float) -> dict:
    """Hops and distances at the target recall, interpolated between the two ef around it."""
    recalls = [side.recall(ef) for ef in bracket]
    ends = [point(side, ef, microseconds, target) for ef in bracket]
    between = {
        field: interpolate(target, recalls, [end[field] for end in ends])
        for field in ("hops", "distances")
    }
    return {**ends[0], **between}


def counted(side: Side, ef: int) -> Result:
    """The engine's own counts."""
    assert isinstance(side.peer, Ours)
    graph, rows = side.peer.arrays
    queries = encode_queries(side.dataset.queries, "cosine", "fp32")
    return search_graph(graph, rows, queries, "cosine", k=K, ef=ef)


def fits(points: list[dict]) -> dict:
    """For each cost: `a + b log2(rows)` by least squares, its R^2, and the exponent of rows."""
    if len(points) < 3:
        return {}
    logs = np.array([math.log2(p["rows"]) for p in points])
    found = {}
    for cost in ("microseconds", "hops", "distances"):
        values = np.array([p[cost] for p in points])
        slope, start = np.polyfit(logs, values, 1)
        rest = values - (start + slope * logs)
        found[cost] = {
            "start": float(start),
            "per_doubling": float(slope),
            "r_squared": float(1 - rest.var() / values.var()),
            "exponent": float(np.polyfit(logs, np.log2(values), 1)[0]),
        }
    return found
