"""The GPU engine: batches of queries, in and out of a GPU's memory. The only module with CuPy.

Its two verbs are the CPU engine's, arrays in, keys out: `walk` the graph, or `compare` all of some
ids. Batches are cut so that what is kept of their queries fits a share of the free memory, and two
are in flight: while one is searched, the other is encoded, copied in or copied out.

Whatever is allocated is used in the order of one stream, or kept until its use has ended: CuPy
gives freed memory to the next that asks on the same stream.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hnsw_gpu.engine import KEY_NONE, CpuEngine, Graph, key_nodes, rows_as_queries
from hnsw_gpu.gpu import launch_plan
from hnsw_gpu.gpu.device_index import (
    DeviceIndex,
    LabelArrays,
    Queries,
    gigabytes,
    keys_compared,
    keys_walked,
    mask_stride,
)

logger = logging.getLogger("hnsw_gpu")

BATCH_SHARE = 4  # the batches in flight take one part in so many of the free memory
MOST_QUERIES = 16384  # of a batch: it fills a GPU, and copying hides behind searching
CUDA_MEMORY = (2, 13)  # device types of DLPack: plain, managed


def _cupy() -> Any:
    """CuPy, with a GPU to use; RuntimeError says what is missing."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            'a GPU search needs CuPy: pip install "hnsw-gpu[cuda12]", or "hnsw-gpu[cuda13]" where '
            f"the driver is of CUDA 13 ({error})"
        ) from error
    if cupy.cuda.is_available():
        return cupy
    runtime = cupy.cuda.runtime
    version = runtime.driverGetVersion()
    if not version:
        raise RuntimeError("a GPU search needs NVIDIA's driver, and there is none here")
    driver = f"the NVIDIA driver (CUDA {version // 1000}.{version % 1000 // 10})"
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"{driver} offers no GPU to CuPy {cupy.__version__}: {error}; is CUDA_VISIBLE_DEVICES "
            "right, and is CuPy made for this CUDA?"
        ) from error
    raise RuntimeError(f"{driver} knows of no GPU")


def missing() -> str:
    """What keeps this machine from searching on a GPU; empty when nothing does."""
    try:
        GpuEngine("l2", "fp32", "", 1, 2)
    except RuntimeError as error:
        return str(error)
    return ""


class _Slot:
    """A stream of its own, and pinned memory that one batch at a time goes through."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._end = cupy.cuda.Event(disable_timing=True)
        self._pinned: dict[str, np.ndarray] = {}  # bytes
        self._awaited: tuple[np.ndarray, np.ndarray] | None = None

    def upload(self, name: str, array: np.ndarray) -> Any:
        """A copy on the device; the next of that name may be uploaded after `collect`."""
        pinned = self._memory(name, array.shape, array.dtype)
        pinned[...] = array
        copy = self._cupy.empty(array.shape, array.dtype)
        copy.set(pinned, self.stream)
        return copy

    def download(self, keys: Any, target: np.ndarray) -> None:
        """Have keys (q, m) copied to the first columns of target (q, k) by the next `collect`."""
        pinned = self._memory("keys", keys.shape, keys.dtype)
        keys.get(self.stream, out=pinned, blocking=False)
        self._end.record(self.stream)
        self._awaited = pinned, target

    def collect(self) -> None:
        """Wait for the batch that was downloaded last."""
        if self._awaited is not None:
            self._end.synchronize()
            pinned, target = self._awaited
            target[:, : pinned.shape[1]] = pinned
            self._awaited = None

    def abandon(self) -> None:
        """Wait for all that is under way, whatever it is."""
        self.stream.synchronize()
        self._awaited = None

    def _memory(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        count = int(np.prod(shape))
        size = max(count * np.dtype(dtype).itemsize, 1)
        if name not in self._pinned or len(self._pinned[name]) < size:
            block = self._cupy.cuda.alloc_pinned_memory(size)
            self._pinned[name] = np.frombuffer(block, np.uint8, size)
        return self._pinned[name][: count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


class GpuEngine:
    """An index on the current GPU; RuntimeError says what one lacks.

    Nodes are only ever added: `update` brings what is new. `walk`, `compare`, `own_keys` and
    `search_on_device` may be called from many threads, `update` and `close` while none is running.
    """

    def __init__(self, metric: str, dtype: str, refine: str, dim: int, M: int) -> None:
        self._cupy = _cupy()
        self._metric, self._dtype, self._refine, self._dim, self._M = metric, dtype, refine, dim, M
        self._index = DeviceIndex(self._cupy, metric, dtype, refine, dim, M)
        self._index.compile_encoder()
        self._device = self._index.device
        self._rows = self._refine_rows = np.empty((0, 0))
        self._relinked = np.empty(0, bool)  # nodes with links that the GPU lacks
        self._is_stale = True  # it lacks some, or nodes
        self._updating = threading.Lock()
        self._slots: list[_Slot] = []  # not in use
        self._lock = threading.Lock()  # of `_searches`, and of uploading labels
        self._searches: list[tuple[Any, Any]] = []  # not waited for: the event at the end, queries

    @property
    def name(self) -> str:
        """Of the GPU."""
        properties = self._cupy.cuda.runtime.getDeviceProperties(self._device.id)
        return str(properties["name"].decode())

    @property
    def node_count(self) -> int:
        """Nodes on the GPU."""
        return self._index.node_count

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that the index holds, room for more included."""
        return self._index.nbytes

    def update(
        self,
        graph: Graph,
        rows: np.ndarray,
        refine_rows: np.ndarray | None = None,
        changed: np.ndarray | None = None,
    ) -> None:
        """Upload what is new: rows, and links of nodes, that the last update did not bring.

        `changed`: int (m,) ids of older nodes whose links on layer 0 are new; None: all may be. The
        rows are read again by self searches. MemoryError where the GPU has too little.
        """
        self._index.update(graph, rows, refine_rows, changed, self._ends())
        self._searches = []
        self._rows = rows
        self._refine_rows = rows if refine_rows is None else refine_rows

    def changing(self, count: int) -> np.ndarray:
        """bool (count,): to be set True for nodes whose links on layer 0 change, before `walk`."""
        before, self._relinked = self._relinked, np.zeros(count, bool)
        known = min(count, len(before))
        self._relinked[:known] = before[:known]
        self._is_stale = True
        return self._relinked

    def up_to_date(self, cpu: CpuEngine) -> "GpuEngine":
        """This engine, with what changed since the last call; may be called from many threads."""
        with self._updating:
            if self._is_stale:
                changed = np.flatnonzero(self._relinked[: self.node_count])
                self.update(cpu.graph, cpu.rows, cpu.refine_rows, changed)
                self._relinked, self._is_stale = np.zeros(cpu.node_count, bool), False
        return self

    def close(self) -> None:
        """Give the memory back to CuPy, when the last search has ended; `update` fills it again."""
        with self._device:
            for event in self._ends():
                event.synchronize()
            self._index.stream.synchronize()
        self._searches, self._slots = [], []
        self._rows = self._refine_rows = np.empty((0, 0))
        self._index.forget()

    def _ends(self) -> list[Any]:
        return [end for end, _ in self._searches]

    # ---------------------------------------------------------------- numpy in, numpy out

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
        threads: int | None = None,
    ) -> np.ndarray:
        """Keys (q, k), ascending, of the nearest nodes that a walk of the graph meets (R3-R10).

        queries: float32 (q, dim), valid; or None, and stored nodes `own` (q,) ask for others.
        ef: best of the beam that the refine rows re-rank. capacity: of the beam on layer 0; None:
        ef. allowed: packed bits, uint32 (words,) or (q, words). threads: of the CPU; not used.
        A k too large for shared memory compares all allowed nodes; an ef too large is a ValueError.
        """
        allowed = _one_row(allowed)
        has_found = allowed is not None or own is not None
        walk = self._walk_of(k, ef, capacity, ef_upper, expand, has_found)
        largest = launch_plan.largest_ef(walk, self.node_count, self._index.limits)
        if not self.node_count or min(k, self.node_count) > largest:
            return self._compare_allowed(queries, k, allowed, own)

        def work(slot: _Slot, part: slice) -> Any:
            batch = self._upload_queries(slot, queries, own, part)
            bits = None
            if allowed is not None:
                bits = slot.upload("allowed", allowed if allowed.ndim == 1 else allowed[part])
            return self._index.walk(batch, walk, min(k, walk.k), bits)

        keys_held = keys_walked(walk, k, self._refine)
        bytes_a_query = self._bytes_a_query(keys_held) + 4 * mask_stride(allowed)
        return self._in_batches(queries, own, k, bytes_a_query, work)

    def compare(
        self,
        queries: np.ndarray | None,
        ids: np.ndarray,
        k: int,
        *,
        own: np.ndarray | None = None,
        threads: int | None = None,
    ) -> np.ndarray:
        """Keys (q, k), ascending, of the nearest of `ids` (m,), all compared by the finest rows.

        queries, own: as for `walk`; but a stored node is compared with itself, if among the ids.
        """
        ids = np.ascontiguousarray(ids, np.int32)
        if not len(ids):
            return np.full((_length(queries, own), k), KEY_NONE, np.uint64)

        def work(slot: _Slot, part: slice) -> Any:
            return self._index.compare(self._upload_queries(slot, queries, own, part), ids, k)

        bytes_a_query = self._bytes_a_query(keys_compared(len(ids), k))
        return self._in_batches(queries, own, k, bytes_a_query, work)

    def own_keys(self, ids: np.ndarray) -> np.ndarray:
        """Keys (m,) of stored nodes (m,) by their distance to themselves, in the finest rows."""

        def work(slot: _Slot, part: slice) -> Any:
            keys = ids[part, None].astype(np.uint64) << np.uint64(1)
            candidates = slot.upload("candidates", keys)
            return self._index.compare_keys(
                self._upload_queries(slot, None, ids, part), candidates=candidates
            )

        return self._in_batches(None, ids, 1, self._bytes_a_query(2), work)[:, 0]

    def _compare_allowed(
        self,
        queries: np.ndarray | None,
        k: int,
        allowed: np.ndarray | None,
        own: np.ndarray | None,
    ) -> np.ndarray:
        """What `walk` answers for a k beyond shared memory: the exact result."""
        if allowed is not None and allowed.ndim == 2:
            parts = [slice(i, i + 1) for i in range(len(allowed))]
            answers = [
                self._compare_allowed(_part(queries, part), k, allowed[part][0], _part(own, part))
                for part in parts
            ]
            return np.concatenate(answers)
        ids = np.arange(self.node_count) if allowed is None else _ids(allowed, self.node_count)
        if own is None:
            return self.compare(queries, ids, k)
        keys = self.compare(None, ids, k + 1, own=own)
        keys[key_nodes(keys) == own[:, None]] = KEY_NONE
        return np.sort(keys, axis=1)[:, :k]

    def _walk_of(
        self, k: int, ef: int, capacity: int | None, ef_upper: int, expand: int, has_found: bool
    ) -> launch_plan.Walk:
        """The numbers of a search; none need be larger than that of the nodes."""
        most = max(self.node_count, 1)
        ef = min(ef, most)
        return launch_plan.Walk(
            ef=ef if capacity is None else min(int(capacity), most),
            k=ef if self._refine else min(k, most),
            ef_upper=min(ef_upper, most),
            expand=expand,
            has_found=has_found,
        )

    def _upload_queries(
        self, slot: _Slot, queries: np.ndarray | None, own: np.ndarray | None, part: slice
    ) -> Queries:
        """A part of the queries, or of the stored nodes that ask, encoded on the device."""
        if queries is not None:
            return self._index.encode(slot.upload("queries", queries[part]))
        assert own is not None
        ids = np.ascontiguousarray(own[part], np.int32)
        coarse = fine = slot.upload("coarse", rows_as_queries(self._rows[ids]))
        if self._refine:
            fine = slot.upload("fine", rows_as_queries(self._refine_rows[ids]))
        return Queries(coarse, fine, slot.upload("own", ids))

    def _in_batches(
        self,
        queries: np.ndarray | None,
        own: np.ndarray | None,
        k: int,
        bytes_a_query: int,
        work: Callable[[_Slot, slice], Any],
    ) -> np.ndarray:
        """Keys (q, k): `work` enqueues the search of a part of the queries, returns its keys."""
        result = np.full((_length(queries, own), k), KEY_NONE, np.uint64)
        slots: list[_Slot] = []
        with self._device:
            try:
                for i, part in enumerate(self._batches(len(result), bytes_a_query)):
                    if i < 2:
                        slots.append(self._spare_slot())
                    slot = slots[i % 2]
                    slot.collect()
                    with slot.stream:
                        slot.stream.wait_event(self._index.uploaded)
                        slot.download(work(slot, part), result[part])
                for slot in slots:
                    slot.collect()
            finally:  # after an error too, nothing may be under way in a spare slot
                for slot in slots:
                    slot.abandon()
                self._slots += slots
        return result

    def _spare_slot(self) -> _Slot:
        try:
            return self._slots.pop()
        except IndexError:
            return _Slot(self._cupy)

    def _batches(self, count: int, bytes_a_query: int) -> Iterator[slice]:
        """Parts of `count` queries of which two fit their share of the free memory together."""
        budget = self._index.free_bytes() // BATCH_SHARE // 2
        size = min(budget // bytes_a_query, MOST_QUERIES)
        if count and not size:
            raise MemoryError(
                f"one query takes {gigabytes(bytes_a_query)} of GPU memory, and a batch may take "
                f"{gigabytes(budget)}"
            )
        for start in range(0, count, max(size, 1)):
            yield slice(start, min(start + size, count))

    def _bytes_a_query(self, keys: int) -> int:
        return launch_plan.bytes_a_query(self._dtype, self._refine, self._dim, keys)

    # ---------------------------------------------------------------- device in, device out

    def search_on_device(
        self,
        queries: Any,
        k: int,
        ef: int,
        *,
        labels: LabelArrays,
        allowed: Any = None,
        allowed_entries: Any = None,
        ids: np.ndarray | None = None,
        capacity: int | None = None,
        expand: int = 1,
        ef_upper: int = 1,
        root: bool = False,
        stream: Any = None,
        out: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]:
        """Labels int64 and distances float32 (q, k), CuPy arrays, of queries (q, dim) on this GPU.

        All is enqueued on `stream` (has `__cuda_stream__`; None: CuPy's current), and the host
        waits for nothing. Queries are CuPy arrays or offer DLPack or `__cuda_array_interface__`;
        float32 in C order is used where it is. One that is not finite, or zero under cosine, finds
        nothing. allowed, allowed_entries: bits, uint32 (words,) or (q, words), of nodes and of
        entries of `labels`; ids: int (m,) nodes that are compared in place of a walk; root: square
        roots of distances; out: two arrays that take the result.
        """
        cupy, index = self._cupy, self._index
        stream = self._stream(stream)
        walk = self._walk_of(k, ef, capacity, ef_upper, expand, allowed is not None)
        compared = None if ids is None else np.ascontiguousarray(ids, np.int32)
        most = launch_plan.largest_ef(walk, self.node_count, index.limits)
        if ids is None and allowed is None and min(k, self.node_count) > most:
            compared = np.arange(self.node_count, dtype=np.int32)
        keys_held = (
            keys_walked(walk, k, self._refine)
            if compared is None
            else keys_compared(len(compared), k)
        )
        with self._lock:
            index.set_labels(labels, after=self._ends())
        with self._device, stream:
            stream.wait_event(index.uploaded)
            vectors = self._vectors(queries)
            found = self._result(out, (len(vectors), k))
            given = (_one_row(allowed), _one_row(allowed_entries))
            masks = [m if m is None else cupy.asarray(m) for m in given]
            try:
                for part in self._batches(len(vectors), self._bytes_a_query(keys_held)):
                    bits = [m if m is None or m.ndim == 1 else m[part] for m in masks]
                    batch = index.encode(vectors[part])
                    if not self.node_count:
                        keys = index.compare(batch, _NO_IDS, k)
                    elif compared is None:
                        keys = index.walk(batch, walk, min(k, walk.k), bits[0])
                    else:
                        keys = index.compare(batch, compared, k)
                    index.spread(keys, bits[1], found[0][part], found[1][part], root)
            finally:  # after an error too, an update must wait for what was enqueued
                self._keep_until_done(stream, (queries, vectors))
        return found

    def _keep_until_done(self, stream: Any, held: Any) -> None:
        """Note the end of a search, and hold its queries: another library may own their memory."""
        end = self._cupy.cuda.Event(disable_timing=True)
        end.record(stream)
        with self._lock:
            self._searches = [pair for pair in self._searches if not pair[0].done] + [(end, held)]

    def to_host(self, queries: Any, stream: Any = None) -> np.ndarray:
        """A copy of an array on this GPU, when `stream` has come so far."""
        with self._device, self._stream(stream) as current:
            return np.asarray(self._on_gpu("queries", queries).get(current))

    def to_device(
        self, labels: np.ndarray, distances: np.ndarray, stream: Any, out: tuple[Any, Any] | None
    ) -> tuple[Any, Any]:
        """CuPy copies of a result (q, k), or `out` with its values, in the order of `stream`."""
        with self._device, self._stream(stream) as current:
            found = self._result(out, labels.shape)
            for array, values in zip(found, (labels, distances), strict=True):
                array.set(values, current)
            current.synchronize()  # the host's copies end here
        return found

    def _stream(self, given: Any) -> Any:
        """CuPy's stream for the caller's, which has `__cuda_stream__`; None: CuPy's current."""
        if given is None:
            return self._cupy.cuda.get_current_stream(self._device.id)
        return self._cupy.cuda.Stream.from_external(given)

    def _vectors(self, queries: Any) -> Any:
        array = self._on_gpu("queries", queries)
        if array.ndim != 2 or array.shape[1] != self._dim:
            raise ValueError(f"queries: shape {array.shape}, expected (q, {self._dim})")
        return self._cupy.ascontiguousarray(array, np.float32)

    def _result(self, out: tuple[Any, Any] | None, shape: tuple[int, int]) -> tuple[Any, Any]:
        if out is None:
            return self._cupy.empty(shape, np.int64), self._cupy.empty(shape, np.float32)
        labels, distances = (self._on_gpu("out", array) for array in out)
        for array, dtype in ((labels, np.int64), (distances, np.float32)):
            if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(
                    f"out: {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}, C order"
                )
        return labels, distances

    def _on_gpu(self, name: str, given: Any) -> Any:
        """A CuPy array of what lies on this GPU; the current stream waits for its producer."""
        cupy = self._cupy
        if not isinstance(given, cupy.ndarray):
            if hasattr(given, "__dlpack_device__") and given.__dlpack_device__()[0] in CUDA_MEMORY:
                given = cupy.from_dlpack(given)
            elif hasattr(given, "__cuda_array_interface__"):
                given = cupy.asarray(given)
            else:
                raise TypeError(f"{name}: {type(given).__name__}, expected an array on the GPU")
        if given.device.id != self._device.id:
            raise ValueError(
                f"{name}: on GPU {given.device.id}, and the index is on GPU {self._device.id}"
            )
        return given


def on_gpu(device: str, cpu: CpuEngine, dim: int) -> GpuEngine | None:
    """What `cpu` holds, on the current GPU; None where that cannot be and device is "auto".

    With device "cuda" RuntimeError says what is missing, MemoryError what does not fit.
    """
    engine = None
    try:
        M = cpu.graph.neighbors.shape[1]
        engine = GpuEngine(cpu.metric, cpu.dtype, cpu.refine, dim, M)
        engine.up_to_date(cpu)
    except (RuntimeError, MemoryError) as error:
        if engine is not None:
            engine.close()
        if device == "cuda":
            raise type(error)(f"device='cuda': {error}") from error
        logger.info("device='auto': searching on the CPU: %s", error)
        return None
    logger.info("searching on %s", engine.name)
    return engine


_NO_IDS = np.empty(0, np.int32)


def _length(queries: np.ndarray | None, own: np.ndarray | None) -> int:
    given = own if queries is None else queries
    assert given is not None
    return len(given)


def _part(array: np.ndarray | None, part: slice) -> np.ndarray | None:
    return None if array is None else array[part]


def _one_row(allowed: Any) -> Any:
    """Bits that all queries share, (words,), where they are given as (1, words)."""
    return allowed if allowed is None or allowed.ndim == 1 or len(allowed) > 1 else allowed[0]


def _ids(allowed: np.ndarray, count: int) -> np.ndarray:
    """int64 ids below `count` whose packed bits, uint32 (words,), are set."""
    bits = np.unpackbits(allowed.astype("<u4").view(np.uint8), count=count, bitorder="little")
    return np.flatnonzero(bits)
