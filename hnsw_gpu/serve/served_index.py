"""What a server answers from: a saved index, or collection, with its filters and its canary.

Beside `docs.hnsw` may lie `docs.filters/NAME.npy`, a filter of that name (a bool mask by label, or
the labels that may be returned), and `docs.canary.npy`, queries (q, dim) that measure recall.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from hnsw_gpu import label_inputs
from hnsw_gpu.cluster import Cluster
from hnsw_gpu.collection import is_collection, load, load_collection, saved_checksum
from hnsw_gpu.files import arrays_checksum
from hnsw_gpu.results import SearchResult
from hnsw_gpu.searching import Searching
from hnsw_gpu.serve import formats
from hnsw_gpu.serve.saved_place import Saved, beside, content
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
    path: Saved
    checksum: str
    index: Searching
    filters: dict[str, np.ndarray]
    canary: Canary | None  # None: the index is empty


def load_served_index(
    path: Saved,
    version: int,
    *,
    device: str = "auto",
    mmap: bool = False,
    threads: int | None,
    on_ray: OnRay | None = None,
) -> ServedIndex:
    """Load an index and the files beside it; compile its kernels, run a search of each kind."""
    is_one = isinstance(path, Path) and not is_collection(path)
    checksum = arrays_checksum(path) if is_one else saved_checksum(path)  # type: ignore[arg-type]
    index: Searching
    if on_ray is not None:
        index = _on_ray(path, on_ray, device, threads)
    elif isinstance(path, Path):
        index = load(path, mmap=mmap or None, device=device)
    else:
        index = load_collection(path, device=device)
    try:
        filters = _filters(path, index)
        canary = _canary(path, index, threads)
        index.warm_up(threads)
    except BaseException:
        close_index(index)
        raise
    return ServedIndex(version, path, checksum, index, filters, canary)


def _on_ray(path: Saved, on_ray: OnRay, device: str, threads: int | None) -> Cluster:
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


def _filters(path: Saved, index: Searching) -> dict[str, np.ndarray]:
    around, name = beside(path, ".filters")
    folder, filters = around.within(name), {}
    for name in folder.names():
        if not name.endswith(".npy"):
            continue
        try:
            allow = label_inputs.label_array("allow", formats.read_npy(content(folder, name)))
            if allow.ndim != 1:
                raise ValueError(f"shape {allow.shape}, expected (n,)")
            index.search(np.empty((0, index.dim), np.float32), 1, allow=allow)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder.place(name)}: {error}") from None
        filters[PurePosixPath(name).stem] = allow
    return filters


def _canary(path: Saved, index: Searching, threads: int | None) -> Canary | None:
    if not len(index):
        return None
    folder, name = beside(path, ".canary.npy")
    if folder.has(name):
        try:
            queries = index.checked_queries(formats.read_npy(content(folder, name)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder.place(name)}: {error}") from None
    else:
        queries = index.vectors(index.some_labels(CANARY_ROWS))
    k = min(CANARY_K, len(index))
    truth = index.exact_search(queries, k, threads=threads)
    return Canary(queries, truth.distances[:, -1:], k)


def memory_needed(path: Saved) -> int:
    """Roughly the bytes that loading an index takes; 0 of a collection, which is mapped."""
    if not isinstance(path, Path) or is_collection(path):
        return 0
    return path.stat().st_size * 5 // 4
