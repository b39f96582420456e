"""ASGI middleware: counts responses, says whose they are, and checks the token."""

import hmac
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hnsw_gpu.serve.metrics import Metrics
from hnsw_gpu.serve.problem import Problem

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
