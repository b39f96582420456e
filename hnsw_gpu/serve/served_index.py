"""What a server answers from: a saved index, or collection, with its filters and its canary.

Beside `docs.hnsw` may lie `docs.filters/NAME.npy`, a filter of that name (a bool mask by label, or
int labels of what may be returned), and `docs.canary.npy`, queries (q, dim) that measure recall.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hnsw_gpu.cluster import Cluster
from hnsw_gpu.collection import is_collection, load, saved_checksum
from hnsw_gpu.files import arrays_checksum, read_vectors
from hnsw_gpu.results import SearchResult
from hnsw_gpu.searching import Searching
from hnsw_gpu.serve import formats
from hnsw_gpu.serve.settings import OnRay

CANARY_ROWS = 64
CANARY_K = 10


class Canary(NamedTuple):
    """Queries whose true neighbours are known."""

    queries: np.ndarray  # float32 (q, dim)
    farthest: np.ndarray  # float32 (q, 1) distance of the k-th true neighbour
    k: int

    def recall(self, found: SearchResult) -> float:
        """Recall@k of an answer; ties are not errors."""
        return float((found.distances <= self.farthest).mean())


@dataclass(frozen=True)
class ServedIndex:
    """What is served, from one swap to the next."""

    version: int  # 1, 2, ... since the server began
    path: Path
    checksum: str
    index: Searching
    filters: dict[str, np.ndarray]
    canary: Canary | None  # None: the index is empty


def load_served_index(
    path: Path,
    version: int,
    *,
    device: str = "auto",
    mmap: bool = False,
    threads: int | None,
    on_ray: OnRay | None = None,
) -> ServedIndex:
    """Load an index and the files beside it; compile its kernels, run a search of each kind."""
    checksum = saved_checksum(path) if is_collection(path) else arrays_checksum(path)
    index: Searching
    if on_ray is None:
        index = load(path, mmap=mmap or None, device=device)
    else:
        index = _on_ray(path, on_ray, device, threads)
    try:
        filters = _filters(path, index)
        canary = _canary(path, index, threads)
        index.warm_up(threads)
    except BaseException:
        close_index(index)
        raise
    return ServedIndex(version, path, checksum, index, filters, canary)


def _on_ray(path: Path, on_ray: OnRay, device: str, threads: int | None) -> Cluster:
    gpus = 0 if device in ("auto", "cpu") else 1
    cpus = 2 if threads is None else threads
    return Cluster(
        path, on_ray.replicas, address=on_ray.address, cpus=cpus, gpus=gpus,
        timeout_s=on_ray.timeout_s,
    )  # fmt: skip


def close_index(index: Searching) -> None:
    """End what an index runs beside this process, if anything."""
    if isinstance(index, Cluster):
        index.close()


def _filters(path: Path, index: Searching) -> dict[str, np.ndarray]:
    filters = {}
    for file in sorted(path.with_suffix(".filters").glob("*.npy")):
        _require_file(file)
        try:
            allow = formats.read_npy(file.read_bytes())
            if allow.ndim != 1:
                raise ValueError(f"shape {allow.shape}, expected (n,)")
            index.search(np.empty((0, index.dim), np.float32), 1, allow=allow)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from None
        filters[file.stem] = allow
    return filters


def _require_file(path: Path) -> None:
    """ValueError for a folder, a link that leads nowhere, or a pipe, on which reading waits."""
    if not path.is_file():
        raise ValueError(f"{path}: is not a file")


def _canary(path: Path, index: Searching, threads: int | None) -> Canary | None:
    if not len(index):
        return None
    file = path.with_suffix(".canary.npy")
    if os.path.lexists(file):
        _require_file(file)
        try:
            queries = index.checked_queries(read_vectors(file))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from None
    else:
        queries = index.vectors(index.some_labels(CANARY_ROWS))
    k = min(CANARY_K, len(index))
    truth = index.exact_search(queries, k, threads=threads)
    return Canary(queries, truth.distances[:, -1:], k)


def memory_needed(path: Path) -> int:
    """Roughly the bytes that loading an index takes; 0 of a collection, which is mapped."""
    if is_collection(path):
        return 0
    return path.stat().st_size * 5 // 4
