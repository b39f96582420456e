"""The HTTP server as an application: its routes, and what they answer.

What a request asks for is in `request.py`, its body in `request_body.py`; the bytes of queries and
results in `formats.py`; what is served in `served_index.py`; what is counted in `metrics.py`; the
token in `middleware.py`; the process and its signals in `process.py`; the whole interface, in
OpenAPI's words, in `openapi.py`. Searches go through a Batcher.
"""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hnsw_gpu.files import read_page
from hnsw_gpu.results import SearchResult
from hnsw_gpu.serve import formats, openapi
from hnsw_gpu.serve.batcher import Batcher, QueueFullError
from hnsw_gpu.serve.disconnect import CallerLeftError, unless_disconnected
from hnsw_gpu.serve.metrics import CONTENT_TYPE, Metrics
from hnsw_gpu.serve.middleware import TokenAndCounts
from hnsw_gpu.serve.problem import (
    Problem,
    message_of,
    on_disconnect,
    on_error,
    on_http_exception,
    on_problem,
)
from hnsw_gpu.serve.request import (
    LARGE,
    MOST_EF,
    MOST_K,
    filter_asked,
    media_type,
    parameters,
    path_asked,
    read_asked,
    run,
    timeout,
)
from hnsw_gpu.serve.request_body import Bodies
from hnsw_gpu.serve.served_index import ServedIndex, load_served_index, memory_free, memory_needed

logger = logging.getLogger("hnsw_gpu")

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MOST_RESULTS = 2**22  # rows times k: 50 MB of answer
CANARY_S = 15.0


class ServerSettings(NamedTuple):
    """How to serve."""

    path: Path  # of the saved index
    root: Path  # swaps stay within this folder
    device: str = "auto"
    mmap: bool = False
    threads: int | None = None
    batch_rows: int | None = None
    queue_rows: int = 16_384
    most_body: int = 2**26  # bytes
    timeout_s: float = 30.0  # of a search, and of reading a body
    drain_s: float = 1.0  # between "not ready" and the end of listening
    token: str | None = None


class Server:
    """What is served, and the routes that serve it."""

    def __init__(
        self, settings: ServerSettings, make_batcher: Callable[..., Batcher] = Batcher
    ) -> None:
        self.settings = settings
        self.served: ServedIndex | None = None
        self.batcher: Batcher | None = None
        self.error: BaseException | None = None  # why nothing is served
        self.is_draining = False
        self.stop: Callable[[], None] = lambda: None  # called when nothing will be served
        self.on_ready: Callable[[ServedIndex], None] = lambda served: None
        self.metrics = Metrics(
            lambda: 0 if self.batcher is None else self.batcher.waiting_rows,
            lambda: 0 if self.batcher is None else self.batcher.in_flight,
        )
        self._make_batcher = make_batcher
        self._is_swapping = False
        self._bodies = Bodies(settings.most_body, settings.timeout_s)
        self._document = openapi.document({"k": MOST_K, "ef": MOST_EF}, settings.token is not None)
        self._page = read_page(PAGE)

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/v1/search", self._search, methods=["POST"]),
            Route("/v1/index", self._about, methods=["GET"]),
            Route("/v1/index:swap", self._swap, methods=["POST"]),
            Route("/health/live", self._live, methods=["GET"]),
            Route("/health/ready", self._ready, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
            Route("/", self._front, methods=["GET"]),
        ]
        app = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={
                Problem: on_problem,
                HTTPException: on_http_exception,
                ClientDisconnect: on_disconnect,
                Exception: on_error,
            },
        )
        app.router.redirect_slashes = False
        known = {route.path for route in routes}
        return TokenAndCounts(app, self.metrics, known, self.settings.token)

    # ---------------------------------------------------------------- its life

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        beginning = asyncio.create_task(self._begin())
        try:
            yield
        finally:
            beginning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beginning
            if self.batcher is not None:
                await asyncio.to_thread(self.batcher.close)

    async def _begin(self) -> None:
        """Load and warm the index while /health already answers; then watch the canary."""
        settings = self.settings
        try:
            served = await asyncio.to_thread(self._load, settings.path, 1)
        except Exception as error:  # raised again where the server was started
            self.error = error
            self.stop()
            return
        self.batcher = self._make_batcher(
            served.index,
            batch_rows=settings.batch_rows,
            queue_rows=settings.queue_rows,
            threads=settings.threads,
            on_batch=self.metrics.batch,
        )
        gc.freeze()  # a collection would look at all that was imported, for 50 ms
        self._serve(served)
        self.on_ready(served)
        while True:
            await self._ask_canary()
            await asyncio.sleep(CANARY_S)

    def _load(self, path: Path, version: int) -> ServedIndex:
        settings = self.settings
        return load_served_index(
            path, version, device=settings.device, mmap=settings.mmap, threads=settings.threads
        )

    def _serve(self, served: ServedIndex) -> None:
        """Answer from `served`; on the event loop, so that no request sees half of it."""
        assert self.batcher is not None
        self.batcher.swap(served.index)
        self.served = served
        self.metrics.served(served)

    async def _ask_canary(self) -> None:
        served, batcher = self.served, self.batcher
        if served is None or batcher is None or served.canary is None:
            return
        try:
            found = await batcher.search(served.canary.queries, served.canary.k)
        except QueueFullError:
            return  # it asks again
        except Exception:
            logger.exception("the canary was not answered")
            return
        self.metrics.canary.set(served.canary.recall(found))

    def drain(self) -> None:
        """Be not ready and take no new searches."""
        self.is_draining = True

    # ---------------------------------------------------------------- searching

    async def _search(self, request: Request) -> Response:
        try:
            return await self._searched(request)
        except Problem as problem:
            self.metrics.rejected.labels(problem.title.lower()).inc()
            raise

    async def _searched(self, request: Request) -> Response:
        started = time.perf_counter()
        self._serving()
        k, ef, name = parameters(request)
        timeout_s = timeout(request, self.settings.timeout_s)
        media = media_type(request, formats.FORMATS)
        accept = formats.chosen(request.headers.get("accept"), media)
        if accept is None:
            raise Problem(406, f"Accept: expected one of {', '.join(formats.FORMATS)}")
        body = await self._bodies.read(request)
        try:
            asked = await read_asked(media, body)
            served, batcher = self._serving()
            left_s = max(timeout_s - (time.perf_counter() - started), 1e-9)
            searching = self._answer(served, batcher, asked, k, ef, name, left_s)
            found = await unless_disconnected(
                request, searching
            )  # in the queue before another task runs
        except TimeoutError:
            raise Problem(504, f"no answer within {timeout_s:g} s") from None
        except CallerLeftError:
            self.metrics.cancelled.inc()
            raise ClientDisconnect from None
        finally:
            self._bodies.release(body)
        is_long = accept == formats.JSON and found.labels.size > LARGE
        answer = await run(is_long, formats.write_result, accept, *found)
        self.metrics.rows.inc(len(found.labels))
        self.metrics.request_seconds.observe(time.perf_counter() - started)
        headers = {
            "X-Index-Version": str(served.version),
            "X-Index-Checksum": served.checksum,
        }
        return Response(answer, 200, headers, media_type=accept)

    def _serving(self) -> tuple[ServedIndex, Batcher]:
        """What is served; 503 where nothing is."""
        if self.is_draining:
            raise Problem(503, "the server is stopping", Retry_After="1", Connection="close")
        if self.served is None or self.batcher is None:
            raise Problem(503, "the index is being loaded", Retry_After="1")
        return self.served, self.batcher

    async def _answer(
        self,
        served: ServedIndex,
        batcher: Batcher,
        asked: formats.Asked,
        k: int,
        ef: int,
        name: str | None,
        timeout_s: float,
    ) -> SearchResult:
        """The answer of this index, or the Problem."""
        try:
            allow = filter_asked(served, asked, name)
            queries = asked.queries
            if asked.labels is not None:
                queries = served.index.vectors(asked.labels)
            assert queries is not None
            if queries.ndim == 2 and len(queries) * k > MOST_RESULTS:
                most = f"at most {MOST_RESULTS:,} results a request"
                raise ValueError(f"{len(queries):,} queries of k={k:,}: {most}")
            return await batcher.search(queries, k, ef=ef, allow=allow, timeout_s=timeout_s)
        except (ValueError, TypeError, LookupError) as error:
            raise Problem(422, message_of(error)) from None
        except QueueFullError as error:
            seconds = max(1, round(error.retry_after_s))
            raise Problem(429, str(error), Retry_After=str(seconds)) from None
        except RuntimeError:
            self._serving()  # 503, if it is because the batcher was closed
            raise

    # ---------------------------------------------------------------- the index

    async def _about(self, _request: Request) -> Response:
        served, _ = self._serving()
        return JSONResponse(self._facts(served))

    def _facts(self, served: ServedIndex) -> dict[str, Any]:
        index = served.index
        names = ("M", "ef_construction", "refine", "seed")
        return {
            "n": len(index),
            "dim": index.dim,
            "metric": index.metric,
            "dtype": index.dtype,
            "device": index.device,
            "parameters": {name: getattr(index, name) for name in names},
            "checksum": served.checksum,
            "version": served.version,
            "path": str(served.path.relative_to(self.settings.root)),
            "filters": sorted(served.filters),
            "limits": {"k": MOST_K, "ef": MOST_EF, "results": MOST_RESULTS}
            | {"body_bytes": self.settings.most_body},
            "formats": list(formats.FORMATS),
        }

    async def _swap(self, request: Request) -> Response:
        self._serving()
        media_type(request, (formats.JSON,))
        body = await self._bodies.read(request)
        self._bodies.release(body)
        path = self._confined(path_asked(body))
        if self._is_swapping:
            raise Problem(409, "wait until the swap that runs is done")
        self._is_swapping = True
        started, outcome = time.perf_counter(), "failed"
        try:
            served = await asyncio.to_thread(self._loaded_beside, path)
            self._serving()
            self._serve(served)
            outcome = "done"
        finally:
            self._is_swapping = False
            self.metrics.swaps.labels(outcome).inc()
        seconds = round(time.perf_counter() - started, 3)
        logger.info("serving %s, version %d, after %g s", path, served.version, seconds)
        return JSONResponse(self._facts(served) | {"seconds": seconds})

    def _loaded_beside(self, path: Path) -> ServedIndex:
        """The next served, if memory holds both."""
        assert self.served is not None
        try:
            free, needed = memory_free(), memory_needed(path)
            if free is not None and needed > free and not self.settings.mmap:
                raise MemoryError(f"{path.name} needs {needed:,} bytes, and {free:,} are free")
            return self._load(path, self.served.version + 1)
        except (FileNotFoundError, IsADirectoryError):
            raise Problem(404, f"no index at {path.name!r}") from None
        except MemoryError as error:
            raise Problem(507, f"beside the index that is served: {message_of(error)}") from None
        except (ValueError, OSError) as error:
            raise Problem(422, message_of(error)) from None

    def _confined(self, asked: str) -> Path:
        """The path of an index within the root; 404 outside, as for what is not there."""
        root = self.settings.root
        try:
            path = (root / asked).resolve()
            is_inside = path.is_relative_to(root) and path.is_file()
        except (ValueError, OSError):  # a null byte, a name too long
            is_inside = False
        if not is_inside:
            raise Problem(404, f"no index at {asked!r:.200}")
        return path

    # ---------------------------------------------------------------- the rest

    async def _live(self, _request: Request) -> Response:
        return JSONResponse({"state": "live"})

    async def _ready(self, _request: Request) -> Response:
        self._serving()
        return JSONResponse({"state": "ready"})

    async def _metrics(self, _request: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _openapi(self, _request: Request) -> Response:
        return JSONResponse(self._document)

    async def _front(self, _request: Request) -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(self._page, headers=headers, media_type="text/html")
