"""Work on threads. The compiled engines release the GIL, and a chunk of work is milliseconds."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager


def thread_count(threads: int | None) -> int:
    """The number of threads to use: as asked for, or one for each processor we may run on."""
    if threads is not None:
        return threads
    if hasattr(os, "sched_getaffinity"):  # Linux; elsewhere all processors count
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _new_helpers() -> ThreadPoolExecutor:
    """Threads that help a caller; one is started when all others are at work."""
    return ThreadPoolExecutor(256, thread_name_prefix="hnsw_gpu")


_helpers = _new_helpers()


def _forget_helpers() -> None:
    """In a forked process they are not there."""
    global _helpers
    _helpers = _new_helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def run_chunks(run: Callable[[int, int], None], count: int, chunk: int, threads: int) -> None:
    """Call run(start, stop) for each chunk of range(count), on up to `threads` threads.

    The caller's thread is one of them; the others are kept from call to call, because to start one
    takes as long as some queries. An exception in one chunk, or KeyboardInterrupt here, stops the
    rest before it is raised: no thread works on behind the caller's back.
    """
    starts = iter(range(0, count, chunk))
    is_stopped = threading.Event()

    def work() -> None:
        try:
            for start in starts:  # next() of a range's iterator is atomic under the GIL
                if is_stopped.is_set():
                    return
                run(start, min(start + chunk, count))
        except BaseException:
            is_stopped.set()
            raise

    others = min(threads, -(-count // chunk)) - 1
    futures = [_helpers.submit(work) for _ in range(others)]
    try:
        work()
        for future in futures:
            if not future.cancel():  # one that has not begun has nothing left to do
                future.result()
    finally:
        is_stopped.set()
        wait([future for future in futures if not future.cancel()])


def run_to_a_stop(work: Callable[[threading.Event], None]) -> None:
    """Call work(stop) on a thread and wait. KeyboardInterrupt sets `stop`, then waits on.

    Python raises KeyboardInterrupt in the main thread alone, so `work` is never torn apart: it
    looks at `stop` where its data is whole.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, stop)
        while not future.done():
            try:
                wait([future])
            except KeyboardInterrupt:  # a second and a third one too
                stop.set()
        future.result()
    if stop.is_set():
        raise KeyboardInterrupt


class SharedLock:
    """Many readers or one writer. A waiting writer goes before readers that come after it.

    In a forked process it is free: the threads that held it are not there.
    """

    def __init__(self) -> None:
        self._start_free()

    def _start_free(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._readers = 0
        self._writers = 0  # at work or waiting
        self._is_writing = False

    def _condition(self) -> threading.Condition:
        if self._process != os.getpid():
            self._start_free()
        return self._changed

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold as one of many."""
        with self._condition():
            self._changed.wait_for(lambda: not self._writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold alone."""
        with self._condition():
            self._writers += 1
            try:
                self._changed.wait_for(lambda: not self._readers and not self._is_writing)
            except BaseException:
                self._writers -= 1
                self._changed.notify_all()
                raise
            self._is_writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writers -= 1
                self._is_writing = False
                self._changed.notify_all()
