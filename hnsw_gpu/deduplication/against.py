"""The nearest vector of another set: is a row a near-duplicate of what is already there?"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.deduplication import pairs
from hnsw_gpu.deduplication.pairs import Nodes
from hnsw_gpu.engine import KEY_NONE, encode, key_distances, key_nodes, rerank, rows_as_queries
from hnsw_gpu.index import Index, load

CANDIDATES = 8  # of an index, whose rows may be coarse; exact distances decide among them
ASKED = 16384  # rows at a time

# label int64 (m,) and distance float32 (m,) of the nearest to encoded rows (m, row): -1, inf: none
Nearest = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def is_saved(value: Any) -> bool:
    """Is it the path of an index?"""
    return isinstance(value, (str, os.PathLike))


def opened(value: Any, metric: str, dim: int) -> Index:
    """The Index, given itself or as a path; ValueError where it cannot be compared with."""
    index = load(value, device="cpu") if is_saved(value) else value
    if index.dim != dim or inputs.METRICS[index.metric] != inputs.METRICS[metric]:
        raise ValueError(
            f"against: an index of {index.metric} and {index.dim} dimensions, expected {metric} "
            f"and {dim}"
        )
    return index


def nearest_in_index(index: Index, metric: str, ef: int, threads: int) -> Nearest:
    """By searching it; labels are its own. Distances are those of its vectors, as it keeps them."""
    is_whole = (index.refine or index.dtype) == "fp32"

    def nearest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels, _ = index.search(rows[:, : index.dim], CANDIDATES, ef=ef, threads=threads)
        known, place = np.unique(labels[labels >= 0], return_inverse=True)
        # whole rows are of unit length already, and another division would change their last bits
        kept = encode(index.vectors(known), "l2" if is_whole else metric, "fp32")
        keys = np.full(labels.shape, KEY_NONE, np.uint64)
        keys[labels >= 0] = place.astype(np.uint64) << np.uint64(1)
        found, distances = _decided(keys, kept, rows, metric, threads)
        is_none = found < 0
        return np.where(is_none, -1, known[found] if len(known) else -1), distances

    return nearest


def nearest_in_nodes(nodes: Nodes, labels: np.ndarray, ef: int, threads: int) -> Nearest:
    """Of nodes that carry int64 labels (n,)."""

    def nearest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(nodes.rows):
            return np.full(len(rows), -1), np.full(len(rows), np.inf, np.float32)
        lists = pairs.lists_across(nodes, rows, ef, threads)
        keys = lists(np.arange(len(rows)), CANDIDATES)
        found, distances = _decided(keys, nodes.rows, rows, nodes.metric, threads)
        return np.where(found < 0, -1, labels[found]), distances

    return nearest


def _decided(
    keys: np.ndarray, rows: np.ndarray, asking: np.ndarray, metric: str, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Number (-1: none) and exact distance of the nearest candidate; 0 of an equal row, but ip."""
    queries = rows_as_queries(asking)
    best = rerank(keys, rows, queries, metric, k=1, threads=threads)[:, 0]
    is_none = best == KEY_NONE
    found = np.where(is_none, -1, key_nodes(best))
    distances = np.where(is_none, np.float32(np.inf), key_distances(best))
    for column in (
        keys.T[::-1] if len(rows) and metric != "ip" else ()
    ):  # whatever a product rounds to
        candidate = np.where(column == KEY_NONE, 0, key_nodes(column))
        is_equal = (rows[candidate] == asking).all(axis=1) & (column != KEY_NONE)
        found[is_equal], distances[is_equal] = candidate[is_equal], 0
    return found, distances


def nearest_of_all(
    parts: list[Nearest],
    rows: Callable[[slice], np.ndarray],
    count: int,
    advance: Callable[[int], object],
) -> tuple[np.ndarray, np.ndarray]:
    """Over several parts of the other set: for `count` rows, labels and distances."""
    labels, distances = np.full(count, -1), np.full(count, np.inf, np.float32)
    for part in parts:
        for start in range(0, count, ASKED):
            place = slice(start, min(start + ASKED, count))
            label, distance = part(rows(place))
            is_nearer = distance < distances[place]
            labels[place] = np.where(is_nearer, label, labels[place])
            distances[place] = np.where(is_nearer, distance, distances[place])
            advance(place.stop - start)
    return labels, distances
