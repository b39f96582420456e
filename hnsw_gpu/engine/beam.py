"""The beam (rule R4): one sorted array of the smallest keys seen, empty slots (KEY_NONE) last.

A key enters a small one by a pass over the array, eight keys at a time and without a branch: with
`beam` as it was and 0 below the first slot, slot i becomes min(beam[i], max(beam[i - 1], key)).
Keys that enter in one pass do so one after the other at each eight.

Keys enter a large one at places that a binary search finds, from the last to the first: the slots
between two places are moved at once.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hnsw_gpu.engine.compiled import has_feature, jit
from hnsw_gpu.engine.keys import KEY_NONE

LANES = 8  # keys that are moved at once
TOGETHER = 4  # keys that enter in one pass
MERGED = 16  # keys that are sorted and enter a large beam at once
STRIDE = 128  # smaller keys that are skipped at once; of fewer, a branch costs more than a pass
I64 = ir.IntType(64)
KEYS = ir.VectorType(I64, LANES)
SHIFTED = ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(range(LANES - 1, 2 * LANES - 1)))


def _row(context, builder, array_type, array, row):
    """Pointer to the first key of a row of a C-contiguous array, and the row's length."""
    data = context.make_array(array_type)(context, builder, array)
    _, columns = cgutils.unpack_tuple(builder, data.shape)
    return builder.gep(data.data, [builder.mul(row, columns)]), columns


def _vector(builder, pointer, position):
    return builder.bitcast(builder.gep(pointer, [position]), KEYS.as_pointer())


def _between(builder, compare, before, key, value):
    """min(value, max(before, key)), of one or of all lanes."""
    larger = builder.select(compare("<", before, key), key, before)
    return builder.select(compare("<", value, larger), value, larger)


@intrinsic
def _push(typingctx, beam, row, start, capacity, keys):
    """Push a tuple of keys into the sorted `beam[row, start:capacity]`; the largest fall out."""

    def codegen(context, builder, signature, arguments):
        array, row, start, capacity, keys = arguments
        pointer, _ = _row(context, builder, beam, array, row)
        entering = cgutils.unpack_tuple(builder, keys)
        # AVX2 compares signed keys only: with their sign flipped they are in the same order.
        is_flipped = has_feature(context, "avx2") and not has_feature(context, "avx512f")
        smallest = ir.Constant(KEYS, [I64(-(2**63) if is_flipped else 0)] * LANES)
        compare = builder.icmp_signed if is_flipped else builder.icmp_unsigned

        def in_order(keys):
            return builder.xor(keys, smallest)

        everywhere = [in_order(_in_all_lanes(builder, key)) for key in entering]
        befores = [cgutils.alloca_once_value(builder, smallest) for _ in entering]
        whole = builder.and_(capacity, I64(-LANES))
        with cgutils.for_range_slice(builder, start, whole, I64(LANES), I64) as (i, _):
            value = in_order(builder.load(_vector(builder, pointer, i), align=8))
            for key, before in zip(everywhere, befores, strict=True):
                below = builder.shuffle_vector(builder.load(before), value, SHIFTED)
                builder.store(value, before)
                value = _between(builder, compare, below, key, value)
            builder.store(in_order(value), _vector(builder, pointer, i), 8)
        lasts = [in_order(builder.load(before)) for before in befores]
        ends = [builder.extract_element(last, I64(LANES - 1)) for last in lasts]
        belows = [cgutils.alloca_once_value(builder, end) for end in ends]
        with cgutils.for_range_slice(builder, whole, capacity, I64(1), I64) as (i, _):
            slot = builder.gep(pointer, [i])
            value = builder.load(slot)
            for key, below in zip(entering, belows, strict=True):
                before = builder.load(below)
                builder.store(value, below)
                value = _between(builder, builder.icmp_unsigned, before, key, value)
            builder.store(value, slot)
        return context.get_dummy_value()

    return types.void(beam, types.int64, types.int64, types.int64, keys), codegen


def _in_all_lanes(builder, key):
    keys = ir.Constant(KEYS, ir.Undefined)
    for lane in range(LANES):
        keys = builder.insert_element(keys, key, I64(lane))
    return keys


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
def _move(typingctx, beam, row, start, to, count):
    """Move `beam[row, start : start + count]` to `to`."""

    def codegen(context, builder, signature, arguments):
        array, row, start, to, count = arguments
        pointer, _ = _row(context, builder, beam, array, row)
        byte = ir.IntType(8).as_pointer()
        source, target = (builder.bitcast(builder.gep(pointer, [at]), byte) for at in (start, to))
        memmove = builder.module.declare_intrinsic("llvm.memmove", [byte, byte, I64])
        size = builder.mul(count, I64(pointer.type.pointee.width // 8))
        builder.call(memmove, [target, source, size, ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(beam, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def _most_passed(typingctx):
    """The capacity up to which a pass is quicker than a merge, as measured."""

    def codegen(context, builder, signature, arguments):
        return I64(768 if has_feature(context, "avx512f") else 96)

    return types.int64(), codegen


@intrinsic
def _unexpanded(typingctx, beam, row, position):
    """Bits of the LANES keys from `position` that are not expanded, nor empty."""

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
    _push(beam, row, _skipped(beam, row, capacity, key), capacity, (key,))


@jit(is_inlined=True)
def insert_some(beam, row, capacity, keys, count):
    """Insert keys[:count], in no order, which may change; TOGETHER places behind may be written."""
    if capacity > _most_passed():
        for first in range(0, count, MERGED):
            _merge(beam, row, capacity, keys, first, min(first + MERGED, count))
        return
    for i in range(count, count + TOGETHER):
        keys[i] = KEY_NONE  # which changes nothing
    i = 0
    while count - i > 1:
        some = keys[i], keys[i + 1], keys[i + 2], keys[i + 3]
        start = _skipped(beam, row, capacity, min(min(some[0], some[1]), min(some[2], some[3])))
        _push(beam, row, start, capacity, some)
        i += TOGETHER
    if i < count:
        insert(beam, row, capacity, keys[i])


@jit(is_inlined=True)
def _merge(beam, row, capacity, keys, first, stop):
    """Sort keys[first:stop], a few, and insert them; every slot is moved at most once."""
    for i in range(first + 1, stop):
        key, j = keys[i], i
        while j > first and keys[j - 1] > key:
            keys[j] = keys[j - 1]
            j -= 1
        keys[j] = key
    end = np.int64(capacity)
    for i in range(stop - 1, first - 1, -1):
        place, by = _smaller(beam, row, end, keys[i]), i - first + 1
        stays = min(end, capacity - by)
        if place < stays:
            _move(beam, row, place, place + by, stays - place)
        if place + by <= capacity:
            beam[row, place + by - 1] = keys[i]
        end = place


@jit(is_inlined=True)
def _smaller(beam, row, end, key):
    """How many keys of the sorted `beam[row, :end]` are smaller."""
    count, left = np.int64(0), np.int64(end)
    while left > 1:  # no branch: a conditional move
        half = left >> 1
        count += half if beam[row, count + half - 1] < key else np.int64(0)
        left -= half
    if left:
        count += beam[row, count] < key
    return count


@jit(is_inlined=True)
def _skipped(beam, row, capacity, key):
    """How many slots hold smaller keys for sure: STRIDE, two of them, ..."""
    start = 0
    while start + STRIDE < capacity and beam[row, start + STRIDE - 1] < key:
        start += STRIDE
    return start


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
