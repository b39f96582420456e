"""Keys (rule R2): distance, id and the expanded flag in one integer; ties go to the smaller id."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hnsw_gpu.engine.compiled import jit

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


@jit(is_inlined=True)
def make_key(distance, node):
    """uint64 key of a float32 distance and an id, not expanded (R2)."""
    bits = np.uint64(_float_bits(distance))
    flip = np.uint64(0xFFFFFFFF) if bits >> np.uint64(31) else np.uint64(0x80000000)
    return (bits ^ flip) << np.uint64(32) | np.uint64(node) << np.uint64(1)


@jit(is_inlined=True)
def key_node(key):
    """The id in a key."""
    return np.int64((key & np.uint64(0xFFFFFFFF)) >> np.uint64(1))


@jit(is_inlined=True)
def key_distance(key):
    """The float32 distance in a key."""
    ordered = np.uint32(key >> np.uint64(32))
    flip = np.uint32(0x80000000) if ordered >> np.uint32(31) else np.uint32(0xFFFFFFFF)
    return _bits_float(np.uint32(ordered ^ flip))


def key_distances(keys):
    """float32 distances of an array of keys; +inf where empty. Any shape."""
    ordered = (keys >> np.uint64(32)).astype(np.uint32)
    flip = np.where(ordered >> np.uint32(31), np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
    return np.where(keys == KEY_NONE, np.float32(np.inf), (ordered ^ flip).view(np.float32))


def key_nodes(keys):
    """int32 ids of an array of keys; -1 where empty. Any shape."""
    ids = ((keys & np.uint64(0xFFFFFFFF)) >> np.uint64(1)).astype(np.int64)
    return np.where(keys == KEY_NONE, -1, ids).astype(np.int32)
