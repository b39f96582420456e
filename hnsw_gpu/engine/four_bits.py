"""int4 rows: rotated vectors, four bits a coordinate, asked for by queries of eight.

A row of B bytes, whole 32-byte blocks, is B - 12 bytes of codes, float32 scale, float32 squared
length of the vector, and int32 sum of 2 c - 15 over its codes c. Byte j holds code j in its low four
bits and code B - 12 + j in its high ones; a code c of 0..15 stands for scale * (2 c - 15). The step of the codes is the one of STEPS whose decoded
row has the best cosine to the vector, and the scale the one that makes the dot product of the two
the squared length.

A query is 2 B bytes, int8 codes as they meet the low and the high bits of a row (0 where they meet
no code), float32 scale and squared length, and int32 fifteen times the sum of its codes: what twice
the dot product of codes is too large by. Integers, so the same on every processor.
"""

import numpy as np

from hnsw_gpu.engine.alignment import empty_aligned
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.rotation import rotate, rotate_back

TAIL_BYTES = 12  # of a row and of a query
STEPS = np.linspace(0.6, 1.0, 9).astype(np.float32)  # of the largest coordinate, for 7.5 codes


def encode_int4(vectors, rows):
    """Write float32 vectors (m, dim) as `rows` uint8 (m, B)."""
    rotated = rotate(vectors)
    tails = np.zeros((len(rows), 3), np.float32)
    _encode(rotated, rows, tails, tails.view(np.int32))
    rows[:, -TAIL_BYTES:] = tails.view(np.uint8)


def decode_int4(rows, dim):
    """float32 vectors (n, dim) that rows (n, B) stand for."""
    codes = np.concatenate([rows[:, :-TAIL_BYTES] & 15, rows[:, :-TAIL_BYTES] >> 4], axis=1)[:, :dim]
    scales = np.ascontiguousarray(rows[:, -TAIL_BYTES : -TAIL_BYTES + 4]).view(np.float32)
    return rotate_back((2 * codes.astype(np.float32) - 15) * scales)


def encode_int4_queries(vectors, queries):
    """Write float32 vectors (q, dim) as `queries` int8 (q, ...)."""
    rotated = rotate(vectors)
    count, dim = rotated.shape
    used = queries.shape[1] - TAIL_BYTES
    held = used // 2 - TAIL_BYTES
    scales = np.abs(rotated).max(axis=1, initial=0) / np.float32(127)
    divisors = np.where(scales > 0, scales, np.float32(1))
    codes = np.clip(np.rint(rotated / divisors[:, None]), -127, 127).astype(np.int8)
    low = min(dim, held)
    queries[:] = 0
    queries[:, :low] = codes[:, :low]
    queries[:, used // 2 : used // 2 + dim - low] = codes[:, low:]
    tails = np.empty((count, 3), np.float32)
    tails[:, 0] = scales
    tails[:, 1] = _squares(rotated)
    tails[:, 2] = (15 * codes.sum(axis=1, dtype=np.int32)).astype(np.int32).view(np.float32)
    queries[:, used:] = tails.view(np.int8)


@jit(allocates=True)
def _squares(vectors):
    result = np.empty(vectors.shape[0], np.float32)
    for i in range(vectors.shape[0]):
        total = 0.0
        for j in range(vectors.shape[1]):
            total += np.float64(vectors[i, j]) * np.float64(vectors[i, j])
        result[i] = total
    return result


@jit
def _code(value, inverse):
    return np.int64(min(max(np.floor(value * inverse) + np.float32(8), np.float32(0)), np.float32(15)))


@jit
def _encode(vectors, rows, tails, sums):
    dim = vectors.shape[1]
    held = rows.shape[1] - TAIL_BYTES
    for i in range(vectors.shape[0]):
        squares, largest = 0.0, np.float32(0)
        for j in range(dim):
            squares += np.float64(vectors[i, j]) * np.float64(vectors[i, j])
            largest = max(largest, abs(vectors[i, j]))
        rows[i, :] = 0
        tails[i, 0] = 0
        tails[i, 1] = squares
        sums[i, 2] = -15 * dim
        if largest == 0:
            continue
        best, best_dot, best_inverse = -1.0, 0.0, np.float32(0)
        for s in range(len(STEPS)):
            inverse = np.float32(7.5) / (largest * STEPS[s])
            dot, length = 0.0, np.int64(0)
            for j in range(dim):
                code = 2 * _code(vectors[i, j], inverse) - 15
                dot += np.float64(vectors[i, j]) * np.float64(code)
                length += code * code
            cosine = dot / np.sqrt(np.float64(length))
            if cosine > best:
                best, best_dot, best_inverse = cosine, dot, inverse
        tails[i, 0] = squares / best_dot
        total = 0
        for j in range(dim):
            code = np.uint8(_code(vectors[i, j], best_inverse))
            total += 2 * np.int64(code) - 15
            if j < held:
                rows[i, j] |= code
            else:
                rows[i, j - held] |= np.uint8(code << 4)
        sums[i, 2] = total
