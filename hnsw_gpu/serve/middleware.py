"""What surrounds every request: the token is checked, the answer is counted."""

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hnsw_gpu.serve.metrics import Metrics
from hnsw_gpu.serve.problem import Problem

OPEN_PATHS = {"/", "/health/live", "/health/ready"}  # without a token


class TokenAndCounts:
    """Around the application: asks for the token, and counts answers by path and code."""

    def __init__(self, app: ASGIApp, metrics: Metrics, known: set[str], token: str | None) -> None:
        self._app, self._metrics, self._known = app, metrics, known
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._known else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        if self._has_token(scope):
            await self._app(scope, receive, counted)
        else:
            detail = "expected the header Authorization: Bearer TOKEN"
            problem = Problem(401, detail, WWW_Authenticate="Bearer", Connection="close")
            await problem.response()(scope, receive, counted)

    def _has_token(self, scope: Scope) -> bool:
        if self._token is None or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._token)
