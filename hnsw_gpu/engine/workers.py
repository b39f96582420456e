"""Work on threads. The compiled engines release the GIL, and a chunk of work is milliseconds.

A signal handler may raise at any line of the main thread, as Ctrl-C does. So nothing here waits for
a Condition, which an exception can leave locked for ever; locks are C's own, held by `with`, or by
a thread that no signal reaches.
"""

import _thread
import os
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock
from typing import Any

from hnsw_gpu.engine.machine import processors


def thread_count(threads: int | None) -> int:
    """The number of threads to use: as asked for, or one for each processor we may use."""
    return processors() if threads is None else threads


class Job:
    """A call that one other thread makes."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._claim = Lock()  # taken by who runs the job, or makes sure that nobody will
        self._running = Lock()
        self._running.acquire()
        self._has_ended = False  # it is set, then `_running` released
        self.error: BaseException | None = None

    def start(self) -> bool:
        """Hand the job to a thread that is idle, or a new one; False where none can be had.

        Started again it is run once all the same.
        """
        try:
            inbox = _idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            try:
                _thread.start_new_thread(_help, (inbox,))
            except RuntimeError:  # the interpreter is ending
                return False
        inbox.put(self)
        return True

    def run(self, before_end: Callable[[], object]) -> None:
        """Run it, unless that was done."""
        if not self._claim.acquire(blocking=False):
            before_end()
            return
        try:
            self._work()
        except BaseException as error:
            self.error = error
        before_end()
        self._has_ended = True
        self._running.release()

    def withdraw(self) -> bool:
        """Make sure that nobody begins it; False: somebody has."""
        return self._claim.acquire(blocking=False)

    def wait(self) -> None:
        """Until it has ended. Interrupted, it can be called again."""
        while not self._has_ended:
            self._running.acquire()


_idle: list["SimpleQueue[Job]"] = []  # of the threads that wait for something to do
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # they are not there


def _help(inbox: "SimpleQueue[Job]") -> None:
    """What a thread does, from job to job: to start one takes as long as some queries."""
    while True:
        inbox.get().run(lambda: _idle.append(inbox))


def run_chunks(run: Callable[[int, int], None], count: int, chunk: int, threads: int) -> None:
    """Call run(start, stop) for each chunk of range(count), on up to `threads` threads.

    The caller's thread is one of them. An exception in one chunk, or raised here by a signal
    handler, stops the rest before it is raised.
    """
    if 0 < count <= chunk:
        run(0, count)
        return
    starts = iter(range(0, count, chunk))
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for start in starts:  # next() of a range's iterator is atomic under the GIL
                if failed:
                    return
                run(start, min(start + chunk, count))
        except BaseException as error:
            failed.append(error)

    jobs: list[Job] = []
    try:
        for _ in range(min(threads, -(-count // chunk)) - 1):
            jobs.append(Job(work))
            if not jobs[-1].start():
                break
        work()
    except BaseException as error:  # of a signal handler, between two lines
        failed.append(error)
    for job in jobs:
        if not job.withdraw():  # one that has not begun has nothing left to do
            _wait_for(job, failed)
    if failed:
        _raise(failed)


def _wait_for(job: Job, failed: list[BaseException]) -> None:
    """Wait for its end, also after what a signal handler raises meanwhile."""
    is_over = False
    while not is_over:
        try:
            job.wait()
            is_over = True
        except BaseException as error:
            failed.append(error)


def _raise(errors: list[BaseException]) -> None:
    """Raise the first. Held by a variable it would, by its traceback, hold itself and much else."""
    first = errors[0]
    errors.clear()
    try:
        raise first
    finally:
        del first


class Stopped(Exception):
    """Raised by work that ends early because it was asked to."""


def run_to_a_stop(work: Callable[[Callable[[], bool]], None]) -> None:
    """Call work(is_stopped) on another thread, and wait for its end.

    What a signal handler raises here, KeyboardInterrupt for one, is raised at that end; meanwhile
    `is_stopped()` is True. So `work` is never torn apart: it ends, or raises Stopped, where its
    data is whole.
    """
    raised: list[BaseException] = []
    job = Job(lambda: work(lambda: bool(raised)))
    is_over = False
    while not is_over:
        try:
            while not is_over:  # twice: a signal is also looked at where a loop goes back
                try:
                    if not job.start():
                        job.run(lambda: None)
                    job.wait()
                    is_over = True
                except BaseException as error:  # a second and a third one too
                    raised.append(error)
        except BaseException as error:
            raised.append(error)
    errors = raised[:]
    if job.error is not None and not isinstance(job.error, Stopped):
        errors.insert(0, job.error)
    job.error = None
    raised.clear()
    if errors:
        _raise(errors)


_told_of_forks: "weakref.WeakSet[Any]" = weakref.WeakSet()


def tell_of_forks(one: Any) -> None:
    """Have `one.after_fork()` called in each process that is forked while it lives."""
    _told_of_forks.add(one)


def _tell() -> None:
    for one in _told_of_forks:
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell)


class SharedLock:
    """Many readers or one writer. A waiting writer goes before readers that come after it.

    In a forked process it is free: its holders are gone.
    """

    def __init__(self) -> None:
        self._gate = Lock()  # held by a writer, and for a moment by each reader that comes
        self._readers: list[Any] = []  # a lock of each, which it holds until it is done
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Be free, whoever holds it."""
        self._gate, self._readers = Lock(), []

    def shared(self, work: Callable[[], Any]) -> Any:
        """work(), as one of many."""
        mine = Lock()
        with mine:
            with self._gate:
                self._readers = [lock for lock in self._readers if lock.locked()] + [mine]
            return work()

    def exclusive(self, work: Callable[[], Any]) -> Any:
        """work(), alone."""
        with self._gate:
            for lock in self._readers:
                with lock:
                    pass
            return work()


class ChangeLock:
    """`with changing.lock`: one at a time. In a forked process it is free: its holder is gone."""

    def __init__(self) -> None:
        self.lock = Lock()
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Be free, whoever holds it."""
        self.lock = Lock()
