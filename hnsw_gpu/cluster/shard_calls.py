"""Calls of shards' actors: one of each shard, another replica where one is lost, a limit of time.

All calls of a process run on one event loop in a thread of its own, whoever waits for them: so what
is counted here needs no lock. Ray repeats no call by itself: while an actor is made again its calls
fail at once, and the other replica answers meanwhile.
"""

import asyncio
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from hnsw_gpu.cluster.ray_connection import imported_ray
from hnsw_gpu.cluster.shard_actor import NotOpenError, ShardFacts

RETRY_S = 0.1  # between two rounds of the replicas of a shard
PATIENCE_S = 2.0  # before an actor whose answer is awaited has to tell of itself
LOOK_S = 3.0  # for an actor to tell of itself
LARGE = 100_000  # bytes of an array that is put in Ray's store once, not sent with each call
LOOK = "look"  # the actors' group of calls that no search keeps waiting


class ShardLostError(RuntimeError):
    """No replica of some shard answers; `shards` names their files."""

    def __init__(self, message: str, shards: tuple[str, ...]) -> None:
        super().__init__(message)
        self.shards = shards

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.shards)


class SilentError(RuntimeError):
    """An actor says nothing, not even of itself: its machine hangs, or nobody reaches it."""


class Replica:
    """An actor's handle, and what this process knows of it."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.calls = 0  # that run
        self.failed_at = 0.0
        self.silent: asyncio.Future[None] | None = None  # it says nothing, and is listened to

    def rank(self) -> tuple[bool, bool, int]:
        """Smaller is asked first: who did not fail just now, then who has least to do."""
        failed = self.failed_at > time.monotonic() - 1.0
        return self.silent is not None, failed, self.calls

    async def answer(
        self, ask: Callable[..., Any], given: Sequence[Any], *, may_be_left: bool
    ) -> Any:
        """What the actor answers; the error of its own code, or Ray's where there is no actor.

        SilentError, where it `may_be_left` for another replica: it has said nothing for some
        seconds. One that computes for long does say so.
        """
        self.calls += 1
        answer = asyncio.ensure_future(_of_ray(self.handle.ask.remote(ask, *given)))
        try:
            while not (await asyncio.wait([answer], timeout=PATIENCE_S))[0]:
                if may_be_left:
                    await self._hear()
            return answer.result()
        finally:
            answer.cancel()
            self.calls -= 1

    async def _hear(self) -> None:
        """SilentError where it does not tell of itself; then it is listened to until it does."""
        try:
            await asyncio.wait_for(self.facts(), LOOK_S)
        except TimeoutError:
            if self.silent is None:
                self.silent = asyncio.ensure_future(self._listen())
            raise SilentError(f"an actor has said nothing for {PATIENCE_S + LOOK_S:g} s") from None

    async def _listen(self) -> None:
        """Until it tells of itself, or Ray that it is lost."""
        while True:
            try:
                await asyncio.wait_for(self.facts(), LOOK_S)
            except TimeoutError:
                continue
            except Exception:  # whoever asks it next is told
                break
            break
        self.silent = None

    async def facts(self) -> ShardFacts:
        """What the actor tells of itself; errors as of `answer`."""
        found: ShardFacts = await _of_ray(self.handle.facts.remote())
        return found


async def _of_ray(called: Any) -> Any:
    """What an actor answers; the error of its own code, or Ray's where there is no actor."""
    try:
        return await called
    except imported_ray().exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None


class ShardCalls:
    """Asks the actors of all shards. A pickle of it asks the same actors from another process."""

    def __init__(
        self, files: Sequence[str], handles: Sequence[Sequence[Any]], timeout_s: float
    ) -> None:
        self.files, self.timeout_s = tuple(files), timeout_s
        self.replicas = [[Replica(handle) for handle in shard] for shard in handles]
        self.retries = [0] * len(self.files)  # calls of each shard that another actor was asked for
        self._process = os.getpid()

    def __reduce__(self) -> tuple:
        handles = [[replica.handle for replica in shard] for shard in self.replicas]
        return ShardCalls, (self.files, handles, self.timeout_s)

    # ---------------------------------------------------------------- of each shard

    def of_each(self, ask: Callable[..., Any], *what: Any) -> list[Any]:
        """`ask(index, *what)` of each shard's index."""
        return self.waited_for(self.begin(ask, what))

    def begin(
        self, ask: Callable[..., Any], what: Sequence[Any], *, may_lack: bool = False
    ) -> "Future[list[Any]]":
        """The same, to be waited for; with `may_lack` the errors of shards that are lost, too.

        Such shards are then not waited for until their actors are there again.
        """
        given = [_sent(value) for value in what]
        return self.on_loop(self._of_each(ask, given, may_lack))

    async def _of_each(
        self, ask: Callable[..., Any], given: Sequence[Any], may_lack: bool
    ) -> list[Any]:
        until = asyncio.get_running_loop().time() + self.timeout_s
        calls = [
            asyncio.ensure_future(self._of_shard(s, ask, given, until, may_lack))
            for s in range(len(self.files))
        ]
        try:
            return await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()

    async def _of_shard(
        self, s: int, ask: Callable[..., Any], given: Sequence[Any], until: float, may_lack: bool
    ) -> Any:
        why: BaseException | None = None
        not_there = NotOpenError, SilentError, imported_ray().exceptions.RayError
        others = len(self.replicas[s]) > 1
        try:
            async with asyncio.timeout_at(until):
                while True:
                    errors = []
                    for replica in sorted(self.replicas[s], key=Replica.rank):
                        try:
                            return await replica.answer(ask, given, may_be_left=others)
                        except not_there as error:
                            replica.failed_at = time.monotonic()
                            errors.append(why := error)
                            self.retries[s] += 1
                    if may_lack or all(map(_is_for_good, errors)):
                        break
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            if not may_lack and (why is None or isinstance(why, SilentError)):
                raise TimeoutError(
                    f"{self.files[s]}: no answer within timeout_s={self.timeout_s:g}"
                ) from None
        if not may_lack and isinstance(why, NotOpenError):
            raise why.cause
        lost = ShardLostError(
            f"{self.files[s]}: no replica answers, of {len(self.replicas[s])} "
            f"(timeout_s={self.timeout_s:g}): {_first_line(why)}",
            (self.files[s],),
        )
        if may_lack:
            return lost
        raise lost

    # ---------------------------------------------------------------- of each actor

    def opened(self, within_s: float) -> list[list[ShardFacts]]:
        """What every actor tells of itself, once all are there.

        The error that keeps one from opening its shard; TimeoutError: after `within_s` some are
        not there.
        """
        return self.waited_for(self.on_loop(self._opened(within_s)), within_s)

    async def _opened(self, within_s: float) -> list[list[ShardFacts]]:
        every = [replica for shard in self.replicas for replica in shard]
        calls = [asyncio.ensure_future(_started(replica)) for replica in every]
        try:
            async with asyncio.timeout(within_s):
                found = iter(await asyncio.gather(*calls))
                return [[next(found) for _ in shard] for shard in self.replicas]
        except TimeoutError:
            missing = sum(not call.done() or call.cancelled() for call in calls)
            raise TimeoutError(
                f"{missing} of {len(every)} actors were not there within {within_s:g} s"
            ) from None
        finally:
            for call in calls:
                call.cancel()

    def look(self) -> list[list[ShardFacts | BaseException]]:
        """What every actor tells of itself now, or what keeps it from that."""
        return self.waited_for(self.on_loop(self._look()))

    async def _look(self) -> list[list[ShardFacts | BaseException]]:
        every = [replica for shard in self.replicas for replica in shard]
        calls = (asyncio.wait_for(replica.facts(), LOOK_S) for replica in every)
        found = iter(await asyncio.gather(*calls, return_exceptions=True))
        return [[next(found) for _ in shard] for shard in self.replicas]

    def are_there(self) -> bool:
        """Does an actor of each shard tell of itself?"""
        found: bool = self.waited_for(self.on_loop(self._are_there()))
        return found

    async def _are_there(self) -> bool:
        return all(await asyncio.gather(*map(_is_any_there, self.replicas)))

    # ---------------------------------------------------------------- the loop

    def on_loop(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        """Begin it on the loop; RuntimeError in a forked process, where Ray does not go."""
        if os.getpid() != self._process:
            work.close()
            raise RuntimeError(
                "the cluster was opened before this process was forked, and Ray does not follow; "
                "start processes by `spawn`, or open it here"
            )
        return asyncio.run_coroutine_threadsafe(work, _loop(self._process))

    def waited_for(self, begun: "Future[Any]", within_s: float | None = None) -> Any:
        """Its result; what has begun is given up where the wait is, as by Ctrl-C."""
        limit = (self.timeout_s if within_s is None else within_s) + 10  # where Ray itself hangs
        try:
            return begun.result(limit)
        finally:
            begun.cancel()


async def _is_any_there(replicas: Sequence[Replica]) -> bool:
    """Is one there? As soon as it says so, whatever the others do."""
    looks = [asyncio.ensure_future(replica.facts()) for replica in replicas]
    try:
        for look in asyncio.as_completed(looks, timeout=LOOK_S):
            with contextlib.suppress(NotOpenError, imported_ray().exceptions.RayError):
                await look
                return True
    except TimeoutError:
        pass
    finally:
        for each in looks:
            each.cancel()
    return False


async def _started(replica: Replica) -> ShardFacts:
    """What an actor tells of itself, however often it is lost before."""
    ray_error = imported_ray().exceptions.RayError
    while True:
        try:
            return await replica.facts()
        except NotOpenError as error:
            raise error.cause from None
        except ray_error as error:
            if _is_for_good(error):
                raise RuntimeError(f"an actor cannot start: {error}") from None
        await asyncio.sleep(RETRY_S)


def _is_for_good(error: BaseException) -> bool:
    """Will no actor ever answer there, or none before its file is mended?"""
    return isinstance(error, (NotOpenError, imported_ray().exceptions.ActorDiedError))


def _first_line(error: BaseException | None) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _sent(value: Any) -> Any:
    """A value as calls take it: a large array once in Ray's store."""
    is_large = isinstance(value, np.ndarray) and value.nbytes > LARGE
    return imported_ray().put(value) if is_large else value


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process, and its thread."""
    loop = asyncio.new_event_loop()
    name = f"hnsw_gpu cluster {process}"
    threading.Thread(target=loop.run_forever, name=name, daemon=True).start()
    return loop
