"""Queries in the host's memory: cut into batches that fit the GPU, and copied behind searches.

Two batches are in flight: while one is searched, the other is encoded, copied in or copied out.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hnsw_gpu.gpu.device_index import DeviceIndex, gigabytes

BATCH_SHARE = 4  # the batches in flight take one part in so many of the free memory
MOST_QUERIES = 16384  # of a batch: it fills a GPU, and copying hides behind searching


class Slot:
    """A stream of its own, and pinned memory that one batch at a time goes through."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._end = cupy.cuda.Event(disable_timing=True)
        self._pinned: dict[str, np.ndarray] = {}  # bytes
        self._awaited: list[tuple[np.ndarray, np.ndarray]] = []

    def upload(self, name: str, array: np.ndarray) -> Any:
        """A copy on the device; the next of that name may be uploaded after `collect`."""
        pinned = self._memory(name, array.shape, array.dtype)
        pinned[...] = array
        copy = self._cupy.empty(array.shape, array.dtype)
        copy.set(pinned, self.stream)
        return copy

    def download(self, arrays: Sequence[Any], targets: Sequence[np.ndarray]) -> None:
        """Have arrays (q, m) copied to the first columns of targets (q, k) by `collect`."""
        for i, (array, target) in enumerate(zip(arrays, targets, strict=True)):
            pinned = self._memory(f"result {i}", array.shape, array.dtype)
            array.get(self.stream, out=pinned, blocking=False)
            self._awaited.append((pinned, target))
        self._end.record(self.stream)

    def collect(self) -> None:
        """Wait for the batch that was downloaded last."""
        if self._awaited:
            self._end.synchronize()
            for pinned, target in self._awaited:
                target[:, : pinned.shape[1]] = pinned
            self._awaited = []

    def abandon(self) -> None:
        """Wait for all that is under way, whatever it is."""
        self.stream.synchronize()
        self._awaited = []

    def _memory(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        count = int(np.prod(shape))
        size = max(count * np.dtype(dtype).itemsize, 1)
        if name not in self._pinned or len(self._pinned[name]) < size:
            block = self._cupy.cuda.alloc_pinned_memory(size)
            self._pinned[name] = np.frombuffer(block, np.uint8, size)
        return self._pinned[name][: count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


class HostBatches:
    """Searches an index for queries in the host's memory, in batches, from many threads at once."""

    def __init__(self, cupy: Any, index: DeviceIndex) -> None:
        self._cupy, self._index = cupy, index
        self._spare: list[Slot] = []  # not in use

    def forget(self) -> None:
        """Give the pinned memory back."""
        self._spare = []

    def run(
        self,
        results: Sequence[np.ndarray],
        bytes_a_query: int,
        work: Callable[[Slot, slice], Sequence[Any]],
    ) -> None:
        """Fill results (q, k): `work` enqueues the search of a part of them, gives arrays."""
        slots: list[Slot] = []
        with self._index.device:
            try:
                for i, part in enumerate(self.parts(len(results[0]), bytes_a_query)):
                    if i < 2:
                        slots.append(self._spare_slot())
                    slot = slots[i % 2]
                    slot.collect()
                    with slot.stream:
                        slot.stream.wait_event(self._index.uploaded)
                        slot.download(work(slot, part), [result[part] for result in results])
                for slot in slots:
                    slot.collect()
            finally:  # after an error too, nothing may be under way in a spare slot
                for slot in slots:
                    slot.abandon()
                self._spare += slots

    def _spare_slot(self) -> Slot:
        try:
            return self._spare.pop()
        except IndexError:
            return Slot(self._cupy)

    def parts(self, count: int, bytes_a_query: int) -> Iterator[slice]:
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
