"""The beam (rule R4): one sorted array of the smallest keys seen."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.keys import KEY_NONE


@intrinsic
def _move_up(typingctx, beam, row, position, count):
    """Move `count` keys of `beam[row]` from `position` one slot up (memmove)."""

    def codegen(context, builder, signature, arguments):
        array, row, position, count = arguments
        data = context.make_array(beam)(context, builder, array)
        _, columns = cgutils.unpack_tuple(builder, data.shape)
        start = builder.add(builder.mul(row, columns), position)
        source = builder.gep(data.data, [start])
        target = builder.gep(data.data, [builder.add(start, ir.IntType(64)(1))])
        cgutils.raw_memmove(builder, target, source, count, 8)
        return context.get_dummy_value()

    return types.void(beam, types.int64, types.int64, types.int64), codegen


@jit
def insert(beam, row, size, capacity, key):
    """Insert `key` into the sorted `beam[row, :size]`; the largest falls out of a full one.

    Returns the key's position, or `capacity` where it did not enter.
    """
    if size == capacity:
        if size == 0 or key >= beam[row, size - 1]:
            return capacity
        size -= 1
    low, high = 0, size
    while low < high:
        middle = (low + high) >> 1
        if beam[row, middle] < key:
            low = middle + 1
        else:
            high = middle
    _move_up(beam, row, low, size - low)
    beam[row, low] = key
    return low


@jit
def size(beam, row):
    """How many keys the sorted `beam[row]` holds before its empty slots."""
    return np.int64(np.searchsorted(beam[row], KEY_NONE))
