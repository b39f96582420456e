"""An answer is given up as soon as its caller closes the connection."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

WATCH_AFTER_S = 0.05  # for a caller who leaves: shorter waits are not worth a look

Answer = TypeVar("Answer")


class CallerLeftError(Exception):
    pass


async def unless_disconnected(request: Request, answer: Awaitable[Answer]) -> Answer:
    """The answer, or CallerLeftError as soon as the caller closes the connection."""
    me = asyncio.current_task()
    assert me is not None

    async def watch() -> None:
        await asyncio.sleep(WATCH_AFTER_S)
        while (await request.receive())["type"] != "http.disconnect":
            pass
        me.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await answer
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            me.uncancel()
            raise CallerLeftError from None
        raise
    finally:
        watcher.cancel()
