"""One shard in a process of its own: opened from its path, asked by whoever has its handle."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from hnsw_gpu.collection import Manifest, ShardEntry, open_shard, shard_path
from hnsw_gpu.files import CorruptIndexError, Folder
from hnsw_gpu.index import Index

logger = logging.getLogger("hnsw_gpu")


class ShardFacts(NamedTuple):
    """What a shard's actor tells of itself."""

    node: str  # the machine's name
    pid: int
    device: str
    nbytes: int
    has_deleted: bool
    searches: int  # calls that it answered
    busy_s: float  # that they took, all together
    open_s: float  # it took to open the shard and warm up


class NotOpenError(RuntimeError):
    """A shard's file cannot be opened where the actor runs; `cause` says why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause

    def __reduce__(self) -> tuple:
        return type(self), (self.cause,)


class ShardActor:
    """A replica of a shard. Ray makes it, and makes it again where its process or node is lost.

    A file that cannot be opened is no end: it is tried again at the next call.
    """

    def __init__(
        self, folder: Folder, entry: ShardEntry, manifest: Manifest, device: str, threads: int
    ) -> None:
        self._folder, self._entry, self._manifest = folder, entry, manifest
        self._device, self._threads = device, threads
        self._opening = threading.Lock()
        self._counting = threading.Lock()
        self._index: Index | None = None
        self._searches, self._busy_s, self._open_s = 0, 0.0, 0.0
        try:
            self._opened()
        except NotOpenError as error:
            logger.error("%s", error)

    def __repr__(self) -> str:
        return f"hnsw_gpu {self._folder.place(self._entry.file)}"

    def _opened(self) -> Index:
        with self._opening:
            if self._index is None:
                started = time.perf_counter()
                try:
                    path = shard_path(self._folder, self._entry)
                    index = open_shard(path, self._entry, self._manifest, mmap=True)
                    index.to(self._device)
                    index.warm_up(self._threads)
                except CorruptIndexError as error:  # or missing, here
                    told = CorruptIndexError(f"{error} (on {socket.gethostname()})")
                    raise NotOpenError(told) from error
                except Exception as error:
                    raise NotOpenError(error) from error
                self._open_s = time.perf_counter() - started
                self._index = index
            return self._index

    def ask(self, what: Callable[..., Any], *given: Any) -> Any:
        """`what(index, *given)` of the shard's index."""
        index = self._opened()
        started = time.perf_counter()
        answer = what(index, *given)
        with self._counting:
            self._searches += 1
            self._busy_s += time.perf_counter() - started
        return answer

    def facts(self) -> ShardFacts:
        """Of the actor now; NotOpenError where it has no shard."""
        index = self._opened()
        return ShardFacts(
            socket.gethostname(), os.getpid(), index.device, index.nbytes, index.has_deleted,
            self._searches, self._busy_s, self._open_s,
        )  # fmt: skip
