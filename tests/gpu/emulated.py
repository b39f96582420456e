"""The kernels' call: encoded arrays in, arrays out, as search.py has them.

They run on the emulator or, as PTX, on its executor, or on a GPU.
"""

import functools
from typing import NamedTuple

import emulator
import launches_on_gpu
import numpy as np
import ptx

from hnsw_gpu.engine.keys import KEY_NONE
from hnsw_gpu.engine.search import Result
from hnsw_gpu.gpu import kernel_source, kernel_structs, launch_plan

LANES = 32


class Build(NamedTuple):
    """Which kernel: what it is specialised to, how it is compiled, and from what text."""

    metric: str
    dtype: str
    dim: int
    M: int
    warps: int = 1
    tag_bits: int = 16
    sanitizer: str | None = None
    source: str | None = None  # None: the kernel as it is
    arch: int | None = None  # run the PTX for this compute capability; None: emulate
    on_gpu: bool = False  # run it there

    def library(
        self, kernel: str, has_allowed_keys: bool = False
    ) -> emulator.Library | ptx.Library | launches_on_gpu.Library:
        definitions = kernel_source.definitions(
            self.metric, self.dtype, self.dim, self.M, self.warps, self.tag_bits, has_allowed_keys
        )
        if self.on_gpu:
            return _on_gpu(kernel, tuple(definitions.items()), self.source)
        if self.arch is not None:
            return ptx.compile(kernel, definitions, arch=self.arch, source=self.source)
        return emulator.compile(kernel, definitions, sanitizer=self.sanitizer, source=self.source)

    def launch(
        self, kernel: str, grid, block, args, memory, *, has_allowed_keys=False, **how
    ) -> None:
        """`memory`: the arrays that the structs in `args` point at; all else in it is left out."""
        library = self.library(kernel, has_allowed_keys)
        if self.arch is not None or self.on_gpu:
            how["memory"] = [one for one in memory if isinstance(one, np.ndarray)]
        library.launch(grid, block, args, **how)


@functools.cache
def _on_gpu(kernel: str, definitions: tuple, source: str | None) -> launches_on_gpu.Library:
    return launches_on_gpu.Library(kernel, dict(definitions), source)


def forget_gpu_kernels() -> None:
    """After a stand-in for a GPU."""
    _on_gpu.cache_clear()


def struct(name: str, **fields) -> tuple[np.ndarray, list]:
    """One element of a kernel's struct, and what its fields were given, to be kept alive."""
    value = np.zeros(1, kernel_structs.struct_dtype(name))
    assert set(fields) == set(value.dtype.names)
    for field, content in fields.items():
        value[field] = content.ctypes.data if isinstance(content, np.ndarray) else (content or 0)
    return value, list(fields.values())


def own_memory(array: np.ndarray, dtype=None) -> np.ndarray:
    """A read-only copy in memory of just its size, so that it shows who reads beyond or writes."""
    copy = np.array(array, dtype=dtype, order="C")
    copy.flags.writeable = False
    return copy


def shared_bytes(build: Build, *, ef, ef_upper, k, visited_buckets, has_allowed_keys) -> int:
    """Of one query: what `divide` in search.cu hands out."""
    slots = max(ef, ef_upper) + 1 & ~1
    allowed_keys = (k + 1 & ~1) if has_allowed_keys else 0
    fresh = 0 if build.warps == 1 else 128
    return 8 * (slots + allowed_keys + 64 + fresh) + 16 * visited_buckets + 4 * (128 + 32) + 16


def search(
    build: Build,
    graph,
    rows: np.ndarray,
    queries: np.ndarray,
    *,
    k: int,
    ef: int,
    expand: int = 1,
    ef_upper: int = 1,
    allowed: np.ndarray | None = None,
    own: np.ndarray | None = None,
    visited_buckets: int = 32,
    groups: int = 2,
    blocks: int = 2,
    seed: int | None = 0,
    limit: int | None = None,
    bytes_read: dict[str, int] | None = None,
) -> Result:
    """`search.search` by search.cu. `groups` queries a block (one where warps share a query).

    `limit` shortens the shared memory by as many bytes, which no launch may survive. `bytes_read`
    takes what was read of "rows" and of each array of the graph (PTX, seed None).
    """
    count = len(queries)
    ef = max(ef, k)
    has_allowed_keys = allowed is not None or own is not None
    groups = groups if build.warps == 1 else 1
    arrays = {name: own_memory(array) for name, array in graph._asdict().items()}
    keys = np.zeros((count, k), np.uint64)
    counts = np.full((count, 3), -1, np.int32)
    bits = None if allowed is None else own_memory(np.atleast_2d(allowed))
    arrays["rows"] = own_memory(rows)
    graph_struct, held = struct("Graph", **arrays, top=graph.top)
    task, held_too = struct(
        "Task",
        queries=own_memory(queries),
        allowed=bits,
        own=None if own is None else own_memory(own, np.int32),
        keys=keys,
        counts=counts,
        next_query=np.zeros(1, np.uint32),
        allowed_stride=0 if bits is None or len(bits) == 1 else bits.shape[1],
        query_count=count,
        ef=ef,
        ef_upper=ef_upper,
        k=k,
        expand=expand,
        visited_buckets=visited_buckets,
    )
    one = shared_bytes(
        build,
        ef=ef,
        ef_upper=ef_upper,
        k=k,
        visited_buckets=visited_buckets,
        has_allowed_keys=has_allowed_keys,
    )
    build.launch(
        "search",
        (blocks,),
        (LANES * build.warps * groups,),
        (graph_struct, task),
        [*held, *held_too],
        has_allowed_keys=has_allowed_keys,
        shared_mem=one * groups - (limit or 0),
        seed=seed,
    )
    if bytes_read is not None:
        profile = build.library("search", has_allowed_keys).profile
        bytes_read |= {name: profile.read_of(array)[0] for name, array in arrays.items()}
    return Result(keys, *counts.T)


def compare(
    build: Build,
    rows,
    queries,
    *,
    ids=None,
    candidates=None,
    k=0,
    shares=2,
    seed: int | None = 0,
    bytes_read: dict[str, int] | None = None,
) -> np.ndarray:
    """Sorted keys (q, m) of ids (m,), or of each query's candidates (q, m), by compare.cu.

    k: keys kept of each share, the k smallest of which are returned; 0: all. `bytes_read` takes
    what was read of "refine_rows" (PTX, seed None).
    """
    rows = own_memory(rows)
    count = len(ids) if candidates is None else candidates.shape[1]
    keys = np.full((len(queries), shares * k or count), 7, np.uint64)
    task, held = struct(
        "Comparison",
        rows=rows,
        queries=own_memory(queries),
        ids=None if ids is None else own_memory(ids, np.int32),
        candidates=None if candidates is None else own_memory(candidates),
        keys=keys,
        query_count=len(queries),
        count=count,
        k=k,
    )
    grid = (-(-len(queries) // 8), shares)
    build.launch(
        "compare", grid, (256,), (task,), held, shared_mem=8 * (256 + 8 * k) if k else 0, seed=seed
    )
    if bytes_read is not None:
        bytes_read["refine_rows"] = build.library("compare").profile.read_of(rows)[0]
    if k:  # each share is sorted
        assert (np.diff(keys.reshape(-1, k).astype(object), axis=1) >= 0).all()
    return np.sort(keys, axis=1)[:, : k or count]


def encode(build: Build, vectors: np.ndarray, width: int, seed: int | None = 0) -> np.ndarray:
    """Encoded queries uint8 (q, width) of float32 vectors (q, dim), by encode.cu."""
    queries = np.zeros((len(vectors), width), np.uint8)
    task, held = struct(
        "Encoding", vectors=own_memory(vectors), queries=queries, count=len(vectors)
    )
    grid, block, shared_mem = launch_plan.encode_launch(
        build.dtype, build.dim, len(vectors), launch_plan.of_arch(build.arch or 90)
    )
    build.launch("encode", (grid,), (block,), (task,), held, shared_mem=shared_mem, seed=seed)
    return queries


def keys_to_labels(build: Build, keys, offsets, entry_labels, k, root=False, seed: int | None = 0):
    """Labels and distances (q, k) of keys (q, m), by keys_to_labels.cu."""
    labels = np.zeros((len(keys), k), np.int64)
    distances = np.zeros((len(keys), k), np.float32)
    task, held = struct(
        "KeysToLabels",
        keys=own_memory(keys),
        offsets=own_memory(offsets),
        entry_labels=own_memory(entry_labels),
        labels=labels,
        distances=distances,
        query_count=len(keys),
        m=keys.shape[1],
        k=k,
        root=int(root),
    )
    grid = (-(-len(keys) // 4),)
    build.launch("keys_to_labels", grid, (128,), (task,), held, seed=seed)
    return labels, distances


__all__ = ["KEY_NONE", "Build", "compare", "encode", "keys_to_labels", "search"]
