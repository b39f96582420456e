"""The ids that a column gives to rows: integers or strings, each once in all files."""

import itertools
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from hnsw_gpu import inputs, label_inputs
from hnsw_gpu.files import UNSEEN, Advance, Sources, StepRunner

IDS_AT_A_TIME = 1 << 25  # that are compared with each other; 16 bytes each
KEYS_END = 1 << 62  # keys of strings are below it


def ids_of(sources: Sources, column: str | None, start: int, stop: int) -> np.ndarray:
    """Labels (stop - start,) of rows: of a column, or their numbers."""
    if column is None:
        return np.arange(start, stop)
    found = sources.column(column, start, stop).to_numpy()
    try:
        return label_inputs.labels(f"column {column!r}", found)
    except inputs.RowsError as error:
        where = sources.where(start + int(error.rows[0]))
        raise ValueError(f"{where}: column {column!r}: {error.what}") from None


def label_keys(labels: np.ndarray) -> np.ndarray:
    """int64 (n,), equal ones of equal labels: integers themselves, or a hash of 62 bits."""
    if labels.dtype.kind != "T":
        return labels
    digests = (blake2b(text.encode(), digest_size=8).digest() for text in labels.tolist())
    return np.frombuffer(b"".join(digests), np.int64) & (KEYS_END - 1)


def require_ids_once(
    sources: Sources, column: str, spans: Sequence[tuple[int, int]], runner: StepRunner
) -> None:
    """ValueError names the rows of an id that is there twice. spans: of rows, looked at at once."""
    from pyarrow.types import is_integer, is_large_string, is_string

    kind = sources.column_type(column)
    can_be = (is_integer, is_string, is_large_string)
    if not any(is_kind(kind) for is_kind in can_be):
        raise ValueError(f"column {column!r} is {kind}: labels are integers or strings")
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
    """The least and the largest key of the ids of some rows, each of which is there once."""
    keys = label_keys(ids_of(sources, column, start, stop))
    _require_once(sources, column, keys, np.arange(start, stop))
    return (int(keys.min()), int(keys.max())) if len(keys) else None


def _require_once_within(
    sources: Sources, column: str, least: int, beyond: int, *, advance: Advance
) -> None:
    """Of the ids whose keys are from `least` up to `beyond`, of all rows."""
    keys, rows = [], []
    for start in range(0, len(sources), IDS_AT_A_TIME):
        stop = min(start + IDS_AT_A_TIME, len(sources))
        some = label_keys(ids_of(sources, column, start, stop))
        within = np.flatnonzero((some >= least) & (some < beyond))
        keys.append(some[within])
        rows.append(start + within)
    _require_once(sources, column, np.concatenate(keys), np.concatenate(rows))


def _require_once(sources: Sources, column: str, keys: np.ndarray, rows: np.ndarray) -> None:
    order = np.argsort(keys, kind="stable")
    for place in np.flatnonzero(keys[order][1:] == keys[order][:-1]).tolist():
        pair = [int(row) for row in rows[order[place : place + 2]]]
        one, other = (ids_of(sources, column, row, row + 1).tolist()[0] for row in pair)
        if one == other:  # of strings, the keys of others may be equal by chance
            first, second = map(sources.where, pair)
            raise ValueError(f"column {column!r}: {one!r} is in {first}, and in {second}")
