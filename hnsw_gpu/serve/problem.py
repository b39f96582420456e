"""Error responses (RFC 9457), and the exception handlers that make them."""

import json

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hnsw_gpu.serve import openapi


class Problem(Exception):
    """An error response (RFC 9457): raise it anywhere below a route."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.title = openapi.TITLES.get(status, "Error")

    def response(self) -> Response:
        content = {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        return Response(
            json.dumps(content).encode(), self.status, self.headers, media_type=openapi.PROBLEM
        )


async def on_problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    problem = Problem(error.status_code, f"{request.method} {request.url.path}")
    problem.headers = dict(error.headers or {})
    return problem.response()


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody is left to read it, but the metrics count it


async def on_error(_request: Request, _error: Exception) -> Response:
    """A bug of ours; the traceback is in the log."""
    return Problem(500, "the log of the server says more").response()


def message_of(error: BaseException) -> str:
    """The text of an error, without the quotes that str() puts around a KeyError's."""
    words = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
    return words or type(error).__name__
