"""The ids that a column gives to rows: each an integer, and once in all files."""

import itertools
from collections.abc import Sequence

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.files import UNSEEN, Advance, Sources, StepRunner

IDS_AT_A_TIME = 1 << 25  # that are compared with each other; 16 bytes each


def ids_of(sources: Sources, column: str | None, start: int, stop: int) -> np.ndarray:
    """int64 labels (stop - start,) of rows: of a column, or their numbers."""
    if column is None:
        return np.arange(start, stop)
    found = sources.column(column, start, stop).to_numpy()
    return inputs.labels(f"column {column!r}", found)


def require_ids_once(
    sources: Sources, column: str, spans: Sequence[tuple[int, int]], runner: StepRunner
) -> None:
    """ValueError names the rows of an id that is there twice. spans: of rows, looked at at once."""
    import pyarrow

    kind = sources.column_type(column)
    if not pyarrow.types.is_integer(kind):
        raise ValueError(f"column {column!r} is {kind}: labels are integers")
    rows = [stop - start for start, stop in spans]
    ends = runner.each(_ends, (sources, column), spans, rows, UNSEEN)
    filled = sorted(pair for pair in ends if pair is not None)
    if all(a[1] < b[0] for a, b in itertools.pairwise(filled)):
        return  # the spans have ranges of their own
    least, beyond = filled[0][0], max(last for _, last in filled) + 1
    parts = -(-len(sources) // IDS_AT_A_TIME)
    edges = [least + (beyond - least) * i // parts for i in range(parts + 1)]
    ranges = list(itertools.pairwise(edges))
    runner.each(_require_once_within, (sources, column), ranges, [0] * parts, UNSEEN)


def _ends(
    sources: Sources, column: str, start: int, stop: int, *, advance: Advance
) -> tuple[int, int] | None:
    """The least and the largest id of some rows, each of which is there once."""
    ids = ids_of(sources, column, start, stop)
    _require_once(sources, column, ids, np.arange(start, stop))
    return (int(ids.min()), int(ids.max())) if len(ids) else None


def _require_once_within(
    sources: Sources, column: str, least: int, beyond: int, *, advance: Advance
) -> None:
    """Of the ids from `least` up to `beyond`, of all rows."""
    ids, rows = [], []
    for start in range(0, len(sources), IDS_AT_A_TIME):
        some = ids_of(sources, column, start, min(start + IDS_AT_A_TIME, len(sources)))
        within = np.flatnonzero((some >= least) & (some < beyond))
        ids.append(some[within])
        rows.append(start + within)
    _require_once(sources, column, np.concatenate(ids), np.concatenate(rows))


def _require_once(sources: Sources, column: str, ids: np.ndarray, rows: np.ndarray) -> None:
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(twice):
        one, other = (sources.where(int(rows[order[twice[0] + i]])) for i in (0, 1))
        raise ValueError(f"column {column!r}: {ids[order[twice[0]]]} is in {one}, and in {other}")
