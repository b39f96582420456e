"""A server on a thread of the test's own process, over real sockets, and a bare HTTP caller."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hnsw_gpu import Index
from hnsw_gpu.serve import formats
from hnsw_gpu.serve.live_index import LiveIndex
from hnsw_gpu.serve.process import Process, listen
from hnsw_gpu.serve.saved_place import saved_at
from hnsw_gpu.serve.server import Server
from hnsw_gpu.serve.settings import ServerSettings

DIM, ROWS = 8, 400
VECTORS = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
QUERIES = np.random.default_rng(1).normal(size=(64, DIM)).astype(np.float32)


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]  # names in small letters
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def refused(self, status: int, words: str) -> None:
        """It is this problem, in the form of RFC 9457."""
        assert self.status == status, (self.status, self.body[:300])
        assert self.headers["content-type"] == "application/problem+json"
        problem = self.json
        assert set(problem) == {"type", "title", "status", "detail"} and problem["status"] == status
        assert words in problem["detail"], problem["detail"]


class Caller:
    """One connection, kept open."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def __call__(self, method: str, target: str, body: Any = None, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, target, body, named)
        answer = self.connection.getresponse()
        names = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, names, answer.read())

    def search(self, queries: Any, target: str = "/v1/search", **headers: str) -> Reply:
        body = formats.write_npy(queries)
        return self("POST", target, body, **{"Content_Type": formats.NPY, **headers})

    def as_json(self, content: Any, target: str = "/v1/search") -> Reply:
        return self("POST", target, json.dumps(content), Content_Type=formats.JSON)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self("GET", "/metrics").body.decode().splitlines()
        held = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return sum(float(v) for n, _, v in held if n.partition("{")[0] == f"hnsw_gpu_{name}")


class Running(NamedTuple):
    server: Server
    process: Process
    port: int
    call: Caller
    others: list[Caller]  # closed at the end

    @property
    def live(self) -> LiveIndex:
        return self.server.live

    def caller(self) -> Caller:
        self.others.append(Caller(self.port))
        return self.others[-1]

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Searches that the batcher begins do not end meanwhile."""
        assert self.live.served is not None
        index, goes_on = self.live.served.index, threading.Event()
        search = index.search_checked

        def wait_and_search(*given, **named):
            goes_on.wait()
            return search(*given, **named)

        index.search_checked = wait_and_search  # type: ignore[method-assign]
        try:
            yield
        finally:
            goes_on.set()
            del index.search_checked

    def wait(self, is_true) -> None:
        until = time.monotonic() + 20
        while not is_true():
            assert time.monotonic() < until
            time.sleep(0.002)


def saved(folder: Path, name: str = "docs.hnsw", vectors: np.ndarray = VECTORS) -> Path:
    index = Index(vectors.shape[1], M=8, ef_construction=40)
    index.add(vectors)
    index.save(folder / name)
    return folder / name


@contextmanager
def running(place: Path | str, **settings: Any) -> Iterator[Running]:
    """Serves what lies at a path or a URL until the block ends."""
    path = saved_at(place)
    server = Server(ServerSettings(path, path.parent, **{"drain_s": 0.0, **settings}))
    process, live = Process(server), server.live
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=process.run, args=([listening],))
    thread.start()
    fresh = Running(server, process, port, Caller(port), [])
    try:
        fresh.wait(lambda: live.served is not None or live.error is not None)
        if live.served is not None and live.served.canary is not None:  # not in a test's way
            fresh.wait(lambda: server.metrics.canary._value.get() > 0)
            fresh.wait(lambda: live.batcher is not None and not live.batcher.in_flight)
        yield fresh
    finally:
        for caller in [fresh.call, *fresh.others]:
            caller.connection.close()
        process.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()
