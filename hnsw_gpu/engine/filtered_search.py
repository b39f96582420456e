"""Search under a filter (R8): a walk with a larger beam, or all allowed nodes compared.

An engine (`cpu_engine.py`, `gpu_engine.py`) has two verbs, `walk` and `compare`; here is when which
is used. With a filter, ef counts allowed nodes: the beam is larger by their share, and a query
whose final beam holds too few (a filter may bar just what is near) walks again with one twice as
large. Where a walk would cost more than comparing all allowed nodes, or its beam does not fit, they
are compared.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from hnsw_gpu.engine.bits import count_on, pack_bits, places_on
from hnsw_gpu.engine.keys import KEY_NONE, key_distances, key_nodes
from hnsw_gpu.engine.walk import Queries, Walk, Walked

FEW = 64  # a step of the walk costs as much as comparing 64 rows in a scan
CHANCE = 2  # standard deviations that a beam may hold fewer allowed nodes than ef


class Allowed(NamedTuple):
    """Nodes that may be returned, to all queries or to each."""

    bits: np.ndarray  # packed, uint32 (words,) or (q, words)
    counts: np.ndarray | int  # how many they are, or int64 (q,)

    @classmethod
    def of(cls, bits: np.ndarray) -> "Allowed":
        """Those of packed bits."""
        return cls(bits, count_on(bits))

    def part(self, rows: np.ndarray) -> "Allowed":
        """The same for some of the queries."""
        if self.bits.ndim == 1:
            return self
        return Allowed(self.bits[rows], np.asarray(self.counts)[rows])


class Engine(Protocol):
    """What finds nodes."""

    @property
    def node_count(self) -> int: ...

    def can_walk(self, k: int, keeps_allowed: bool, capacity: int = 0) -> bool:
        """Can a beam of `capacity`, k or more, be held, and k allowed keys beside it (R8, R10)?"""

    def walk(self, queries: Queries, walk: Walk, allowed: np.ndarray | None = None) -> Walked:
        """The nearest nodes that a walk of the graph meets (R3-R10).

        allowed: packed bits of nodes, uint32 (words,) or (q, words).
        """

    def compare(self, queries: Queries, ids: np.ndarray, k: int, threads: int = 1) -> np.ndarray:
        """Keys (q, k) of the nearest of nodes `ids` (m,), all compared by the finest rows.

        A stored node that asks is compared with itself, if it is among the ids.
        """

    def own_keys(self, ids: np.ndarray) -> np.ndarray:
        """Keys (m,) of stored nodes (m,) by their distance to themselves."""


def nearest(engine: Engine, queries: Queries, walk: Walk, allowed: Allowed | None) -> np.ndarray:
    """Keys (q, min(k, nodes)) of the nodes nearest to each query, of those allowed; None: all."""
    nodes = engine.node_count
    walk = walk.within(nodes)
    if allowed is not None and np.all(allowed.counts == nodes):
        allowed = None
    if not engine.can_walk(walk.k, allowed is not None or queries.own is not None):
        every = Allowed(pack_bits(np.ones(nodes, bool)), nodes)
        return _compared(engine, queries, allowed or every, walk)
    if allowed is None:
        return engine.walk(queries, walk).keys
    return _allowed_nearest(engine, queries, walk, allowed)


def _allowed_nearest(engine: Engine, queries: Queries, walk: Walk, allowed: Allowed) -> np.ndarray:
    """As `nearest`, where nodes are barred: beams twice as large until they hold ef allowed ones.

    What chance takes from a beam is let be: half of all beams hold less than their mean.
    """
    nodes = engine.node_count
    counts = np.broadcast_to(allowed.counts, queries.size)
    is_barred = counts < nodes  # the others are answered as without a filter
    capacity = np.where(is_barred, _beam_capacity(counts, nodes, walk.ef), walk.ef)
    enough = walk.ef - CHANCE * np.sqrt(walk.ef * (1 - counts / nodes))
    keys = np.full((queries.size, walk.k), KEY_NONE, np.uint64)
    is_compared = np.zeros(queries.size, bool)
    waiting = np.arange(queries.size)
    while len(waiting):
        is_compared[waiting] = is_barred[waiting] & (counts[waiting] <= FEW * capacity[waiting])
        waiting = waiting[~is_compared[waiting]]
        lacking = [np.empty(0, np.int64)]
        for size in np.unique(capacity[waiting]).tolist():
            part = waiting[capacity[waiting] == size]
            if size > walk.ef and not engine.can_walk(walk.ef, True, size):
                is_compared[part] = True
                continue
            larger = walk._replace(capacity=size)
            found = engine.walk(queries.part(part), larger, allowed.part(part).bits)
            keys[part] = found.keys
            lacking.append(part[is_barred[part] & (size - found.blocked < enough[part])])
        waiting = np.concatenate(lacking)
        capacity[waiting] *= 2
    met = (keys != KEY_NONE).sum(axis=1)
    others = counts if queries.own is None else counts - 1
    is_compared |= is_barred & (met < np.minimum(walk.k, others))
    part = np.flatnonzero(is_compared)
    if len(part):
        keys[part] = _compared(engine, queries.part(part), allowed.part(part), walk)
    return keys


def within(
    engine: Engine,
    queries: Queries,
    is_near: Callable[[np.ndarray], np.ndarray],
    walk: Walk,
    allowed: Allowed | None,
) -> list[np.ndarray]:
    """Keys (hits,) of each query, of the nodes whose distances float32 (...) `is_near`.

    A query whose beam was full of hits is searched again with twice the ef, until it is not.
    """
    nodes, ef = engine.node_count, walk.ef
    hits = [np.empty(0, np.uint64)] * queries.size
    waiting = np.arange(queries.size if nodes else 0)
    while len(waiting):
        part = None if allowed is None else allowed.part(waiting)
        keys = nearest(engine, queries.part(waiting), walk._replace(k=ef, ef=ef), part)
        is_hit = (keys != KEY_NONE) & is_near(key_distances(keys))
        is_full = is_hit.all(axis=1) & (ef < nodes)
        for i in np.flatnonzero(~is_full):
            hits[waiting[i]] = keys[i][is_hit[i]]
        waiting = waiting[is_full]
        ef *= 2
    return hits


def _compared(engine: Engine, queries: Queries, allowed: Allowed, walk: Walk) -> np.ndarray:
    """Keys (q, k) of the nearest of all allowed nodes, of itself to none (R10)."""
    keys = np.full((queries.size, walk.k), KEY_NONE, np.uint64)
    for part, ids in _same_ids(queries.size, allowed.bits, engine.node_count):
        asking = queries.part(part)
        if queries.own is None:
            keys[part] = engine.compare(asking, ids, walk.k, walk.threads)
            continue
        found = engine.compare(asking, ids, walk.k + 1, walk.threads)
        found[key_nodes(found) == queries.own[part, None]] = KEY_NONE
        keys[part] = np.sort(found, axis=1)[:, : walk.k]
    return keys


def _beam_capacity(allowed: np.ndarray, nodes: int, ef: int) -> np.ndarray:
    """Capacities (q,) of beams that hold about `ef` allowed nodes where chance chose these (R8).

    A beam is as much larger than ef as nodes are more than allowed ones, in steps of a quarter.
    """
    quarters = -(-4 * nodes // np.maximum(allowed, 1))
    return -(-ef * quarters // 4)


def _same_ids(count: int, bits: np.ndarray, nodes: int) -> list[tuple[slice, np.ndarray]]:
    """Parts of `count` queries and the ids that each may return, those with one filter together."""
    if bits.ndim == 1:
        return [(slice(0, count), places_on(bits, nodes))] if count else []
    return [(slice(i, i + 1), places_on(bits[i], nodes)) for i in range(count)]
