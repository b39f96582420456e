"""Arrays that begin on a cache line, for which numpy cannot be asked.

Rows and links that straddle lines are read from one line more.
"""

import math

import numpy as np
from numpy.typing import DTypeLike

CACHE_LINE = 64


def empty_aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Uninitialised array of that shape."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return np.ndarray(shape, dtype, memory, start)


def copy_aligned(array: np.ndarray) -> np.ndarray:
    """A copy, C order."""
    result = empty_aligned(array.shape, array.dtype)
    result[...] = array
    return result


def taken_aligned(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """array[rows], of rows int64 (m,) that are all there."""
    result = empty_aligned((len(rows), *array.shape[1:]), array.dtype)
    return np.take(array, rows, axis=0, out=result, mode="clip")  # other modes copy twice
