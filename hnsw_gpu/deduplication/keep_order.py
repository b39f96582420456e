"""Who is kept first: the order of rows that `keep` asks for, and the order of nodes by it."""

from typing import Any

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.deduplication.distinct_rows import Rows
from hnsw_gpu.deduplication.linkage import Neighbors

KEEP = ("first", "last", "medoid")


def row_order(keep: Any, rows: Rows, near: Neighbors) -> np.ndarray:
    """Places in `rows.valid`, in the order of who is kept first; ties to the lower row.

    near: nodes near each node, by which "medoid" counts.
    """
    if not isinstance(keep, str):
        return _by_values(keep, rows)
    inputs.one_of("keep", keep, KEEP)
    places = np.arange(len(rows.valid))
    if keep == "first":
        return places
    if keep == "last":
        return places[::-1]
    copies_of = np.bincount(rows.node_of, minlength=rows.nodes)
    rows_before = np.concatenate([[0], np.cumsum(copies_of[near.nodes])])
    degree = copies_of + rows_before[near.ends] - rows_before[near.starts]
    return np.argsort(-degree[rows.node_of], kind="stable")


def _by_values(keep: Any, rows: Rows) -> np.ndarray:
    which, values = keep
    inputs.one_of("keep", which, ("max", "min"))
    values = inputs.array("keep", values)
    if values.shape != (rows.total,) or values.dtype.kind not in "fiub":
        raise ValueError(f"keep: {values.dtype} {values.shape}, expected ({rows.total},) numbers")
    is_valid = np.zeros(rows.total, bool)
    is_valid[rows.valid] = True
    inputs.refuse("keep", np.isnan(values) & is_valid, "NaN")
    values = values[rows.valid]
    if which == "min":
        return np.argsort(values, kind="stable")
    return len(values) - 1 - np.argsort(values[::-1], kind="stable")[::-1]


def node_order(places: np.ndarray, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Nodes by their first row in that order of places; and that row, of each node."""
    nodes, first = np.unique(rows.node_of[places], return_index=True)
    row_of = np.empty(rows.nodes, np.int64)
    row_of[nodes] = rows.valid[places[first]]
    return nodes[np.argsort(first, kind="stable")], row_of
