"""Near-duplicates as pairs: every two nodes of a set within a limit, and how they are found.

`lists(ids, k)` gives keys (m, k) of the k nearest other nodes: of a graph, or by comparing all. A
node whose k-th neighbour is still near is asked again with a larger k, and no other is. Where that
would give more pairs than may be kept, as in one large heap of near-duplicates, the nodes that are
left are *open*: not all of their pairs are known.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hnsw_gpu import answer, beam, exact
from hnsw_gpu.answer import Engine
from hnsw_gpu.vectors import rows_as_queries

FIRST_K = 16
GROWTH = 4  # of k, from one round to the next
PART = 16384  # nodes a call of `lists`

Lists = Callable[[np.ndarray, int], np.ndarray]


class Pairs(NamedTuple):
    """Pairs of nodes, a < b, in ascending order, each once."""

    a: np.ndarray  # int32 (p,)
    b: np.ndarray  # int32 (p,)
    distances: np.ndarray  # float32 (p,)
    is_open: np.ndarray  # bool (nodes,): not all pairs of the node are known
    nearest: np.ndarray  # float32 (nodes,): distance of the nearest other node, +inf where none


def lists_of_graph(engine: Engine, ef: int, threads: int) -> Lists:
    """Of what walks of the graph find (R10)."""

    def lists(ids: np.ndarray, k: int) -> np.ndarray:
        return answer.nearest_others(engine, ids, k, max(ef, 3 * k // 2), None, threads=threads)

    return lists


def lists_of_all(rows: np.ndarray, metric: str, threads: int) -> Lists:
    """Of all nodes, compared: rows (n, row), fp32, encoded."""

    def lists(ids: np.ndarray, k: int) -> np.ndarray:
        keys = np.full((len(ids), min(k + 1, len(rows))), beam.KEY_NONE, np.uint64)
        queries = rows_as_queries(rows[ids])
        block = max(256, min(exact.BLOCK, exact.BLOCK_VALUES // rows.shape[1]))
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            exact.exact_block(keys, part, start, queries, metric, threads=threads)
        keys[beam.nodes(keys) == ids[:, None]] = beam.KEY_NONE
        return np.sort(keys, axis=1)[:, :k]

    return lists


def find_pairs(
    lists: Lists, nodes: int, limit: float, most: int, advance: Callable[[int], object]
) -> Pairs:
    """All pairs within float32 `limit`, but of nodes left open once there would be over `most`.

    advance: told how many nodes are done.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []  # ids, and keys of their near others
    is_open = np.zeros(nodes, bool)
    nearest = np.full(nodes, np.inf, np.float32)
    waiting, k, count = np.arange(nodes), min(FIRST_K, max(nodes - 1, 1)), 0
    while len(waiting):
        full: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(waiting), PART):
            ids = waiting[start : start + PART]
            keys = lists(ids, k)
            nearest[ids] = np.where(keys[:, 0] == beam.KEY_NONE, np.inf, beam.distances(keys[:, 0]))
            is_near = near(keys, limit)
            is_full = np.asarray(is_near.all(axis=1) & (k < nodes - 1))
            ids_of, at = np.nonzero(is_near & ~is_full[:, None])
            found.append((ids[ids_of], keys[ids_of, at]))
            count += len(ids_of)
            full.append((ids[is_full], keys[is_full]))
            advance(len(ids) - int(is_full.sum()))
        waiting = np.concatenate([ids for ids, _ in full])
        if count + len(waiting) * k * GROWTH > most:
            found += [(np.repeat(ids, k), keys.ravel()) for ids, keys in full]
            is_open[waiting] = True
            advance(len(waiting))
            break
        k = min(k * GROWTH, max(nodes - 1, 1))
    a = np.concatenate([ids for ids, _ in found] or [np.empty(0, np.int64)])
    keys = np.concatenate([keys for _, keys in found] or [np.empty(0, np.uint64)])
    return Pairs(*united(a, beam.nodes(keys), beam.distances(keys)), is_open, nearest)


def within(lists: Lists, ids: np.ndarray, limit: float, nodes: int) -> list[np.ndarray]:
    """Keys of all near others of each of some nodes, ascending, however many there are."""
    found = [np.empty(0, np.uint64)] * len(ids)
    waiting, k = np.arange(len(ids)), min(FIRST_K, max(nodes - 1, 1))
    while len(waiting):
        keys = lists(ids[waiting], k)
        is_near = near(keys, limit)
        is_full = is_near.all(axis=1) & (k < nodes - 1)
        for i in np.flatnonzero(~is_full):
            found[waiting[i]] = keys[i][is_near[i]]
        waiting, k = waiting[is_full], min(k * GROWTH, max(nodes - 1, 1))
    return found


def near(keys: np.ndarray, limit: float) -> np.ndarray:
    """bool, like keys: is there a node, within the limit?"""
    is_near: np.ndarray = beam.distances(keys) <= np.float32(limit)
    return is_near & (keys != beam.KEY_NONE)


def united(
    one: np.ndarray, other: np.ndarray, distances: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, distances) of pairs that may be there twice and in either order, as in `Pairs`."""
    a, b = np.minimum(one, other), np.maximum(one, other)
    _, first = np.unique(a.astype(np.uint64) << np.uint64(32) | b.astype(np.uint64), True)
    return a[first].astype(np.int32), b[first].astype(np.int32), distances[first]
