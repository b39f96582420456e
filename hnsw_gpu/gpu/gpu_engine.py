"""The GPU engine: the CPU engine's verbs, arrays in, keys out, over an index in the GPU's memory.

Whatever is allocated is used in the order of one stream, or kept until its use has ended: CuPy
gives freed memory to the next that asks on the same stream.
"""

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from hnsw_gpu.engine import (
    KEY_NONE,
    CpuEngine,
    Queries,
    SharedLock,
    Walk,
    Walked,
    rows_as_queries,
)
from hnsw_gpu.gpu import launch_plan
from hnsw_gpu.gpu.cupy_driver import cupy_with_a_gpu
from hnsw_gpu.gpu.device_arrays import DeviceArrays
from hnsw_gpu.gpu.device_index import (
    DeviceIndex,
    EncodedQueries,
    LabelArrays,
    end_of_work,
    keys_compared,
    keys_walked,
    mask_stride,
)
from hnsw_gpu.gpu.host_batches import HostBatches, Slot, parts
from hnsw_gpu.gpu.link_changes import LinkChanges

logger = logging.getLogger("hnsw_gpu")


_of_other_processes: list["GpuEngine"] = []  # never freed: that would call CUDA


def on_gpu(device: str, cpu: CpuEngine, dim: int, version: int) -> "GpuEngine | None":
    """What `cpu` holds, on a GPU; None where that cannot be and device is "auto".

    "cuda" is the current GPU, "cuda:1" one by number: RuntimeError says what is missing,
    MemoryError what does not fit.
    """
    engine, number = None, device.partition(":")[2]
    try:
        M = cpu.graph.neighbors.shape[1]
        engine = GpuEngine(
            cpu.metric, cpu.dtype, cpu.refine, dim, M, int(number) if number else None
        )
        engine.bring(version, cpu)
    except (RuntimeError, MemoryError) as error:
        if engine is not None:
            engine.close()
        if device != "auto":  # CuPy's own errors are made of numbers, not of a text
            kind = MemoryError if isinstance(error, MemoryError) else RuntimeError
            raise kind(f"device={device!r}: {error}") from error
        logger.info("device='auto': searching on the CPU: %s", error)
        return None
    logger.info("searching on %s", engine.name)
    return engine


def unavailable_reason() -> str:
    """Reason GPU search is unavailable; empty if available."""
    try:
        GpuEngine("l2", "fp32", "", 1, 2)
    except RuntimeError as error:
        return str(error)
    return ""


class GpuEngine:
    """An index on a GPU, the current one or that of a number; RuntimeError says what one lacks.

    The GPU holds one version of an index; `at` runs what asks for another, after bringing it. There
    may be many threads in `at`, and in `walk`, `compare`, `own_keys` and `search_on_device`; none
    is while `update` runs. CUDA works in no forked process: there `at` is a RuntimeError.
    """

    def __init__(
        self, metric: str, dtype: str, refine: str, dim: int, M: int, number: int | None = None
    ) -> None:
        self._process = os.getpid()
        self._cupy = cupy_with_a_gpu(number)
        self._dtype, self._refine, self._dim = dtype, refine, dim
        self._index = DeviceIndex(self._cupy, metric, dtype, refine, dim, M, number)
        self._index.compile_encoder()
        self._device = self._index.device
        self._batches = HostBatches(self._cupy, self._index)
        self._arrays = DeviceArrays(self._cupy, self._device, dim)
        self._cpu: CpuEngine | None = None  # what is here, in the host's memory
        self._version = -1  # of what is here
        self._changes = LinkChanges()
        self._using = SharedLock()
        self._lock = threading.RLock()  # of `_searches`, and of labels while they are used
        # not waited for, by stream, oldest first: the event at the end, and the arrays in use
        self._searches: dict[int, deque[tuple[Any, Any]]] = {}

    @property
    def name(self) -> str:
        """Of the GPU."""
        properties = self._cupy.cuda.runtime.getDeviceProperties(self._device.id)
        return str(properties["name"].decode())

    @property
    def number(self) -> int:
        """Of the GPU, as CuPy counts them."""
        return int(self._device.id)

    @property
    def is_usable(self) -> bool:
        """Is this the process that CUDA was started in?"""
        return self._process == os.getpid()

    @property
    def reranks_on_host(self) -> bool:
        """Do the refine rows not fit the GPU, so that the CPU re-ranks by its own?"""
        return bool(self._refine) and not self._index.has_refine_rows

    @property
    def node_count(self) -> int:
        """Nodes on the GPU."""
        return self._index.node_count

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that the index holds, room for more included."""
        return self._index.nbytes

    def update(self, cpu: CpuEngine, changed: np.ndarray | None = None) -> None:
        """Upload what `cpu` has: rows, and links of nodes, that the last update did not bring.

        `changed`: int (m,) ids of older nodes whose links on layer 0 are new; None: all may be.
        Self searches read rows of `cpu` again, and re-ranking does where the refine rows do not fit
        the GPU. MemoryError where all else does not.
        """
        if changed is not None:
            changed = changed[changed < self.node_count]
        self._index.update(cpu.graph, cpu.rows, cpu.refine_rows, changed, self._ends())
        self._searches = {}
        self._cpu = cpu

    def note(self, version: int, changed: np.ndarray | None) -> None:
        """Before `at` is asked for a version: nodes (m,) whose links on layer 0 are new in it.

        None: it shares nothing with the version before.
        """
        self._changes.note(version, changed, self._version, self.node_count)

    def at(self, version: int, cpu: CpuEngine, work: Callable[[], Any]) -> Any:
        """(work(),) over version `version`, which `cpu` holds; None if a later one is here."""
        self._require_own_process()
        found = None
        while found is None and self._version <= version:
            found = self._using.shared(lambda: (work(),) if self._version == version else None)
            if found is None:
                self._using.exclusive(lambda: self.bring(version, cpu))
        return found

    def bring(self, version: int, cpu: CpuEngine) -> None:
        """Upload what this version has and the one that is here has not."""
        if self._version >= version:
            return
        changed = self._changes.between(self._version, version)
        if changed is None:
            self._forget()
            changed = np.empty(0, np.int64)  # all is new
        self._version = -1  # until all is there; a signal handler may raise at any line
        try:
            self.update(cpu, changed)
        except BaseException:
            self._forget()
            raise
        self._version = version

    def compile_all(self) -> None:
        """Compile now whatever kernel a search may need, so that none waits for it later."""
        self._require_own_process()
        self._index.compile_all()

    def _require_own_process(self) -> None:
        if not self.is_usable:
            raise RuntimeError(
                "the index is on the GPU of the process that forked this one, and CUDA works in no "
                'forked process: start processes by "spawn", or search here after index.to("cpu")'
            )

    def close(self) -> None:
        """Give the memory back to CuPy, when the last search has ended."""
        if self.is_usable:
            self._using.exclusive(self._close)
        else:
            _of_other_processes.append(self)

    def _close(self) -> None:
        self._forget()
        self._version = sys.maxsize  # `at` brings nothing any more

    def _forget(self) -> None:
        with self._device:
            for event in self._ends():
                event.synchronize()
            self._index.stream.synchronize()
        self._searches = {}
        self._cpu = None
        self._version = -1
        self._batches.forget()
        self._index.forget()

    def _ends(self) -> list[Any]:
        """Of the last search of each stream: those before it have ended when it has."""
        return [pending[-1][0] for pending in self._searches.values()]

    # ---------------------------------------------------------------- numpy in, numpy out

    def can_walk(self, k: int, keeps_allowed: bool, capacity: int = 0) -> bool:
        """Does a beam of `capacity`, k or more, fit shared memory, with k allowed keys if kept?"""
        capacity = max(k, capacity)
        plan = launch_plan.BeamShape(capacity, k, has_allowed_keys=keeps_allowed)
        return capacity <= launch_plan.largest_ef(plan, self.node_count, self._index.limits)

    def walk(self, queries: Queries, walk: Walk, allowed: np.ndarray | None = None) -> Walked:
        """The nearest nodes that a walk of the graph meets (R3-R10).

        allowed: packed bits, uint32 (words,) or (q, words). ValueError: a beam of ef is too large.
        """
        allowed, walk = _one_row(allowed), walk.within(self.node_count)
        planned = self._planned(walk, allowed is not None or queries.own is not None)
        width = planned.k if self.reranks_on_host else walk.k
        keys = np.full((queries.size, width), KEY_NONE, np.uint64)
        counts = np.zeros((queries.size, 3), np.int32)
        found = Walked(keys, counts[:, 2])
        if not self.node_count:
            return found

        def work(slot: Slot, part: slice) -> Any:
            batch = self._upload_queries(slot, queries.part(part))
            bits = None
            if allowed is not None:
                bits = slot.upload("allowed", allowed if allowed.ndim == 1 else allowed[part])
            return self._index.walk(batch, planned, min(walk.k, planned.k), bits)

        keys_held = keys_walked(planned, walk.k, self._index.has_refine_rows)
        bytes_a_query = self._bytes_a_query(keys_held) + 4 * mask_stride(allowed)
        self._batches.run((keys, counts), bytes_a_query, work)
        if self.reranks_on_host:
            assert self._cpu is not None
            return Walked(self._cpu.reranked(keys, queries, walk), found.blocked)
        return found

    def compare(self, queries: Queries, ids: np.ndarray, k: int, threads: int = 1) -> np.ndarray:
        """Keys (q, k), ascending, of the nearest of `ids` (m,), all compared by the finest rows.

        A stored node that asks is compared with itself, if it is among the ids.
        """
        if self.reranks_on_host:
            assert self._cpu is not None
            return self._cpu.compare(queries, ids, k, threads)
        ids = np.ascontiguousarray(ids, np.int32)
        result = np.full((queries.size, k), KEY_NONE, np.uint64)
        if not len(ids):
            return result

        def work(slot: Slot, part: slice) -> Any:
            return (self._index.compare(self._upload_queries(slot, queries.part(part)), ids, k),)

        self._batches.run((result,), self._bytes_a_query(keys_compared(len(ids), k)), work)
        return result

    def own_keys(self, ids: np.ndarray) -> np.ndarray:
        """Keys (m,) of stored nodes (m,) by their distance to themselves, in the finest rows."""
        if self.reranks_on_host:
            assert self._cpu is not None
            return self._cpu.own_keys(ids)

        def work(slot: Slot, part: slice) -> Any:
            keys = ids[part, None].astype(np.uint64) << np.uint64(1)
            candidates = slot.upload("candidates", keys)
            batch = self._upload_queries(slot, Queries(own=ids[part]))
            return (self._index.compare_keys(batch, candidates=candidates),)

        result = np.full((len(ids), 1), KEY_NONE, np.uint64)
        self._batches.run((result,), self._bytes_a_query(2), work)
        return result[:, 0]

    def _planned(self, walk: Walk, keeps_allowed: bool) -> launch_plan.BeamShape:
        """The numbers that decide a launch."""
        walk = walk.within(self.node_count)
        return launch_plan.BeamShape(
            ef=walk.capacity,
            k=walk.kept(self._refine),
            ef_upper=min(walk.ef_upper, max(self.node_count, 1)),
            expand=walk.expand,
            has_allowed_keys=keeps_allowed,
        )

    def _upload_queries(self, slot: Slot, queries: Queries) -> EncodedQueries:
        """Queries, or the stored nodes that ask, encoded on the device."""
        if queries.encoded is not None:  # for the one kind of rows that there is
            given = slot.upload("coarse", queries.encoded)
            return EncodedQueries(given, given)
        if queries.vectors is not None:
            return self._index.encode(slot.upload("queries", queries.vectors))
        ids = np.ascontiguousarray(queries.own, np.int32)
        assert self._cpu is not None
        coarse = fine = slot.upload("coarse", rows_as_queries(self._cpu.rows[ids]))
        if self._index.has_refine_rows:
            fine = slot.upload("fine", rows_as_queries(self._cpu.finest[ids]))
        return EncodedQueries(coarse, fine, slot.upload("own", ids))

    def _bytes_a_query(self, keys: int) -> int:
        return launch_plan.bytes_a_query(self._dtype, self._refine, self._dim, keys)

    # ---------------------------------------------------------------- device in, device out

    def search_on_device(
        self,
        queries: Any,
        walk: Walk,
        labels: LabelArrays,
        *,
        root: bool = False,
        stream: Any = None,
        out: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]:
        """Labels int64 and distances float32 (q, k), CuPy arrays, of queries (q, dim) on this GPU.

        All is enqueued on `stream`, which waits for CuPy's current stream, and the host waits for
        nothing: who reads the answer or writes the queries on another stream, has it wait for
        this one. What may be given as queries
        and stream, `DeviceArrays` says. A query that is not finite, or zero under cosine, finds
        nothing. root: square roots of distances; out: two arrays that take the result.
        """
        index = self._index
        planned = self._planned(walk, keeps_allowed=False)
        every = None  # compared, where a beam of k does not fit or there is nothing to walk
        if not self.node_count or not self.can_walk(planned.k, False):
            every = np.arange(self.node_count, dtype=np.int32)
            keys_held = keys_compared(len(every), walk.k)
        else:
            keys_held = keys_walked(planned, walk.k, self._index.has_refine_rows)
        stream = self._arrays.stream(stream)
        with self._lock:  # until the end is noted, for which an upload of other labels waits
            index.set_labels(labels, after=self._ends())
            with self._device, stream:
                stream.wait_event(index.uploaded)
                vectors = self._arrays.vectors(queries)
                found = self._arrays.result(out, (len(vectors), walk.k))
                room = self._batches.room(len(vectors), self._bytes_a_query(keys_held))
                try:
                    for part in parts(len(vectors), room):
                        batch = index.encode(vectors[part])
                        if every is None:
                            keys, _ = index.walk(batch, planned, min(walk.k, planned.k), None)
                        else:
                            keys = index.compare(batch, every, walk.k)
                        index.keys_to_labels(keys, found[0][part], found[1][part], root)
                finally:  # after an error too, an update must wait for what was enqueued
                    room.nbytes = 0  # what is freed, the same stream takes again
                    self._keep_until_done(stream, (queries, vectors, out, found))
        return found

    def _keep_until_done(self, stream: Any, held: Any) -> None:
        """Note the end of a search, and hold its arrays: another library may own their memory."""
        end = end_of_work(self._cupy)
        end.record(stream)
        with self._lock:
            for pending in self._searches.values():  # a stream's searches end in their order
                while pending and pending[0][0].done:
                    pending.popleft()
            self._searches = {ptr: pending for ptr, pending in self._searches.items() if pending}
            self._searches.setdefault(stream.ptr, deque()).append((end, held))

    def to_host(self, queries: Any, stream: Any = None) -> np.ndarray:
        """A copy of an array on this GPU, when `stream` has come so far."""
        return self._arrays.to_host(queries, stream)

    def to_device(
        self, labels: np.ndarray, distances: np.ndarray, stream: Any, out: tuple[Any, Any] | None
    ) -> tuple[Any, Any]:
        """CuPy copies of a result (q, k), or `out` with its values, in the order of `stream`."""
        return self._arrays.to_device(labels, distances, stream, out)


def _one_row(allowed: Any) -> Any:
    """Bits that all queries share, (words,), where they are given as (1, words)."""
    return allowed if allowed is None or allowed.ndim == 1 or len(allowed) > 1 else allowed[0]
