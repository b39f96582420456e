"""A Future that can be settled without waiting for whoever waits for it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, _base
from typing import TypeVar

from hnsw_gpu.engine import tell_of_forks
from hnsw_gpu.results import SearchResult

Kept = TypeVar("Kept")

MOMENT_S = 0.05  # longer than a thread that goes on holds a Future's lock


class AnswerFuture(Future[SearchResult]):
    """A Future for threads.

    A Ctrl-C in a thread that is in `result`, `wait`, `cancel`, ... can leave locks of
    `concurrent.futures` held for ever, and `set_result` would wait for them as long: with it the
    engine's thread, and all other callers. In a forked process it has an error: who would settle
    it is in the other one.
    """

    def __init__(self) -> None:
        super().__init__()
        tell_of_forks(self)

    def result(self, timeout: float | None = None) -> SearchResult:
        """As Future's; an exception of a signal handler is raised as it is."""
        return self._waited_for(super().result, timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The same."""
        return self._waited_for(super().exception, timeout)

    def _waited_for(self, wait: Callable[[float | None], Kept], timeout: float | None) -> Kept:
        try:
            return wait(timeout)
        except RuntimeError as error:
            # interrupted where a Condition has let go of its lock, it fails to let go again
            interrupt = error.__context__
            if error is self._exception or interrupt is None:
                raise
            raise interrupt from None

    def after_fork(self) -> None:
        """Give it an error, where nobody settles it; locks that a fork left held are replaced.

        Callbacks are not called: they belong to the process that was forked.
        """
        self._condition = threading.Condition()
        self._waiters.clear()
        self._done_callbacks.clear()  # type: ignore[attr-defined]
        if self._state in (_base.PENDING, _base.RUNNING):
            self._exception = RuntimeError(
                "this process was forked before the answer came, which goes to the other one"
            )
            self._state = _base.FINISHED

    def cancel(self) -> bool:
        """As Future's, and `wait` and `as_completed` know at once: no engine comes to it again."""
        is_cancelled = super().cancel()
        with self._condition:
            if self._state == _base.CANCELLED:
                self.set_running_or_notify_cancel()
        return is_cancelled

    def settle_now(self, outcome: SearchResult | BaseException) -> object | None:
        """Settle it, unless it was settled or cancelled; returns what keeps it from that, or None.

        That is a lock that is held, or a `wait` or `as_completed`, which have locks of their own.
        """
        if not self._condition.acquire(timeout=MOMENT_S):
            return self._condition
        try:
            if self._waiters:
                return self._waiters[0]
            if self._state == _base.CANCELLED:
                self._state = _base.CANCELLED_AND_NOTIFIED
            if self._state != _base.PENDING:
                return None
            if isinstance(outcome, BaseException):
                self._exception = outcome
            else:
                self._result = outcome
            self._state = _base.FINISHED
            self._condition.notify_all()
        finally:
            self._condition.release()
        self._invoke_callbacks()  # type: ignore[attr-defined]
        return None

    def settle(self, outcome: SearchResult | BaseException) -> None:
        """The same, however long others keep it waiting."""
        with self._condition:  # nobody cancels it between these two
            is_open = self._state in (_base.PENDING, _base.CANCELLED)
            if not (is_open and self.set_running_or_notify_cancel()):
                return
        if isinstance(outcome, BaseException):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)
