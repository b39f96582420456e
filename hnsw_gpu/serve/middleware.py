"""ASGI middleware: counts responses, says whose they are and sends them in pieces; checks the host
and the token; logs.
"""

import asyncio
import hmac
import ipaddress
import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hnsw_gpu.serve.metrics import Metrics
from hnsw_gpu.serve.problem import Problem
from hnsw_gpu.serve.protocol import ABORT

access_logger = logging.getLogger("hnsw_gpu.access")

PIECE = 2**16  # bytes that are sent at once
OPEN_PATHS = {"/", "/health/live", "/health/ready"}  # need no token


class CountResponses:
    """Counts responses by path and status code; paths that are not `known` count as "other"."""

    def __init__(self, app: ASGIApp, metrics: Metrics, known: set[str]) -> None:
        self._app, self._metrics, self._known = app, metrics, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._known else "other"
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, count_and_send)


class EchoCallId:
    """Repeats a request's X-Call-Id in the answer, so that a caller knows it for its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call_id = dict(scope.get("headers", ())).get(b"x-call-id", b"")
        if not re.fullmatch(rb"[\w.-]{1,64}", call_id):
            await self._app(scope, receive, send)
            return

        async def name_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-call-id", call_id)]}
            await send(message)

        await self._app(scope, receive, name_and_send)


class LogAccess:
    """Logs each request once its answer is sent: who asked for what, the status, the time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, size = time.perf_counter(), 0, 0

        async def note_and_send(message: Message) -> None:
            nonlocal status, size
            status = message.get("status", status)
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, note_and_send)
        finally:
            if scope["type"] == "http":
                query = b"?" + scope["query_string"] if scope["query_string"] else b""
                event = {
                    "client": (scope["client"] or ("",))[0],
                    "method": scope["method"],
                    "path": (scope["raw_path"] + query).decode("latin-1"),
                    "status": status,
                    "bytes": size,
                    "seconds": round(time.perf_counter() - started, 6),
                }
                access_logger.info(
                    "%(client)s %(method)s %(path)s %(status)d %(bytes)d B %(seconds).6f s",
                    event,
                    extra={"event": event},
                )


class SendInPieces:
    """Sends large bodies in pieces, and closes on callers who do not read theirs in time."""

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self._app, self._timeout_s = app, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_pieces(message: Message) -> None:
            body = message.get("body", b"")
            if len(body) <= PIECE:
                await send(message)
                return
            try:
                async with asyncio.timeout(self._timeout_s):
                    for start in range(0, len(body), PIECE):
                        piece = body[start : start + PIECE]
                        await send({**message, "body": piece, "more_body": True})
                    await send({**message, "body": b""})
            except TimeoutError:
                scope["extensions"][ABORT]()

        await self._app(scope, receive, send_in_pieces)


class CheckHost:
    """Answers 421 to requests for another host: a page whose name leads here sends its own.

    Addresses are nobody's name and always right.
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str]) -> None:
        self._app, self._allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_here(scope):
            await self._app(scope, receive, send)
        else:
            detail = "Host: a name that this server does not have (--allowed-host NAME)"
            await Problem(421, detail).response()(scope, receive, send)

    def _is_here(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = host_name(given)
        return not name or name in self._allowed or is_address(name)


def host_name(host: str) -> str:
    """The name in NAME:PORT, in small letters."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name.strip("[]").rstrip(".").lower()


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class RequireToken:
    """Answers 401 to requests without the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._has_token(scope):
            await self._app(scope, receive, send)
        else:
            detail = "expected the header Authorization: Bearer TOKEN"
            problem = Problem(401, detail, WWW_Authenticate="Bearer", Connection="close")
            await problem.response()(scope, receive, send)

    def _has_token(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)
