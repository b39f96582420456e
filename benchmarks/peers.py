"""One small class a library, all with the same methods, so that they can be raced.

Rows are unit length (cosine) and their labels are their numbers. A library is imported when it is
built; its name goes into `PEERS` and that is all there is to adding one.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

K = 10
# 10, 11, 12, 13, 14, 15, 17, ... in steps of about 10 %: fine enough to interpolate between
EFS = sorted({round(K * 1.1**i) for i in range(60)})


class Setting(NamedTuple):
    """What every library is built with; the names are the paper's."""

    M: int = 16
    ef_construction: int = 200
    seed: int = 0


class Peer(Protocol):
    @property
    def ladders(self) -> Sequence[Sequence[Any]]:
        """What `search` takes in the place of ef: on a ladder, recall grows with every rung.

        One ladder (`EFS`) for a graph; one for each value of a second knob, where there are two.
        """

    def build(self, base: np.ndarray, setting: Setting, threads: int) -> None: ...

    def search(self, queries: np.ndarray, k: int, rung: Any, threads: int, /) -> np.ndarray:
        """Labels int64 (q, k)."""

    @property
    def nbytes(self) -> int | None:
        """What the library says it holds, where it says so."""


class Reranked(NamedTuple):
    """A beam of ef, of which the nearest are compared once more by their refine rows."""

    ef: int
    rerank: int


class Ours:
    """hnsw_gpu on the CPU; "int8" and "int4" walk on codes and re-rank with `refine` rows."""

    def __init__(self, dtype: str, refine: bool | str = False) -> None:
        self.dtype = dtype
        self.refine = refine
        self.ladders: tuple = (EFS,)
        if refine:
            self.ladders += tuple([Reranked(ef, n) for ef in EFS if ef > n] for n in (20, 40))

    def build(self, base: np.ndarray, setting: Setting, threads: int) -> None:
        import hnsw_gpu

        self.index = hnsw_gpu.Index(
            base.shape[1],
            "cosine",
            self.dtype,
            M=setting.M,
            ef_construction=setting.ef_construction,
            refine=self.refine,
            seed=setting.seed,
        )
        self.index.add(base, threads=threads)

    def search(self, queries: np.ndarray, k: int, rung: int | Reranked, threads: int) -> np.ndarray:
        ef, rerank = rung if isinstance(rung, Reranked) else (rung, "auto")
        return self.index.search(queries, k, ef=ef, rerank=rerank, threads=threads).labels

    @property
    def nbytes(self) -> int | None:
        return self.index.nbytes

    @property
    def arrays(self) -> tuple:
        """(graph, encoded rows), for what looks inside."""
        return self.index._state.graph, self.index._state.rows


class Hnswlib:
    """Its own build compiles with -march=native; see README.md on checking that it did."""

    ladders = (EFS,)
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

    ladders = (EFS,)
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


class Probes(NamedTuple):
    """Lists scanned, and candidates for each of the k answers: those are compared as fp32."""

    nprobe: int
    k_factor: int


class FaissIvf:
    """IVF2048,PQ(dim/2)x4fsr,RFlat: lists of four-bit codes scanned by FastScan, then re-ranked.

    The coarse quantizer leans on BLAS: see README.md on the settings to unset.
    """

    ladders = tuple(
        [Probes(n, factor) for n in sorted({round(1.1**i) for i in range(81)}) if n <= 2048]
        for factor in (2, 4, 8, 16, 32)
    )
    nbytes: int | None = None

    def build(self, base: np.ndarray, setting: Setting, threads: int) -> None:
        import faiss

        self.faiss = faiss
        faiss.omp_set_num_threads(threads)
        n, dim = base.shape
        lists = min(2048, n // 39)  # faiss asks for 39 rows a list to learn from
        codes = next(count for count in range(dim // 2, 0, -1) if dim % count == 0)
        description = f"IVF{lists},PQ{codes}x4fsr,RFlat"
        self.index: Any = faiss.index_factory(dim, description, faiss.METRIC_INNER_PRODUCT)
        self.lists = faiss.extract_index_ivf(self.index)
        self.lists.cp.seed = setting.seed
        self.index.train(base)
        self.index.add(base)

    def search(self, queries: np.ndarray, k: int, probes: Probes, threads: int) -> np.ndarray:
        self.faiss.omp_set_num_threads(threads)
        # more lists than there are, and faiss 1.15 finds wrong neighbours
        self.lists.nprobe = min(probes.nprobe, self.lists.nlist)
        self.index.k_factor = probes.k_factor
        return self.index.search(queries, k)[1]


class Svs:
    """Intel's Vamana graph on fp32 rows, of as many links a node, with its own other settings.

    By inner product its alpha is at most 1: 0.95, which is its 1.2 of squared distances.
    """

    ladders = (EFS,)
    nbytes: int | None = None

    def build(self, base: np.ndarray, setting: Setting, threads: int) -> None:
        import svs

        parameters = svs.VamanaBuildParameters(
            alpha=0.95, graph_max_degree=2 * setting.M, window_size=setting.ef_construction
        )
        self.index = svs.Vamana.build(parameters, base, svs.DistanceType.MIP, num_threads=threads)

    def search(self, queries: np.ndarray, k: int, ef: int, threads: int) -> np.ndarray:
        import svs

        if self.index.num_threads != threads:  # a new pool of threads
            self.index.num_threads = threads
        buffer = svs.SearchBufferConfig(ef)  # prefetching as the class has it: builds differ
        self.index.search_parameters = svs.VamanaSearchParameters(buffer)
        return self.index.search(queries, k)[0].astype(np.int64)


class Usearch:
    ladders = (EFS,)

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


class Maker(NamedTuple):
    make: Callable[[], Peer]
    module: str  # to import
    distribution: str  # whose version is recorded
    leans_on_blas: bool = False


PEERS: dict[str, Maker] = {
    "ours-fp32": Maker(lambda: Ours("fp32"), "hnsw_gpu", "hnsw-gpu"),
    "ours-int8": Maker(lambda: Ours("int8", True), "hnsw_gpu", "hnsw-gpu"),
    "ours-int4": Maker(lambda: Ours("int4", "fp16"), "hnsw_gpu", "hnsw-gpu"),
    "hnswlib": Maker(Hnswlib, "hnswlib", "hnswlib"),
    "faiss": Maker(Faiss, "faiss", "faiss-cpu"),
    "faiss-ivf": Maker(FaissIvf, "faiss", "faiss-cpu", leans_on_blas=True),
    "svs": Maker(Svs, "svs", "scalable-vs"),
    "usearch": Maker(Usearch, "usearch", "usearch"),
}

LABELS = {
    "ours-int4": "hnsw_gpu int4 + refine",
    "ours-int8": "hnsw_gpu int8 + refine",
    "ours-fp32": "hnsw_gpu fp32",
    "svs": "SVS Vamana fp32",
    "faiss": "faiss HNSW",
    "faiss-ivf": "faiss IVF, 4 bits + refine",
}


def reason_to_skip(name: str) -> str:
    """Why the peer cannot be imported here; empty if it can."""
    module, distribution = PEERS[name].module, PEERS[name].distribution
    try:
        importlib.import_module(module)
    except ImportError as error:  # absent, or not for this processor or Python
        return f"{distribution} cannot be imported: {error}"
    return ""


def make(name: str, dim: int) -> Peer:
    """An empty peer; another was built and searched first, so that nothing is left to compile."""
    warm = PEERS[name].make()
    rows = np.random.default_rng(0).standard_normal((1_000, dim)).astype(np.float32)
    warm.build(rows, Setting(M=4, ef_construction=8), threads=2)
    for threads in (1, 2):
        warm.search(rows[:20], K, warm.ladders[0][0], threads)
    return PEERS[name].make()
