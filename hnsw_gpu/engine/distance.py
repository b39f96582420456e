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

from hnsw_gpu.engine.alignment import CACHE_LINE
from hnsw_gpu.engine.compiled import INNER, has_feature, jit
from hnsw_gpu.engine.halves import half_to_float

L2, IP, COSINE = 0, 1, 2

F32, I8, I16, I32, I64 = (
    ir.FloatType(),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
)
COMPILED = {"_nrt": False, **INNER}
CODES_AT_ONCE = 32  # bytes of a row, whose length is a multiple
TAIL_BYTES = 12  # end of a row of codes, or of a query for them
SCALE_AT, NORM_AT, SUM_AT = 12, 8, 4  # bytes from its end: float32, float32, int32 sum of codes
PREFETCH_LINES = 256  # of one row; those of longer ones would drive each other out


def row_pointer(context, builder, array_type, array, index):
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


def call(builder, name, result, arguments):
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
    return call(builder, name, row.type, [query, row, total])


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


class Codes:
    """How rows of integer codes meet queries of them, in the instructions of one processor.

    int8: unsigned query codes (offset 128) and signed row codes. int4: signed query codes, those
    that meet the low bits of a row before those that meet the high ones, and unsigned row codes.
    A sum of integers has no order: every way below gives the same.
    """

    def __init__(self, context, builder, is_int4):
        self.builder, self.is_int4 = builder, is_int4
        self.has_avx2 = has_feature(context, "avx2")
        is_wide = has_feature(context, "avx512vnni") and has_feature(context, "avx512vl")
        self.has_vnni = is_wide or has_feature(context, "avxvnni")
        # AVX2 multiplies 8 bits by 8 only where 2 * 127 * 127 fits 16 bits: the query's offset goes
        self.is_signed = self.has_avx2 and not self.has_vnni and not is_int4
        self.has_offset = not is_int4 and not self.is_signed  # in the sums: 128 each
        # bytes of a row that are taken at once; what is left is one block of 32
        self.lanes = 64 if is_wide or not self.has_avx2 else 32

    def queries(self, query, offset, row_bytes, lanes):
        """The query's codes that meet `lanes` bytes of a row at `offset`."""
        first = _load(self.builder, query, offset, I8, lanes)
        if self.is_signed:  # the code 0, without an offset, is what meets a row's tail
            is_code = self.builder.icmp_unsigned("!=", first, splat(I8(0), lanes))
            code = self.builder.xor(first, splat(I8(-128), lanes))
            return [self.builder.select(is_code, code, splat(I8(0), lanes))]
        if not self.is_int4:
            return [first]
        return [first, _load(self.builder, query, self.builder.add(offset, row_bytes), I8, lanes)]

    def add(self, total, row, offset, queries, lanes):
        """`total`, int32 (lanes / 4,), and the products of `lanes` bytes of a row and `queries`."""
        builder = self.builder
        codes = _load(builder, row, offset, I8, lanes)
        if self.is_signed:
            vector = codes.type
            absolute = call(builder, "llvm.x86.avx2.psign.b", vector, [codes, codes])
            turned = call(builder, "llvm.x86.avx2.psign.b", vector, [queries[0], codes])
            return self._products(total, absolute, turned, lanes)
        if not self.is_int4:
            return self._products(total, queries[0], codes, lanes)
        low = builder.and_(codes, splat(I8(15), lanes))
        high = builder.lshr(codes, splat(I8(4), lanes))
        total = self._products(total, low, queries[0], lanes)
        return self._products(total, high, queries[1], lanes)

    def _products(self, total, unsigned, signed, lanes):
        builder, sums = self.builder, total.type
        if self.has_vnni:
            name = f"llvm.x86.avx512.vpdpbusd.{lanes * 8}"
            operands = [total, builder.bitcast(unsigned, sums), builder.bitcast(signed, sums)]
            return call(builder, name, sums, operands)
        if self.has_avx2 and (self.is_int4 or self.is_signed):
            words = ir.VectorType(I16, 16)
            pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", words, [unsigned, signed])
            quads = call(builder, "llvm.x86.avx2.pmadd.wd", sums, [pairs, splat(I16(1), 16)])
            return builder.add(total, quads)
        words = ir.VectorType(I32, lanes)
        products = builder.mul(builder.zext(unsigned, words), builder.sext(signed, words))
        # Even and odd products are added first: the pattern that becomes `pmaddwd`.
        for _ in range(2):
            lanes //= 2
            products = builder.add(
                shuffled(builder, products, products, range(0, 2 * lanes, 2)),
                shuffled(builder, products, products, range(1, 2 * lanes, 2)),
            )
        return builder.add(total, products)


def splat(value, lanes):
    return ir.Constant(ir.VectorType(value.type, lanes), [value] * lanes)


def shuffled(builder, a, b, places):
    """The lanes of a, then of b, at `places`."""
    places = list(places)
    mask = ir.Constant(ir.VectorType(I32, len(places)), places)
    return builder.shuffle_vector(a, b, mask)


def code_sums(codes, query, rows, row_bytes):
    """Dot products of a query's codes and those of each of `rows` (pointers): int32 vectors.

    Each is two vectors, which are to be added up over all lanes: of 64-byte and of 32-byte blocks,
    or the latter alone.
    """
    builder = codes.builder
    widths = sorted({codes.lanes, 32}, reverse=True)
    totals = {
        lanes: [cgutils.alloca_once_value(builder, splat(I32(0), lanes // 4)) for _ in rows]
        for lanes in widths
    }

    def add_block(offset, lanes):
        queries = codes.queries(query, offset, row_bytes, lanes)
        for row, total in zip(rows, totals[lanes], strict=True):
            builder.store(codes.add(builder.load(total), row, offset, queries, lanes), total)

    whole = builder.and_(row_bytes, I64(-codes.lanes))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(codes.lanes), I64) as (offset, _):
        add_block(offset, codes.lanes)
    if codes.lanes != 32:
        with cgutils.if_unlikely(builder, builder.icmp_signed("<", whole, row_bytes)):
            add_block(whole, 32)
    return [[builder.load(totals[lanes][i]) for lanes in widths] for i in range(len(rows))]


def eight_lanes(builder, vectors):
    """int32 (8,) with the same sum over all lanes as `vectors`."""
    halves = []
    for vector in vectors:
        for start in range(0, vector.type.count, 8):
            halves.append(shuffled(builder, vector, vector, range(start, start + 8)))
    total = halves[0]
    for half in halves[1:]:
        total = builder.add(total, half)
    return total


def _float_intrinsic(is_l2):
    """Intrinsic (queries, q, rows, i) -> float32: sum of squared differences, or of products."""

    @intrinsic
    def float_sum(typingctx, queries, q, rows, i):
        is_half = rows.dtype == types.uint16  # numba has no float16 arrays on the CPU

        def codegen(context, builder, signature, arguments):
            query, _ = row_pointer(context, builder, queries, *arguments[:2])
            row, row_bytes = row_pointer(context, builder, rows, *arguments[2:])
            return _float_sum(context, builder, is_l2, query, row, row_bytes, is_half)

        return types.float32(queries, types.int64, rows, types.int64), codegen

    return float_sum


_squares = _float_intrinsic(is_l2=True)
_products = _float_intrinsic(is_l2=False)


@intrinsic
def _codes(typingctx, queries, q, rows, i):
    """int32 dot product of query codes and row codes (of int4, as they are stored)."""

    def codegen(context, builder, signature, arguments):
        query_array, q_index, row_array, row_index = arguments
        query, _ = row_pointer(context, builder, queries, query_array, q_index)
        row, row_bytes = row_pointer(context, builder, rows, row_array, row_index)
        codes = Codes(context, builder, rows.dtype == types.uint8)
        (sums,) = code_sums(codes, query, [row], row_bytes)
        total = eight_lanes(builder, sums)
        total = call(builder, "llvm.vector.reduce.add.v8i32", I32, [total])
        if not codes.has_offset:
            return total
        address = builder.gep(row, [builder.sub(row_bytes, I64(SUM_AT))])
        row_sum = builder.load(builder.bitcast(address, I32.as_pointer()), align=1)
        return builder.sub(total, builder.shl(row_sum, I32(7)))

    return types.int32(queries, types.int64, rows, types.int64), codegen


@intrinsic
def _fused(typingctx, a, b, c):
    """a * b + c, rounded once."""

    def codegen(context, builder, signature, arguments):
        return call(builder, "llvm.fma.f32", F32, list(arguments))

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def prefetch_row(typingctx, rows, i):
    """Ask for the cache lines of row `i`, the first PREFETCH_LINES of them.

    They come into the second cache: the first one waits for few lines at a time, and what it cannot
    take holds up the walk. A hop asks for a hundred.
    """

    def codegen(context, builder, signature, arguments):
        pointer, row_bytes = row_pointer(context, builder, rows, *arguments)
        read, second_cache, data = I32(0), I32(2), I32(1)

        def prefetch(offset):
            address = builder.gep(pointer, [offset])
            operands = [address, read, second_cache, data]
            call(builder, "llvm.prefetch.p0", ir.VoidType(), operands)

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
            pointer, _ = row_pointer(context, builder, array, *arguments[:2])
            address = builder.gep(pointer, [arguments[2]])
            value = builder.load(builder.bitcast(address, element.as_pointer()), align=1)
            return half_to_float(context, builder, value) if element == I16 else value

        return numba_type(array, types.int64, types.int64), codegen

    return load


def _store_intrinsic(element, numba_type):
    """Intrinsic (array, i, offset, value): write the `element` at byte `offset` of row `i`."""

    @intrinsic
    def store(typingctx, array, i, offset, value):
        def codegen(context, builder, signature, arguments):
            pointer, _ = row_pointer(context, builder, array, *arguments[:2])
            address = builder.gep(pointer, [arguments[2]])
            builder.store(arguments[3], builder.bitcast(address, element.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(array, types.int64, types.int64, numba_type), codegen

    return store


_store_float = _store_intrinsic(F32, types.float32)
_store_int = _store_intrinsic(I32, types.int32)
_float_at = _load_intrinsic(F32, types.float32)
_int_at = _load_intrinsic(I32, types.int32)
_half_at = _load_intrinsic(I16, types.float32)


@jit(is_inlined=True)
def distance(metric, queries, q, rows, i):
    """float32 distance (R1) of encoded query `q` to encoded row `i`."""
    return _distance(metric, queries, q, rows, i)


def _distance(metric, queries, q, rows, i):
    raise NotImplementedError("by dtype, below: compiled once, whoever calls")


@overload(_distance, jit_options=COMPILED)
def _distance_of_dtype(metric, queries, q, rows, i):
    if rows.dtype == types.int8:

        def int8_distance(metric, queries, q, rows, i):
            end, query_end = rows.shape[1], queries.shape[1]
            code_dot = _codes(queries, q, rows, i)
            scale = _float_at(queries, q, query_end - SCALE_AT) * _float_at(rows, i, end - SCALE_AT)
            dot = scale * np.float32(np.int32(code_dot))
            if metric != L2:
                return np.float32(metric == COSINE) - dot
            norms = _float_at(queries, q, query_end - NORM_AT) + _float_at(rows, i, end - NORM_AT)
            return max(np.float32(0), norms - np.float32(2) * dot)

        return int8_distance

    if rows.dtype == types.uint8:

        def int4_distance(metric, queries, q, rows, i):
            end, query_end = rows.shape[1], queries.shape[1]
            dot = np.int32(2) * _codes(queries, q, rows, i) - _int_at(
                queries, q, query_end - SUM_AT
            )
            dot = np.float32(np.int32(dot))
            scale = _float_at(queries, q, query_end - SCALE_AT) * _float_at(rows, i, end - SCALE_AT)
            if metric != L2:
                return _fused(-scale, dot, np.float32(metric == COSINE))
            norms = _float_at(queries, q, query_end - NORM_AT) + _float_at(rows, i, end - NORM_AT)
            return _fused(np.float32(-2) * scale, dot, norms)

        return int4_distance

    def float_distance(metric, queries, q, rows, i):
        if metric == L2:
            return _squares(queries, q, rows, i)
        return np.float32(metric == COSINE) - _products(queries, q, rows, i)

    return float_distance


@intrinsic
def _write_codes(typingctx, rows, i, queries, q):
    """Write the bytes of row `i` as a query's: of int8 the codes and 128; of int4 2 c - 15 of the
    codes c, those in low bits before those in high ones."""

    def codegen(context, builder, signature, arguments):
        row, row_bytes = row_pointer(context, builder, rows, *arguments[:2])
        query, _ = row_pointer(context, builder, queries, *arguments[2:])
        block = ir.VectorType(I8, CODES_AT_ONCE)

        def every(number):
            return ir.Constant(block, [I8(number)] * block.count)

        def write(codes, offset):
            address = builder.bitcast(builder.gep(query, [offset]), block.as_pointer())
            builder.store(codes, address, align=1)

        def odd(codes):
            return builder.sub(builder.shl(codes, every(1)), every(15))

        step = I64(block.count)
        with cgutils.for_range_slice(builder, I64(0), row_bytes, step, I64) as (offset, _):
            codes = _load(builder, row, offset, I8, block.count)
            if rows.dtype == types.int8:
                write(builder.xor(codes, every(-128)), offset)
            else:
                write(odd(builder.and_(codes, every(15))), offset)
                write(odd(builder.lshr(codes, every(4))), builder.add(row_bytes, offset))
        return context.get_dummy_value()

    return types.void(rows, types.int64, queries, types.int64), codegen


@jit(is_inlined=True)
def _write_zeros(queries, q, start, end):
    """From byte `start` to `end`, a multiple of four further on."""
    for offset in range(start, end, 4):
        _store_int(queries, q, offset, np.int32(0))


@jit(is_inner=True)
def as_query(rows, i, queries, q):
    """Write encoded row `i` as encoded query `q`."""
    _as_query(rows, i, queries, q)


def _as_query(rows, i, queries, q):
    raise NotImplementedError("by dtype, below: compiled once, whoever calls")


@overload(_as_query, jit_options=COMPILED)
def _as_query_of_dtype(rows, i, queries, q):
    if rows.dtype == types.int8:

        def int8_as_query(rows, i, queries, q):
            codes, tail = rows.shape[1] - TAIL_BYTES, queries.shape[1] - TAIL_BYTES
            _write_codes(rows, i, queries, q)
            _write_zeros(queries, q, codes, tail)  # what meets the row's tail counts nothing
            for offset in range(0, TAIL_BYTES, 4):
                _store_int(queries, q, tail + offset, _int_at(rows, i, codes + offset))

        return int8_as_query

    if rows.dtype == types.uint8:

        def int4_as_query(rows, i, queries, q):
            end, query_end = rows.shape[1], queries.shape[1]
            _write_codes(rows, i, queries, q)
            _write_zeros(queries, q, end - TAIL_BYTES, end)  # what meets no code meets a zero
            _write_zeros(queries, q, 2 * end - TAIL_BYTES, query_end - TAIL_BYTES)
            _store_float(queries, q, query_end - SCALE_AT, _float_at(rows, i, end - SCALE_AT))
            _store_float(queries, q, query_end - NORM_AT, _float_at(rows, i, end - NORM_AT))
            _store_int(
                queries, q, query_end - SUM_AT, np.int32(15) * _int_at(rows, i, end - SUM_AT)
            )

        return int4_as_query

    if rows.dtype == types.uint16:

        def half_as_query(rows, i, queries, q):
            for j in range(rows.shape[1]):
                queries[q, j] = _half_at(rows, i, 2 * j)

        return half_as_query

    def float_as_query(rows, i, queries, q):
        for j in range(rows.shape[1]):
            queries[q, j] = rows[i, j]

    return float_as_query
