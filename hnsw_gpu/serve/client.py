"""A client for the server, with the standard library and numpy only: .npy both ways."""

import http.client
import itertools
import json
import math
import os
import secrets
import threading
import time
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs, label_inputs
from hnsw_gpu.results import SearchResult
from hnsw_gpu.serve import formats
from hnsw_gpu.serve.connection import (
    Answer,
    Connection,
    DeadlineError,
    Target,
    TooLongError,
    UnsentError,
)
from hnsw_gpu.serve.openapi import SCHEMAS

BUSY = (429, 503)  # the server refused before doing any work
WAITS_S = (0.1, 0.2, 0.4, 0.8, 1.6)
LONGEST_TIMEOUT_S = 3600  # that the server takes
JSON_BYTES = 2**22  # most of a JSON answer
NPY_HEAD_BYTES = 2**14
JSON_NUMBER = 26  # most bytes of a number, with what divides it from the next
BODY_BYTES, RESULTS = 2**23, 2**20  # most of one request: more are hardly faster
ANY_BODY_BYTES, ANY_RESULTS = 2**16, 2**16  # beyond these the server is asked for its limits
CALL_ID = "X-Call-Id"
PYTHON_TYPES = {"integer": int, "string": str, "object": dict, "array": list}


class ServerError(RuntimeError):
    """The server refused a request: `status` is the HTTP code, `detail` its reason."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail

    def __reduce__(self) -> tuple:
        return type(self), (self.status, self.detail)


class AnswerError(ServerError):
    """The answer is not what was asked for: garbage, another shape, too long, another call's."""


class _Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    most_bytes: int  # of the answer
    is_safe: bool = True  # it may be sent twice


class Client:
    """Searches an index that `hnsw-gpu serve` serves at `url`, such as "http://127.0.0.1:8080".

    token: the content of the server's token file. It goes to that host alone: redirects are not
        followed.
    timeout_s: for each call of a method, with all its requests, retries and waits; infinity: none.
        (To resolve a name the system takes its own time.)
    retries: how often to retry a request where that is safe: nothing of it was sent, or the server
        closed the connection before it answered or answered 429 or 503 (a search changes nothing).
    batch_rows: most queries per request; larger batches are sent in several, as are those beyond
        the server's limits.

    ServerError: the server refused. AnswerError, a ServerError: its answer makes no sense.
    ConnectionError: it cannot be reached, or does not speak HTTP. TimeoutError: no answer in time.
    Threads and forked processes may share a client; each gets its own connection.
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
        self._target, self._prefix = _parsed(url)
        self._headers = {} if token is None else {"Authorization": f"Bearer {_checked(token)}"}
        self._timeout_s = _positive("timeout_s", timeout_s)
        self._retries = inputs.integer("retries", retries, 0, len(WAITS_S))
        self._batch_rows = inputs.integer("batch_rows", batch_rows, 1)
        self._limits: dict[str, Any] | None = None  # the server's, once asked for
        self._local = threading.local()

    def search(
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        ef: int = 64,
        recall: float | None = None,
        rerank: int | str | None = "auto",
        allow: str | ArrayLike | None = None,
        timeout_s: float | None = None,
    ) -> SearchResult:
        """The k nearest labels of each query (q, dim), as `Index.search` gives them.

        allow: what may be returned: the name of a filter on the server, or labels (m,), which go
            with every request.
        timeout_s: the server gives up a request that it cannot answer in time (ServerError 504).
        """
        deadline = self._deadline()
        given = inputs.array("queries", queries)
        given = inputs.vectors("queries", given[None] if given.ndim == 1 else given)
        if given.dtype not in (np.float16, np.float32):
            given = given.astype(np.float32)
        k, ef = inputs.integer("k", k, 1, inputs.MOST_NODES), inputs.integer("ef", ef, 1)
        options: dict[str, Any] = {"k": k, "rerank": "all" if rerank is None else rerank}
        options |= {"ef": ef} if recall is None else {"recall": _decimal(inputs.recall(recall, ef))}
        options |= {"allow": allow} if isinstance(allow, str) else {}
        allowed = None if allow is None or isinstance(allow, str) else _allowed(allow, given)
        path = "/v1/search?" + urlencode(options)
        media = formats.NPY if allowed is None else formats.JSON
        headers = {"Content-Type": media, "Accept": formats.NPY}
        if timeout_s is not None:
            asked_s = min(_positive("timeout_s", timeout_s), LONGEST_TIMEOUT_S)
            headers["X-Timeout-Ms"] = str(max(1, round(1000 * asked_s)))
        found = []
        step = self._rows_of_a_request(given, k, allowed, deadline)
        for start in range(0, max(len(given), 1), step):
            rows = given[start : start + step]
            most = len(rows) * k * formats.RESULT.itemsize
            most = max(most, formats.MOST_NPY_STRINGS) + NPY_HEAD_BYTES
            asked = _Asked("POST", path, headers, _body(rows, allowed), most)
            found.append(_result_of(self._call(asked, deadline), len(rows), k))
        labels, distances = zip(*found, strict=True)
        return SearchResult(np.concatenate(labels), np.concatenate(distances))

    def index(self) -> dict[str, Any]:
        """What is served: n, dim, metric, dtype, labels ("integers" or "strings"), parameters,
        checksum, version, filters, limits."""
        return self._describe(self._deadline())

    def swap(self, path: str, *, force: bool = False) -> dict[str, Any]:
        """Make the server load another saved index; `path` is relative to the server's root.

        force: also one of another dim, metric or kind of labels. Returns what `index` returns once
        the new index is served. Never sent twice.
        """
        if not isinstance(path, str):
            raise TypeError(f"path={path!r}: expected str")
        asked = _Asked(
            "POST", "/v1/index:swap" + ("?force=true" if force else ""),
            {"Content-Type": formats.JSON},
            json.dumps({"path": path}).encode(), JSON_BYTES, is_safe=False,
        )  # fmt: skip
        return _description_of(self._call(asked, self._deadline()))

    def close(self) -> None:
        """Close this thread's connection."""
        connection = self._take()
        if connection is not None:
            connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- requests

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    def _describe(self, deadline: float) -> dict[str, Any]:
        asked = _Asked("GET", "/v1/index", {"Accept": formats.JSON}, b"", JSON_BYTES)
        return _description_of(self._call(asked, deadline))

    def _rows_of_a_request(
        self, queries: np.ndarray, k: int, allowed: str | None, deadline: float
    ) -> int:
        """How many rows a request may have: by `batch_rows`, by our limits and the server's."""
        # the server counts numbers as float32
        a_number, head = (4, NPY_HEAD_BYTES) if allowed is None else (JSON_NUMBER, len(allowed))
        a_row = max(queries.shape[1] * a_number, 1)
        bytes_, results = BODY_BYTES, RESULTS
        rows = min(len(queries), self._batch_rows)
        if rows > 1 and (rows * a_row > ANY_BODY_BYTES or rows * k > ANY_RESULTS):
            if self._limits is None:
                self._limits = self._describe(deadline).get("limits", {})
            bytes_ = min(bytes_, _whole_number(self._limits.get("body_bytes"), bytes_))
            results = min(results, _whole_number(self._limits.get("results"), results))
        room = (bytes_ - head) // a_row
        return max(1, min(self._batch_rows, room, results // k))

    def _call(self, asked: _Asked, deadline: float) -> Answer:
        """The answer of status 200."""
        for attempt in itertools.count():
            wait = WAITS_S[attempt] if attempt < self._retries else math.inf  # then the last
            failure: Exception
            try:
                answer = self._exchange(asked, deadline)
            except DeadlineError:
                raise TimeoutError(
                    f"no answer of {self._target.host} within {self._timeout_s:g} s"
                ) from None
            except TooLongError as error:
                raise AnswerError(200, str(error)) from None
            except (OSError, http.client.HTTPException) as error:
                told = str(error) if isinstance(error, OSError) else repr(error)
                place = f"{self._target.host}:{self._target.port}"
                failure = ConnectionError(f"{place}: {told:.300}")
                failure.__cause__ = error
                can_retry = asked.is_safe or isinstance(error, UnsentError)
            else:
                if answer.status == 200:
                    return answer
                failure = ServerError(answer.status, _detail(answer))
                can_retry = asked.is_safe and answer.status in BUSY
                wait = max(wait, min(_retry_after(answer), WAITS_S[-1]))
            if not can_retry or time.monotonic() + wait >= deadline or math.isinf(wait):
                raise failure
            time.sleep(wait)
        raise AssertionError

    def _exchange(self, asked: _Asked, deadline: float) -> Answer:
        """Ask on this thread's connection, which is kept only if the exchange was whole."""
        connection = self._take()
        if connection is not None and not connection.is_quiet:
            connection.close()  # the server closed it, or what it sent is nobody's answer
            connection = None
        if connection is None:
            connection = Connection(self._target, deadline)
        call_id = secrets.token_hex(8)
        headers = self._headers | asked.headers | {CALL_ID: call_id}
        try:
            answer = connection.exchange(
                asked.method, self._prefix + asked.path, headers, asked.body,
                deadline=deadline, most_bytes=asked.most_bytes,
            )  # fmt: skip
            echoed = answer.headers.get(CALL_ID, call_id)  # a server may know nothing of it
            if echoed != call_id:
                raise AnswerError(
                    answer.status, f"the answer to call {echoed!r:.40}, not to {call_id}"
                )
        except BaseException:  # also a Ctrl-C
            connection.close()
            raise
        if connection.is_reusable and "kept" not in self._local.__dict__:  # by a call within this
            self._local.kept = os.getpid(), connection
        else:
            connection.close()
        return answer

    def _take(self) -> Connection | None:
        """This thread's idle connection, if any; while it is in use, nobody else finds it."""
        process, connection = self._local.__dict__.pop("kept", (None, None))
        if connection is not None and process != os.getpid():
            connection.close()  # of the process before the fork, which goes on using it
            return None
        return connection


def _parsed(url: str) -> tuple[Target, str]:
    """The server, and what comes before its paths."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        host = None
    if (
        host is None
        or parts.scheme not in ("http", "https")
        or parts.query + parts.fragment
        or "@" in parts.netloc
        or not (url.isascii() and url.isprintable() and " " not in url)
    ):
        raise ValueError(f"url={url!r}: expected such as http://127.0.0.1:8080")
    is_https = parts.scheme == "https"
    return Target(host, port or (443 if is_https else 80), is_https), parts.path.rstrip("/")


def _checked(token: str) -> str:
    """The token without the end of its line; its error does not show it."""
    token = token.strip()
    if not token.isascii() or not token.isprintable() or len(token.split()) != 1:
        raise ValueError("token: expected one word of printable ASCII")
    return token


def _positive(name: str, value: float) -> float:
    if not inputs.number(name, value) > 0:
        raise ValueError(f"{name}={value}: expected more than 0")
    return float(value)


def _decimal(number: float) -> str:
    """The number itself when it is read again, without an exponent."""
    return np.format_float_positional(number, trim="0")


def _allowed(allow: ArrayLike, queries: np.ndarray) -> str:
    """The JSON of allowed labels, of a body that holds these queries too."""
    given = label_inputs.label_array("allow", allow)
    if given.dtype in (np.dtype(bool), np.dtype(np.uint8)):
        raise TypeError(
            f"allow: a mask, {given.dtype} {given.shape}; expected the name of a filter of the "
            "server, or labels"
        )
    inputs.refuse("queries", ~np.isfinite(queries).all(axis=1), "NaN or infinite values")
    return json.dumps(label_inputs.labels("allow", given).tolist())


def _body(queries: np.ndarray, allowed: str | None) -> bytes:
    if allowed is None:
        return formats.write_npy(queries)
    return f'{{"queries": {json.dumps(queries.tolist())}, "allow": {allowed}}}'.encode()


def _whole_number(value: Any, default: int) -> int:
    is_one = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_one else default


def _result_of(answer: Answer, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and distances (rows, k); AnswerError: it is no answer to such a search."""
    try:
        labels, distances = formats.read_result(answer.body)
    except ValueError as error:
        raise AnswerError(answer.status, str(error)) from None
    if labels.shape != (rows, k):
        raise AnswerError(answer.status, f"results {labels.shape}, expected {(rows, k)}")
    are_strings = labels.dtype.kind == "T"
    if (not are_strings and (labels < -1).any()) or np.isnan(distances).any():
        raise AnswerError(answer.status, "labels below -1, or distances that are NaN")
    if not np.isinf(distances[labels == ("" if are_strings else -1)]).all():
        raise AnswerError(answer.status, "distances of labels that were not found")
    return labels, distances


def _description_of(answer: Answer) -> dict[str, Any]:
    """What `index` returns; AnswerError: it is none."""
    try:
        found = formats.read_object(answer.body)
    except (ValueError, TypeError) as error:
        raise AnswerError(answer.status, str(error)) from None
    schema = SCHEMAS["Index"]
    for name in (*schema["required"], "limits"):
        kind = schema["properties"][name]["type"]
        held = found.get(name, {} if name == "limits" else None)
        if not isinstance(held, PYTHON_TYPES[kind]) or isinstance(held, bool):
            raise AnswerError(answer.status, f"{name}={held!r:.60}: expected {kind}")
    return found


def _retry_after(answer: Answer) -> float:
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 0.0


def _detail(answer: Answer) -> str:
    """The detail of a problem+json, or the start of any other content, on one printable line."""
    if 300 <= answer.status < 400:
        to = answer.headers.get("Location", "")
        return f"a redirect to {to!r:.200}, which is not followed"
    try:
        detail = formats.read_object(answer.body)["detail"]
    except (ValueError, LookupError, TypeError):
        detail = answer.body[:200].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(detail)[:2000])
