"""The CPU engine: walks of the graph and comparisons, of encoded rows. Arrays in, keys out."""

from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine import exact
from hnsw_gpu.engine.graph import Graph
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.engine.vectors import encode_queries, rows_as_queries


class CpuEngine(NamedTuple):
    """The arrays of an index, as they are for the length of one search. See `answer.Engine`."""

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
        ef = min(ef, max(self.node_count, 1))
        found = search_graph(
            self.graph,
            self.rows,
            self._encoded(queries, own, self.rows, self.dtype),
            self.metric,
            k=k if self.refine_rows is None else ef,
            ef=ef if capacity is None else min(capacity, self.node_count),
            expand=expand,
            ef_upper=ef_upper,
            allowed=allowed,
            own=None if own is None else own.astype(np.int32),
            threads=threads,
        )
        if self.refine_rows is None:
            return found.keys
        fine = self._encoded(queries, own, self.refine_rows, self.refine)
        return exact.rerank(found.keys, self.refine_rows, fine, self.metric, k=k, threads=threads)

    def compare(
        self,
        queries: np.ndarray | None,
        ids: np.ndarray,
        k: int,
        *,
        own: np.ndarray | None = None,
        threads: int = 1,
    ) -> np.ndarray:
        fine = self._encoded(queries, own, self.finest, self.refine or self.dtype)
        return exact.exact_ids(self.finest, ids, fine, self.metric, k=k, threads=threads)

    def own_keys(self, ids: np.ndarray) -> np.ndarray:
        return exact.own_keys(self.finest, ids, self.metric)

    def _encoded(
        self, queries: np.ndarray | None, own: np.ndarray | None, rows: np.ndarray, dtype: str
    ) -> np.ndarray:
        """The queries, or the stored nodes that ask, encoded for `rows` of a dtype."""
        if queries is None:
            return rows_as_queries(rows[own])
        return encode_queries(queries, self.metric, dtype)
