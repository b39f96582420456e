"""Which nodes answer a query, whatever engine looks for them: by a walk, or by comparing all.

An engine (`cpu.py`, `gpu.py`) has two verbs, `walk` and `compare`. Here is when which is used. With
a filter, ef counts allowed nodes: the beam is larger by their share. A mask of allowed nodes is
None or bool, (n,) or (q, n).
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np

from hnsw_gpu.engine.keys import KEY_NONE, key_distances, key_nodes
from hnsw_gpu.engine.search import pack_bits

FEW = 64  # see `_beam_capacity`: a step of the walk costs as much as comparing 64 rows in a scan


class Engine(Protocol):
    """What finds nodes. Queries are float32 (q, dim), or None where stored nodes `own` (q,) ask."""

    @property
    def node_count(self) -> int: ...

    def walk(
        self,
        queries: np.ndarray | None,
        k: int,
        ef: int,
        *,
        capacity: int | None = None,
        allowed: np.ndarray | None = None,
        own: np.ndarray | None = None,
        expand: int = 1,
        ef_upper: int = 1,
        threads: int = 1,
    ) -> np.ndarray:
        """Keys (q, k) of the nearest nodes that a walk of the graph meets (R3-R10).

        ef: best of the beam that the refine rows re-rank; capacity: of the beam (None: ef);
        allowed: packed bits of nodes, uint32 (words,) or (q, words).
        """

    def compare(
        self,
        queries: np.ndarray | None,
        ids: np.ndarray,
        k: int,
        *,
        own: np.ndarray | None = None,
        threads: int = 1,
    ) -> np.ndarray:
        """Keys (q, k) of the nearest of nodes `ids` (m,), all compared by the finest rows."""

    def own_keys(self, ids: np.ndarray) -> np.ndarray:
        """Keys (m,) of stored nodes (m,) by their distance to themselves."""


def nearest(
    engine: Engine,
    queries: np.ndarray,
    k: int,
    ef: int,
    mask: np.ndarray | None,
    *,
    expand: int = 1,
    ef_upper: int = 1,
    threads: int = 1,
) -> np.ndarray:
    """Keys (q, min(k, nodes)) of the nodes nearest to queries (q, dim)."""
    nodes = engine.node_count
    k = min(k, nodes)
    ef = max(ef, k)
    walk = partial(engine.walk, expand=expand, ef_upper=ef_upper, threads=threads)
    if mask is None or mask.all():
        return walk(queries, k, ef)
    allowed = np.broadcast_to(mask.sum(axis=-1), len(queries))
    plan = _beam_capacity(allowed, nodes, ef)
    plan[allowed == nodes] = ef  # as without a mask, whatever the others' masks
    keys = np.full((len(queries), k), KEY_NONE, np.uint64)
    for capacity in np.unique(plan[plan > 0]):
        part = np.flatnonzero(plan == capacity)
        bits = pack_bits(mask if mask.ndim == 1 else mask[part])
        keys[part] = walk(queries[part], k, ef, capacity=int(capacity), allowed=bits)
    met = (keys != KEY_NONE).sum(axis=1)
    too_few = (met < np.minimum(k, allowed)) & (allowed < nodes)
    for part, ids in _same_ids(np.flatnonzero(too_few), mask):
        keys[part] = engine.compare(queries[part], ids, k, threads=threads)
    return keys


def within(
    engine: Engine,
    queries: np.ndarray,
    is_near: Callable[[np.ndarray], np.ndarray],
    ef: int,
    mask: np.ndarray | None,
    *,
    expand: int = 1,
    threads: int = 1,
) -> list[np.ndarray]:
    """Keys (hits,) of each query, of the nodes whose distances float32 (...) `is_near`.

    A query whose beam was full of hits is searched again with twice the ef, until it is not.
    """
    nodes = engine.node_count
    hits = [np.empty(0, np.uint64)] * len(queries)
    waiting = np.arange(len(queries) if nodes else 0)
    while len(waiting):
        part = mask[waiting] if mask is not None and mask.ndim == 2 else mask
        keys = nearest(engine, queries[waiting], ef, ef, part, expand=expand, threads=threads)
        is_hit = (keys != KEY_NONE) & is_near(key_distances(keys))
        is_full = is_hit.all(axis=1) & (ef < nodes)
        for i in np.flatnonzero(~is_full):
            hits[waiting[i]] = keys[i][is_hit[i]]
        waiting = waiting[is_full]
        ef *= 2
    return hits


def nearest_others(
    engine: Engine,
    ids: np.ndarray,
    k: int,
    ef: int,
    mask: np.ndarray | None,
    *,
    expand: int = 1,
    threads: int = 1,
) -> np.ndarray:
    """Keys (m, k or fewer) of the nodes nearest to stored nodes (m,), themselves left out."""
    nodes = engine.node_count
    k = min(k, max(nodes - 1, 1))
    ef = min(max(ef, k), nodes)
    walk = partial(engine.walk, None, k, ef, own=ids, expand=expand, threads=threads)
    if mask is None:
        return walk()
    capacity = int(_beam_capacity(mask.sum(), nodes, ef))
    if not capacity:
        return _compare_others(engine, ids, mask, k, threads)
    keys = walk(capacity=capacity, allowed=pack_bits(mask))
    met = (keys != KEY_NONE).sum(axis=1)
    few = np.flatnonzero(met < min(k, mask.sum() - 1))
    if len(few):
        keys[few] = _compare_others(engine, ids[few], mask, k, threads)
    return keys


def _compare_others(
    engine: Engine, ids: np.ndarray, mask: np.ndarray, k: int, threads: int
) -> np.ndarray:
    """Keys (m, k) for stored nodes (m,), by comparing all allowed ones."""
    keys = engine.compare(None, np.flatnonzero(mask), k + 1, own=ids, threads=threads)
    keys[key_nodes(keys) == ids[:, None]] = KEY_NONE
    return np.sort(keys, axis=1)[:, :k]


def _beam_capacity(allowed: np.ndarray, nodes: int, ef: int) -> np.ndarray:
    """Capacities (q,) of beams that meet about `ef` allowed nodes; 0: compare all allowed (R8).

    A beam is as much larger than ef as nodes are more than allowed ones, in steps of a quarter.
    Where that walk would cost more than comparing every allowed node, they are few.
    """
    quarters = -(-4 * nodes // np.maximum(allowed, 1))
    return np.where(allowed**2 <= FEW * ef * nodes, 0, -(-ef * quarters // 4))


def _same_ids(queries: np.ndarray, mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Queries (m,) and the ids that each may return, those with one mask together."""
    if mask.ndim == 1:
        return [(queries, np.flatnonzero(mask))] if len(queries) else []
    return [(queries[i : i + 1], np.flatnonzero(mask[q])) for i, q in enumerate(queries)]
