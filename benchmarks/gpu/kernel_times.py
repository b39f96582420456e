"""Kernel times by CUDA events, beside what the memory of the GPU would allow.

A round copies a large array from device memory to device memory, then searches. The copy says what
the memory delivers, leaves nothing of the index in the cache, and lasts longer than the host takes
to enqueue the search: so the events around the search see the GPU alone.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers import K
from hnsw_gpu.gpu import launch_plan
from hnsw_gpu.gpu.device_index import EncodedQueries

LINK_BYTES = 4


class Round(NamedTuple):
    """Seconds of one round."""

    copy: float
    search: float
    enqueue: float  # on the host


class Clock:
    """Times what is enqueued on a stream of its own."""

    def __init__(self, copied_bytes: int) -> None:
        import cupy

        self._cupy = cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._from, self._to = (cupy.zeros(copied_bytes, np.uint8) for _ in range(2))
        cupy.cuda.Device().synchronize()

    def time(self, work: Callable[[], Any]) -> Round:
        """Seconds of `work`, which enqueues on the current stream."""
        start, copied, end = (self._cupy.cuda.Event() for _ in range(3))
        with self._stream:
            start.record(self._stream)
            self._to[...] = self._from
            copied.record(self._stream)
            before = time.perf_counter()
            kept = work()
            enqueue = time.perf_counter() - before
            end.record(self._stream)
        end.synchronize()
        del kept
        elapsed = self._cupy.cuda.get_elapsed_time
        return Round(elapsed(start, copied) / 1e3, elapsed(copied, end) / 1e3, enqueue)

    @property
    def stream_ptr(self) -> int:
        """For libraries other than CuPy."""
        return int(self._stream.ptr)

    def copy_bandwidth(self, rounds: list[Round]) -> float:
        """Bytes/s, read and written, of the copies."""
        return float(2 * self._from.nbytes / median(one.copy for one in rounds))

    def upload(self, array: np.ndarray) -> Any:
        """A copy on the device, there when this returns."""
        copy = self._cupy.asarray(array)
        self._cupy.cuda.Device().synchronize()
        return copy


def peak_bandwidth() -> float:
    """Bytes/s of the GPU's memory by its clock and bus (two transfers a clock); 0: not told."""
    import cupy

    runtime, device = cupy.cuda.runtime, cupy.cuda.Device().id
    clock_khz = runtime.deviceGetAttribute(runtime.cudaDevAttrMemoryClockRate, device)
    bus_bits = runtime.deviceGetAttribute(runtime.cudaDevAttrGlobalMemoryBusWidth, device)
    return 2e3 * clock_khz * bus_bits / 8


def places(batch: int, number: int, count: int) -> np.ndarray:
    """Which of `count` queries make up batch `number`: the next ones, then the first again."""
    return (np.arange(batch) + number * batch) % count


def measure(
    clock: Clock,
    engine: Any,
    encoded: list[np.ndarray],
    walk: launch_plan.BeamShape,
    batch: int,
    rounds: int,
    peak: float,
) -> dict:
    """The kernels alone, `rounds` batches of encoded queries, after one to warm up.

    encoded: (q, bytes) as the rows are, and as the finest rows are. Re-ranking is timed too.
    """
    index = engine._index
    arrays = [index._arrays[name] for name in ("rows", "refine_rows") if name in index._arrays]

    def search(number: int) -> Round:
        asked = places(batch, number, len(encoded[0]))
        queries = EncodedQueries(*(clock.upload(one[asked]) for one in encoded))
        return clock.time(lambda: index.walk(queries, walk, min(K, walk.k), None))

    search(0)
    with kept_counts(index) as kept:
        times = [search(number) for number in range(rounds)]
    counts = np.concatenate([array.get() for array in kept])
    hops, distances, _ = counts.mean(axis=0)
    copy = clock.copy_bandwidth(times)
    seconds = median(one.search for one in times)
    links = index._arrays["neighbors0"].shape[1]
    read = bytes_a_query([distances, walk.k], arrays, hops * links)
    bandwidth = peak or copy
    return {
        **planned(index, walk, batch),
        "kernel": {
            **spread([one.search for one in times], batch),
            "is_enqueued_in_time": all(one.enqueue < one.copy for one in times),
        },
        "hops_per_query": float(hops),
        "distances_per_query": float(distances),
        "bytes_per_query": read,
        "copy_bytes_per_s": copy,
        "roofline_queries_per_s": bandwidth / read,
        "roofline_ratio": batch / seconds * read / bandwidth,
    }


def bytes_a_query(reads: list[float], arrays: list[Any], links: float) -> float:
    """Of rows and links that a search reads: `reads` rows of each of the arrays (n, row).

    Links of upper layers are taken to be as many as below. Most of the hops are on layer 0, so the
    links are hardly too many; queries and results are far fewer, and left out.
    """
    rows = sum(
        read * array[:1].nbytes for read, array in zip(reads, arrays, strict=False)
    )  # without refine rows, the rows alone
    return float(rows + links * LINK_BYTES)


@contextlib.contextmanager
def kept_counts(index: Any) -> Iterator[list]:
    """Device arrays int32 (q, 3), hops, distances and blocked, of each search in the block."""
    kept: list[Any] = []
    before, index.on_counts = index.on_counts, kept.append
    try:
        yield kept
    finally:
        index.on_counts = before


def planned(index: Any, walk: launch_plan.BeamShape, batch: int) -> dict:
    """How a batch is launched."""
    kernel, plan = index.planned(walk, batch)
    return {
        "queries": batch,
        "warps": plan.definitions["WARPS"],
        "tag_bits": plan.definitions["TAG_BITS"],
        "registers": kernel.num_regs,
        **{name: value for name, value in plan._asdict().items() if name != "definitions"},
    }


def spread(seconds: list[float], batch: int) -> dict:
    """Median, lowest and highest of the times of batches, and queries/s by the median."""
    return {
        "seconds": median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "queries_per_s": batch / median(seconds),
    }
