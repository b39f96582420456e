"""Reads request bodies, and refuses those that are too large, too slow or too many at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from hnsw_gpu.serve.problem import Problem

HELD_BODIES = 4  # bodies of the largest size that may be in memory at once
SMALL = 2**18  # bytes, or a sixteenth of the largest body: always admitted


class BodyReader:
    """Reads bodies of at most `most_bytes` each, within `timeout_s`."""

    def __init__(self, most_bytes: int, timeout_s: float) -> None:
        self._most_bytes, self._timeout_s = most_bytes, timeout_s
        self._small = min(SMALL, most_bytes // 16)
        self.held_bytes = 0  # of all requests

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held until the block ends.

        Problem 408: it came too slowly. 413: it is too large. 429: too many are held.
        """
        body = await self._receive(request)
        try:
            yield body
        finally:
            self.held_bytes -= len(body)

    async def _receive(self, request: Request) -> bytes:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal():
            self._check_size(int(declared))
        size, chunks = 0, []
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    self.held_bytes += len(chunk)
                    self._check_size(size)
                    is_full = self.held_bytes > self._most_bytes * HELD_BODIES
                    if is_full and size > self._small:
                        busy = "too many large bodies at once"
                        raise Problem(429, busy, Retry_After="1", Connection="close")
                    chunks.append(chunk)
                if size > SMALL:
                    return await asyncio.to_thread(b"".join, chunks)
                return b"".join(chunks)
        except BaseException as error:
            self.held_bytes -= size
            if isinstance(error, TimeoutError):
                late = f"the body did not come within {self._timeout_s:g} s"
                raise Problem(408, late, Connection="close") from None
            raise

    def _check_size(self, size: int) -> None:
        if size > self._most_bytes:
            detail = f"a body of {size:,} bytes: at most {self._most_bytes:,}"
            raise Problem(413, detail, Connection="close")
