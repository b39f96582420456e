"""int4 rows: rotated vectors, four bits a coordinate, asked for by queries of eight.

A row of B bytes, whole 32-byte blocks, is B - 12 bytes of codes, float32 scale, float32 squared
length of the vector, and int32 sum of 2 c - 15 over its codes c. Byte j holds code j in its low
four bits and code B - 12 + j in its high ones; a code c of 0..15 stands for scale * (2 c - 15).
Codes are made of coordinates that were rounded to -FINEST..FINEST, by integers. Their step is the
one of STEPS whose decoded row has the best cosine to the vector, and the scale the one that makes
the dot product of the two the squared length.

A query is 2 B bytes, int8 codes as they meet the low and the high bits of a row (0 where they meet
no code), and QUERY_TAIL_BYTES, at whose end are float32 scale and squared length, and int32 fifteen
times the sum of its codes: what twice the dot product of codes is too large by. Integers, so the
same on every processor, and on a GPU, whose encode.cu makes the same queries.
"""

import numpy as np

from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import TAIL_BYTES
from hnsw_gpu.engine.rotation import rotate, rotate_back

FINEST = 2047  # times 15 times the most dimensions is below 2^31
STEPS = np.linspace(0.6, 1.0, 9)  # of the largest coordinate, for 7.5 codes
SHIFT = 16
FACTORS = np.rint(2**SHIFT * 7.5 / (FINEST * STEPS)).astype(np.int32)  # of a coordinate, to codes
LANES = 8
QUERY_TAIL_BYTES = 32  # whole chunks of what a GPU reads at once


def encode_int4(vectors, rows):
    """Write float32 vectors (m, dim) as `rows` uint8 (m, B)."""
    _encode(rotate(vectors), np.empty(vectors.shape[1], np.int32), np.empty(LANES), rows)


def decode_int4(rows, dim):
    """float32 vectors (n, dim) that rows (n, B) stand for."""
    codes = np.concatenate([rows[:, :-TAIL_BYTES] & 15, rows[:, :-TAIL_BYTES] >> 4], axis=1)
    scales = np.ascontiguousarray(rows[:, -TAIL_BYTES : -TAIL_BYTES + 4]).view(np.float32)
    return rotate_back((2 * codes[:, :dim].astype(np.float32) - 15) * scales)


def encode_int4_queries(vectors, queries):
    """Write float32 vectors (q, dim) as `queries` int8 (q, 2 B + QUERY_TAIL_BYTES)."""
    _encode_queries(rotate(vectors), np.empty(LANES), queries)


@jit(is_inner=True)
def _largest(vector):
    largest = np.float32(0)
    for j in range(len(vector)):
        largest = max(largest, np.abs(vector[j]))
    return largest


@jit(is_inner=True)
def _square(vector, totals):
    """float64 squared length: sums of every LANES-th square, and then theirs."""
    totals[:] = 0
    whole = len(vector) // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            value = np.float64(vector[start + lane])
            totals[lane] += value * value
    for j in range(whole, len(vector)):
        totals[j - whole] += np.float64(vector[j]) * np.float64(vector[j])
    total = 0.0
    for lane in range(LANES):
        total += totals[lane]
    return total


@jit(is_inlined=True)
def _code(coordinate, factor):
    """0..15 of a coordinate -FINEST..FINEST."""
    code = np.int32(np.int32(np.int32(coordinate * factor) >> np.int32(SHIFT)) + np.int32(8))
    return min(max(code, np.int32(0)), np.int32(15))


@jit(is_inlined=True)
def _odd(code):
    """What a code stands for, in scales."""
    return np.int32(np.int32(2) * code - np.int32(15))


@jit(is_inner=True)
def _best_factor(coordinates):
    """The factor whose codes have the best cosine to coordinates, and their dot product."""
    best, best_dot, best_cosine = FACTORS[0], np.int32(0), -1.0
    for factor in FACTORS:
        dot, length = np.int32(0), np.int32(0)
        for j in range(len(coordinates)):
            number = _odd(_code(coordinates[j], factor))
            dot = np.int32(dot + np.int32(coordinates[j] * number))
            length = np.int32(length + np.int32(number * number))
        cosine = dot / np.sqrt(np.float64(length))
        if cosine > best_cosine:
            best, best_dot, best_cosine = factor, dot, cosine
    return best, best_dot


@jit(is_inner=True)
def _round(vector, unit, coordinates):
    """Write a vector as whole numbers of units."""
    for j in range(len(vector)):
        coordinates[j] = np.int32(vector[j] / unit + np.float32(FINEST + 0.5)) - FINEST


@jit
def _encode(vectors, coordinates, totals, rows):
    dim = vectors.shape[1]
    held = rows.shape[1] - TAIL_BYTES
    for i in range(vectors.shape[0]):
        row = rows[i]
        row[:] = 0
        total, scale, square = np.int32(-15 * dim), 0.0, 0.0
        unit = _largest(vectors[i]) / np.float32(FINEST)
        if unit > 0:
            _round(vectors[i], unit, coordinates)
            factor, dot = _best_factor(coordinates)
            square = _square(vectors[i], totals)
            scale = square / (np.float64(unit) * dot)
            total = np.int32(0)
            for j in range(dim):
                total = np.int32(total + _odd(_code(coordinates[j], factor)))
            for j in range(min(dim, held)):
                row[j] = _code(coordinates[j], factor)
            for j in range(held, dim):
                row[j - held] |= np.uint8(_code(coordinates[j], factor) << 4)
        tail = row[held:]
        tail[:8].view(np.float32)[0] = scale
        tail[:8].view(np.float32)[1] = square
        tail[8:].view(np.int32)[0] = total


@jit
def _encode_queries(vectors, totals, queries):
    dim = vectors.shape[1]
    row_bytes = (queries.shape[1] - QUERY_TAIL_BYTES) // 2
    held = row_bytes - TAIL_BYTES
    for i in range(vectors.shape[0]):
        vector, query = vectors[i], queries[i]
        scale = _largest(vector) / np.float32(127)
        unit = scale if scale > 0 else np.float32(1)
        query[:] = 0
        total = np.int32(0)
        for j in range(dim):
            code = np.int32(vector[j] / unit + np.float32(127.5)) - 127
            total += code
            query[j if j < held else row_bytes + j - held] = code
        tail = query[len(query) - TAIL_BYTES :]
        tail[:8].view(np.float32)[0] = scale
        tail[:8].view(np.float32)[1] = _square(vector, totals)
        tail[8:].view(np.int32)[0] = 15 * total
