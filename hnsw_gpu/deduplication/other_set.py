"""The nearest vector of another set: is a row a near-duplicate of what is already there?"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.deduplication.distinct_rows import ROWS_AT_ONCE
from hnsw_gpu.deduplication.near_pairs import Nodes, lists_for_rows
from hnsw_gpu.engine import KEY_NONE, encode, key_distances, key_nodes, rerank, rows_as_queries
from hnsw_gpu.index import Index, load_index
from hnsw_gpu.string_labels import BYTES, Names, names_of

CANDIDATES = 8  # of an index, whose rows may be coarse; exact distances decide among them


class NearestOther(NamedTuple):
    """Of each of some encoded rows (m, row) its nearest in another set."""

    labels: np.ndarray  # int64 (m,): -1 where there is none
    distances: np.ndarray  # float32 (m,): +inf where there is none
    names: Names | None = None  # of labels that are strings, which then are their numbers

    def arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` takes."""
        strings = {} if self.names is None else self.names.arrays(len(self.names))
        return {"labels": self.labels, "distances": self.distances, **strings}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "NearestOther":
        names = names_of(arrays) if BYTES in arrays else None
        return cls(arrays["labels"], arrays["distances"], names)


FindNearest = Callable[[np.ndarray], NearestOther]  # of encoded rows (m, row)


def is_path(value: Any) -> bool:
    """Is it the path of a saved index, rather than an index or vectors?"""
    return isinstance(value, (str, os.PathLike))


def open_index(value: Any, metric: str, dim: int) -> Index:
    """The Index, given itself or as a path; ValueError where it cannot be compared with."""
    index = load_index(value, device="cpu") if is_path(value) else value
    if index.dim != dim or inputs.METRICS[index.metric] != inputs.METRICS[metric]:
        raise ValueError(
            f"against: an index of {index.metric} and {index.dim} dimensions, expected {metric} "
            f"and {dim}"
        )
    return index


def nearest_in_index(index: Index, metric: str, ef: int, threads: int) -> FindNearest:
    """By searching it; labels are its own. Distances are those of its vectors, as it keeps them."""
    is_whole = (index.refine or index.dtype) == "fp32"
    names = Names(index.labels.tolist()) if index.label_kind == "strings" else None

    def nearest(rows: np.ndarray) -> NearestOther:
        labels, _ = index.search(rows[:, : index.dim], CANDIDATES, ef=ef, threads=threads)
        if names is not None:
            labels = names.numbers(labels.ravel()).reshape(labels.shape)
        known, place = np.unique(labels[labels >= 0], return_inverse=True)
        # whole rows are of unit length already, and another division would change their last bits
        stored = index.vectors(known if names is None else names.strings(known))
        kept = encode(stored, "l2" if is_whole else metric, "fp32")
        keys = np.full(labels.shape, KEY_NONE, np.uint64)
        keys[labels >= 0] = place.astype(np.uint64) << np.uint64(1)
        found = _exactly_nearest(keys, Nodes(kept, None, metric), known, rows, threads)
        return found._replace(names=names)

    return nearest


def nearest_in_nodes(nodes: Nodes, labels: np.ndarray, ef: int, threads: int) -> FindNearest:
    """Of nodes that carry int64 labels (n,)."""

    def nearest(rows: np.ndarray) -> NearestOther:
        lists = lists_for_rows(nodes, rows, ef, threads)
        keys = np.empty((len(rows), 0), np.uint64)
        if len(nodes.rows):
            keys = lists(np.arange(len(rows)), CANDIDATES)
        return _exactly_nearest(keys, nodes, labels, rows, threads)

    return nearest


def _exactly_nearest(
    keys: np.ndarray, nodes: Nodes, labels: np.ndarray, rows: np.ndarray, threads: int
) -> NearestOther:
    """The nearest of candidates, keys (m, k), by exact distances; 0 of an equal row, but ip."""
    if not len(nodes.rows):
        return NearestOther(np.full(len(rows), -1), np.full(len(rows), np.inf, np.float32))
    queries = rows_as_queries(rows)
    best = rerank(keys, nodes.rows, queries, nodes.metric, k=1, threads=threads)[:, 0]
    is_none = best == KEY_NONE
    found = np.where(is_none, 0, key_nodes(best))
    distances = np.where(is_none, np.float32(np.inf), key_distances(best))
    if nodes.metric != "ip":
        for column in keys.T[::-1]:  # copies, whatever a product rounds to
            candidate = np.where(column == KEY_NONE, 0, key_nodes(column))
            is_equal = (nodes.rows[candidate] == rows).all(axis=1) & (column != KEY_NONE)
            found[is_equal], distances[is_equal] = candidate[is_equal], 0
    return NearestOther(np.where(is_none, -1, labels[found]), distances)


def nearest_of_all(
    parts: list[FindNearest],
    rows: Callable[[slice], np.ndarray],
    count: int,
    advance: Callable[[int], object],
) -> NearestOther:
    """Over several parts of the other set, of `count` rows."""
    labels, distances = np.full(count, -1), np.full(count, np.inf, np.float32)
    names = None
    for part in parts:
        for start in range(0, count, ROWS_AT_ONCE):
            place = slice(start, min(start + ROWS_AT_ONCE, count))
            label, distance, names = part(rows(place))
            is_nearer = distance < distances[place]
            labels[place] = np.where(is_nearer, label, labels[place])
            distances[place] = np.where(is_nearer, distance, distances[place])
            advance(place.stop - start)
    if names is None:
        return NearestOther(labels, distances)
    used = np.unique(labels[labels >= 0])  # of all strings of an index, those that are told
    labels = np.where(labels < 0, -1, np.searchsorted(used, labels))
    return NearestOther(labels, distances, Names(names.strings(used).tolist()))
