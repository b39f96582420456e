"""Stops work for callers who close the connection."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

WATCH_AFTER_S = 0.05  # most answers are there sooner, and need no watcher

Answer = TypeVar("Answer")


async def unless_disconnected(request: Request, answer: Awaitable[Answer]) -> Answer:
    """Await `answer`; cancel it and raise ClientDisconnect once the caller disconnects."""
    this_task = asyncio.current_task()
    assert this_task is not None

    async def watch() -> None:
        await asyncio.sleep(WATCH_AFTER_S)
        while (await request.receive())["type"] != "http.disconnect":
            pass
        this_task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await answer
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            this_task.uncancel()
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
