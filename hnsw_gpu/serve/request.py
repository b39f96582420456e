"""What a request asks for: parameters, media types, queries, a filter."""

import json
import re
from typing import NamedTuple

import numpy as np
from starlette.requests import Request

from hnsw_gpu.serve import formats
from hnsw_gpu.serve.middleware import host_name
from hnsw_gpu.serve.problem import Problem
from hnsw_gpu.serve.served_index import ServedIndex

MOST_K = MOST_EF = 10_000
SHARE = re.compile(r"[01]?\.[0-9]{1,20}|1", re.ASCII)
MOST_RESULTS = 2**22  # rows times k: 50 MB of answer


class SearchParameters(NamedTuple):
    """What the query string and the headers of a search say."""

    k: int
    ef: int
    recall: float | None  # in place of ef
    rerank: int | str | None
    filter_name: str | None
    timeout_s: float  # the caller's, at most the server's
    content_type: str  # of the body
    accept: str  # media type of the answer


def search_parameters(request: Request, most_timeout_s: float) -> SearchParameters:
    """Problem 406, 415 or 422 says what is wrong with them."""
    given = request.query_params
    for name in given:
        if name not in ("k", "ef", "recall", "rerank", "allow"):
            raise Problem(422, f"{name!r:.60}: expected k, ef, recall, rerank or allow")
        if len(given.getlist(name)) > 1:
            raise Problem(422, f"{name}: given more than once")
    k = _whole_number("k", given.get("k", "10"), MOST_K)
    ef = _whole_number("ef", given.get("ef", "64"), MOST_EF)
    recall = _share("recall", given["recall"]) if "recall" in given else None
    if recall is not None and "ef" in given:
        raise Problem(422, "ef, recall: expected one of the two")
    rerank = _rerank(given.get("rerank", "auto"))
    timeout_s = most_timeout_s
    timeout_ms = request.headers.get("x-timeout-ms")
    if timeout_ms is not None:
        timeout_s = min(_whole_number("X-Timeout-Ms", timeout_ms, 3_600_000) / 1000, timeout_s)
    content_type = checked_content_type(request, formats.FORMATS)
    accept = formats.negotiate(request.headers.get("accept"), content_type)
    if accept is None:
        raise Problem(406, f"Accept: expected one of {', '.join(formats.FORMATS)}")
    return SearchParameters(
        k, ef, recall, rerank, given.get("allow"), timeout_s, content_type, accept
    )


def _rerank(text: str) -> int | str | None:
    if text in ("auto", "all"):
        return None if text == "all" else text
    try:
        return _whole_number("rerank", text, MOST_EF)
    except Problem as problem:
        raise Problem(422, f"{problem.detail}, auto or all") from None


def _whole_number(name: str, text: str, most: int) -> int:
    is_whole = text.isascii() and text.isdecimal() and len(text) < 20
    if not is_whole or not 1 <= int(text) <= most:
        raise Problem(422, f"{name}={text!r:.60}: expected a whole number from 1 to {most:,}")
    return int(text)


def _share(name: str, text: str) -> float:
    if not SHARE.fullmatch(text):
        raise Problem(422, f"{name}={text!r:.60}: expected a share such as 0.95")
    return float(text)


def checked_content_type(request: Request, known: tuple[str, ...]) -> str:
    """The media type of the body; Problem 415 unless it is known and not compressed."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in known:
        raise Problem(415, f"Content-Type {media!r:.80}: expected {', '.join(known)}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "Content-Encoding: expected none")
    return media


def beam_capacity(asked: SearchParameters, served: ServedIndex) -> int:
    """The ef that is asked for, or that was tuned for the recall asked for; ValueError: none was,
    or it is larger than a request may ask for."""
    ef = served.index.chosen_ef(asked.k, asked.ef, asked.recall)
    if ef > MOST_EF:
        raise ValueError(f"recall={asked.recall}: takes ef={ef:,}, at most {MOST_EF:,} a request")
    return ef


def check_cost(search: formats.SearchBody, served: ServedIndex, k: int, most_numbers: int) -> int:
    """The numbers of all queries, known before any row is gathered or converted.

    TooLargeError, ValueError: too many numbers, too many results.
    """
    rows, dim = 1, served.index.dim
    if search.labels is not None:
        rows = len(search.labels)
    elif search.queries is not None and search.queries.ndim == 2:
        rows, dim = search.queries.shape
    if rows * k > MOST_RESULTS:
        raise ValueError(f"{rows:,} queries of k={k:,}: at most {MOST_RESULTS:,} results a request")
    if rows * dim > most_numbers:
        most = f"at most {most_numbers:,} numbers a request"
        raise formats.TooLargeError(f"{rows:,} queries of {dim:,} numbers: {most}")
    return rows * dim


def queries_of(search: formats.SearchBody, served: ServedIndex) -> np.ndarray:
    """float32 (q, dim), checked; ValueError, TypeError, KeyError: they are no queries."""
    given = search.queries
    if given is None:
        assert search.labels is not None
        given = served.index.vectors(search.labels)
    checked = served.index.checked_queries(given)
    checked.flags.writeable = False  # it is ours: the batcher need not copy it
    return checked


def requested_filter(
    served: ServedIndex, search: formats.SearchBody, name: str | None
) -> np.ndarray | None:
    """What may be returned: the registered filter `name`, or what the body allows."""
    if name is None:
        return search.allow
    if search.allow is not None:
        raise ValueError("allow: given in the query and in the body")
    if name not in served.filters:
        raise LookupError(f"allow={name!r:.80}: no filter of that name")
    return served.filters[name]


def refuse_other_origins(request: Request, known: frozenset[str]) -> None:
    """Problem 403 where a browser asks on behalf of a page that is not this server's."""
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site")
    if site in ("same-origin", "none") or (site is None and origin is None):
        return
    _, _, host = (origin or "").partition("://")
    is_ours = site is None and host.lower() == request.headers.get("host", "").lower()
    if not is_ours and host_name(host) not in known:
        raise Problem(403, f"asked by a page of another origin, {origin!r:.80}")


def is_forced(request: Request) -> bool:
    """What the query string of a swap says; Problem 422 where it says anything else."""
    given = request.query_params.multi_items()
    if given not in ([], [("force", "true")], [("force", "false")]):
        raise Problem(422, f"{request.url.query!r:.80}: expected force=true or force=false")
    return given == [("force", "true")]


def read_swap(body: bytes) -> str:
    """The path that the body of a swap names."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"not JSON: {error!s:.200}") from None
    if not isinstance(given, dict) or set(given) != {"path"} or not isinstance(given["path"], str):
        raise Problem(422, 'expected {"path": "..."}')
    return given["path"]
