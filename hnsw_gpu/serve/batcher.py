"""Many small searches in batches for one engine. Knows asyncio and threads, but no HTTP.

Requests that arrive while the engine is busy form the next batch, which starts the moment it is
free. Nothing waits for a batch to fill: a window of 2 ms costs a lone caller five sixths of its
requests/s.
"""

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs, label_inputs
from hnsw_gpu.engine import thread_count
from hnsw_gpu.results import SearchResult
from hnsw_gpu.searching import Searching
from hnsw_gpu.serve.answer_future import AnswerFuture
from hnsw_gpu.serve.batch_forming import AnyFuture, BatchKey, BatchQueue, Part, QueuedSearch
from hnsw_gpu.serve.offload import on_a_thread

logger = logging.getLogger("hnsw_gpu")

# Larger batches are hardly faster per row, and every caller waits for the whole batch.
ROWS_A_THREAD = 128
ROWS_ON_A_GPU = 8192


Settled = tuple[QueuedSearch, SearchResult | BaseException]


class QueueFullError(RuntimeError):
    """Too many rows wait: try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.retry_after_s)


class Batch(NamedTuple):
    """One call of the engine."""

    rows: int
    waited_s: list[float]  # of each request, from its arrival to this call
    engine_s: float
    is_ok: bool


class Batcher:
    """Searches one index in batches for many independent callers.

    Use `await search(...)` in tasks of any event loop, `submit(...)` in threads. Answers equal
    those of `index.search`, bit for bit (R11).

    index: what is searched; `swap` replaces it.
    batch_rows: most rows in one call of the engine; larger requests are split. None: 128 per
        thread on the CPU, 8,192 on a GPU.
    queue_rows: most rows that may wait; beyond it, QueueFullError. Requests larger than a batch
        count among themselves: the first may be of any size, and small ones wait beside it.
    threads: of each search; None: all cores.
    on_batch: called with a Batch after each call of the engine, on the engine's thread.

    Requests share a batch if they have the same ef, the same number to re-rank (if the index has
    refine rows), the same k once rounded up to a power of two (at most ef), and no `allow` or the
    same 1-d array object; those larger than a batch are groups of their own. Such groups take
    turns; within a group, first come, first served. Queries are copied; do not modify `allow`
    before the answer.
    A `with` or `async with` block closes the batcher at its end.
    """

    def __init__(
        self,
        index: Searching,
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
        self._wake: SimpleQueue[None] = SimpleQueue()  # one item wakes one sleeping worker
        self._lock = threading.Lock()  # guards all that follows
        self._queue = BatchQueue()
        self._sleepers = 0  # workers that wait for `_wake`
        self._in_flight = 0
        self._most_in_flight = 0
        self._rate = 0.0  # rows/s, a moving average
        self._is_closed = False
        self._workers: list[threading.Thread] = []
        self._process = os.getpid()
        self.swap(index)

    # ---------------------------------------------------------------- callers

    async def search(
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        ef: int = 64,
        recall: float | None = None,
        rerank: int | str | None = "auto",
        allow: ArrayLike | None = None,
        timeout_s: float | None = None,
    ) -> SearchResult:
        """The k nearest labels of each query (q, dim), as `Index.search` gives them.

        ValueError, TypeError: as there. QueueFullError: too many rows wait. TimeoutError: no answer
        within `timeout_s`. RuntimeError: closed. A cancelled task leaves the queue.
        """
        index = self._index
        ef = index.chosen_ef(k, ef, recall)
        given = _own(index.checked_queries(queries))
        return await self.search_checked(
            index, given, k, ef=ef, rerank=rerank, allow=allow, timeout_s=timeout_s
        )

    async def search_checked(
        self,
        index: Searching,
        queries: np.ndarray,
        k: int,
        *,
        ef: int,
        rerank: int | str | None = "auto",
        allow: ArrayLike | None = None,
        timeout_s: float | None = None,
    ) -> SearchResult:
        """As `search`, of an index and queries that its `checked_queries` gave and nobody changes.

        The index is the served one, or one that a swap has just replaced.
        """
        future: asyncio.Future[SearchResult] = asyncio.get_running_loop().create_future()
        request = self._enqueue(index, queries, k, ef, rerank, allow, timeout_s, future)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            self._forget(request)
            raise (error if str(error) else request.timeout_error()) from None
        except asyncio.CancelledError:
            self._forget(request)
            raise

    def submit(
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        ef: int = 64,
        recall: float | None = None,
        rerank: int | str | None = "auto",
        allow: ArrayLike | None = None,
        timeout_s: float | None = None,
    ) -> "Future[SearchResult]":
        """The same for threads: a Future, which can be cancelled until it has the answer.

        A request that still waits after `timeout_s` is not searched: when its turn comes, its
        future gets a TimeoutError.
        """
        future = AnswerFuture()
        index = self._index
        ef = index.chosen_ef(k, ef, recall)
        given = _own(index.checked_queries(queries))
        request = self._enqueue(index, given, k, ef, rerank, allow, timeout_s, future)
        future.add_done_callback(lambda _: self._forget(request))
        return future

    def _enqueue(
        self,
        index: Searching,
        queries: np.ndarray,
        k: int,
        ef: int,
        rerank: int | str | None,
        allow: ArrayLike | None,
        timeout_s: float | None,
        future: AnyFuture,
    ) -> QueuedSearch:
        k, ef = inputs.integer("k", k, 1, inputs.MOST_NODES), inputs.integer("ef", ef, 1)
        if timeout_s is not None and not inputs.number("timeout_s", timeout_s) > 0:
            raise ValueError(f"timeout_s={timeout_s}: expected more than 0")
        mask = None if allow is None else label_inputs.label_array("allow", allow)
        if mask is not None and mask.ndim == 2 and len(mask) != len(queries):
            raise ValueError(
                f"allow: shape {mask.shape}, expected one row for each of {len(queries)} queries"
            )
        is_bulk = len(queries) > self._rows_of_a_batch(index)
        reranked = inputs.reranked(rerank, k, ef, index.dtype)
        key = BatchKey.of(index, k, ef, reranked, mask, is_bulk)
        request = QueuedSearch(key, queries, k, mask, timeout_s, future)
        self._require_threads()
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the batcher is closed")
            if not self._queue.has_room(len(queries), is_bulk, self._queue_rows):
                waiting = self._queue.waiting_rows
                raise QueueFullError(
                    f"{waiting:,} rows wait and {len(queries):,} more would be too many: "
                    f"queue_rows={self._queue_rows:,}",
                    waiting / self._rate if self._rate else 1.0,
                )
            self._queue.add(request)
        self._wake_up(1)  # outside the lock, which the woken worker takes first
        return request

    def _require_threads(self) -> None:
        """RuntimeError in a forked process, where the threads are not."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "the batcher was made before this process was forked, and its threads are in the "
                "other one; make another Batcher here"
            )

    def __reduce__(self) -> Any:
        raise TypeError("a Batcher has threads and cannot be copied or pickled: its index can")

    def _forget(self, request: QueuedSearch) -> None:
        with self._lock:
            self._queue.remove(request)

    # ---------------------------------------------------------------- its state

    @property
    def index(self) -> Searching:
        """The index that answers new requests."""
        return self._index

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue."""
        return self._queue.waiting_rows

    @property
    def in_flight(self) -> int:
        """Batches in the engine."""
        return self._in_flight

    @property
    def waiting_requests(self) -> int:
        """Requests in the queue."""
        with self._lock:
            return self._queue.waiting_requests

    def swap(self, index: Searching) -> None:
        """Search another index from now on; requests already queued stay with theirs."""
        self._require_threads()
        if not isinstance(index, Searching):
            raise TypeError(f"index: {type(index).__name__}, expected an Index or a Collection")
        with self._lock:
            self._index = index
            self._most_in_flight = index.calls_at_once
            while len(self._workers) < self._most_in_flight and not self._is_closed:
                name = f"hnsw_gpu batcher {len(self._workers)}"
                self._workers.append(threading.Thread(target=self._work, name=name, daemon=True))
                self._workers[-1].start()

    def close(self) -> None:
        """Refuse new requests; return when those already queued are answered.

        In a forked process nothing was queued, and nothing is waited for.
        """
        if os.getpid() != self._process:
            return
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
        await on_a_thread(self.close)

    # ---------------------------------------------------------------- the engine's thread

    def _work(self) -> None:
        while True:
            parts: list[Part] = []  # an idle worker keeps no queries alive
            late: list[QueuedSearch] = []
            with self._lock:
                is_waiting = self._queue.waiting_groups > 0
                has_work = is_waiting and self._in_flight < self._most_in_flight
                if has_work:
                    parts, late = self._queue.next_batch(self._rows_of_a_batch)
                    self._in_flight += 1
                    self._wake_up(self._queue.waiting_groups)  # on a GPU: for what is left
                elif self._is_closed and not is_waiting:
                    self._wake_up(self._sleepers)
                    return
                else:
                    self._sleepers += 1
            if not has_work:
                self._wake.get()
                with self._lock:
                    self._sleepers -= 1
                continue
            _settle((request, request.timeout_error()) for request in late)
            try:
                if parts:
                    self._run(parts)
            finally:
                with self._lock:
                    self._in_flight -= 1

    def _wake_up(self, count: int) -> None:
        """Wake up to `count` workers; one too many finds nothing to do.

        (A Condition costs a lone caller 60 microseconds, and can stay locked after Ctrl-C.)
        """
        for _ in range(min(count, self._sleepers - self._wake.qsize())):
            self._wake.put(None)

    def _rows_of_a_batch(self, index: Searching) -> int:
        if self._batch_rows is not None:
            return self._batch_rows
        if index.device != "cpu":
            return ROWS_ON_A_GPU
        return ROWS_A_THREAD * thread_count(self._threads)

    def _run(self, parts: list[Part]) -> None:
        """Search one batch and give each caller its own rows, or the error."""
        started = time.perf_counter()
        waited = [started - part.request.arrived for part in parts]
        key = parts[0].request.key
        # With a filter, or after deletes, the number of results asked for decides whether all
        # vectors are compared (R8): only without can a larger k give the same answer.
        calls: dict[int, list[Part]] = defaultdict(list)
        for part in parts:
            can_round = part.request.allow is None and not key.searched.has_deleted
            calls[key.rounded_k if can_round else part.request.k].append(part)
        outcomes: list[Settled] = []
        is_ok = True
        for k, members in calls.items():
            try:
                outcomes += self._divide(members, self._search_parts(members, k))
            except Exception as error:  # of the engine: these callers get it, the next batch runs
                is_ok = False
                for part in members:
                    self._forget(part.request)  # the rest of a split request
                    outcomes.append((part.request, error))
        engine_s = time.perf_counter() - started
        _settle(outcomes)
        rows = sum(part.stop - part.start for part in parts)
        self._rate += (rows / engine_s - self._rate) * (0.2 if self._rate else 1)
        if self._on_batch is not None:
            try:
                self._on_batch(Batch(rows, waited, engine_s, is_ok))
            except Exception:  # the caller's bug must not end the engine's thread
                logger.exception("on_batch failed")

    def _search_parts(self, parts: list[Part], k: int) -> SearchResult:
        request, start, stop = parts[0]
        key, allow = request.key, request.allow
        if allow is not None and allow.ndim == 2:  # such a request is alone
            allow = allow[start:stop]
        rows = [part.request.queries[part.start : part.stop] for part in parts]
        queries = rows[0] if len(rows) == 1 else np.concatenate(rows)
        return key.searched.search_checked(
            queries, k, ef=key.ef, rerank=key.rerank, allow=allow, threads=self._threads
        )

    def _divide(
        self, parts: list[Part], found: SearchResult
    ) -> Iterator[tuple[QueuedSearch, SearchResult]]:
        """The requests that this batch completes, and their answers."""
        first = 0
        for request, start, stop in parts:
            rows = slice(first, first + stop - start)
            first = rows.stop
            # copies: a view would keep the whole batch alive for as long as one caller's answer
            mine = SearchResult(*(array[rows, : request.k].copy() for array in found))
            if stop - start < len(request.queries):
                with self._lock:  # two parts of one request may be in flight
                    whole = request.add_part(start, stop, mine)
                if whole is None:
                    continue
                mine = whole
            yield request, mine


def _own(queries: np.ndarray) -> np.ndarray:
    """Queries that their caller cannot change any more."""
    return queries.copy() if queries.flags.writeable else queries


def _settle(outcomes: Iterable[Settled]) -> None:
    """Give callers their answers, those of one event loop in one call, which wakes it once.

    Nothing that a caller holds is waited for: such answers wait on threads of their own.
    """
    by_loop = defaultdict(list)
    by_obstacle = defaultdict(list)
    for request, outcome in outcomes:
        future = request.future
        if not isinstance(future, AnswerFuture):
            by_loop[future.get_loop()].append((future, outcome))
        elif (obstacle := future.settle_now(outcome)) is not None:
            by_obstacle[id(obstacle)].append((future, outcome))
    for loop, members in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, its tasks are gone
            loop.call_soon_threadsafe(_settle_on_loop, members)
    for waiting in by_obstacle.values():
        settle = functools.partial(_settle_in_the_end, waiting)
        try:
            threading.Thread(target=settle, name="hnsw_gpu answers", daemon=True).start()
        except RuntimeError:  # no more threads: the process ends
            settle()


def _settle_in_the_end(outcomes: list[tuple[AnswerFuture, SearchResult | BaseException]]) -> None:
    for future, outcome in outcomes:
        future.settle(outcome)


def _settle_on_loop(
    outcomes: list[tuple[asyncio.Future[SearchResult], SearchResult | BaseException]],
) -> None:
    for future, outcome in outcomes:
        if future.done():  # the caller has left
            continue
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
