"""The index in device memory, and the kernels that search it.

CuPy is handed in. Everything here is enqueued on CuPy's current stream, the caller's to choose; the
index itself is written on one stream, and who reads it waits for the event `uploaded`.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from hnsw_gpu.engine import Graph
from hnsw_gpu.gpu import kernel_source, launch_plan
from hnsw_gpu.gpu.cupy_driver import newer_nvrtc, require_capability
from hnsw_gpu.gpu.kernel_structs import argument

logger = logging.getLogger("hnsw_gpu")

LEAST_MAJOR = 7  # of the compute capability: lanes find their equals since then
BLOCK_IDS = 65536  # that are compared before the keys are cut to k
SORT_SCRATCH = 3  # keys' worth for each key that CuPy sorts: the row of each, and all of it twice


class LabelArrays(Protocol):
    """Labels of nodes."""

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and labels, int64: node i carries `labels[offsets[i]:offsets[i + 1]]`."""


class EncodedQueries(NamedTuple):
    """Encoded queries on the device, uint8 (q, bytes)."""

    coarse: Any  # as the rows are
    fine: Any  # as the finest rows are: the same array where there are no refine rows
    own: Any = None  # int32 (q,): the stored nodes that the queries are (R10)


class DeviceIndex:
    """Rows, graph and labels of an index on one GPU, each with room for more.

    number: of the GPU; None: the current one.
    """

    def __init__(
        self,
        cupy: Any,
        metric: str,
        dtype: str,
        refine: str,
        dim: int,
        M: int,
        number: int | None = None,
    ) -> None:
        self._cupy = cupy
        self._metric, self._dtype, self._refine, self._dim, self._M = metric, dtype, refine, dim, M
        self.device = cupy.cuda.Device() if number is None else cupy.cuda.Device(number)
        properties = cupy.cuda.runtime.getDeviceProperties(self.device.id)
        require_capability(cupy, properties, LEAST_MAJOR)
        self.limits = launch_plan.from_device(properties)
        with self.device:
            self.stream = cupy.cuda.Stream(non_blocking=True)
            self.uploaded = end_of_work(cupy)
        # told the counts, int32 (q, 3) on the device, of each batch that is walked
        self.on_counts: Callable[[Any], object] = lambda counts: None
        self._kernels: dict[tuple, Any] = {}
        self._compiling = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Hold nothing, and keep no memory from other streams; nothing may be under way."""
        self._arrays: dict[str, Any] = {}
        self.give_back(self.stream)
        self._labels: LabelArrays | None = None
        self._top = self.node_count = 0
        self.has_refine_rows = bool(self._refine)  # None fit: they stay in the host's memory

    def give_back(self, stream: Any) -> None:
        """Have CuPy keep no memory for a stream that has come to its end."""
        with self.device:
            self._cupy.get_default_memory_pool().free_all_blocks(stream)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held, room for more included."""
        return sum(array.nbytes for array in self._arrays.values())

    def free_bytes(self) -> int:
        """Bytes of device memory that can be had; CuPy keeps some that it gives to nobody else."""
        with self.device:  # CuPy's pool answers for the current one
            pool = self._cupy.get_default_memory_pool()
            return int(self.device.mem_info[0] + pool.free_bytes())

    # ---------------------------------------------------------------- what it holds

    def update(
        self,
        graph: Graph,
        rows: np.ndarray,
        refine_rows: np.ndarray | None,
        changed: np.ndarray | None,
        after: Iterable[Any],
    ) -> None:
        """Upload what is new, after the events `after`; see `GpuEngine.update`."""
        first = self.node_count
        self._require_room(graph)
        with self.device, self.stream:
            for event in after:
                self.stream.wait_event(event)
            self._put("rows", rows, first)
            if refine_rows is not None and self.has_refine_rows:
                self._put("refine_rows", refine_rows, first)
            self._put("neighbors0", graph.neighbors0, 0 if changed is None else first)
            if changed is not None and len(changed):
                links = self._cupy.asarray(graph.neighbors0[changed])
                self._arrays["neighbors0"][self._cupy.asarray(changed)] = links
            for name in ("nodes", "neighbors", "below", "layer_offsets"):
                self._put(name, getattr(graph, name), 0)
            self.uploaded.record(self.stream)
            self.uploaded.synchronize()  # the host's arrays may change after this
        self._top, self.node_count = graph.top, len(rows)

    def set_labels(self, labels: LabelArrays, after: Iterable[Any]) -> None:
        """Upload labels that are not the last ones, after the events `after`."""
        if self._labels is labels:
            return
        self._labels = None
        with self.device, self.stream:
            for event in after:
                self.stream.wait_event(event)
            offsets, entry_labels = labels.packed()
            self._put("label_offsets", offsets, 0)
            self._put("entry_labels", entry_labels, 0)
            self.uploaded.record(self.stream)
        self._labels = labels

    def _require_room(self, graph: Graph) -> None:
        """MemoryError where the index does not fit; if it does without refine rows, do without."""
        parts = launch_plan.index_bytes(
            self._dtype, self._refine, self._dim, self._M, len(graph.neighbors0), len(graph.nodes)
        )
        available = self.free_bytes() + self.nbytes
        if not self.has_refine_rows:
            parts["refine rows"] = 0
        elif sum(parts.values()) > available >= sum(parts.values()) - parts["refine rows"]:
            logger.info(
                "refine rows, %s, stay in the host's memory, where the CPU re-ranks by them: %s of "
                "GPU memory are free",
                gigabytes(parts["refine rows"]), gigabytes(available),
            )  # fmt: skip
            self.has_refine_rows, parts["refine rows"] = False, 0
            self._arrays.pop("refine_rows", None)
        if sum(parts.values()) > available:
            figures = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
            raise MemoryError(
                f"the index takes {gigabytes(sum(parts.values()))} of GPU memory ({figures}), "
                f"and {gigabytes(available)} of {gigabytes(self.device.mem_info[1])} are free; "
                "a smaller dtype or refine takes less, and the CPU has its own memory"
            )

    def _put(self, name: str, array: np.ndarray, first: int) -> None:
        """Copy array[first:] to the device, where the rows before are already; grows by a quarter.

        Where the old copy and the larger one do not fit together, all is copied again.
        """
        old = self._arrays.get(name)
        if old is None:  # as after a growth that found no memory
            first = 0
        if old is None or len(old) < len(array):
            room = len(array) if old is None else max(len(array), len(old) + len(old) // 4)
            row_bytes = array[:1].nbytes
            if old is not None and row_bytes * room > self.free_bytes():
                old, first, room = None, 0, len(array)
                del self._arrays[name]
            grown = self._cupy.empty((room, *array.shape[1:]), array.dtype)
            if old is not None:
                grown[:first] = old[:first]
            self._arrays[name] = grown
        if len(array) > first:
            self._arrays[name][first : len(array)].set(array[first:])

    # ---------------------------------------------------------------- searching it

    def walk(self, batch: EncodedQueries, walk: launch_plan.BeamShape, k: int, allowed: Any) -> Any:
        """Keys (q, k) and counts (q, 3) of search.cu; where there are refine rows, the keys that
        compare.cu makes of what it found.
        """
        cupy, count = self._cupy, len(batch.coarse)
        kernel, planned = self.planned(walk, count)
        keys, counts = cupy.empty((count, walk.k), np.uint64), cupy.empty((count, 3), np.int32)
        next_query = cupy.zeros(1, np.uint32)
        names = ("neighbors0", "nodes", "neighbors", "below", "layer_offsets", "rows")
        graph = argument("Graph", top=self._top, **{name: self._arrays[name] for name in names})
        task = argument(
            "Task",
            queries=batch.coarse,
            allowed=allowed,
            own=batch.own,
            keys=keys,
            counts=counts,
            next_query=next_query,
            allowed_stride=mask_stride(allowed),
            query_count=count,
            ef=max(walk.ef, walk.k),
            ef_upper=walk.ef_upper,
            k=walk.k,
            expand=walk.expand,
            visited_buckets=planned.visited_buckets,
        )
        kernel((planned.grid,), (planned.block,), (graph, task), shared_mem=planned.shared_mem)
        self.on_counts(counts)
        if not self.has_refine_rows:
            return keys, counts
        if k <= launch_plan.MOST_KEPT:
            return self._keep_nearest(batch, k, candidates=keys), counts
        keys = self.compare_keys(batch, candidates=keys)
        keys.sort(axis=1)
        return _cut(keys, k), counts

    def planned(self, walk: launch_plan.BeamShape, queries: int) -> tuple[Any, launch_plan.Plan]:
        """The compiled search.cu for a batch, and how to launch it."""
        plan = functools.partial(
            launch_plan.plan, self._metric, self._dtype, self._dim, self._M, walk,
            queries=queries, nodes=self.node_count, limits=self.limits,
        )  # fmt: skip
        kernel = self._kernel("search", plan().definitions)
        return kernel, plan(registers=kernel.num_regs)

    def compare(self, batch: EncodedQueries, ids: np.ndarray, k: int) -> Any:
        """Keys (q, k or fewer), ascending, of the nearest of int32 ids (m,)."""
        k = min(k, len(ids))
        if 0 < k <= launch_plan.MOST_KEPT:
            return self._keep_nearest(batch, k, ids=self._cupy.asarray(ids))
        best = self._cupy.empty((len(batch.fine), 0), np.uint64)
        for start in range(0, len(ids), BLOCK_IDS):
            part = self._cupy.asarray(ids[start : start + BLOCK_IDS])
            keys = self.compare_keys(batch, ids=part)
            keys = self._cupy.concatenate((best, keys), axis=1) if start else keys
            keys.sort(axis=1)
            best = _cut(keys, k)
        return best

    def _keep_nearest(
        self, batch: EncodedQueries, k: int, ids: Any = None, candidates: Any = None
    ) -> Any:
        """Keys (q, k), ascending, of the nearest of ids (m,) or of keys `candidates` (q, m)."""
        m = len(ids) if candidates is None else candidates.shape[1]
        _, shares = launch_plan.compare_grid(len(batch.fine), m, self.limits)
        keys = self._cupy.empty((len(batch.fine), shares * k), np.uint64)
        self._launch_compare(batch, ids, candidates, keys, k)
        if shares == 1:
            return keys
        keys.sort(axis=1)
        return _cut(keys, k)

    def compare_keys(self, batch: EncodedQueries, ids: Any = None, candidates: Any = None) -> Any:
        """Keys (q, m), in order of ids (m,) or of the keys `candidates` (q, m)."""
        m = len(ids) if candidates is None else candidates.shape[1]
        keys = self._cupy.empty((len(batch.fine), m), np.uint64)
        self._launch_compare(batch, ids, candidates, keys, k=0)
        return keys

    def _launch_compare(
        self, batch: EncodedQueries, ids: Any, candidates: Any, keys: Any, k: int
    ) -> None:
        count, m = len(batch.fine), len(ids) if candidates is None else candidates.shape[1]
        task = argument(
            "Comparison",
            rows=self._arrays["refine_rows" if self.has_refine_rows else "rows"],
            queries=batch.fine,
            ids=ids,
            candidates=candidates,
            keys=keys,
            query_count=count,
            count=m,
            k=k,
        )
        kernel = self._kernel("compare", self._definitions(self._refine or self._dtype))
        grid = launch_plan.compare_grid(count, m, self.limits)
        shared_mem = launch_plan.compare_shared_mem(k)
        kernel(grid, (launch_plan.COMPARE_BLOCK,), (task,), shared_mem=shared_mem)

    def compile_encoder(self) -> None:
        """The smallest kernel: RuntimeError where kernels cannot be compiled or launched here."""
        launch_plan.encode_launch(self._dtype, self._dim, 1, self.limits)
        with self.device:
            self._kernel("encode", self._definitions(self._dtype))

    def compile_all(self) -> None:
        """Every kernel that a search of this index may need, whatever its batch, ef and filter."""
        finest = self._refine or self._dtype
        with self.device:
            for definitions in launch_plan.search_variants(
                self._metric, self._dtype, self._dim, self._M, self.node_count
            ):
                self._kernel("search", definitions)
            for dtype in dict.fromkeys((self._dtype, finest)):
                self._kernel("encode", self._definitions(dtype))
            self._kernel("compare", self._definitions(finest))
            self._kernel("keys_to_labels", self._definitions(self._dtype))

    def encode(self, vectors: Any) -> EncodedQueries:
        def encoded(dtype: str) -> Any:
            size = launch_plan.query_bytes(dtype, self._dim)
            queries = self._cupy.empty((len(vectors), size), np.uint8)
            task = argument("Encoding", vectors=vectors, queries=queries, count=len(vectors))
            kernel = self._kernel("encode", self._definitions(dtype))
            grid, block, shared_mem = launch_plan.encode_launch(
                dtype, self._dim, len(vectors), self.limits
            )
            kernel((grid,), (block,), (task,), shared_mem=shared_mem)
            return queries

        coarse = encoded(self._dtype)
        return EncodedQueries(coarse, encoded(self._refine) if self.has_refine_rows else coarse)

    def keys_to_labels(self, keys: Any, labels: Any, distances: Any, root: bool) -> None:
        """Write labels and distances (q, k) of keys (q, m)."""
        task = argument(
            "KeysToLabels",
            keys=keys,
            offsets=self._arrays["label_offsets"],
            entry_labels=self._arrays["entry_labels"],
            labels=labels,
            distances=distances,
            query_count=len(keys),
            m=keys.shape[1],
            k=labels.shape[1],
            root=root,
        )
        kernel = self._kernel("keys_to_labels", self._definitions(self._dtype))
        kernel((launch_plan.warp_grid(len(keys)),), (launch_plan.THREAD_BLOCK,), (task,))

    def _definitions(self, dtype: str) -> dict[str, int]:
        """For the kernels that have no plan."""
        return kernel_source.definitions(self._metric, dtype, self._dim, self._M, warps=1)

    def _kernel(self, name: str, definitions: dict[str, int]) -> Any:
        """The compiled kernel; CuPy keeps compiled ones on disk."""
        key = (name, *definitions.items())
        with self._compiling:
            if key not in self._kernels:
                self._kernels[key] = self._compiled(name, definitions)
            return self._kernels[key]

    def _compiled(self, name: str, definitions: dict[str, int]) -> Any:
        start = time.perf_counter()
        code, options = kernel_source.source(name), kernel_source.options(definitions)
        try:
            kernel = self._cupy.RawModule(code=code, options=options).get_function(name)
        except Exception as error:  # of CuPy, of NVRTC, of a library that is not there
            advice = newer_nvrtc(self._cupy)
            raise RuntimeError(f"kernels cannot be compiled here: {error}{advice}") from error
        if name in ("search", "encode"):  # the plan reckons with all of the shared memory
            kernel.max_dynamic_shared_size_bytes = self.limits.shared_per_block
            kernel.preferred_shared_memory_carveout = 100
        seconds = time.perf_counter() - start
        logger.info("kernel %s: compiled in %.1f s (%s)", name, seconds, " ".join(options))
        return kernel


def end_of_work(cupy: Any) -> Any:
    """An event to be recorded on a stream: who waits for it sleeps, and spins no core."""
    return cupy.cuda.Event(block=True, disable_timing=True)


def _cut(keys: Any, k: int) -> Any:
    return keys if keys.shape[1] <= k else keys[:, :k].copy()


def mask_stride(allowed: Any) -> int:
    """Words from the bits of one query to those of the next; 0 where all share them."""
    return 0 if allowed is None or allowed.ndim == 1 else int(allowed.shape[1])


def keys_walked(walk: launch_plan.BeamShape, k: int, is_reranked: bool) -> int:
    """Keys a query that `walk` holds at once: as found, and as compared again, where they are."""
    return walk.k + (keys_compared(walk.k, k) if is_reranked else 0)


def keys_compared(ids: int, k: int) -> int:
    """Keys a query that `compare` holds at once: those kept; or a block, and the best so far.

    Shares are merged where queries are few: together they hold some 10,000 times k keys at most,
    and as much scratch as those take to be sorted.
    """
    block, best = min(ids, BLOCK_IDS), min(ids, k)
    if best <= launch_plan.MOST_KEPT:
        return 2 * best
    if ids <= BLOCK_IDS:
        return (1 + SORT_SCRATCH) * block
    return (1 + SORT_SCRATCH) * (block + best) + best


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
