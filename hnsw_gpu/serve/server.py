"""The HTTP server: one process, one event loop, one thread for the engine.

What a request says, and what is wrong with it, is in `http_request.py`; the bytes of queries and
results in `wire.py`; what is served in `edition.py`; what is counted in `server_metrics.py`; the
whole interface, in OpenAPI's words, in `openapi.py`. Searches go through a Batcher.
"""

import asyncio
import contextlib
import gc
import hmac
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hnsw_gpu.results import SearchResult
from hnsw_gpu.serve import formats, openapi
from hnsw_gpu.serve.batcher import Batcher, QueueFullError
from hnsw_gpu.serve.metrics import CONTENT_TYPE, Metrics
from hnsw_gpu.serve.request import (
    LARGE,
    MOST_EF,
    MOST_K,
    Problem,
    filter_asked,
    media_type,
    parameters,
    path_asked,
    read_asked,
    run,
    said,
    timeout,
    too_large,
)
from hnsw_gpu.serve.served_index import Edition, load_edition, memory_free, memory_needed

logger = logging.getLogger("hnsw_gpu")

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OPEN_PATHS = {"/", "/health/live", "/health/ready"}  # without a token
MOST_RESULTS = 2**22  # rows times k: 50 MB of answer
HELD_BODIES = 4  # bodies of the largest size that are held at a time
WATCH_AFTER_S = 0.05  # for a caller who leaves: shorter waits are not worth a look
GRACE_S = 30  # for what is under way when the server is told to stop
CANARY_S = 15.0

Answer = TypeVar("Answer")


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
    """What is served, and the routes that serve it. `batcher` may be another face of the same."""

    def __init__(
        self, settings: ServerSettings, make_batcher: Callable[..., Batcher] = Batcher
    ) -> None:
        self.settings = settings
        self.edition: Edition | None = None
        self.batcher: Batcher | None = None
        self.error: BaseException | None = None  # why there is no edition
        self.is_draining = False
        self.stop: Callable[[], None] = lambda: None  # called when there will be no edition
        self.on_ready: Callable[[Edition], None] = lambda edition: None
        self.metrics = Metrics(
            lambda: 0 if self.batcher is None else self.batcher.waiting_rows,
            lambda: 0 if self.batcher is None else self.batcher.in_flight,
        )
        self._make_batcher = make_batcher
        self._is_swapping = False
        self._held_bytes = 0
        self._document = openapi.document({"k": MOST_K, "ef": MOST_EF}, settings.token is not None)
        self._page = PAGE.read_bytes()

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
                Problem: _of_problem,
                HTTPException: _of_http,
                ClientDisconnect: _of_nobody,
                Exception: _of_mistake,
            },
        )
        app.router.redirect_slashes = False
        known = {route.path for route in routes}
        return _Counted(app, self.metrics, known, self.settings.token)

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
            edition = await asyncio.to_thread(self._load, settings.path, 1)
        except Exception as error:  # raised again where the server was started
            self.error = error
            self.stop()
            return
        self.batcher = self._make_batcher(
            edition.index,
            batch_rows=settings.batch_rows,
            queue_rows=settings.queue_rows,
            threads=settings.threads,
            on_batch=self.metrics.batch,
        )
        gc.freeze()  # a collection would look at all that was imported, for 50 ms
        self._serve(edition)
        self.on_ready(edition)
        while True:
            await self._ask_canary()
            await asyncio.sleep(CANARY_S)

    def _load(self, path: Path, version: int) -> Edition:
        settings = self.settings
        return load_edition(
            path, version, device=settings.device, mmap=settings.mmap, threads=settings.threads
        )

    def _serve(self, edition: Edition) -> None:
        """Answer from `edition`; on the event loop, so that no request sees half of it."""
        assert self.batcher is not None
        self.batcher.swap(edition.index)
        self.edition = edition
        self.metrics.edition(edition)

    async def _ask_canary(self) -> None:
        edition, batcher = self.edition, self.batcher
        if edition is None or batcher is None or edition.canary is None:
            return
        try:
            found = await batcher.search(edition.canary.queries, edition.canary.k)
        except QueueFullError:
            return  # it asks again
        except Exception:
            logger.exception("the canary was not answered")
            return
        self.metrics.canary.set(edition.canary.recall(found))

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
        body = await self._body(request)
        try:
            asked = await read_asked(media, body)
            edition, batcher = self._serving()
            left_s = max(timeout_s - (time.perf_counter() - started), 1e-9)
            searching = self._answer(edition, batcher, asked, k, ef, name, left_s)
            found = await _unless_gone(request, searching)  # in the queue before another task runs
        except TimeoutError:
            raise Problem(504, f"no answer within {timeout_s:g} s") from None
        except _CallerLeftError:
            self.metrics.cancelled.inc()
            raise ClientDisconnect from None
        finally:
            self._held_bytes -= len(body)
        is_long = accept == formats.JSON and found.labels.size > LARGE
        answer = await run(is_long, formats.write_result, accept, *found)
        self.metrics.rows.inc(len(found.labels))
        self.metrics.request_seconds.observe(time.perf_counter() - started)
        headers = {
            "X-Index-Version": str(edition.version),
            "X-Index-Checksum": edition.checksum,
        }
        return Response(answer, 200, headers, media_type=accept)

    def _serving(self) -> tuple[Edition, Batcher]:
        """What is served; 503 where nothing is."""
        if self.is_draining:
            raise Problem(503, "the server is stopping", Retry_After="1", Connection="close")
        if self.edition is None or self.batcher is None:
            raise Problem(503, "the index is being loaded", Retry_After="1")
        return self.edition, self.batcher

    async def _answer(
        self,
        edition: Edition,
        batcher: Batcher,
        asked: formats.Asked,
        k: int,
        ef: int,
        name: str | None,
        timeout_s: float,
    ) -> SearchResult:
        """The answer of this edition, or the Problem."""
        try:
            allow = filter_asked(edition, asked, name)
            queries = asked.queries
            if asked.labels is not None:
                queries = edition.index.vectors(asked.labels)
            assert queries is not None
            if queries.ndim == 2 and len(queries) * k > MOST_RESULTS:
                most = f"at most {MOST_RESULTS:,} results a request"
                raise ValueError(f"{len(queries):,} queries of k={k:,}: {most}")
            return await batcher.search(queries, k, ef=ef, allow=allow, timeout_s=timeout_s)
        except (ValueError, TypeError, LookupError) as error:
            raise Problem(422, said(error)) from None
        except QueueFullError as error:
            seconds = max(1, round(error.retry_after_s))
            raise Problem(429, str(error), Retry_After=str(seconds)) from None
        except RuntimeError:
            self._serving()  # 503, if it is because the batcher was closed
            raise

    async def _body(self, request: Request) -> bytes:
        """The body; too long, too slow and too many are refused. Held until it is counted off."""
        most, held, chunks = self.settings.most_body, 0, []
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_large(int(declared), most)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                async for chunk in request.stream():
                    held += len(chunk)
                    self._held_bytes += len(chunk)
                    if held > most:
                        raise too_large(held, most)
                    if self._held_bytes > most * HELD_BODIES:
                        busy = "too many large bodies at once"
                        raise Problem(429, busy, Retry_After="1", Connection="close")
                    chunks.append(chunk)
        except BaseException as error:
            self._held_bytes -= held
            if isinstance(error, TimeoutError):
                late = f"the body did not come within {self.settings.timeout_s:g} s"
                raise Problem(408, late, Connection="close") from None
            raise
        return b"".join(chunks)

    # ---------------------------------------------------------------- the index

    async def _about(self, _request: Request) -> Response:
        edition, _ = self._serving()
        return JSONResponse(self._facts(edition))

    def _facts(self, edition: Edition) -> dict[str, Any]:
        index = edition.index
        names = ("M", "ef_construction", "refine", "seed")
        return {
            "n": len(index),
            "dim": index.dim,
            "metric": index.metric,
            "dtype": index.dtype,
            "device": index.device,
            "parameters": {name: getattr(index, name) for name in names},
            "checksum": edition.checksum,
            "version": edition.version,
            "path": str(edition.path.relative_to(self.settings.root)),
            "filters": sorted(edition.filters),
            "limits": {"k": MOST_K, "ef": MOST_EF, "results": MOST_RESULTS}
            | {"body_bytes": self.settings.most_body},
            "formats": list(formats.FORMATS),
        }

    async def _swap(self, request: Request) -> Response:
        self._serving()
        media_type(request, (formats.JSON,))
        body = await self._body(request)
        self._held_bytes -= len(body)
        path = self._confined(path_asked(body))
        if self._is_swapping:
            raise Problem(409, "wait until the swap that runs is done")
        self._is_swapping = True
        started, outcome = time.perf_counter(), "failed"
        try:
            edition = await asyncio.to_thread(self._loaded_beside, path)
            self._serving()
            self._serve(edition)
            outcome = "done"
        finally:
            self._is_swapping = False
            self.metrics.swaps.labels(outcome).inc()
        seconds = round(time.perf_counter() - started, 3)
        logger.info("serving %s, version %d, after %g s", path, edition.version, seconds)
        return JSONResponse(self._facts(edition) | {"seconds": seconds})

    def _loaded_beside(self, path: Path) -> Edition:
        """The next edition, if memory holds both."""
        assert self.edition is not None
        try:
            free, needed = memory_free(), memory_needed(path)
            if free is not None and needed > free and not self.settings.mmap:
                raise MemoryError(f"{path.name} needs {needed:,} bytes, and {free:,} are free")
            return self._load(path, self.edition.version + 1)
        except (FileNotFoundError, IsADirectoryError):
            raise Problem(404, f"no index at {path.name!r}") from None
        except MemoryError as error:
            raise Problem(507, f"beside the index that is served: {said(error)}") from None
        except (ValueError, OSError) as error:
            raise Problem(422, said(error)) from None

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


# -------------------------------------------------------------------- running things


class _CallerLeftError(Exception):
    pass


async def _unless_gone(request: Request, answer: Awaitable[Answer]) -> Answer:
    """The answer, or _CallerLeftError as soon as the caller closes the connection."""
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
            raise _CallerLeftError from None
        raise
    finally:
        watcher.cancel()


class _Counted:
    """Around the application: counts answers by path and code, and asks for the token."""

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

        if self._is_let_in(scope):
            await self._app(scope, receive, counted)
        else:
            detail = "expected the header Authorization: Bearer TOKEN"
            problem = Problem(401, detail, WWW_Authenticate="Bearer", Connection="close")
            await problem.response()(scope, receive, counted)

    def _is_let_in(self, scope: Scope) -> bool:
        if self._token is None or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._token)


async def _of_problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _of_http(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    problem = Problem(error.status_code, f"{request.method} {request.url.path}")
    problem.headers = dict(error.headers or {})
    return problem.response()


async def _of_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the metrics do


async def _of_mistake(_request: Request, _error: Exception) -> Response:
    """A mistake of ours: the log has the traceback."""
    return Problem(500, "the log of the server says more").response()


# -------------------------------------------------------------------- the process


class Process(uvicorn.Server):
    """Uvicorn, which on SIGTERM is first not ready, then stops when all is answered."""

    def __init__(self, server: Server) -> None:
        super().__init__(
            uvicorn.Config(
                server.app(),
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._server = server
        self._told: list[int] = []
        server.stop = self._stop

    def _stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._told.append(sig)
        if len(self._told) > 1 or self._server.edition is None:
            self.should_exit = True
            self.force_exit = len(self._told) > 1
            return
        self._server.drain()
        asyncio.get_running_loop().call_later(self._server.settings.drain_s, self._stop)

    @property
    def was_interrupted(self) -> bool:
        return signal.SIGINT in self._told


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError says which address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # not `socket.create_server`: where the protocol is not named, asyncio leaves out TCP_NODELAY,
    # and an answer, written in two parts, waits 40 ms for the acknowledgement of the first
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        listening.close()
        raise OSError(f"cannot listen on {host}:{port}: {error}") from None
    return listening


def serve(
    settings: ServerSettings, listening: socket.socket, on_ready: Callable[[Edition], None]
) -> None:
    """Serve until SIGTERM, or Ctrl-C (KeyboardInterrupt).

    Raises what keeps the index from loading.
    """
    server = Server(settings)
    server.on_ready = on_ready
    process = Process(server)
    process.run(sockets=[listening])
    if server.error is not None:
        raise server.error
    if process.was_interrupted:
        raise KeyboardInterrupt
