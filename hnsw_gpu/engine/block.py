"""Keys of a block of rows at once (rule R5): a hop compares what it lists, no branch a neighbour.

Rows of codes are taken EIGHT at a time: their integer sums are turned into one vector, which goes
on as one distance does in `distance.py`, by the same operations, so to the same bits.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from hnsw_gpu.engine import distance as one
from hnsw_gpu.engine.distance import COMPILED, COSINE, F32, I32, I64, L2, distance
from hnsw_gpu.engine.keys import make_key

EIGHT = 8
FLOATS = ir.VectorType(F32, EIGHT)
INTS = ir.VectorType(I32, EIGHT)
LONGS = ir.VectorType(I64, EIGHT)


def write_keys(metric, queries, q, rows, ids, s, start, count, keys):
    """keys[:count] = keys (R1, R2) of rows ids[s, start : start + count]; compiled code only.

    ids[s] has EIGHT more places behind the last, all of them valid ids, and keys has as many, which
    may be written.
    """
    raise NotImplementedError("called from compiled code only")


@overload(write_keys, jit_options=COMPILED)
def _write_keys(metric, queries, q, rows, ids, s, start, count, keys):
    if rows.dtype in (types.int8, types.uint8):

        def code_keys(metric, queries, q, rows, ids, s, start, count, keys):
            for first in range(0, count, EIGHT):
                _eight_keys(metric, queries, q, rows, ids, s, start, first, keys)

        return code_keys

    def float_keys(metric, queries, q, rows, ids, s, start, count, keys):
        for j in range(count):
            node = np.int64(ids[s, start + j])
            keys[j] = make_key(distance(metric, queries, q, rows, node), node)

    return float_keys


@intrinsic
def _eight_keys(typingctx, metric, queries, q, rows, ids, s, start, first, keys):
    is_int4 = rows.dtype == types.uint8

    def codegen(context, builder, signature, arguments):
        metric, query_array, q, row_array, id_array, s, start, first, key_array = arguments
        query, query_bytes = one.row_pointer(context, builder, queries, query_array, q)
        id_row, _ = one.row_pointer(context, builder, ids, id_array, s)
        id_row = builder.gep(id_row, [builder.mul(builder.add(start, first), I64(4))])
        numbers = builder.load(builder.bitcast(id_row, INTS.as_pointer()), align=4)
        pointers = []
        for i in range(EIGHT):
            number = builder.sext(builder.extract_element(numbers, I32(i)), I64)
            pointer, row_bytes = one.row_pointer(context, builder, rows, row_array, number)
            pointers.append(pointer)
        codes = one.Codes(context, builder, is_int4)
        sums = one.code_sums(codes, query, pointers, row_bytes)
        dots = _turned(builder, [one.eight_lanes(builder, vectors) for vectors in sums])

        def of_query(element, place):
            """A value of the query's tail, in all lanes."""
            address = builder.gep(query, [builder.sub(query_bytes, I64(place))])
            value = builder.load(builder.bitcast(address, element.as_pointer()), align=1)
            vector = ir.VectorType(element, EIGHT)
            lane = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
            return one.shuffled(builder, lane, lane, [0] * EIGHT)

        def of_rows(element, place):
            """A value of each row's tail."""
            vector = ir.Constant(ir.VectorType(element, EIGHT), ir.Undefined)
            for i, pointer in enumerate(pointers):
                address = builder.gep(pointer, [builder.sub(row_bytes, I64(place))])
                value = builder.load(builder.bitcast(address, element.as_pointer()), align=1)
                vector = builder.insert_element(vector, value, I32(i))
            return vector

        if is_int4:
            dots = builder.sub(builder.add(dots, dots), of_query(I32, one.SUM_AT))
        elif codes.has_offset:
            dots = builder.sub(
                dots, builder.shl(of_rows(I32, one.SUM_AT), one.splat(I32(7), EIGHT))
            )
        values = builder.sitofp(dots, FLOATS)
        scales = builder.fmul(of_query(F32, one.SCALE_AT), of_rows(F32, one.SCALE_AT))
        result = cgutils.alloca_once(builder, FLOATS)
        is_l2 = builder.icmp_signed("==", metric, metric.type(L2))
        with builder.if_else(is_l2) as (then, otherwise):
            with then:
                norms = builder.fadd(of_query(F32, one.NORM_AT), of_rows(F32, one.NORM_AT))
                if is_int4:
                    twice = builder.fmul(one.splat(F32(-2), EIGHT), scales)
                    found = one.call(builder, "llvm.fma.v8f32", FLOATS, [twice, values, norms])
                else:
                    dot = builder.fmul(scales, values)
                    found = builder.fsub(norms, builder.fmul(one.splat(F32(2), EIGHT), dot))
                    zero = one.splat(F32(0), EIGHT)
                    found = builder.select(builder.fcmp_ordered(">", found, zero), found, zero)
                builder.store(found, result)
            with otherwise:
                is_cosine = builder.icmp_signed("==", metric, metric.type(COSINE))
                base = builder.select(is_cosine, one.splat(F32(1), EIGHT), one.splat(F32(0), EIGHT))
                if is_int4:
                    operands = [builder.fneg(scales), values, base]
                    found = one.call(builder, "llvm.fma.v8f32", FLOATS, operands)
                else:
                    found = builder.fsub(base, builder.fmul(scales, values))
                builder.store(found, result)
        bits = builder.bitcast(builder.load(result), INTS)
        sign = builder.ashr(bits, one.splat(I32(31), EIGHT))
        flip = builder.or_(sign, one.splat(I32(-(2**31)), EIGHT))
        high = builder.zext(builder.xor(bits, flip), LONGS)
        low = builder.zext(numbers, LONGS)
        made = builder.or_(
            builder.shl(high, one.splat(I64(32), EIGHT)), builder.shl(low, one.splat(I64(1), EIGHT))
        )
        data = context.make_array(keys)(context, builder, key_array).data
        place = builder.bitcast(builder.gep(data, [first]), LONGS.as_pointer())
        builder.store(made, place, align=8)
        return context.get_dummy_value()

    return types.void(metric, queries, q, rows, ids, s, start, first, keys), codegen


def _turned(builder, vectors):
    """int32 (8,): the sum of all lanes of each of eight vectors (8,)."""
    for pair in (1, 2, 4):
        low = [i for lane in range(0, EIGHT, 2 * pair) for i in _both(lane, pair)]
        vectors = [
            builder.add(
                one.shuffled(builder, a, b, low),
                one.shuffled(builder, a, b, [i + pair for i in low]),
            )
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _both(lane, pair):
    """Places of `pair` lanes of one vector and the same ones of the other."""
    own = range(lane, lane + pair)
    return [*own, *(EIGHT + i for i in own)]
