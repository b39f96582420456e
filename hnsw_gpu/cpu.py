"""The CPU engine: which nodes are nearest, by walking the graph or by comparing all allowed ones.

Arrays in, keys out. With a filter, ef counts allowed nodes: the beam is larger by their share.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hnsw_gpu import beam, exact
from hnsw_gpu.graph import Graph
from hnsw_gpu.search import pack_bits, search
from hnsw_gpu.vectors import encode_queries, rows_as_queries

FEW = 64  # see `_beam_capacity`: a step of the walk costs as much as comparing 64 rows in a scan


class CpuEngine(NamedTuple):
    """The arrays of an index, as they are for the length of one search."""

    graph: Graph
    rows: np.ndarray  # (n, row) encoded as dtype
    refine_rows: np.ndarray | None  # (n, row) encoded as refine
    metric: str
    dtype: str
    refine: str

    @property
    def finest(self) -> np.ndarray:
        """The rows that decide where all are compared."""
        return self.rows if self.refine_rows is None else self.refine_rows

    def nearest(
        self, queries: np.ndarray, k: int, ef: int, mask: np.ndarray | None, **walk: int
    ) -> np.ndarray:
        """Keys (q, min(k, nodes)); `mask` of allowed nodes is None or bool, (n,) or (q, n)."""
        nodes = len(self.rows)
        k = min(k, nodes)
        if mask is None or mask.all():
            return self._walk(queries, k, max(ef, k), None, **walk)
        allowed = np.broadcast_to(mask.sum(axis=-1), len(queries))
        plan = _beam_capacity(allowed, nodes, max(ef, k))
        plan[allowed == nodes] = max(ef, k)  # as without a mask, whatever the others' masks
        keys = np.full((len(queries), k), beam.KEY_NONE, np.uint64)
        for capacity in np.unique(plan[plan > 0]):
            part = np.flatnonzero(plan == capacity)
            part_mask = mask if mask.ndim == 1 else mask[part]
            keys[part] = self._walk(
                queries[part], k, max(ef, k), part_mask, capacity=capacity, **walk
            )
        met = (keys != beam.KEY_NONE).sum(axis=1)
        too_few = (met < np.minimum(k, allowed)) & (allowed < nodes)
        for part, ids in _same_ids(np.flatnonzero(too_few), mask):
            keys[part] = self._exact(queries[part], ids, k, walk["threads"])
        return keys

    def _walk(
        self,
        queries: np.ndarray,
        k: int,
        ef: int,
        mask: np.ndarray | None,
        *,
        capacity: int | None = None,
        **walk: int,
    ) -> np.ndarray:
        """Search the graph, and re-rank the `ef` best by the refine rows."""
        nodes = len(self.rows)
        ef = min(ef, max(nodes, 1))
        found = search(
            self.graph,
            self.rows,
            encode_queries(queries, self.metric, self.dtype),
            self.metric,
            k=k if self.refine_rows is None else ef,
            ef=ef if capacity is None else min(int(capacity), nodes),
            allowed=None if mask is None else pack_bits(mask),
            **walk,
        )
        if self.refine_rows is None:
            return found.keys
        encoded = encode_queries(queries, self.metric, self.refine)
        return self._rerank(found.keys, encoded, k, walk["threads"])

    def _rerank(self, keys: np.ndarray, encoded: np.ndarray, k: int, threads: int) -> np.ndarray:
        return exact.rerank(keys, self.refine_rows, encoded, self.metric, k=k, threads=threads)

    def _exact(self, queries: np.ndarray, ids: np.ndarray, k: int, threads: int) -> np.ndarray:
        """Compare the listed nodes, by the finest rows."""
        encoded = encode_queries(queries, self.metric, self.refine or self.dtype)
        return self._exact_encoded(encoded, ids, k, threads)

    def _exact_encoded(
        self, encoded: np.ndarray, ids: np.ndarray, k: int, threads: int
    ) -> np.ndarray:
        return exact.exact_ids(self.finest, ids, encoded, self.metric, k=k, threads=threads)

    def within(
        self,
        queries: np.ndarray,
        is_near: Callable[[np.ndarray], np.ndarray],
        ef: int,
        mask: np.ndarray | None,
        threads: int,
    ) -> list[np.ndarray]:
        """Keys (hits,) of each query, of the nodes whose distances float32 (...) `is_near`.

        A query whose beam was full of hits is searched again with twice the ef, until it is not.
        """
        nodes = len(self.rows)
        hits = [np.empty(0, np.uint64)] * len(queries)
        waiting = np.arange(len(queries) if nodes else 0)
        while len(waiting):
            part = mask[waiting] if mask is not None and mask.ndim == 2 else mask
            keys = self.nearest(
                queries[waiting], ef, ef, part, expand=1, ef_upper=1, threads=threads
            )
            is_hit = (keys != beam.KEY_NONE) & is_near(beam.distances(keys))
            is_full = is_hit.all(axis=1) & (ef < nodes)
            for i in np.flatnonzero(~is_full):
                hits[waiting[i]] = keys[i][is_hit[i]]
            waiting = waiting[is_full]
            ef *= 2
        return hits

    def nearest_others(
        self, ids: np.ndarray, k: int, ef: int, mask: np.ndarray | None, threads: int
    ) -> np.ndarray:
        """Keys (m, k or fewer) of the nodes nearest to stored nodes (m,), themselves left out."""
        nodes = len(self.rows)
        k = min(k, max(nodes - 1, 1))
        ef = min(max(ef, k), nodes)
        capacity = ef
        if mask is not None:
            capacity = min(int(_beam_capacity(mask.sum(), nodes, ef)), nodes)
        own = rows_as_queries(self.finest[ids])
        if mask is not None and not capacity:
            return self._exact_others(own, ids, mask, k, threads)
        found = search(
            self.graph,
            self.rows,
            rows_as_queries(self.rows[ids]),
            self.metric,
            k=k if self.refine_rows is None else ef,
            ef=capacity,
            allowed=None if mask is None else pack_bits(mask),
            own=ids.astype(np.int32),
            threads=threads,
        )
        keys = found.keys if self.refine_rows is None else self._rerank(found.keys, own, k, threads)
        if mask is not None:
            met = (keys != beam.KEY_NONE).sum(axis=1)
            few = np.flatnonzero(met < min(k, mask.sum() - 1))
            keys[few] = self._exact_others(own[few], ids[few], mask, k, threads)
        return keys

    def _exact_others(
        self, own: np.ndarray, ids: np.ndarray, mask: np.ndarray, k: int, threads: int
    ) -> np.ndarray:
        """Keys (m, k) for stored nodes (m,), by comparing all allowed ones."""
        keys = self._exact_encoded(own, np.flatnonzero(mask), k + 1, threads)
        keys[beam.nodes(keys) == ids[:, None]] = beam.KEY_NONE
        return np.sort(keys, axis=1)[:, :k]

    def own_keys(self, ids: np.ndarray) -> np.ndarray:
        """Keys (m,) of stored nodes (m,) by their distance to themselves."""
        return exact.own_keys(self.finest, ids, self.metric)


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
