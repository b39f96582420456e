"""A client for the server, with the standard library and numpy only: .npy both ways."""

import contextlib
import http.client
import json
import threading
import time
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs
from hnsw_gpu.results import SearchResult
from hnsw_gpu.serve import formats

BUSY = (429, 503)  # the server refused before doing any work
WAITS_S = (0.1, 0.2, 0.4, 0.8, 1.6)


class ServerError(RuntimeError):
    """The server refused a request: `status` is the HTTP code, `detail` its reason."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


class Client:
    """Searches an index that `hnsw-gpu serve` serves at `url`, such as "http://127.0.0.1:8080".

    token: the content of the server's token file.
    timeout_s: to connect, and to get each answer.
    retries: how often to retry a call where that is safe: the server could not be reached,
        closed the connection before it answered (a search changes nothing), or answered 429 or 503.
    batch_rows: most queries per request; larger batches are sent in several.

    ServerError: the server refused. ConnectionError: it cannot be reached. TimeoutError: no answer
    in time. Threads may share a client; each gets its own connection.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 5,
        batch_rows: int = 4096,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"url={url!r}: expected such as http://127.0.0.1:8080")
        self._is_https, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout_s = inputs.number("timeout_s", timeout_s)
        self._retries = inputs.integer("retries", retries, 0, len(WAITS_S))
        self._batch_rows = inputs.integer("batch_rows", batch_rows, 1)
        self._local = threading.local()

    def search(
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        ef: int = 64,
        rerank: int | str | None = "auto",
        allow: str | None = None,
        timeout_s: float | None = None,
    ) -> SearchResult:
        """The k nearest labels of each query (q, dim), as `Index.search` gives them.

        allow: the name of a filter on the server. timeout_s: the server gives up a request that it
        cannot answer in time (ServerError 504).
        """
        given = inputs.array("queries", queries)
        given = inputs.vectors("queries", given[None] if given.ndim == 1 else given)
        if given.dtype not in (np.float16, np.float32):
            given = given.astype(np.float32)
        asked = {"k": k, "ef": ef, "rerank": "all" if rerank is None else rerank}
        target = "/v1/search?" + urlencode(asked | ({"allow": allow} if allow else {}))
        headers = {"Content-Type": formats.NPY, "Accept": formats.NPY}
        if timeout_s is not None:
            headers["X-Timeout-Ms"] = str(max(1, round(1000 * timeout_s)))
        found = []
        for start in range(0, max(len(given), 1), self._batch_rows):
            body = formats.write_npy(given[start : start + self._batch_rows])
            found.append(formats.read_result(self._call("POST", target, body, headers)))
        labels, distances = zip(*found, strict=True)
        return SearchResult(np.concatenate(labels), np.concatenate(distances))

    def index(self) -> dict[str, Any]:
        """What is served: n, dim, metric, dtype, parameters, checksum, version, filters, limits."""
        found: dict[str, Any] = json.loads(self._call("GET", "/v1/index", None, {}))
        return found

    def swap(self, path: str) -> dict[str, Any]:
        """Make the server load another saved index; `path` is relative to the server's root.

        Returns what `index` returns once the new index is served. Never retried.
        """
        body = json.dumps({"path": path}).encode()
        headers = {"Content-Type": formats.JSON}
        found: dict[str, Any] = json.loads(
            self._call("POST", quote("/v1/index:swap", safe="/:"), body, headers, is_safe=False)
        )
        return found

    def close(self) -> None:
        """Close this thread's connection."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(
        self, method: str, target: str, body: bytes | None, headers: dict[str, str],
        *, is_safe: bool = True,
    ) -> bytes:  # fmt: skip
        """The body of a 200 response. is_safe: the request may be repeated."""
        left = self._retries if is_safe else 0
        while True:
            wait = WAITS_S[self._retries - left] if left else 0.0
            try:
                status, content, retry_after = self._exchange(method, target, body, headers)
            except TimeoutError:
                self.close()
                raise TimeoutError(
                    f"no answer of {self._host} within {self._timeout_s:g} s"
                ) from None
            except (ConnectionError, http.client.HTTPException, OSError) as error:
                self.close()
                if not left:
                    raise ConnectionError(f"{self._host}: {error!r}") from error
            else:
                if status == 200:
                    return content
                if status not in BUSY or not left:
                    raise ServerError(status, _detail(content))
                wait = max(wait, min(retry_after, WAITS_S[-1]))
            left -= 1
            time.sleep(wait)

    def _exchange(
        self, method: str, target: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes, float]:
        """Status, body, and Retry-After in seconds."""
        connection = self._connection()
        try:
            connection.request(method, self._prefix + target, body, self._headers | headers)
        except (BrokenPipeError, ConnectionResetError):
            if connection.sock is None:
                raise
            # the server refused before it had the whole body: its answer may already be there
        response = connection.getresponse()
        content = response.read()
        retry_after = 0.0
        with contextlib.suppress(ValueError):
            retry_after = float(response.headers.get("Retry-After", "0"))
        return response.status, content, retry_after

    def _connection(self) -> http.client.HTTPConnection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._is_https else http.client.HTTPConnection
            connection = kind(self._host, self._port, timeout=self._timeout_s)
            self._local.connection = connection
        return connection


def _detail(content: bytes) -> str:
    """The detail of a problem+json, or the start of any other content."""
    try:
        return str(json.loads(content)["detail"])
    except (ValueError, LookupError, TypeError):
        return content[:200].decode("utf-8", "replace")
