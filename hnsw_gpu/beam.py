"""Keys (rule R2) and the beam (rule R4): one sorted array of the smallest keys seen."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

KEY_NONE = np.uint64(0xFFFFFFFFFFFFFFFF)  # an empty slot: larger than every key
EXPANDED = np.uint64(1)


@intrinsic
def _float_bits(typingctx, value):
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _bits_float(typingctx, bits):
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), codegen


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


@njit(cache=True, _nrt=False)
def make_key(distance, node):
    """uint64 key of a float32 distance and an id, not expanded (R2)."""
    bits = np.uint64(_float_bits(distance))
    flip = np.uint64(0xFFFFFFFF) if bits >> np.uint64(31) else np.uint64(0x80000000)
    return (bits ^ flip) << np.uint64(32) | np.uint64(node) << np.uint64(1)


@njit(cache=True, _nrt=False)
def key_node(key):
    """The id in a key."""
    return np.int64((key & np.uint64(0xFFFFFFFF)) >> np.uint64(1))


@njit(cache=True, _nrt=False)
def key_distance(key):
    """The float32 distance in a key."""
    ordered = np.uint32(key >> np.uint64(32))
    flip = np.uint32(0x80000000) if ordered >> np.uint32(31) else np.uint32(0xFFFFFFFF)
    return _bits_float(np.uint32(ordered ^ flip))


@njit(cache=True, _nrt=False)
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


@njit(cache=True, _nrt=False)
def size(beam, row):
    """How many keys the sorted `beam[row]` holds before its empty slots."""
    return np.int64(np.searchsorted(beam[row], KEY_NONE))


def distances(keys):
    """float32 distances of an array of keys; +inf where empty. Any shape."""
    ordered = (keys >> np.uint64(32)).astype(np.uint32)
    flip = np.where(ordered >> np.uint32(31), np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
    return np.where(keys == KEY_NONE, np.float32(np.inf), (ordered ^ flip).view(np.float32))


def nodes(keys):
    """int32 ids of an array of keys; -1 where empty. Any shape."""
    ids = ((keys & np.uint64(0xFFFFFFFF)) >> np.uint64(1)).astype(np.int64)
    return np.where(keys == KEY_NONE, -1, ids).astype(np.int32)
