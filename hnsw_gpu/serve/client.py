"""A client of the server, in the standard library and numpy: .npy both ways, one connection."""

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

BUSY = (429, 503)  # refused before any work was done
WAITS_S = (0.1, 0.2, 0.4, 0.8, 1.6)


class ServerError(RuntimeError):
    """The server refused: `status` is the HTTP code, the text what it said."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


class Client:
    """Searches an index that `hnsw-gpu serve` serves at `url`, such as "http://127.0.0.1:8080".

    token: what the server's token file holds. timeout_s: of connecting, and of every answer.
    retries: how often a call is tried again where that is safe: the connection could not be made or
    was closed before an answer (a search changes nothing), or the server said 429 or 503.
    batch_rows: queries a request; more are sent in several.

    ServerError: what the server refused; ConnectionError: it cannot be reached; TimeoutError: no
    answer in time. Threads may share a client: each gets a connection of its own.
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
        allow: str | None = None,
        timeout_s: float | None = None,
    ) -> SearchResult:
        """The k nearest labels of each query (q, dim), as `Index.search` gives them.

        allow: the name of a filter that the server has. timeout_s: the server drops what it could
        not answer within it (ServerError 504).
        """
        given = inputs.array("queries", queries)
        given = inputs.vectors("queries", given[None] if given.ndim == 1 else given)
        if given.dtype not in (np.float16, np.float32):
            given = given.astype(np.float32)
        target = "/v1/search?" + urlencode({"k": k, "ef": ef} | ({"allow": allow} if allow else {}))
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
        """Have the server load another saved index, by its path from the server's root.

        Returns when it is served, with its facts. Never tried again by itself.
        """
        body = json.dumps({"path": path}).encode()
        headers = {"Content-Type": formats.JSON}
        found: dict[str, Any] = json.loads(
            self._call("POST", quote("/v1/index:swap", safe="/:"), body, headers, is_safe=False)
        )
        return found

    def close(self) -> None:
        """Close the connection of this thread."""
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
        """The body of a good answer. `is_safe`: once more changes nothing."""
        left = self._retries if is_safe else 0
        while True:
            wait = WAITS_S[self._retries - left] if left else 0.0
            try:
                status, said, retry_after = self._once(method, target, body, headers)
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
                    return said
                if status not in BUSY or not left:
                    raise ServerError(status, _detail(said))
                wait = max(wait, min(retry_after, WAITS_S[-1]))
            left -= 1
            time.sleep(wait)

    def _once(
        self, method: str, target: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes, float]:
        """Status, body, and seconds of Retry-After."""
        connection = self._connection()
        try:
            connection.request(method, self._prefix + target, body, self._headers | headers)
        except (BrokenPipeError, ConnectionResetError):
            if connection.sock is None:
                raise
            # refused while the body was still being sent: the answer may be there already
        answer = connection.getresponse()
        said = answer.read()
        retry_after = 0.0
        with contextlib.suppress(ValueError):
            retry_after = float(answer.headers.get("Retry-After", "0"))
        return answer.status, said, retry_after

    def _connection(self) -> http.client.HTTPConnection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._is_https else http.client.HTTPConnection
            connection = kind(self._host, self._port, timeout=self._timeout_s)
            self._local.connection = connection
        return connection


def _detail(said: bytes) -> str:
    """What a problem+json says, or the beginning of whatever came."""
    try:
        return str(json.loads(said)["detail"])
    except (ValueError, LookupError, TypeError):
        return said[:200].decode("utf-8", "replace")
