"""Queries and results as bytes: .npy, safetensors and JSON, by media type. Nothing is unpickled.

Queries: a .npy of (q, dim); or by name, as tensors or as members of a JSON object, `queries` or
`labels` (their stored vectors are the queries), and `allow`. Results: `labels` and `distances`,
(q, k) each; a .npy has them as two fields. In JSON an infinite distance (none found) is null.

Labels that are strings: in JSON as they are; in a .npy of numpy's U, each as wide as the longest of
the answer; in safetensors, which has none, `labels` is their UTF-8 (uint8), one after the other,
and `label_offsets` int64 (q k + 1,) says where each begins. They are asked for in JSON only.
"""

import functools
import io
import json
import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy

from hnsw_gpu import label_inputs
from hnsw_gpu.serve import long_json
from hnsw_gpu.serve.offload import LARGE
from hnsw_gpu.string_labels import STRINGS

NPY, SAFETENSORS, JSON = "application/x-npy", "application/x-safetensors", "application/json"
FORMATS = (JSON, NPY, SAFETENSORS)
RESULT = np.dtype([("labels", "<i8"), ("distances", "<f4")])
MOST_NPY_STRINGS = 2**26  # bytes of an answer as .npy
NAMES = {"queries", "labels", "allow"}
MOST_JSON_ELEMENTS = 2**22  # numbers and lists of one body
MOST_HEADER = 2**16  # bytes before the numbers of a .npy or safetensors
MalformedError = long_json.MalformedError


class TooLargeError(ValueError):
    """More numbers than one request may hold."""


class SearchBody(NamedTuple):
    """The body of a search, not yet checked against an index."""

    queries: np.ndarray | None  # or
    labels: np.ndarray | None
    allow: np.ndarray | None


def read_search(media: str, body: bytes) -> SearchBody:
    """The body of a search.

    MalformedError: not in that format. TooLargeError. ValueError, TypeError: wrong.
    """
    if media == NPY:
        return SearchBody(read_npy(body), None, None)
    held = read_json(body) if media == JSON else read_safetensors(body)
    unknown = sorted(set(held) - NAMES)
    if unknown:
        raise ValueError(f"{unknown[0]!r:.60}: expected {', '.join(sorted(NAMES))}")
    arrays = (
        {name: _array_of(name, value) for name, value in held.items()} if media == JSON else held
    )
    if ("queries" in arrays) == ("labels" in arrays):
        raise ValueError("expected either queries or labels")
    labels = arrays.get("labels")
    if labels is not None:
        labels = label_inputs.labels("labels", labels)
    return SearchBody(arrays.get("queries"), labels, arrays.get("allow"))


def read_npy(body: bytes) -> np.ndarray:
    """The array of a .npy, in the memory of `body`; its header must agree with the length."""
    try:
        start = 10 + int.from_bytes(body[8:10], "little")
        if body[6:8] == b"\x02\x00":
            start = 12 + int.from_bytes(body[8:12], "little")
        if start > MOST_HEADER:
            raise ValueError(f"a header of {start:,} bytes")
        shape, order, dtype = _parsed_npy_header(body[:start])
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        length = len(body) - start
        if math.prod(shape) * dtype.itemsize != length:
            raise ValueError(f"{length} bytes for {dtype} {shape}")
        # `frombuffer` makes no objects, so nothing is unpickled
        return np.frombuffer(body, dtype, math.prod(shape), start).reshape(shape, order=order)
    except Exception as error:  # the header is a Python literal: whatever its parser may raise
        raise MalformedError(f"not a .npy: {_one_line(error)}") from None


@functools.lru_cache(256)  # most callers send the same one every time
def _parsed_npy_header(header: bytes) -> tuple[tuple[int, ...], Literal["F", "C"], np.dtype]:
    """Shape, order and dtype from the bytes before an array's data."""
    file = io.BytesIO(header)
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
    shape, is_fortran, dtype = read(file)
    if file.tell() != len(header):
        raise ValueError("a header that ends early")
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    return shape, "F" if is_fortran else "C", dtype


def write_npy(array: np.ndarray) -> bytes:
    return _npy_header_bytes(array.shape, array.dtype) + array.tobytes()


@functools.lru_cache(256)
def _npy_header_bytes(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    file = io.BytesIO()
    facts = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, facts)
    return file.getvalue()


def read_safetensors(body: bytes) -> dict[str, np.ndarray]:
    from safetensors import numpy as safetensors

    header = int.from_bytes(body[:8], "little")
    if MOST_HEADER < header <= len(body):
        raise TooLargeError(f"a header of {header:,} bytes: at most {MOST_HEADER:,}")
    try:
        return safetensors.load(body)
    except Exception as error:  # its own types, and KeyError for a dtype that numpy lacks
        raise MalformedError(f"not safetensors of numpy's dtypes: {_one_line(error)}") from None


def read_json(body: bytes) -> dict[str, Any]:
    """The members of the body of a search, which hold nothing but numbers if it is long."""
    if len(body) > LARGE:
        elements = long_json.count_elements(body)
        if elements > MOST_JSON_ELEMENTS:
            most = f"at most {MOST_JSON_ELEMENTS:,}: more fit a .npy"
            raise TooLargeError(f"JSON of {elements:,} numbers and lists: {most}")
        return long_json.read_long_json(body)
    return read_object(body)


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object of any members. MalformedError: no JSON; TypeError: no object."""
    try:
        held = json.loads(body, parse_constant=long_json.refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"not JSON: {_one_line(error)}") from None
    if not isinstance(held, dict):
        raise TypeError("expected a JSON object")
    return held


def _array_of(name: str, value: Any) -> np.ndarray:
    """Numbers of any shape for queries; integers or strings (m,) for the others."""
    if name != "queries" and isinstance(value, list) and value and isinstance(value[0], str):
        return label_inputs.label_array(name, value)
    try:
        array = np.asarray(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{name}: rows of different lengths") from None
    if name == "queries":
        if array.dtype.kind not in "fiu":
            raise TypeError("queries: expected numbers")
        return array
    if array.ndim != 1:
        raise ValueError(f"{name}: shape {array.shape}, expected (m,)")
    if array.size and array.dtype.kind != "i":
        raise TypeError(f"{name}: expected integers or strings")
    return array.astype(np.int64)


def write_result(media: str, labels: np.ndarray, distances: np.ndarray) -> bytes:
    """A result, labels int64 or strings, and distances float32 (q, k).

    TooLargeError: the strings are too long for a .npy.
    """
    if media == NPY:
        both = np.empty(labels.shape, _npy_result(labels))
        both["labels"], both["distances"] = labels, distances
        return write_npy(both)
    if media == SAFETENSORS:
        from safetensors import numpy as safetensors

        return safetensors.save({**_tensors_of(labels), "distances": distances})
    parts = [b'{"labels": [', *long_json.written_rows(labels), b'], "distances": [']
    return b"".join([*parts, *long_json.written_rows(distances), b"]}"])


def _npy_result(labels: np.ndarray) -> np.dtype:
    """The dtype of a result in a .npy."""
    if labels.dtype.kind != "T":
        return RESULT
    longest = max(map(len, labels.ravel().tolist()), default=0)
    dtype = _of_strings(max(longest, 1))
    if labels.size * dtype.itemsize > MOST_NPY_STRINGS:
        raise TooLargeError(
            f"{labels.size:,} labels, one of {longest:,} characters: a .npy would make all as "
            f"long; ask for {JSON}"
        )
    return dtype


def _of_strings(longest: int) -> np.dtype:
    return np.dtype([("labels", f"<U{longest}"), ("distances", "<f4")])


def _tensors_of(labels: np.ndarray) -> dict[str, np.ndarray]:
    if labels.dtype.kind != "T":
        return {"labels": labels}
    texts = [text.encode() for text in labels.ravel().tolist()]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return {"labels": np.frombuffer(b"".join(texts), np.uint8), "label_offsets": offsets}


def read_result(body: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Labels and distances (q, k) of a .npy that `write_result` wrote."""
    both = read_npy(body)
    if both.dtype.names != RESULT.names or both.ndim != 2:
        raise MalformedError(f"a result of {both.dtype} {both.shape}")
    labels = np.ascontiguousarray(both["labels"])
    is_known = both.dtype == RESULT
    if labels.dtype.kind == "U":
        is_known = both.dtype == _of_strings(labels.dtype.itemsize // 4)
    if not is_known:
        raise MalformedError(f"a result of {both.dtype} {both.shape}")
    if labels.dtype.kind == "U":
        if not label_inputs.are_text(labels.ravel()).all():
            raise MalformedError("labels: numbers that are no characters")
        labels = np.array(labels.ravel().tolist(), STRINGS).reshape(labels.shape)
    return labels, np.ascontiguousarray(both["distances"])


def negotiate(accept: str | None, default: str) -> str | None:
    """The format that an Accept header prefers, `default` among equals; None: none of ours."""
    best, most = None, 0.0
    for item in (accept or "*/*").split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    weight = float(parameter[2:])
                except ValueError:
                    weight = 0.0
        known = default if name in ("*/*", "application/*") else name
        if known in FORMATS and weight > most:
            best, most = known, weight
    return best


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
