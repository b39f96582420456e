"""int8 rows: each vector divided by a scale of its own and rounded.

A row holds codes, zeros, and in its last TAIL_BYTES float32 scale, float32 squared length of the
decoded vector and int32 sum of codes. The scale is one per row: a later `add` with larger values
clips nothing, and a row's bytes never depend on the rows beside it.
"""

import numpy as np

from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import TAIL_BYTES

LARGEST = np.float32(127)  # code


@jit
def encode_int8(vectors, rows):
    """Write float32 vectors (m, dim) as `rows` int8 (m, row)."""
    for i in range(vectors.shape[0]):
        vector, row = vectors[i], rows[i]
        largest = np.float32(0)
        for j in range(len(vector)):
            largest = max(largest, abs(vector[j]))
        scale = largest / LARGEST
        divisor = scale if scale > 0 else np.float32(1)
        total, squares = np.int32(0), np.int32(0)
        for j in range(len(vector)):
            number = np.rint(vector[j] / divisor)
            code = np.int32(min(max(number, -LARGEST), LARGEST))
            row[j] = code
            total = np.int32(total + code)
            squares = np.int32(squares + np.int32(code * code))
        for j in range(len(vector), len(row)):
            row[j] = 0
        tail = row[len(row) - TAIL_BYTES :]
        tail[:8].view(np.float32)[0] = scale
        tail[:8].view(np.float32)[1] = (scale * scale) * np.float32(squares)
        tail[8:].view(np.int32)[0] = total


def decode_int8(rows, dim):
    """float32 vectors (n, dim) that rows (n, row) stand for."""
    scales = np.ascontiguousarray(rows[:, -TAIL_BYTES : -TAIL_BYTES + 4]).view(np.float32)
    return rows[:, :dim] * scales
