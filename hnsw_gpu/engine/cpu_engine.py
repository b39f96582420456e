"""The CPU engine: walks of the graph and comparisons, of encoded rows. Arrays in, keys out."""

from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine import exact
from hnsw_gpu.engine.graph import Graph
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.engine.vectors import encode_queries, rows_as_queries
from hnsw_gpu.engine.walk import Queries, Walk, Walked


class CpuEngine(NamedTuple):
    """The arrays of an index, for the length of one search. See `filtered_search.Engine`."""

    graph: Graph
    rows: np.ndarray  # (n, row) encoded as dtype
    refine_rows: np.ndarray | None  # (n, row) encoded as refine
    metric: str
    dtype: str
    refine: str

    @property
    def node_count(self) -> int:
        return len(self.rows)

    @property
    def finest(self) -> np.ndarray:
        """The rows that decide where all are compared."""
        return self.rows if self.refine_rows is None else self.refine_rows

    def can_walk(self, k: int, keeps_allowed: bool, capacity: int = 0) -> bool:
        return True

    def walk(self, queries: Queries, walk: Walk, allowed: np.ndarray | None = None) -> Walked:
        walk = walk.within(self.node_count)
        found = search_graph(
            self.graph,
            self.rows,
            self._encoded(queries, self.rows, self.dtype, walk.threads),
            self.metric,
            k=walk.kept(self.refine),
            ef=walk.capacity,
            expand=walk.expand,
            ef_upper=walk.ef_upper,
            allowed=allowed,
            own=None if queries.own is None else queries.own.astype(np.int32),
            threads=walk.threads,
        )
        if self.refine_rows is None:
            return Walked(found.keys, found.blocked)
        return Walked(self.reranked(found.keys, queries, walk), found.blocked)

    def reranked(self, keys: np.ndarray, queries: Queries, walk: Walk) -> np.ndarray:
        """Keys (q, k) of the nearest nodes in keys (q, m), by the finest rows."""
        fine = self._encoded(queries, self.finest, self.refine or self.dtype, walk.threads)
        found: np.ndarray = exact.rerank(
            keys, self.finest, fine, self.metric, k=walk.k, threads=walk.threads
        )
        return found

    def compare(self, queries: Queries, ids: np.ndarray, k: int, threads: int = 1) -> np.ndarray:
        fine = self._encoded(queries, self.finest, self.refine or self.dtype, threads)
        return exact.exact_ids(self.finest, ids, fine, self.metric, k=k, threads=threads)

    def own_keys(self, ids: np.ndarray) -> np.ndarray:
        return exact.own_keys(self.finest, ids, self.metric)

    def _encoded(self, queries: Queries, rows: np.ndarray, dtype: str, threads: int) -> np.ndarray:
        """The queries encoded for `rows` of a dtype; of a stored node, its own row."""
        if queries.encoded is not None:
            return queries.encoded
        if queries.vectors is None:
            return rows_as_queries(rows[queries.own])
        return encode_queries(queries.vectors, self.metric, dtype, threads)
