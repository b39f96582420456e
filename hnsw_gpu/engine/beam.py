"""The beam (rule R4): one sorted array of the smallest keys seen, empty slots (KEY_NONE) last.

A key enters by one pass over the array, eight keys at a time and without a branch: with `beam` as
it was and -1 below the first slot, slot i becomes min(beam[i], max(beam[i - 1], key)).
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.keys import KEY_NONE

LANES = 8  # keys that are moved at once
STRIDE = 128  # smaller keys that are skipped at once; of fewer, a branch costs more than a pass
I64 = ir.IntType(64)
KEYS = ir.VectorType(I64, LANES)


def _row(context, builder, array_type, array, row):
    """Pointer to the first key of a row of a C-contiguous array, and the row's length."""
    data = context.make_array(array_type)(context, builder, array)
    _, columns = cgutils.unpack_tuple(builder, data.shape)
    return builder.gep(data.data, [builder.mul(row, columns)]), columns


def _vector(builder, pointer, position):
    return builder.bitcast(builder.gep(pointer, [position]), KEYS.as_pointer())


def _between(builder, before, key, value):
    """min(value, max(before, key)), of one or of all lanes."""
    larger = builder.select(builder.icmp_unsigned("<", before, key), key, before)
    return builder.select(builder.icmp_unsigned("<", value, larger), value, larger)


@intrinsic
def _push(typingctx, beam, row, start, capacity, key):
    """Push `key` into the sorted `beam[row, start:capacity]`; the largest falls out."""

    def codegen(context, builder, signature, arguments):
        array, row, start, capacity, key = arguments
        pointer, _ = _row(context, builder, beam, array, row)
        keys = ir.Constant(KEYS, ir.Undefined)
        for lane in range(LANES):
            keys = builder.insert_element(keys, key, ir.IntType(32)(lane))
        shifted = ir.Constant(
            ir.VectorType(ir.IntType(32), LANES), list(range(LANES - 1, 2 * LANES - 1))
        )
        before = cgutils.alloca_once_value(builder, ir.Constant(KEYS, [I64(0)] * LANES))
        whole = builder.and_(capacity, I64(-LANES))
        with cgutils.for_range_slice(builder, start, whole, I64(LANES), I64) as (i, _):
            value = builder.load(_vector(builder, pointer, i), align=8)
            below = builder.shuffle_vector(builder.load(before), value, shifted)
            builder.store(_between(builder, below, keys, value), _vector(builder, pointer, i), 8)
            builder.store(value, before)
        last = builder.extract_element(builder.load(before), ir.IntType(32)(LANES - 1))
        below = cgutils.alloca_once_value(builder, last)
        with cgutils.for_range_slice(builder, whole, capacity, I64(1), I64) as (i, _):
            slot = builder.gep(pointer, [i])
            value = builder.load(slot)
            builder.store(_between(builder, builder.load(below), key, value), slot)
            builder.store(value, below)
        return context.get_dummy_value()

    return types.void(beam, types.int64, types.int64, types.int64, types.uint64), codegen


@intrinsic
def set_bytes(typingctx, array, row, start, byte):
    """Set all bytes of `array[row, start:]`, in C order; 255 makes empty slots."""

    def codegen(context, builder, signature, arguments):
        pointer, columns = _row(context, builder, array, arguments[0], arguments[1])
        first = builder.bitcast(builder.gep(pointer, [arguments[2]]), ir.IntType(8).as_pointer())
        item = context.get_abi_sizeof(pointer.type.pointee)
        count = builder.mul(builder.sub(columns, arguments[2]), I64(item))
        value = builder.trunc(arguments[3], ir.IntType(8))
        memset = builder.module.declare_intrinsic("llvm.memset", (first.type, I64))
        builder.call(memset, [first, value, count, ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, types.int64), codegen


@intrinsic
def _unexpanded(typingctx, beam, row, position):
    """Bits of the LANES keys from `position` that are not expanded; empty slots count as such."""

    def codegen(context, builder, signature, arguments):
        array, row, position = arguments
        pointer, _ = _row(context, builder, beam, array, row)
        value = builder.load(_vector(builder, pointer, position), align=8)
        flag = builder.and_(value, ir.Constant(KEYS, [I64(1)] * LANES))
        is_unexpanded = builder.icmp_unsigned("==", flag, ir.Constant(KEYS, [I64(0)] * LANES))
        bits = builder.bitcast(is_unexpanded, ir.IntType(LANES))
        return builder.zext(bits, I64)

    return types.int64(beam, types.int64, types.int64), codegen


@intrinsic
def _lowest_bit(typingctx, bits):
    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.int64), codegen


@jit(is_inlined=True)
def insert(beam, row, capacity, key):
    """Insert `key` into the sorted `beam[row, :capacity]`; the largest falls out of a full one."""
    start = 0
    while start + STRIDE < capacity and beam[row, start + STRIDE - 1] < key:
        start += STRIDE
    _push(beam, row, start, capacity, key)


@jit(is_inlined=True)
def first_unexpanded(beam, row, start, capacity):
    """Position of the first unexpanded key from `start` on; `capacity` or more if there is none.

    Keys are looked at LANES at a time: start and the row's length are multiples of it.
    """
    position = start
    while position < capacity:
        bits = _unexpanded(beam, row, position)
        if bits:
            return position + _lowest_bit(bits)
        position += LANES
    return position


@jit(is_inlined=True)
def size(beam, row):
    """How many keys the sorted `beam[row]` holds before its empty slots."""
    count, end = np.int64(0), np.int64(beam.shape[1])
    while count < end:
        middle = (count + end) >> 1
        if beam[row, middle] < KEY_NONE:
            count = middle + 1
        else:
            end = middle
    return count
