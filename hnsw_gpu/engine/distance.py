"""Distances between an encoded query and an encoded row (rule R1).

The order of summation depends only on (metric, dtype, dim): one loop over the row's blocks with
fixed accumulators (rule R11). Vectors are written as generic LLVM vectors, so that the compiler
picks what the processor has (AVX-512, AVX2, NEON) without changing the order or, thanks to
explicit fused multiply-adds, a bit. int8 uses `vpdpbusd` where the processor has it: an integer
sum has no order.

The slow version is `tests/reference.py`.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from hnsw_gpu.engine.halves import half_to_float

L2, IP, COSINE = 0, 1, 2

F32, I8, I16, I32, I64 = (
    ir.FloatType(),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
)
CACHE_LINE = 64
NO_REFCOUNT = {"_nrt": False}
TAIL_BYTES = 12  # end of an int8 row: float32 scale, float32 norm, int32 sum of codes
PREFETCH_LINES = 16  # of one row; the hardware prefetcher follows a longer one by itself


def _row_pointer(context, builder, array_type, array, index):
    """Pointer to the first byte of row `index` of a C-contiguous 2-D array, and the row's bytes."""
    data = context.make_array(array_type)(context, builder, array)
    _, columns = cgutils.unpack_tuple(builder, data.shape)
    row_bytes = builder.mul(columns, data.itemsize)
    base = builder.bitcast(data.data, I8.as_pointer())
    return builder.gep(base, [builder.mul(index, row_bytes)]), row_bytes


def _load(builder, pointer, offset, element, lanes):
    vector = ir.VectorType(element, lanes)
    address = builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())
    return builder.load(address, align=1)


def _call(builder, name, result, arguments):
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in arguments]), name
    )
    return builder.call(function, arguments)


def _lanes_sum(builder, vector):
    """Sum of a float vector's lanes, always folding the upper half onto the lower."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        low = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        high = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes, 2 * lanes)))
        undefined = ir.Constant(vector.type, ir.Undefined)
        vector = builder.fadd(
            builder.shuffle_vector(vector, undefined, low),
            builder.shuffle_vector(vector, undefined, high),
        )
    return builder.extract_element(vector, I32(0))


def _accumulate(builder, is_l2, query, row, total):
    """total + query * row, or total + (query - row)^2, each fused."""
    name = f"llvm.fma.v{row.type.count}f32"
    if is_l2:
        query = row = builder.fsub(query, row)
    return _call(builder, name, row.type, [query, row, total])


def _float_sum(context, builder, is_l2, query, row, row_bytes, is_half):
    """Sum over a row of 32-byte blocks: pairs of 16-lane accumulators, then 8 or 16 lanes a block.

    `query` points at float32, `row` at float32 or float16, both zero padded to whole blocks.
    """
    item = 2 if is_half else 4
    block = 32 // item  # elements of the row in one block
    zero = ir.Constant(F32, 0.0)
    wide, narrow = ir.VectorType(F32, 16), ir.VectorType(F32, block)

    def row_vector(offset, lanes):
        if not is_half:
            return _load(builder, row, offset, F32, lanes)
        return half_to_float(context, builder, _load(builder, row, offset, I16, lanes))

    def query_vector(offset, lanes):
        return _load(builder, query, builder.mul(offset, I64(4 // item)), F32, lanes)

    totals = [cgutils.alloca_once_value(builder, ir.Constant(wide, [zero] * 16)) for _ in range(2)]
    tail = cgutils.alloca_once_value(builder, ir.Constant(narrow, [zero] * block))
    step = 32 * item
    whole = builder.and_(row_bytes, I64(-step))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(step), I64) as (offset, _):
        for part, total in enumerate(totals):
            at = builder.add(offset, I64(part * 16 * item))
            value = _accumulate(
                builder, is_l2, query_vector(at, 16), row_vector(at, 16), builder.load(total)
            )
            builder.store(value, total)
    with cgutils.for_range_slice(builder, whole, row_bytes, I64(32), I64) as (offset, _):
        value = _accumulate(
            builder,
            is_l2,
            query_vector(offset, block),
            row_vector(offset, block),
            builder.load(tail),
        )
        builder.store(value, tail)
    wide_sum = _lanes_sum(builder, builder.fadd(*(builder.load(total) for total in totals)))
    return builder.fadd(wide_sum, _lanes_sum(builder, builder.load(tail)))


def _code_dot(context, builder, query, row, row_bytes):
    """int32 dot product of unsigned query codes and signed row codes, 32 bytes a block."""
    zero = ir.Constant(I32, 0)
    features = context.codegen().magic_tuple()[2]
    has_vnni = "+avx512vnni" in features and "+avx512vl" in features

    def add_block(offset, lanes, total):
        sums = ir.VectorType(I32, lanes // 4)
        q = _load(builder, query, offset, I8, lanes)
        r = _load(builder, row, offset, I8, lanes)
        if has_vnni:
            name = f"llvm.x86.avx512.vpdpbusd.{lanes * 8}"
            operands = [builder.load(total), builder.bitcast(q, sums), builder.bitcast(r, sums)]
            builder.store(_call(builder, name, sums, operands), total)
            return
        words = ir.VectorType(I32, lanes)
        products = builder.mul(builder.zext(q, words), builder.sext(r, words))
        # Even and odd products are added first: the pattern that becomes `pmaddwd`.
        for _ in range(2):
            lanes //= 2
            undefined = ir.Constant(products.type, ir.Undefined)
            even = ir.Constant(ir.VectorType(I32, lanes), list(range(0, 2 * lanes, 2)))
            odd = ir.Constant(ir.VectorType(I32, lanes), list(range(1, 2 * lanes, 2)))
            products = builder.add(
                builder.shuffle_vector(products, undefined, even),
                builder.shuffle_vector(products, undefined, odd),
            )
        builder.store(builder.add(builder.load(total), products), total)

    wide = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(I32, 16), [zero] * 16))
    tail = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(I32, 8), [zero] * 8))
    whole = builder.and_(row_bytes, I64(-64))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(64), I64) as (offset, _):
        add_block(offset, 64, wide)
    with cgutils.if_unlikely(builder, builder.icmp_signed("<", whole, row_bytes)):
        add_block(whole, 32, tail)
    sums = [
        _call(builder, f"llvm.vector.reduce.add.v{lanes}i32", I32, [builder.load(total)])
        for lanes, total in ((16, wide), (8, tail))
    ]
    return builder.add(*sums)


def _float_intrinsic(is_l2):
    """Intrinsic (queries, q, rows, i) -> float32: sum of squared differences, or of products."""

    @intrinsic
    def float_sum(typingctx, queries, q, rows, i):
        is_half = rows.dtype == types.uint16  # numba has no float16 arrays on the CPU

        def codegen(context, builder, signature, arguments):
            query, _ = _row_pointer(context, builder, queries, *arguments[:2])
            row, row_bytes = _row_pointer(context, builder, rows, *arguments[2:])
            return _float_sum(context, builder, is_l2, query, row, row_bytes, is_half)

        return types.float32(queries, types.int64, rows, types.int64), codegen

    return float_sum


_squares = _float_intrinsic(is_l2=True)
_products = _float_intrinsic(is_l2=False)


@intrinsic
def _codes(typingctx, queries, q, rows, i):
    """int32 dot product of query codes (offset 128) and row codes."""

    def codegen(context, builder, signature, arguments):
        query_array, q_index, row_array, row_index = arguments
        query, _ = _row_pointer(context, builder, queries, query_array, q_index)
        row, row_bytes = _row_pointer(context, builder, rows, row_array, row_index)
        return _code_dot(context, builder, query, row, row_bytes)

    return types.int32(queries, types.int64, rows, types.int64), codegen


@intrinsic
def prefetch_row(typingctx, rows, i):
    """Ask for the cache lines of row `i`, the first PREFETCH_LINES of them."""

    def codegen(context, builder, signature, arguments):
        pointer, row_bytes = _row_pointer(context, builder, rows, *arguments)

        def prefetch(offset):
            address = builder.gep(pointer, [offset])
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), [address, I32(0), I32(3), I32(1)])

        most = I64(PREFETCH_LINES * CACHE_LINE)
        is_short = builder.icmp_signed("<", row_bytes, most)
        end = builder.select(is_short, row_bytes, most)
        with cgutils.for_range_slice(builder, I64(0), end, I64(CACHE_LINE), I64) as (offset, _):
            prefetch(offset)
        prefetch(builder.sub(end, I64(1)))  # a row may begin in the middle of a line
        return context.get_dummy_value()

    return types.void(rows, types.int64), codegen


def _load_intrinsic(element, numba_type):
    """Intrinsic (array, i, offset) -> the `element` at byte `offset` of row `i`; I16 is a half."""

    @intrinsic
    def load(typingctx, array, i, offset):
        def codegen(context, builder, signature, arguments):
            pointer, _ = _row_pointer(context, builder, array, *arguments[:2])
            address = builder.gep(pointer, [arguments[2]])
            value = builder.load(builder.bitcast(address, element.as_pointer()), align=1)
            return half_to_float(context, builder, value) if element == I16 else value

        return numba_type(array, types.int64, types.int64), codegen

    return load


_float_at = _load_intrinsic(F32, types.float32)
_int_at = _load_intrinsic(I32, types.int32)
_half_at = _load_intrinsic(I16, types.float32)


def distance(metric, queries, q, rows, i):
    """float32 distance (R1) of encoded query `q` to encoded row `i`; compiled code only."""
    raise NotImplementedError("called from compiled code only")


@overload(distance, jit_options=NO_REFCOUNT)
def _distance(metric, queries, q, rows, i):
    if rows.dtype == types.int8:

        def int8_distance(metric, queries, q, rows, i):
            row_end, query_end = rows.shape[1], queries.shape[1]
            code_dot = _codes(queries, q, rows, i) - np.int32(128) * _int_at(rows, i, row_end - 4)
            scale = _float_at(queries, q, query_end - 12) * _float_at(rows, i, row_end - 12)
            dot = scale * np.float32(np.int32(code_dot))
            if metric != L2:
                return np.float32(metric == COSINE) - dot
            norms = _float_at(queries, q, query_end - 8) + _float_at(rows, i, row_end - 8)
            return max(np.float32(0), norms - np.float32(2) * dot)

        return int8_distance

    def float_distance(metric, queries, q, rows, i):
        if metric == L2:
            return _squares(queries, q, rows, i)
        return np.float32(metric == COSINE) - _products(queries, q, rows, i)

    return float_distance


def as_query(rows, i, queries, q):
    """Write encoded row `i` as encoded query `q`; compiled code only."""
    raise NotImplementedError("called from compiled code only")


@overload(as_query, jit_options=NO_REFCOUNT)
def _as_query(rows, i, queries, q):
    if rows.dtype == types.int8:

        def int8_as_query(rows, i, queries, q):
            codes = rows.shape[1] - TAIL_BYTES
            for j in range(codes):
                queries[q, j] = np.uint8(rows[i, j]) ^ np.uint8(128)
            tail = queries.shape[1] - TAIL_BYTES
            for j in range(codes, tail):  # what meets the row's tail counts nothing
                queries[q, j] = 0
            for j in range(TAIL_BYTES):
                queries[q, tail + j] = np.uint8(rows[i, codes + j])

        return int8_as_query

    if rows.dtype == types.uint16:

        def half_as_query(rows, i, queries, q):
            for j in range(rows.shape[1]):
                queries[q, j] = _half_at(rows, i, 2 * j)

        return half_as_query

    def float_as_query(rows, i, queries, q):
        for j in range(rows.shape[1]):
            queries[q, j] = rows[i, j]

    return float_as_query
