"""How near pairs are found: every two nodes within a limit.

`lists(ids, k)` gives keys (m, k) of the k nearest others of some nodes: of a graph, or by comparing
all. A node whose k-th neighbour is still near is asked again with a larger k, and no other is.
Where that would give more pairs than may be kept, as in one large heap of near-duplicates, the
nodes that are left are *open*: not all of their pairs are known.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hnsw_gpu.deduplication.counting_sort import order_of_pairs
from hnsw_gpu.deduplication.distinct_rows import ROWS_AT_ONCE
from hnsw_gpu.engine import (
    KEY_NONE,
    Graph,
    block_rows,
    exact_block,
    key_distances,
    key_nodes,
    rows_as_queries,
    search_graph,
)

FIRST_K = 16
K_FACTOR = 4  # from one round to the next

NearestLists = Callable[[np.ndarray, int], np.ndarray]


class Nodes(NamedTuple):
    """Distinct vectors, ready to be searched."""

    rows: np.ndarray  # (n, row) fp32, encoded
    graph: Graph | None  # None: all are compared
    metric: str


class Found(NamedTuple):
    """What asking for near others gave, of `ids` (m,) that were asked."""

    asked: np.ndarray  # int64 (p,): node that asked
    keys: np.ndarray  # uint64 (p,): of one near it
    is_open: np.ndarray  # bool (m,): there may be more near it
    nearest: np.ndarray  # float32 (m,): distance of the nearest other, +inf where none


def lists_of_itself(nodes: Nodes, ef: int, threads: int) -> NearestLists:
    """Of the nodes themselves: others of the same set (R10)."""

    def lists(ids: np.ndarray, k: int) -> np.ndarray:
        queries = rows_as_queries(nodes.rows[ids])
        if nodes.graph is not None:
            return _walked(nodes, queries, k, ef, threads, own=ids.astype(np.int32))
        keys = _compared(nodes, queries, k + 1, threads)
        keys[key_nodes(keys) == ids[:, None]] = KEY_NONE
        return np.sort(keys, axis=1)[:, :k]

    return lists


def lists_for_rows(nodes: Nodes, rows: np.ndarray, ef: int, threads: int) -> NearestLists:
    """Of other encoded rows (m, row), which ask by their number."""

    def lists(ids: np.ndarray, k: int) -> np.ndarray:
        queries = rows_as_queries(rows[ids])
        if nodes.graph is not None:
            return _walked(nodes, queries, k, ef, threads)
        return _compared(nodes, queries, k, threads)

    return lists


def _walked(
    nodes: Nodes,
    queries: np.ndarray,
    k: int,
    ef: int,
    threads: int,
    own: np.ndarray | None = None,
) -> np.ndarray:
    assert nodes.graph is not None
    k = min(k, len(nodes.rows))
    ef = capacity(nodes, k, ef)
    return search_graph(
        nodes.graph, nodes.rows, queries, nodes.metric, k=k, ef=ef, own=own, threads=threads
    ).keys


def capacity(nodes: Nodes, k: int, ef: int) -> int:
    """Of the beam that walks for k."""
    return min(max(ef, 3 * k // 2), len(nodes.rows))


def _compared(nodes: Nodes, queries: np.ndarray, k: int, threads: int) -> np.ndarray:
    rows = nodes.rows
    keys = np.full((len(queries), min(k, len(rows))), KEY_NONE, np.uint64)
    block = block_rows(rows.shape[1])
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        exact_block(keys, part, start, queries, nodes.metric, threads=threads)
    return keys


def find_pairs(
    lists: NearestLists,
    ids: np.ndarray,
    others: int,
    limit: float,
    most: int,
    advance: Callable[[int], object],
    nearest_of_others: np.ndarray | None = None,
) -> Found:
    """All near others of `ids` (m,), each of which has `others`, within float32 `limit`.

    Nodes are left open once there would be over `most` pairs. advance: told how many are done.
    nearest_of_others: float32 (others,), lowered to the distances that lists show.
    """
    asked, found = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    is_open, nearest = np.zeros(len(ids), bool), np.full(len(ids), np.inf, np.float32)
    waiting, k, count = np.arange(len(ids)), min(FIRST_K, others), 0
    while len(waiting) and others > 0:
        full: list[tuple[np.ndarray, np.ndarray]] = []  # places in ids, and their keys
        for start in range(0, len(waiting), ROWS_AT_ONCE):
            places = waiting[start : start + ROWS_AT_ONCE]
            keys = lists(ids[places], k)
            first = keys[:, 0]
            nearest[places] = np.where(first == KEY_NONE, np.inf, key_distances(first))
            if nearest_of_others is not None:
                _lower(nearest_of_others, keys[keys != KEY_NONE])
            is_near = near(keys, limit)
            is_full = np.asarray(is_near.all(axis=1) & (k < others))
            row, at = np.nonzero(is_near & ~is_full[:, None])
            asked.append(ids[places[row]])
            found.append(keys[row, at])
            count += len(row)
            full.append((places[is_full], keys[is_full]))
            advance(len(places) - int(is_full.sum()))
        waiting = np.concatenate([places for places, _ in full])
        if count + len(waiting) * k * K_FACTOR > most:
            asked += [np.repeat(ids[places], keys.shape[1]) for places, keys in full]
            found += [keys.ravel() for _, keys in full]
            is_open[waiting] = True
            advance(len(waiting))
            break
        k = min(k * K_FACTOR, others)
    return Found(np.concatenate(asked), np.concatenate(found), is_open, nearest)


def find_all_near(
    lists: NearestLists, ids: np.ndarray, others: int, limit: float
) -> list[np.ndarray]:
    """Keys of all near others of each of `ids` (m,), ascending, however many there are."""
    found = [np.empty(0, np.uint64)] * len(ids)
    waiting, k = np.arange(len(ids)), min(FIRST_K, others)
    while len(waiting) and others > 0:
        keys = lists(ids[waiting], k)
        is_near = near(keys, limit)
        is_full = is_near.all(axis=1) & (k < others)
        for i in np.flatnonzero(~is_full):
            found[waiting[i]] = keys[i][is_near[i]]
        waiting, k = waiting[is_full], min(k * K_FACTOR, others)
    return found


def _lower(nearest: np.ndarray, keys: np.ndarray) -> None:
    np.minimum.at(nearest, key_nodes(keys), key_distances(keys))


def near(keys: np.ndarray, limit: float) -> np.ndarray:
    """bool, like keys: is there a node, within the limit?"""
    is_near: np.ndarray = key_distances(keys) <= np.float32(limit)
    return is_near & (keys != KEY_NONE)


def united(
    one: np.ndarray, other: np.ndarray, distances: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (a, b, distances) with a < b, ascending, each once: of pairs in any order, or twice."""
    a, b = np.minimum(one, other), np.maximum(one, other)
    order = order_of_pairs(a, b)
    a, b = a[order], b[order]
    is_first = np.ones(len(a), bool)
    is_first[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    return (
        a[is_first].astype(np.int32),
        b[is_first].astype(np.int32),
        distances[order[is_first]],
    )
