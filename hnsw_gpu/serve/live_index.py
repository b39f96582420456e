"""The index that is served now: loaded at the start, replaced by swaps, watched by a canary."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Callable

from hnsw_gpu.engine import memory_free
from hnsw_gpu.searching import Searching
from hnsw_gpu.serve.batcher import Batcher, QueueFullError
from hnsw_gpu.serve.metrics import Metrics
from hnsw_gpu.serve.problem import Problem, message_of
from hnsw_gpu.serve.saved_place import Saved, named_within
from hnsw_gpu.serve.served_index import (
    ServedIndex,
    close_index,
    load_served_index,
    memory_needed,
)
from hnsw_gpu.serve.settings import ServerSettings

logger = logging.getLogger("hnsw_gpu")

CANARY_INTERVAL_S = 15.0


class LiveIndex:
    """The served index and the batcher that searches it, from loading to closing.

    on_ready: called once the first index is served. on_failure: called if it cannot be loaded;
    `error` then says why.
    """

    def __init__(
        self,
        settings: ServerSettings,
        metrics: Metrics,
        make_batcher: Callable[..., Batcher] = Batcher,
    ) -> None:
        self.served: ServedIndex | None = None
        self.batcher: Batcher | None = None
        self.error: Exception | None = None
        self.is_draining = False
        self.on_ready: Callable[[ServedIndex], None] = lambda served: None
        self.on_failure: Callable[[], None] = lambda: None
        self._settings, self._metrics, self._make_batcher = settings, metrics, make_batcher
        self._swapping = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: object) -> AsyncIterator[None]:
        """Serve while the application runs; it answers /health while the index still loads."""
        serving = asyncio.create_task(self._serve())
        try:
            yield
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            if self.batcher is not None:
                await asyncio.to_thread(self.batcher.close)
            if self.served is not None:
                await asyncio.to_thread(close_index, self.served.index)

    async def _serve(self) -> None:
        settings = self._settings
        try:
            served = await asyncio.to_thread(self._load, settings.path, 1)
        except Exception as error:  # raised by `process.serve`
            self.error = error
            self.on_failure()
            return
        self.batcher = self._make_batcher(
            served.index,
            batch_rows=settings.batch_rows,
            queue_rows=settings.queue_rows,
            threads=settings.threads,
            on_batch=self._metrics.batch,
        )
        self._metrics.watch(self.batcher)
        gc.freeze()  # otherwise a collection scans everything imported, which takes 50 ms
        self._switch_to(served)
        self.on_ready(served)
        del served  # or it would outlive a swap
        while True:
            await self.measure_canary()
            await asyncio.sleep(CANARY_INTERVAL_S)

    def current(self) -> tuple[ServedIndex, Batcher]:
        """What answers searches now; Problem 503 if nothing does."""
        if self.is_draining:
            raise Problem(503, "the server is stopping", Retry_After="1", Connection="close")
        if self.served is None or self.batcher is None:
            raise Problem(503, "the index is being loaded", Retry_After="1")
        return self.served, self.batcher

    async def require_ready(self) -> None:
        """Problem 503 where a search would find nothing that answers it."""
        served, _ = self.current()
        if not await asyncio.to_thread(served.index.is_ready):
            raise Problem(503, "a shard has no live replica", Retry_After="1")

    def drain(self) -> None:
        """Become not ready and refuse new searches; running ones finish."""
        self.is_draining = True

    async def measure_canary(self) -> None:
        """Search the canary queries and publish their recall."""
        served, batcher = self.served, self.batcher
        if served is None or batcher is None or served.canary is None:
            return
        try:
            found = await batcher.search(served.canary.queries, served.canary.k)
        except QueueFullError:
            return  # callers come first; the next round measures again
        except Exception:
            logger.exception("the canary was not answered")
            return
        self._metrics.canary.set(served.canary.recall(found))

    # ---------------------------------------------------------------- swapping

    async def swap(self, name: str, *, is_forced: bool = False) -> ServedIndex:
        """Load the index at `name`, relative to the root, beside the current one; then serve it.

        Problem 404: no such file in the root. 409: another swap is running. 422: it cannot be
        loaded, or has another dim, metric or kind of labels, and the swap is not forced. 502: the
        URL of the root does not answer. 507: memory does not hold both.
        """
        try:
            path = await asyncio.to_thread(named_within, self._settings.root, name)
        except FileNotFoundError:
            raise Problem(404, f"no index at {name!r:.200}") from None
        except OSError as error:
            raise Problem(502, message_of(error)) from None
        if self._swapping.locked():
            raise Problem(409, "wait until the swap that runs is done")
        outcome = "failed"
        async with self._swapping:
            try:
                served = await asyncio.to_thread(self._load_beside, path, is_forced)
                self.current()  # 503 if a drain began meanwhile
                self._switch_to(served)
                outcome = "done"
            finally:
                self._metrics.swaps.labels(outcome).inc()
        return served

    def _switch_to(self, served: ServedIndex) -> None:
        """Answer from `served`: all at once, since this runs on the event loop.

        A cluster that it replaces ends with the last request that holds it.
        """
        assert self.batcher is not None
        self.batcher.swap(served.index)
        self.served = served
        self._metrics.served(served)

    def _load_beside(self, path: Saved, is_forced: bool) -> ServedIndex:
        """Load the next index if memory holds it beside the current one."""
        assert self.served is not None
        try:
            free, needed = memory_free(), memory_needed(path)
            if free is not None and needed > free and not self._settings.mmap:
                raise MemoryError(f"{path.name} needs {needed:,} bytes, and {free:,} are free")
            served = self._load(path, self.served.version + 1)
            try:
                if not is_forced:
                    _require_alike(served.index, self.served.index)
            except ValueError:
                close_index(served.index)
                raise
            return served
        except (FileNotFoundError, IsADirectoryError):
            raise Problem(404, f"no index at {path.name!r}") from None
        except MemoryError as error:
            detail = f"beside the index that is served: {message_of(error)}"
            raise Problem(507, self._without_root(detail)) from None
        except (ValueError, OSError) as error:
            raise Problem(422, self._without_root(message_of(error))) from None

    def _without_root(self, message: str) -> str:
        """The message, with the names of files relative to the root."""
        root = str(self._settings.root)
        return message if root == "/" else message.replace(root + "/", "")

    def _load(self, path: Saved, version: int) -> ServedIndex:
        settings = self._settings
        return load_served_index(
            path, version, device=settings.device, mmap=settings.mmap, threads=settings.threads,
            on_ray=settings.on_ray,
        )  # fmt: skip


def _require_alike(new: Searching, old: Searching) -> None:
    """ValueError where callers of one cannot be callers of the other."""
    differences = [
        f"{name} {getattr(new, name)} instead of {getattr(old, name)}"
        for name in ("dim", "metric")
        if getattr(new, name) != getattr(old, name)
    ]
    if len(new) and len(old) and new.label_kind != old.label_kind:
        differences.append(f"labels that are {new.label_kind} instead of {old.label_kind}")
    if differences:
        what = " and ".join(differences)
        raise ValueError(f"the index has {what}: ?force=true serves it all the same")
