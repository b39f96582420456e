"""Queries in the host's memory: cut into batches that fit the GPU, and copied behind searches.

Two batches are in flight: while one is searched, the other is encoded, copied in or copied out.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hnsw_gpu.gpu.device_index import DeviceIndex, end_of_work, gigabytes

BATCH_SHARE = 2  # the batches in flight, of all threads, take one part in so many of what is free
MOST_QUERIES = 16384  # of a batch: it fills a GPU, and copying hides behind searching


class Slot:
    """A stream of its own, and pinned memory that one batch at a time goes through."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._end = end_of_work(cupy)
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


class Room:
    """Memory that one call takes, as long as somebody holds this."""

    def __init__(self, queries: int, nbytes: int) -> None:
        self.queries, self.nbytes = queries, nbytes  # of a batch; of two


class HostBatches:
    """Searches an index for queries in the host's memory, in batches, from many threads at once."""

    def __init__(self, cupy: Any, index: DeviceIndex) -> None:
        self._cupy, self._index = cupy, index
        self._spare: list[Slot] = []  # not in use
        self._lock = threading.Lock()  # of the rooms
        self._rooms: weakref.WeakSet[Room] = weakref.WeakSet()

    def forget(self) -> None:
        """Give the memory back, pinned and the GPU's."""
        spare, self._spare = self._spare, []
        for slot in spare:
            self._index.give_back(slot.stream)

    def run(
        self,
        results: Sequence[np.ndarray],
        bytes_a_query: int,
        work: Callable[[Slot, slice], Sequence[Any]],
    ) -> None:
        """Fill results (q, k): `work` enqueues the search of a part of them, gives arrays."""
        slots: list[Slot] = []
        room = self.room(len(results[0]), bytes_a_query)
        with self._index.device:
            try:
                for i, part in enumerate(parts(len(results[0]), room)):
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
                room.nbytes = 0

    def _spare_slot(self) -> Slot:
        try:
            return self._spare.pop()
        except IndexError:
            return Slot(self._cupy)

    def room(self, count: int, bytes_a_query: int) -> Room:
        """Room for batches of `count` queries, two at a time, of at least one query.

        A call takes half of what the others leave, so that there is always some for one more.
        """
        with self._lock:
            promised = sum(room.nbytes for room in self._rooms)
            budget = (self._index.free_bytes() // BATCH_SHARE - promised) // 2 // 2
            size = min(budget // bytes_a_query, MOST_QUERIES, count)
            if count and size < 1 and not promised:
                raise MemoryError(
                    f"one query takes {gigabytes(bytes_a_query)} of GPU memory, and a batch may "
                    f"take {gigabytes(budget)}"
                )
            size = max(size, 1)
            room = Room(size, 2 * size * bytes_a_query)
            self._rooms.add(room)
        return room


def parts(count: int, room: Room) -> Iterator[slice]:
    """The batches of `count` queries."""
    for start in range(0, count, room.queries):
        yield slice(start, min(start + room.queries, count))
