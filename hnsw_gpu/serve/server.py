"""The HTTP application: its routes, and what they answer.

Around it: `middleware.py` (token, counts), `request.py` and `request_body.py` (what is asked),
`formats.py` (queries and results as bytes), `problem.py` (errors), `openapi.py` (the interface as
a document). Below it: `live_index.py` (loading, swaps, canary) and `batcher.py`, which searches.
`process.py` runs it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hnsw_gpu.cluster import ShardLostError
from hnsw_gpu.files import CorruptIndexError, read_page
from hnsw_gpu.results import SearchResult
from hnsw_gpu.serve import formats, openapi, problem
from hnsw_gpu.serve.batcher import Batcher, QueueFullError
from hnsw_gpu.serve.disconnect import unless_disconnected
from hnsw_gpu.serve.live_index import LiveIndex
from hnsw_gpu.serve.metrics import CONTENT_TYPE, Metrics
from hnsw_gpu.serve.middleware import (
    CheckHost,
    CountResponses,
    EchoCallId,
    LogAccess,
    RequireToken,
    SendInPieces,
)
from hnsw_gpu.serve.offload import Offload
from hnsw_gpu.serve.problem import Problem, message_of
from hnsw_gpu.serve.request import (
    MOST_EF,
    MOST_K,
    MOST_RESULTS,
    SearchParameters,
    beam_capacity,
    check_cost,
    checked_content_type,
    is_forced,
    queries_of,
    read_swap,
    refuse_other_origins,
    requested_filter,
    search_parameters,
)
from hnsw_gpu.serve.request_body import BodyReader
from hnsw_gpu.serve.saved_place import name_within
from hnsw_gpu.serve.served_index import ServedIndex
from hnsw_gpu.serve.settings import ServerSettings

logger = logging.getLogger("hnsw_gpu")

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server:
    """The routes over a live index."""

    def __init__(
        self, settings: ServerSettings, make_batcher: Callable[..., Batcher] = Batcher
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.live = LiveIndex(settings, self.metrics, make_batcher)
        self._bodies = BodyReader(settings.most_body, settings.timeout_s)
        self._most_numbers = settings.most_body // 4  # of a request: float32
        self._offload = Offload()
        self._document = openapi.document({"k": MOST_K, "ef": MOST_EF}, settings.token is not None)
        self._page = read_page(PAGE)

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/v1/search", self._search, methods=["POST"]),
            Route("/v1/index", self._get_index, methods=["GET"]),
            Route("/v1/index:swap", self._swap_index, methods=["POST"]),
            Route("/health/live", self._get_live, methods=["GET"]),
            Route("/health/ready", self._get_ready, methods=["GET"]),
            Route("/metrics", self._get_metrics, methods=["GET"]),
            Route("/openapi.json", self._get_openapi, methods=["GET"]),
            Route("/", self._get_page, methods=["GET"]),
        ]
        routed = Starlette(
            routes=routes,
            lifespan=self.live.lifespan,
            exception_handlers={
                Problem: problem.on_problem,
                HTTPException: problem.on_http_exception,
                ClientDisconnect: problem.on_disconnect,
                Exception: problem.on_error,
            },
        )
        routed.router.redirect_slashes = False
        token, hosts = self.settings.token, self.settings.allowed_hosts
        guarded: ASGIApp = routed if token is None else RequireToken(routed, token)
        guarded = guarded if hosts is None else CheckHost(guarded, hosts)
        named = EchoCallId(guarded)
        counted = CountResponses(named, self.metrics, {route.path for route in routes})
        sent = SendInPieces(counted, self.settings.timeout_s)
        return LogAccess(sent) if self.settings.has_access_log else sent

    # ---------------------------------------------------------------- searching

    async def _search(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except Problem as refusal:
            self.metrics.rejected.labels(refusal.title.lower()).inc()
            raise

    async def _answer(self, request: Request) -> Response:
        started = time.perf_counter()
        self.live.current()  # 503 before the body is read
        asked = search_parameters(request, self.settings.timeout_s)
        async with self._bodies.read(request) as body:
            deadline = started + asked.timeout_s
            try:
                served, found = await unless_disconnected(
                    request, self._find(body, asked, deadline)
                )
            except ClientDisconnect:
                self.metrics.cancelled.inc()
                raise
        try:
            content = await self._offload.call(
                found.labels.size, formats.write_result, asked.accept, *found
            )
        except formats.TooLargeError as error:
            raise Problem(413, str(error)) from None
        self.metrics.rows.inc(len(found.labels))
        self.metrics.request_seconds.observe(time.perf_counter() - started)
        headers = {"X-Index-Version": str(served.version), "X-Index-Checksum": served.checksum}
        return Response(content, 200, headers, media_type=asked.accept)

    async def _find(
        self, body: bytes, asked: SearchParameters, deadline: float
    ) -> tuple[ServedIndex, SearchResult]:
        """The result, and the index that it comes from; Problem if it is refused or late.

        It is the index that was served when the body was there: a swap may come in between.
        """
        served, batcher = self.live.current()
        call = self._offload.call
        is_npy = asked.content_type == formats.NPY  # read where it lies
        try:
            async with asyncio.timeout(deadline - time.perf_counter()):
                size = 0 if is_npy else len(body)
                search = await call(size, formats.read_search, asked.content_type, body)
                allow = requested_filter(served, search, asked.filter_name)
                ef = beam_capacity(asked, served)
                numbers = check_cost(search, served, asked.k, self._most_numbers)
                queries = await call(numbers, queries_of, search, served)
                left_s = max(deadline - time.perf_counter(), 1e-9)
                return served, await batcher.search_checked(
                    served.index, queries, asked.k, ef=ef, rerank=asked.rerank,
                    allow=allow, timeout_s=left_s,
                )  # fmt: skip
        except TimeoutError:
            raise Problem(504, f"no answer within {asked.timeout_s:g} s") from None
        except CorruptIndexError as error:  # it is mapped, and the file was changed
            logger.error("%s", error)
            raise Problem(503, "the file of the index was changed: swap it") from None
        except formats.MalformedError as error:
            raise Problem(400, str(error)) from None
        except formats.TooLargeError as error:
            raise Problem(413, str(error)) from None
        except (ValueError, TypeError, LookupError) as error:
            raise Problem(422, message_of(error)) from None
        except QueueFullError as error:
            seconds = max(1, round(error.retry_after_s))
            raise Problem(429, str(error), Retry_After=str(seconds)) from None
        except ShardLostError as error:
            raise Problem(503, str(error), Retry_After="1") from None
        except RuntimeError:
            self.live.current()  # 503 if the batcher was closed by a drain
            raise

    # ---------------------------------------------------------------- the index

    async def _get_index(self, _request: Request) -> Response:
        served, _ = self.live.current()
        return JSONResponse(self._describe(served))

    def _describe(self, served: ServedIndex) -> dict[str, Any]:
        index = served.index
        names = ("M", "ef_construction", "refine", "seed")
        return {
            "n": len(index),
            "dim": index.dim,
            "metric": index.metric,
            "dtype": index.dtype,
            "device": index.device,
            "labels": index.label_kind,
            "parameters": {name: getattr(index, name) for name in names},
            "checksum": served.checksum,
            "version": served.version,
            "path": _shown(name_within(served.path, self.settings.root) or str(served.path)),
            "filters": sorted(map(_shown, served.filters)),
            "limits": {"k": MOST_K, "ef": MOST_EF, "results": MOST_RESULTS}
            | {"body_bytes": self.settings.most_body},
            "formats": list(formats.FORMATS),
        }

    async def _swap_index(self, request: Request) -> Response:
        self.live.current()
        checked_content_type(request, (formats.JSON,))
        refuse_other_origins(request, self.settings.allowed_hosts or frozenset())
        forced = is_forced(request)
        async with self._bodies.read(request) as body:
            name = read_swap(body)
        started = time.perf_counter()
        served = await self.live.swap(name, is_forced=forced)
        seconds = round(time.perf_counter() - started, 3)
        logger.info("serving %s, version %d, after %g s", served.path, served.version, seconds)
        return JSONResponse(self._describe(served) | {"seconds": seconds})

    # ---------------------------------------------------------------- the rest

    async def _get_live(self, _request: Request) -> Response:
        return JSONResponse({"state": "live"})

    async def _get_ready(self, _request: Request) -> Response:
        await self.live.require_ready()
        return JSONResponse({"state": "ready"})

    async def _get_metrics(self, _request: Request) -> Response:
        text = await asyncio.to_thread(self.metrics.text)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def _get_openapi(self, _request: Request) -> Response:
        return JSONResponse(self._document)

    async def _get_page(self, _request: Request) -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(self._page, headers=headers, media_type="text/html")


def _shown(name: str) -> str:
    """The name of a file, which need not be Unicode."""
    return name.encode("utf-8", "backslashreplace").decode()
