"""What a request asks for: parameters, deadline, format, queries, filter."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request

from hnsw_gpu.serve import formats
from hnsw_gpu.serve.problem import Problem, message_of
from hnsw_gpu.serve.served_index import ServedIndex

MOST_K = MOST_EF = 10_000
LARGE = 2**16  # bytes of a JSON body, or numbers of a JSON result, that are worth a thread

Answer = TypeVar("Answer")


def parameters(request: Request) -> tuple[int, int, str | None]:
    """k, ef, and the name of a filter."""
    given = request.query_params
    for name in given:
        if name not in ("k", "ef", "allow"):
            raise Problem(422, f"{name!r:.60}: expected k, ef or allow")
        if len(given.getlist(name)) > 1:
            raise Problem(422, f"{name}: given more than once")
    k = _whole("k", given.get("k", "10"), MOST_K)
    return k, _whole("ef", given.get("ef", "64"), MOST_EF), given.get("allow")


def _whole(name: str, text: str, most: int) -> int:
    is_whole = text.isascii() and text.isdecimal() and len(text) < 20
    if not is_whole or not 1 <= int(text) <= most:
        raise Problem(422, f"{name}={text!r:.60}: expected a whole number from 1 to {most:,}")
    return int(text)


def timeout(request: Request, most_s: float) -> float:
    """Seconds until the answer is of no use: the caller's, at most the server's."""
    text = request.headers.get("x-timeout-ms")
    if text is None:
        return most_s
    return min(_whole("X-Timeout-Ms", text, 3_600_000) / 1000, most_s)


def media_type(request: Request, known: tuple[str, ...]) -> str:
    """The media type of the body."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in known:
        raise Problem(415, f"Content-Type {media!r:.80}: expected {', '.join(known)}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "Content-Encoding: expected none")
    return media


async def read_asked(media: str, body: bytes) -> formats.Asked:
    try:
        return await run(
            media == formats.JSON and len(body) > LARGE, formats.read_asked, media, body
        )
    except formats.MalformedError as error:
        raise Problem(400, str(error)) from None
    except (ValueError, TypeError) as error:
        raise Problem(422, message_of(error)) from None


def filter_asked(served: ServedIndex, asked: formats.Asked, name: str | None) -> np.ndarray | None:
    if name is None:
        return asked.allow
    if asked.allow is not None:
        raise ValueError("allow: given in the query and in the body")
    if name not in served.filters:
        raise LookupError(f"allow={name!r:.80}: no filter of that name")
    return served.filters[name]


def path_asked(body: bytes) -> str:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"not JSON: {error!s:.200}") from None
    if not isinstance(asked, dict) or set(asked) != {"path"} or not isinstance(asked["path"], str):
        raise Problem(422, 'expected {"path": "..."}')
    return asked["path"]


async def run(is_long: bool, work: Callable[..., Answer], *given: Any) -> Answer:
    """work(*given), on a thread where it takes long: others are served meanwhile."""
    return await asyncio.to_thread(work, *given) if is_long else work(*given)
