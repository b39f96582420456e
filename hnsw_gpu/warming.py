"""Compiling beforehand what an index needs: for images of containers, and for servers."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.engine import STORAGE, build_graph, encode
from hnsw_gpu.index import Index, load_index

METRICS = ("cosine", "l2", "ip")
DIM = 16
COUNT = 300


def warm(
    dtype: str | Sequence[str] = "fp32", metric: str | Sequence[str] = METRICS
) -> dict[str, float]:
    """Compile what indexes of these dtypes and metrics need, and keep it: seconds by dtype.

    That is all methods of `Index`, with refine rows and without, mapped or not, on the CPU. What
    was compiled before takes no time. The code is kept in $NUMBA_CACHE_DIR, else beside the
    sources, else in the user's cache folder; the logger warns where it can be kept nowhere.
    """
    dtypes = [inputs.one_of("dtype", name, STORAGE) for name in _listed(dtype)]
    metrics = [inputs.metric(name) for name in _listed(metric)]
    return dict(warmed(dtypes, metrics))


def warmed(dtypes: Sequence[str], metrics: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Compile, and give each dtype when that is done, with its seconds."""
    for dtype in dtypes:
        started = time.perf_counter()
        for metric in metrics:
            if dtype in ("fp32", "fp16"):  # of many rows walks read codes
                build_graph(
                    encode(_vectors(), metric, dtype), metric, M=2, ef_construction=2, seed=0,
                    threads=1, advance=lambda _: None, by_codes=True,
                )  # fmt: skip
            for refine in (None,) if dtype == "fp32" else (None, "fp32", "fp16"):
                if refine != dtype:
                    _use(Index(DIM, metric, dtype, refine=refine, M=2, ef_construction=2))
        yield dtype, time.perf_counter() - started


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _vectors() -> np.ndarray:
    """float32 (COUNT, DIM)."""
    rng = np.random.default_rng(0)
    far = np.float32(10) ** rng.integers(-2, 3, (COUNT, 1))
    return rng.normal(size=(COUNT, DIM)).astype(np.float32) * far.astype(np.float32)


def _use(index: Index) -> None:
    """Do whatever can be done with an index.

    Its links are few, and some vectors far from others, so that some cannot be reached at first.
    """
    vectors = _vectors()
    index.add(vectors[: COUNT // 2])
    index.add(vectors[COUNT // 2 :])
    index.add(vectors[:2])  # copies
    queries = vectors[:2]
    few, most = np.arange(4), np.arange(COUNT + 2) % 4 > 0
    for allow in (None, few, most):
        index.search(queries, 2, allow=allow)
    index.exact_search(queries, 2)
    index.search_radius(queries, radius=1)
    index.neighbor_graph(2)
    index.update(most.nonzero()[0][:2], vectors[:2] + 1)
    index.delete(few)
    index.search(queries, 2)
    index.vectors(index.labels[:2])
    index.tune(0.5, k=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "warm.hnsw"
        index.save(path)
        other = load_index(path)
        other.check()
        load_index(path, mmap=True).search(queries, 2)
    other.delete(other.labels)
    other.add(vectors[:9] + 2, np.arange(9) + 2 * COUNT)
    index.merge(other)
    index.compact()
