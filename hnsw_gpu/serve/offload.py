"""Work that takes long, on threads, so that the event loop serves the others meanwhile."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

LARGE = 2**16  # bytes of JSON, or numbers: less is done at once
HUGE = 2**20  # the same: waits for others as large, and not in the way of the rest

Result = TypeVar("Result")


class Offload:
    """One thread for large work and one for huge work: more would fight for the interpreter."""

    def __init__(self) -> None:
        self._large, self._huge = asyncio.Lock(), asyncio.Lock()

    async def call(self, size: int, work: Callable[..., Result], *args: Any) -> Result:
        """work(*args), whose arguments are of that size."""
        if size <= LARGE:
            return work(*args)
        async with self._huge if size > HUGE else self._large:
            running = asyncio.get_running_loop().run_in_executor(None, work, *args)
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait([running])  # what it works on is in memory until then
                raise


async def on_a_thread(work: Callable[[], object]) -> None:
    """work() on a thread of its own: asyncio's are gone while the interpreter ends."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if ended.done():  # whoever waited was cancelled
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def run() -> None:
        error = None
        try:
            work()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, error)

    try:
        threading.Thread(target=run).start()
    except RuntimeError:  # none can be had any more
        run()
    await ended
