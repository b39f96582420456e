"""Who does the steps of a long job: this process, one after the other, or whoever else can."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Advance = Callable[[int], object]


class Shown(Protocol):
    """A bar of progress, which `hnsw_gpu.progress.bar` draws."""

    n: Any

    def update(self, n: Any) -> object:
        """So many rows more are done."""


class Unseen:
    """No bar."""

    n = 0

    def update(self, n: Any) -> None:
        """Nothing."""


UNSEEN = Unseen()


class StepRunner(Protocol):
    """Does steps that leave their results in files, and return little."""

    threads: int | None  # of a step; None: all of the machine

    def each(
        self,
        do: Callable[..., Any],
        common: Sequence[Any],
        given: Sequence[Sequence[Any]],
        rows: Sequence[int],
        shown: Shown,
    ) -> list[Any]:
        """What `do(*common, *one, advance=...)` returns for each one of those given.

        rows: that each of them stands for. advance: told how many of these are done, by whom it is
        told at once; however that was, `shown` has the right number after each.
        """


class Here:
    """One step after the other, in this process."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def each(
        self,
        do: Callable[..., Any],
        common: Sequence[Any],
        given: Sequence[Sequence[Any]],
        rows: Sequence[int],
        shown: Shown,
    ) -> list[Any]:
        """As of a StepRunner."""
        results, done = [], 0
        for one, count in zip(given, rows, strict=True):
            results.append(do(*common, *one, advance=shown.update))
            done += count
            shown.update(done - shown.n)
        return results


HERE = Here()
