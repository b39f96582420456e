"""Work that takes long, on threads, so that the event loop serves the others meanwhile."""

import asyncio
from collections.abc import Callable
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
