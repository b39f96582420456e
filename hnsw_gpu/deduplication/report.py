"""The report of a deduplication of files: what it adds to a result's, and its two forms."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hnsw_gpu.deduplication.report_page import write_page
from hnsw_gpu.deduplication.result import DedupResult
from hnsw_gpu.files import Sources, atomic_file

POINTS = 40  # of the curve
GROUPS, MEMBERS = 50, 20  # the largest groups that the report shows, and rows of each


def curve(result: DedupResult, points: int = POINTS) -> list[dict[str, Any]]:
    """What narrower limits would keep: counts at evenly spaced thresholds."""
    parameters = result.report["parameters"]
    key = "threshold" if "threshold" in parameters else "max_distance"
    wide = parameters[key]
    end = max(wide, 1.0) if key == "threshold" else 0.0
    counts = ("kept", "near_duplicates", "groups", "pairs")
    curve = []
    for place in range(points):
        at = wide + (end - wide) * place / (points - 1)
        report = result.regroup(**{key: at}).report if place else result.report
        curve.append({key: at, **{name: report[name] for name in counts}})
        if at == end:
            break
    return curve


def largest_groups(
    result: DedupResult, sources: Sources, text_column: str | None
) -> list[dict[str, Any]]:
    """The largest groups, of each its kept row and the rows nearest to that, with their texts."""
    groups = _largest(result)
    wanted = [np.append(members, head) for head, _, members in groups]
    rows = np.unique(np.concatenate(wanted)) if wanted else np.empty(0, np.int64)
    texts = [None] * len(rows) if text_column is None else sources.take(text_column, rows)
    described = {
        row: {"id": name, "text": text}
        for row, name, text in zip(rows.tolist(), result.names(rows), texts, strict=True)
    }

    def nearness(row: int) -> dict[str, Any]:
        told = result.nearness(result.engine_distance[row : row + 1].astype(np.float64))
        return {name: float(value[0]) for name, value in told.items()}

    return [
        {
            **described[head],
            "size": size,
            "members": [described[row] | nearness(row) for row in members.tolist()],
        }
        for head, size, members in groups
    ]


def _largest(result: DedupResult) -> list[tuple[int, int, np.ndarray]]:
    """(kept row, rows of the group, int64 the nearest of them) of the largest groups."""
    dropped = np.flatnonzero(result.duplicate_of >= 0)
    order = dropped[np.argsort(result.duplicate_of[dropped], kind="stable")]
    heads, starts, sizes = np.unique(
        result.duplicate_of[order], return_index=True, return_counts=True
    )
    groups = []
    for g in np.argsort(-sizes, kind="stable")[:GROUPS]:
        members = order[starts[g] : starts[g] + sizes[g]]
        nearest = members[np.argsort(result.engine_distance[members], kind="stable")][:MEMBERS]
        groups.append((int(heads[g]), int(sizes[g]) + 1, nearest))
    return groups


def write_report(out: Path, report: dict[str, Any]) -> None:
    """report.json, and report.html that shows it."""
    with atomic_file(out / "report.json") as file:
        file.write(json.dumps(report, indent=1, allow_nan=False).encode())
    write_page(out / "report.html", report)
