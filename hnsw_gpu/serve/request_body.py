"""Bodies of requests: too long, too slow and too many at once are refused."""

import asyncio

from starlette.requests import Request

from hnsw_gpu.serve.problem import Problem

HELD_BODIES = 4  # bodies of the largest size that are held at a time


class Bodies:
    """Reads bodies of at most `most` bytes, each within `timeout_s`."""

    def __init__(self, most: int, timeout_s: float) -> None:
        self._most, self._timeout_s = most, timeout_s
        self.held_bytes = 0

    def release(self, body: bytes) -> None:
        """What was read is no longer held."""
        self.held_bytes -= len(body)

    async def read(self, request: Request) -> bytes:
        """The body; too long, too slow and too many are refused. Held until it is counted off."""
        most, held, chunks = self._most, 0, []
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_large(int(declared), most)
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    held += len(chunk)
                    self.held_bytes += len(chunk)
                    if held > most:
                        raise too_large(held, most)
                    if self.held_bytes > most * HELD_BODIES:
                        busy = "too many large bodies at once"
                        raise Problem(429, busy, Retry_After="1", Connection="close")
                    chunks.append(chunk)
        except BaseException as error:
            self.held_bytes -= held
            if isinstance(error, TimeoutError):
                late = f"the body did not come within {self._timeout_s:g} s"
                raise Problem(408, late, Connection="close") from None
            raise
        return b"".join(chunks)


def too_large(size: int, most: int) -> Problem:
    return Problem(413, f"a body of {size:,} bytes: at most {most:,}", Connection="close")
