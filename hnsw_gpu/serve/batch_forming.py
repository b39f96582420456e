"""Requests that wait for the engine, and the batches they form."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hnsw_gpu.results import SearchResult
from hnsw_gpu.searching import Searching
from hnsw_gpu.serve.answer_future import AnswerFuture

AnyFuture = AnswerFuture | asyncio.Future[SearchResult]


class BatchKey(NamedTuple):
    """What requests have in common that may share a batch."""

    searched: Searching
    ef: int
    rerank: int | None  # None: of no account, or the whole beam
    allow: object  # identifies the filter
    rounded_k: int  # the next power of two, but no more than ef needs
    is_bulk: bool  # needs several calls of the engine: takes turns with the others

    @classmethod
    def of(
        cls,
        index: Searching,
        k: int,
        ef: int,
        rerank: int | None,
        allow: np.ndarray | None,
        is_bulk: bool = False,
    ) -> "BatchKey":
        # A request keeps its 1-d filter alive, and so its id. A 2-d one is its own.
        shared: object = id(allow) if allow is None or allow.ndim < 2 else object()
        rounded_k = min(1 << (k - 1).bit_length(), max(ef, k))
        if not index.refine:
            rerank = None
        if rerank is not None and rerank < rounded_k:  # of which at least k are re-ranked
            rounded_k = k
        return cls(index, ef, rerank, shared, rounded_k, is_bulk)


@dataclass(eq=False)
class QueuedSearch:
    """One caller's queries, and the future that takes the answer."""

    key: BatchKey
    queries: np.ndarray
    k: int
    allow: np.ndarray | None
    timeout_s: float | None
    future: AnyFuture  # a thread's, or an event loop's
    arrived: float = field(default_factory=time.perf_counter)
    taken: int = 0  # rows that were given to the engine
    _answered: int = 0  # rows
    _result: SearchResult | None = None  # of a request that needs several calls

    def is_late(self, now: float) -> bool:
        return self.timeout_s is not None and self.arrived + self.timeout_s < now

    @property
    def waiting_rows(self) -> int:
        return len(self.queries) - self.taken

    def add_part(self, start: int, stop: int, part: SearchResult) -> SearchResult | None:
        """Store the answer to rows start:stop; returns the whole answer after the last part."""
        if self._result is None:
            shape = (len(self.queries), self.k)
            self._result = SearchResult(*(np.empty(shape, array.dtype) for array in part))
        for whole, values in zip(self._result, part, strict=True):
            whole[start:stop] = values
        self._answered += stop - start
        return self._result if self._answered == len(self.queries) else None

    def timeout_error(self) -> TimeoutError:
        waited = time.perf_counter() - self.arrived
        return TimeoutError(f"no answer within timeout_s={self.timeout_s:g} ({waited:.3f} s)")


class Part(NamedTuple):
    """Rows start:stop of a request."""

    request: QueuedSearch
    start: int
    stop: int


class BatchQueue:
    """Waiting requests in groups that may share a batch: groups take turns, each first come first
    served. Not thread-safe: the batcher calls it under its lock.
    """

    def __init__(self) -> None:
        self._rows = {False: 0, True: 0}  # that wait: of small requests, of bulk requests
        self._groups: dict[BatchKey, dict[QueuedSearch, None]] = {}  # in the order of their turns

    @property
    def waiting_rows(self) -> int:
        return sum(self._rows.values())

    def has_room(self, rows: int, is_bulk: bool, most_rows: int) -> bool:
        """Whether that many rows more may wait.

        Rows of bulk requests take no room from small ones. The first bulk request always has room,
        another one what all others leave.
        """
        waiting = self.waiting_rows if is_bulk else self._rows[False]
        return not self._rows[is_bulk] or waiting + rows <= most_rows

    @property
    def waiting_groups(self) -> int:
        return len(self._groups)

    @property
    def waiting_requests(self) -> int:
        return sum(map(len, self._groups.values()))

    def add(self, request: QueuedSearch) -> None:
        rows, is_bulk = request.waiting_rows, request.key.is_bulk
        group = self._groups.setdefault(request.key, {})
        group[request] = None  # no call between this and the count: a Ctrl-C finds no gap
        self._rows[is_bulk] += rows

    def remove(self, request: QueuedSearch) -> None:
        """Take out what still waits of a request, if anything does."""
        group = self._groups.get(request.key, {})
        if request in group:
            rows = request.waiting_rows
            del group[request]
            self._rows[request.key.is_bulk] -= rows
            if not group:
                del self._groups[request.key]

    def next_batch(
        self, most_rows: Callable[[Searching], int]
    ) -> tuple[list[Part], list[QueuedSearch]]:
        """Take the next group's batch, and the requests before it that are past their deadline."""
        key, group = next(iter(self._groups.items()))
        room, now = most_rows(key.searched), time.perf_counter()
        parts: list[Part] = []
        late: list[QueuedSearch] = []
        while group:
            request = next(iter(group))
            rows = request.waiting_rows
            if request.is_late(now):
                late.append(request)
            elif rows > room and (parts or not room):
                break  # goes whole into the next batch, or is split there
            else:
                rows = min(rows, room)
                parts.append(Part(request, request.taken, request.taken + rows))
                request.taken += rows
                room -= rows
            self._rows[key.is_bulk] -= rows
            if request.waiting_rows and not request.is_late(now):
                break  # split: the rest keeps its place
            del group[request]
        del self._groups[key]
        if group:
            self._groups[key] = group  # behind the other groups
        return parts, late
