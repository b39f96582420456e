"""Encoded vectors: rows in the storage dtype, padded to whole 32-byte blocks.

fp32 and fp16 rows hold the vector and zeros; of int8 rows see `eight_bits.py`, of int4 rows
`four_bits.py`. Under cosine every row and query is scaled to unit length first.
"""

import numpy as np

from hnsw_gpu.engine.alignment import empty_aligned
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import COSINE, IP, L2, TAIL_BYTES, as_query
from hnsw_gpu.engine.eight_bits import decode_int8, encode_int8
from hnsw_gpu.engine.four_bits import (
    QUERY_TAIL_BYTES,
    decode_int4,
    encode_int4,
    encode_int4_queries,
)
from hnsw_gpu.engine.workers import run_chunks

METRICS = {"l2": L2, "ip": IP, "cosine": COSINE}
STORAGE = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8, "int4": np.uint8}
BLOCK_BYTES = 32
ENCODED = 512  # vectors that a thread encodes at a time


def row_length(dim, dtype):
    """Elements of one encoded row."""
    item = np.dtype(STORAGE[dtype]).itemsize
    used = dim * item + (TAIL_BYTES if dtype == "int8" else 0)
    if dtype == "int4":
        used = -(-dim // 2) + TAIL_BYTES
    return -(-used // BLOCK_BYTES) * BLOCK_BYTES // item


def empty_rows(count, dim, dtype):
    """Uninitialised rows (count, row_length), aligned to a cache line."""
    return empty_aligned((count, row_length(dim, dtype)), STORAGE[dtype])


def squared_lengths(vectors):
    """float64 (n,) sums of squares of float32 rows (n, dim); not finite where a value is not."""
    lengths = np.empty(len(vectors), np.float64)
    _square_lengths(vectors, lengths)
    return lengths


@jit(is_inlined=True)
def _squared_length(vectors, i):
    total = 0.0
    for j in range(vectors.shape[1]):
        total += np.float64(vectors[i, j]) * np.float64(vectors[i, j])
    return total


@jit
def _square_lengths(vectors, lengths):
    for i in range(vectors.shape[0]):
        lengths[i] = _squared_length(vectors, i)


@jit
def are_lengths_within(vectors, least, most):
    """Are the squared lengths of float32 rows (n, dim) all from least to most?"""
    for i in range(vectors.shape[0]):
        if not least <= _squared_length(vectors, i) <= most:  # nor is NaN
            return False
    return True


@jit
def _write_padded(vectors, is_unit, rows):
    """Write vectors (n, dim), of unit length or as they are, as rows (n, dim or more)."""
    dim = vectors.shape[1]
    for i in range(vectors.shape[0]):
        length = np.sqrt(_squared_length(vectors, i)) if is_unit else 0.0
        for j in range(dim):
            rows[i, j] = np.float64(vectors[i, j]) / length if length > 0 else vectors[i, j]
        for j in range(dim, rows.shape[1]):
            rows[i, j] = 0


def scaled(vectors, metric):
    """float32 (m, dim) vectors as rows stand for them: under cosine of unit length."""
    if metric != "cosine":
        return vectors
    result = np.empty(vectors.shape, np.float32)
    _write_padded(vectors, True, result)
    return result


def encode(vectors, metric, dtype):
    """Encoded rows of float32 vectors (m, dim), C order, already validated."""
    return encode_scaled(scaled(vectors, metric), dtype)


def encode_scaled(vectors, dtype):
    """Encoded rows of vectors (m, dim) that `scaled` gave."""
    count, dim = vectors.shape
    rows = empty_rows(count, dim, dtype)
    if dtype == "int4":
        encode_int4(vectors, rows)
    elif dtype == "int8":
        encode_int8(vectors, rows)
    else:
        rows[:, :dim] = vectors
        rows[:, dim:] = 0
        bits = rows.view(f"u{rows.itemsize}")
        bits[bits == 1 << 8 * rows.itemsize - 1] = 0  # -0.0: equal vectors are equal bytes
    return rows


def decode(rows, dim, dtype):
    """float32 vectors (n, dim) that encoded rows stand for."""
    if dtype == "int4":
        return decode_int4(engine_view(rows), dim)
    if dtype == "int8":
        return decode_int8(engine_view(rows), dim)
    return rows[:, :dim].astype(np.float32)


def encode_queries(vectors, metric, dtype, threads=1):
    """Encoded queries of float32 vectors (q, dim): float32 for float rows, codes for codes."""
    queries = _empty_queries(len(vectors), row_length(vectors.shape[1], dtype), STORAGE[dtype])

    def write(start, stop):
        some, place = vectors[start:stop], queries[start:stop]
        if dtype == "int4":
            encode_int4_queries(scaled(some, metric), place)
        elif dtype == "int8":
            _rows_as_queries(encode(some, metric, dtype), place)
        else:
            _write_padded(some, metric == "cosine", place)

    run_chunks(write, len(vectors), ENCODED, threads)
    return queries


def empty_queries(count, rows):
    """Uninitialised encoded queries (count, ...) for searching `rows`."""
    return _empty_queries(count, rows.shape[1], rows.dtype)


def _empty_queries(count, length, storage):
    if storage == np.uint8:
        return empty_aligned((count, 2 * length + QUERY_TAIL_BYTES), np.int8)
    if storage == np.int8:
        return empty_aligned((count, length + BLOCK_BYTES), np.uint8)
    return empty_aligned((count, length), np.float32)


def rows_as_queries(rows):
    """Encoded queries (n, ...) equal to encoded rows (n, row_length)."""
    queries = empty_queries(len(rows), rows)
    if queries.dtype == np.float32:
        queries[:] = rows.view(np.float16) if rows.dtype == np.uint16 else rows
    else:
        _rows_as_queries(engine_view(rows), queries)
    return queries


@jit
def _rows_as_queries(rows, queries):
    for i in range(rows.shape[0]):
        as_query(rows, i, queries, i)


class Alias:
    """An array that numba takes for one like any other, whether it may be written or not."""

    def __init__(self, array):
        self._array = array  # whose memory it is
        about = array.__array_interface__
        self.__array_interface__ = about | {"data": (about["data"][0], False)}


def engine_view(rows):
    """The rows as compiled code takes them, which reads them alone.

    numba has no float16 arrays on the CPU, and compiles all anew for arrays that cannot be written,
    as those are that are mapped.
    """
    rows = rows.view(np.uint16) if rows.dtype == np.float16 else rows
    return rows if rows.flags.writeable else np.asarray(Alias(rows))
