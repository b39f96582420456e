"""Many small searches gathered into batches for one engine. Knows asyncio and threads, no HTTP.

Requests are gathered while the engine is busy and sent the moment it is free. There is no window
of time to wait for more: a fixed one of 2 ms costs a lone caller five sixths of its requests/s.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs
from hnsw_gpu.engine import thread_count
from hnsw_gpu.index import Index
from hnsw_gpu.results import SearchResult

logger = logging.getLogger("hnsw_gpu")

# Larger batches are hardly faster a row, and whoever is in one waits for all of it.
ROWS_A_THREAD = 128
ROWS_ON_A_GPU = 8192
IN_FLIGHT = {"cpu": 1, "cuda": 2}  # on a GPU one batch is prepared while another is searched


class QueueFullError(RuntimeError):
    """As many rows wait as may: try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Batch(NamedTuple):
    """What one call of the engine did."""

    rows: int
    waited_s: list[float]  # a request, from its arrival to this call
    engine_s: float
    is_ok: bool


class _Request:
    """One caller's queries, and where its answer goes: a thread's future, or an event loop's."""

    def __init__(
        self,
        queries: np.ndarray,
        k: int,
        allow: np.ndarray | None,
        timeout_s: float | None,
        future: "Future[SearchResult] | asyncio.Future[SearchResult]",
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.queries, self.k, self.allow = queries, k, allow
        self.future, self.loop = future, loop
        self.arrived = time.perf_counter()
        self.deadline = np.inf if timeout_s is None else self.arrived + timeout_s
        self.key: tuple = ()  # of the group that it waits in
        self.taken = 0  # rows that were given to the engine
        self.answered = 0
        self.result: SearchResult | None = None  # of a request that needs several calls

    @property
    def waiting_rows(self) -> int:
        return len(self.queries) - self.taken

    def with_part(self, start: int, stop: int, part: SearchResult) -> SearchResult | None:
        """Keep the answer to rows start:stop; the whole answer, if that was the last part."""
        if self.result is None:
            shape = (len(self.queries), self.k)
            self.result = SearchResult(np.empty(shape, np.int64), np.empty(shape, np.float32))
        for whole, values in zip(self.result, part, strict=True):
            whole[start:stop] = values
        self.answered += stop - start
        return self.result if self.answered == len(self.queries) else None

    def settle(self, outcome: "SearchResult | BaseException") -> None:
        """Give the caller its answer, unless it has left; of a loop's future, on that loop."""
        if isinstance(self.future, Future):
            if not self.future.set_running_or_notify_cancel():
                return
        elif self.future.done():
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class _Part(NamedTuple):
    """Rows start:stop of a request."""

    request: _Request
    start: int
    stop: int


class Batcher:
    """One index, searched in batches for callers that come one by one.

    `await search(...)` from the tasks of any event loop, `submit(...)` from threads. Answers are
    those of `index.search`, bit for bit (R11).

    index: what is searched; `swap` sets another one.
    batch_rows: most rows in one call of the engine; requests with more are split. None: 128 a
        thread on the CPU, 8,192 on a GPU.
    queue_rows: most rows that wait. One more is refused by QueueFullError; a request that is larger
        is taken when nothing else waits.
    threads: of each search, None: all cores.
    on_batch: called with a Batch after each call of the engine, on the engine's thread.

    Requests share a batch when their ef is the same, `allow` is None or the same 1-d array object,
    and k the same once rounded up to a power of two (at most ef). Groups take turns; within one
    the first come goes first. Queries are copied; `allow` must stay as it is until the answer.
    A `with` or `async with` block closes the batcher at its end.
    """

    def __init__(
        self,
        index: Index,
        *,
        batch_rows: int | None = None,
        queue_rows: int = 16_384,
        threads: int | None = None,
        on_batch: Callable[[Batch], None] | None = None,
    ) -> None:
        if batch_rows is not None:
            inputs.integer("batch_rows", batch_rows, 1)
        self._batch_rows = batch_rows
        self._queue_rows = inputs.integer("queue_rows", queue_rows, 1)
        self._threads = threads if threads is None else inputs.integer("threads", threads, 1)
        self._on_batch = on_batch
        self._wake: SimpleQueue[None] = SimpleQueue()  # one for each sleeper to be woken
        self._lock = threading.Lock()  # guards all that follows
        self._sleepers = 0  # workers
        self._groups: dict[tuple, dict[_Request, None]] = {}  # in the order of their turns
        self._waiting_rows = 0
        self._in_flight = 0
        self._most_in_flight = 0
        self._rate = 0.0  # rows/s, of late
        self._is_closed = False
        self._workers: list[threading.Thread] = []
        self.swap(index)

    # ---------------------------------------------------------------- callers

    async def search(
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        ef: int = 64,
        allow: ArrayLike | None = None,
        timeout_s: float | None = None,
    ) -> SearchResult:
        """The k nearest labels of each query (q, dim), as `Index.search` gives them.

        ValueError, TypeError: as there. QueueFullError: too many rows wait. TimeoutError: no answer
        within `timeout_s`. RuntimeError: closed. A task that is cancelled leaves the queue.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[SearchResult] = loop.create_future()
        request = self._request(queries, k, ef, allow, timeout_s, future, loop)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            self._forget(request)
            raise TimeoutError(str(error) or _too_late(request)) from None
        except asyncio.CancelledError:
            self._forget(request)
            raise

    def submit(
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        ef: int = 64,
        allow: ArrayLike | None = None,
        timeout_s: float | None = None,
    ) -> "Future[SearchResult]":
        """The same for threads: the Future of the answer, which can be cancelled until it is there.

        After `timeout_s` a request that still waits is not searched: its future has a TimeoutError
        when its turn comes.
        """
        future: Future[SearchResult] = Future()
        request = self._request(queries, k, ef, allow, timeout_s, future, None)
        future.add_done_callback(lambda _: self._forget(request))
        return future

    def _request(
        self,
        queries: ArrayLike,
        k: int,
        ef: int,
        allow: ArrayLike | None,
        timeout_s: float | None,
        future: "Future[SearchResult] | asyncio.Future[SearchResult]",
        loop: asyncio.AbstractEventLoop | None,
    ) -> _Request:
        """Check what was given, and put it in the queue."""
        k, ef = inputs.integer("k", k, 1, inputs.MOST_NODES), inputs.integer("ef", ef, 1)
        index = self._index
        given = index.checked_queries(queries)
        if given.flags.writeable:  # perhaps the caller's own array, which it may use again at once
            given = given.copy()
        if timeout_s is not None and not inputs.number("timeout_s", timeout_s) > 0:
            raise ValueError(f"timeout_s={timeout_s}: expected more than 0")
        mask = None if allow is None else inputs.array("allow", allow)
        request = _Request(given, k, mask, timeout_s, future, loop)
        shared: object = id(mask)  # which lives as long as the request
        if mask is not None and mask.ndim == 2:  # a row a query: shared with nobody
            shared = request
        request.key = (index, ef, shared, min(1 << (k - 1).bit_length(), max(ef, k)))
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the batcher is closed")
            if self._waiting_rows and self._waiting_rows + len(given) > self._queue_rows:
                raise QueueFullError(
                    f"{self._waiting_rows:,} rows wait and {len(given):,} more would be too many: "
                    f"queue_rows={self._queue_rows:,}",
                    self._waiting_rows / self._rate if self._rate else 1.0,
                )
            self._groups.setdefault(request.key, {})[request] = None
            self._waiting_rows += len(given)
            is_awaited = self._sleepers > 0
            self._sleepers -= is_awaited
        if is_awaited:
            self._wake.put(None)  # not within the lock, which is the first that it asks for
        return request

    def _forget(self, request: _Request) -> None:
        """Take what still waits of a request out of the queue."""
        with self._lock:
            group = self._groups.get(request.key, {})
            if request in group:
                del group[request]
                self._waiting_rows -= request.waiting_rows
                if not group:
                    del self._groups[request.key]

    # ---------------------------------------------------------------- its state

    @property
    def index(self) -> Index:
        """The index that new requests are searched in."""
        return self._index

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue."""
        return self._waiting_rows

    @property
    def in_flight(self) -> int:
        """Batches that the engine searches now."""
        return self._in_flight

    @property
    def waiting_requests(self) -> int:
        """Requests in the queue."""
        with self._lock:
            return sum(map(len, self._groups.values()))

    def swap(self, index: Index) -> None:
        """Search another index from here on; requests that are already here stay with theirs."""
        with self._lock:
            self._index = index
            self._most_in_flight = IN_FLIGHT[index.device]
            while len(self._workers) < self._most_in_flight and not self._is_closed:
                name = f"hnsw_gpu batcher {len(self._workers)}"
                self._workers.append(threading.Thread(target=self._work, name=name, daemon=True))
                self._workers[-1].start()

    def close(self) -> None:
        """Refuse new requests, answer those that wait, and return when all are answered."""
        with self._lock:
            self._is_closed = True
            self._wake_up(self._sleepers)
        for worker in self._workers:
            worker.join()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> "Batcher":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # ---------------------------------------------------------------- the engine's thread

    def _work(self) -> None:
        while True:
            parts: list[_Part] = []  # an idle worker holds no queries
            late: list[_Request] = []
            with self._lock:
                has_work = bool(self._groups) and self._in_flight < self._most_in_flight
                if has_work:
                    parts, late = self._next_batch()
                    self._in_flight += 1
                    self._wake_up(len(self._groups))  # on a GPU: for what is left
                elif self._is_closed and not self._groups:
                    self._wake_up(self._sleepers)
                    return
                else:
                    self._sleepers += 1
            if not has_work:
                self._wake.get()
                continue
            _settle((request, TimeoutError(_too_late(request))) for request in late)
            try:
                if parts:
                    self._run(parts)
            finally:
                with self._lock:
                    self._in_flight -= 1

    def _wake_up(self, count: int) -> None:
        """Wake up to `count` workers. (A Condition would cost a lone caller 60 microseconds.)"""
        for _ in range(min(count, self._sleepers)):
            self._sleepers -= 1
            self._wake.put(None)

    def _next_batch(self) -> tuple[list[_Part], list[_Request]]:
        """The batch of the group whose turn it is, and requests that are past their deadline."""
        key, group = next(iter(self._groups.items()))
        room, now = self._rows_of_a_batch(key[0]), time.perf_counter()
        parts: list[_Part] = []
        late: list[_Request] = []
        while group:
            request = next(iter(group))
            rows = request.waiting_rows
            if request.deadline < now:
                late.append(request)
            elif rows > room and (parts or not room):
                break  # goes whole into the next batch, or is split there
            else:
                rows = min(rows, room)
                parts.append(_Part(request, request.taken, request.taken + rows))
                request.taken += rows
                room -= rows
            self._waiting_rows -= rows
            if request.deadline >= now and request.waiting_rows:
                break  # split: the rest keeps its place
            del group[request]
        del self._groups[key]
        if group:
            self._groups[key] = group
        return parts, late

    def _rows_of_a_batch(self, index: Index) -> int:
        if self._batch_rows is not None:
            return self._batch_rows
        if index.device == "cuda":
            return ROWS_ON_A_GPU
        return ROWS_A_THREAD * thread_count(self._threads)

    def _run(self, parts: list[_Part]) -> None:
        """Search one batch and give each caller its own rows, or the error."""
        started = time.perf_counter()
        waited = [started - part.request.arrived for part in parts]
        index, ef, _, k = parts[0].request.key
        # With a filter, or after deletes, how many k are found decides whether all are compared
        # (R8): only without can a larger k give the same answer.
        calls: dict[int, list[_Part]] = defaultdict(list)
        for part in parts:
            is_rounded = part.request.allow is None and not index.has_deleted
            calls[k if is_rounded else part.request.k].append(part)
        outcomes: list[tuple[_Request, SearchResult | BaseException]] = []
        is_ok = True
        for wide, members in calls.items():
            try:
                found = self._found(index, members, wide, ef)
                outcomes += self._divided(members, found)
            except Exception as error:  # of the engine: these callers get it, the next batch runs
                is_ok = False
                for part in members:
                    self._forget(part.request)  # what is left of one that was split
                    outcomes.append((part.request, error))
        engine_s = time.perf_counter() - started
        _settle(outcomes)
        rows = sum(part.stop - part.start for part in parts)
        self._rate += (rows / engine_s - self._rate) * (0.2 if self._rate else 1)
        if self._on_batch is not None:
            try:
                self._on_batch(Batch(rows, waited, engine_s, is_ok))
            except Exception:  # a caller's mistake must not end the engine's thread
                logger.exception("on_batch failed")

    def _found(self, index: Index, parts: list[_Part], k: int, ef: int) -> SearchResult:
        first = parts[0]
        allow = first.request.allow
        if allow is not None and allow.ndim == 2:
            allow = allow[first.start : first.stop]
        rows = [part.request.queries[part.start : part.stop] for part in parts]
        queries = rows[0] if len(rows) == 1 else np.concatenate(rows)
        return index.search_checked(queries, k, ef=ef, allow=allow, threads=self._threads)

    def _divided(
        self, parts: list[_Part], found: SearchResult
    ) -> Iterator[tuple[_Request, SearchResult]]:
        """The requests that are complete with the rows of a batch, and their answers."""
        first = 0
        for request, start, stop in parts:
            rows = slice(first, first + stop - start)
            first = rows.stop
            # copies: a view would keep the whole batch while its caller keeps the answer
            mine = SearchResult(*(array[rows, : request.k].copy() for array in found))
            if stop - start < len(request.queries):
                with self._lock:  # two parts of one request may be in flight
                    whole = request.with_part(start, stop, mine)
                if whole is None:
                    continue
                mine = whole
            yield request, mine


def _settle(outcomes: Iterable[tuple[_Request, "SearchResult | BaseException"]]) -> None:
    """Give callers their answers; those of one event loop in one call, which wakes it once."""
    by_loop = defaultdict(list)
    for request, outcome in outcomes:
        if request.loop is None:
            request.settle(outcome)
        else:
            by_loop[request.loop].append((request, outcome))
    for loop, members in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed, its tasks are gone
            loop.call_soon_threadsafe(_settle_on_loop, members)


def _settle_on_loop(outcomes: list[tuple[_Request, "SearchResult | BaseException"]]) -> None:
    for request, outcome in outcomes:
        request.settle(outcome)


def _too_late(request: _Request) -> str:
    waited = time.perf_counter() - request.arrived
    return f"no answer within timeout_s={request.deadline - request.arrived:g} ({waited:.3f} s)"
