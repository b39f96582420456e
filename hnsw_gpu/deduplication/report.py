"""The report of a deduplication of files: what it adds to a result's, and its two forms."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hnsw_gpu.deduplication.checkpoints import MADE_BY
from hnsw_gpu.deduplication.report_page import write_page
from hnsw_gpu.deduplication.result import DedupResult
from hnsw_gpu.files import Sources, atomic_file, texts

RESULTS = ("duplicates.parquet", "pairs.parquet", "kept.parquet", "report.json", "report.html")
POINTS = 40  # of the curve
TEXT = 500  # characters shown of a text or an id
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
    names: list[Any] = rows.tolist()
    if result.ids is not None:  # as text: JSON's numbers end at 2^53, and it has no dates
        names = [_cut(name) for name in texts(result.names_array(rows))]
    told = [None] * len(rows) if text_column is None else sources.texts(text_column, rows)
    described = {
        row: {"id": name, "text": _cut(text)}
        for row, name, text in zip(rows.tolist(), names, told, strict=True)
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


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= TEXT else text[: TEXT - 3] + "..."


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


def require_ours(out: Path, read: Sequence[Path], *, is_begun: bool) -> None:
    """ValueError where a result would replace a file that is read, or that is not provably ours.

    Ours are the results in OUT beside a report of ours, or beside a run that is begun there.
    """
    there = [out / name for name in RESULTS if os.path.lexists(out / name)]
    for path in there:
        if any(path.exists() and given.exists() and path.samefile(given) for given in read):
            raise ValueError(f"{path} is an input: it would be overwritten")
    if there and not is_begun and not _is_ours(out / "report.json"):
        raise ValueError(
            f"{there[0]} is there, and no report.json of {MADE_BY} beside it: it would be "
            "overwritten; move it away, or choose another output folder"
        )


def _is_ours(report: Path) -> bool:
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("made_by") == MADE_BY


def write_report(out: Path, report: dict[str, Any]) -> None:
    """report.json, and report.html that shows it."""
    with atomic_file(out / "report.json") as file:
        file.write(json.dumps(report, indent=1, allow_nan=False).encode())
    write_page(out / "report.html", report)
