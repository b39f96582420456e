"""Search under a filter (R8): a walk with a larger beam, or all allowed nodes compared.

An engine (`cpu_engine.py`, `gpu_engine.py`) has two verbs, `walk` and `compare`; here is when which
is used. With a filter, ef counts allowed nodes: the beam is larger by their share. `mask` says
which nodes are allowed: None (all), or bool (n,) or (q, n).
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from hnsw_gpu.engine.keys import KEY_NONE, key_distances, key_nodes
from hnsw_gpu.engine.search import pack_bits
from hnsw_gpu.engine.walk import Queries, Walk

FEW = 64  # see `_beam_capacity`: a step of the walk costs as much as comparing 64 rows in a scan


class Engine(Protocol):
    """What finds nodes."""

    @property
    def node_count(self) -> int: ...

    def can_walk(self, k: int, keeps_allowed: bool) -> bool:
        """Can a beam hold k keys, beside k allowed ones where those are kept (R8, R10)?"""

    def walk(self, queries: Queries, walk: Walk, allowed: np.ndarray | None = None) -> np.ndarray:
        """Keys (q, k) of the nearest nodes that a walk of the graph meets (R3-R10).

        allowed: packed bits of nodes, uint32 (words,) or (q, words).
        """

    def compare(self, queries: Queries, ids: np.ndarray, k: int, threads: int = 1) -> np.ndarray:
        """Keys (q, k) of the nearest of nodes `ids` (m,), all compared by the finest rows.

        A stored node that asks is compared with itself, if it is among the ids.
        """

    def own_keys(self, ids: np.ndarray) -> np.ndarray:
        """Keys (m,) of stored nodes (m,) by their distance to themselves."""


def nearest(engine: Engine, queries: Queries, walk: Walk, mask: np.ndarray | None) -> np.ndarray:
    """Keys (q, min(k, nodes)) of the allowed nodes nearest to each query."""
    nodes = engine.node_count
    walk = walk.within(nodes)
    if mask is not None and mask.all():
        mask = None
    can_walk = engine.can_walk(walk.k, mask is not None or queries.own is not None)
    if mask is None:
        if can_walk:
            return engine.walk(queries, walk)
        return _compared(engine, queries, np.arange(nodes), walk)
    allowed = np.broadcast_to(mask.sum(axis=-1), queries.size)
    plan = _beam_capacity(allowed, nodes, walk.ef)
    plan[allowed == nodes] = walk.ef  # as without a mask, whatever the others' masks
    plan[:] = plan if can_walk else 0
    keys = np.full((queries.size, walk.k), KEY_NONE, np.uint64)
    for capacity in np.unique(plan[plan > 0]).tolist():
        part = np.flatnonzero(plan == capacity)
        bits = pack_bits(mask if mask.ndim == 1 else mask[part])
        wider = walk._replace(capacity=capacity).within(nodes)
        keys[part] = engine.walk(queries.part(part), wider, bits)
    met = (keys != KEY_NONE).sum(axis=1)
    others = allowed if queries.own is None else allowed - 1
    too_few = (met < np.minimum(walk.k, others)) & ((allowed < nodes) | (plan == 0))
    for part, ids in _same_ids(np.flatnonzero(too_few), mask):
        keys[part] = _compared(engine, queries.part(part), ids, walk)
    return keys


def within(
    engine: Engine,
    queries: Queries,
    is_near: Callable[[np.ndarray], np.ndarray],
    walk: Walk,
    mask: np.ndarray | None,
) -> list[np.ndarray]:
    """Keys (hits,) of each query, of the nodes whose distances float32 (...) `is_near`.

    A query whose beam was full of hits is searched again with twice the ef, until it is not.
    """
    nodes, ef = engine.node_count, walk.ef
    hits = [np.empty(0, np.uint64)] * queries.size
    waiting = np.arange(queries.size if nodes else 0)
    while len(waiting):
        part = mask[waiting] if mask is not None and mask.ndim == 2 else mask
        keys = nearest(engine, queries.part(waiting), walk._replace(k=ef, ef=ef), part)
        is_hit = (keys != KEY_NONE) & is_near(key_distances(keys))
        is_full = is_hit.all(axis=1) & (ef < nodes)
        for i in np.flatnonzero(~is_full):
            hits[waiting[i]] = keys[i][is_hit[i]]
        waiting = waiting[is_full]
        ef *= 2
    return hits


def _compared(engine: Engine, queries: Queries, ids: np.ndarray, walk: Walk) -> np.ndarray:
    """Keys (q, k) of the nearest of all allowed nodes `ids` (m,), of itself to none (R10)."""
    if queries.own is None:
        return engine.compare(queries, ids, walk.k, walk.threads)
    keys = engine.compare(queries, ids, walk.k + 1, walk.threads)
    keys[key_nodes(keys) == queries.own[:, None]] = KEY_NONE
    return np.sort(keys, axis=1)[:, : walk.k]


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
