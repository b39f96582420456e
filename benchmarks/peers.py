"""One small class a library, all with the same three methods, so that they can be raced.

Rows are unit length (cosine) and their labels are their numbers. A library is imported when it is
built; its name goes into `PEERS` and that is all there is to adding one.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np


class Setting(NamedTuple):
    """What every library is built with; the names are the paper's."""

    M: int = 16
    ef_construction: int = 200
    seed: int = 0


class Peer(Protocol):
    def build(self, base: np.ndarray, setting: Setting, threads: int) -> None: ...

    def search(self, queries: np.ndarray, k: int, ef: int, threads: int) -> np.ndarray:
        """Labels int64 (q, k)."""

    @property
    def nbytes(self) -> int | None:
        """What the library says it holds, where it says so."""


class Ours:
    """hnsw_gpu on the CPU; "int8" walks on int8 rows and re-ranks with the kept fp32 rows."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def build(self, base: np.ndarray, setting: Setting, threads: int) -> None:
        import hnsw_gpu

        self.index = hnsw_gpu.Index(
            base.shape[1],
            "cosine",
            self.dtype,
            M=setting.M,
            ef_construction=setting.ef_construction,
            refine=self.dtype != "fp32",
            seed=setting.seed,
        )
        self.index.add(base, threads=threads)

    def search(self, queries: np.ndarray, k: int, ef: int, threads: int) -> np.ndarray:
        return self.index.search(queries, k, ef=ef, threads=threads).labels

    @property
    def nbytes(self) -> int | None:
        return self.index.nbytes

    @property
    def arrays(self) -> tuple:
        """(graph, encoded rows), for what looks inside."""
        return self.index._state.graph, self.index._state.rows


class Hnswlib:
    """Its own build compiles with -march=native; see README.md on checking that it did."""

    nbytes: int | None = None

    def build(self, base: np.ndarray, setting: Setting, threads: int) -> None:
        import hnswlib

        self.index = hnswlib.Index("cosine", base.shape[1])
        self.index.init_index(
            len(base),
            M=setting.M,
            ef_construction=setting.ef_construction,
            random_seed=setting.seed,
        )
        self.index.add_items(base, np.arange(len(base)), num_threads=threads)

    def search(self, queries: np.ndarray, k: int, ef: int, threads: int) -> np.ndarray:
        self.index.set_ef(ef)
        return self.index.knn_query(queries, k, num_threads=threads)[0].astype(np.int64)


class Faiss:
    """IndexHNSWFlat; the inner product of unit rows is their cosine."""

    nbytes: int | None = None

    def build(self, base: np.ndarray, setting: Setting, threads: int) -> None:
        import faiss

        self.faiss = faiss
        faiss.omp_set_num_threads(threads)
        self.index = faiss.IndexHNSWFlat(base.shape[1], setting.M, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = setting.ef_construction
        self.index.add(base)

    def search(self, queries: np.ndarray, k: int, ef: int, threads: int) -> np.ndarray:
        self.faiss.omp_set_num_threads(threads)
        self.index.hnsw.efSearch = ef
        return self.index.search(queries, k)[1]


class Usearch:
    def build(self, base: np.ndarray, setting: Setting, threads: int) -> None:
        from usearch.index import Index

        self.index = Index(
            ndim=base.shape[1],
            metric="cos",
            dtype="f32",
            connectivity=setting.M,
            expansion_add=setting.ef_construction,
        )
        self.index.add(np.arange(len(base)), base, threads=threads)

    def search(self, queries: np.ndarray, k: int, ef: int, threads: int) -> np.ndarray:
        self.index.expansion_search = ef
        return self.index.search(queries, k, threads=threads).keys.astype(np.int64)

    @property
    def nbytes(self) -> int | None:
        return int(self.index.memory_usage)


# name: (how to make one, the distribution whose version is recorded)
PEERS: dict[str, tuple[Callable[[], Peer], str]] = {
    "ours-fp32": (lambda: Ours("fp32"), "hnsw-gpu"),
    "ours-int8": (lambda: Ours("int8"), "hnsw-gpu"),
    "hnswlib": (Hnswlib, "hnswlib"),
    "faiss": (Faiss, "faiss-cpu"),
    "usearch": (Usearch, "usearch"),
}


def make(name: str, dim: int) -> Peer:
    """An empty peer; another was built and searched first, so that nothing is left to compile."""
    factory, _ = PEERS[name]
    warm = factory()
    rows = np.random.default_rng(0).standard_normal((300, dim)).astype(np.float32)
    warm.build(rows, Setting(M=4, ef_construction=8), threads=2)
    for threads in (1, 2):
        warm.search(rows[:20], 10, 10, threads)
    return factory()
