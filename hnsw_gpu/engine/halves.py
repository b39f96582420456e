"""Half-precision numbers as float32, exactly, on processors with and without an instruction for it.

Without one LLVM would call a function of a C library that is not there, which ends the process.
"""

from llvmlite import ir

from hnsw_gpu.engine.compiled import has_feature

HALF = ir.HalfType()
SIGN, MAGNITUDE, SMALLEST_NORMAL, INFINITY = 0x8000, 0x7FFF, 0x0400, 0x7C00
SHIFT = 13  # a float32 has this many more bits of mantissa ...
REBIAS = (127 - 15) << 23  # ... and a larger exponent for the same number


def half_to_float(context, builder, bits):
    """float32 of a half's bits: a 16-bit integer, or a vector of them."""
    if _converts_halves(context):
        return builder.fpext(builder.bitcast(bits, _like(bits, HALF)), _like(bits, ir.FloatType()))

    def number(value):
        one = ir.IntType(32)(value)
        lanes = getattr(bits.type, "count", 0)
        return ir.Constant(integers, [one] * lanes) if lanes else one

    integers, floats = _like(bits, ir.IntType(32)), _like(bits, ir.FloatType())
    wide = builder.zext(bits, integers)
    magnitude = builder.and_(wide, number(MAGNITUDE))
    shifted = builder.shl(magnitude, number(SHIFT))
    normal = builder.add(shifted, number(REBIAS))
    endless = builder.add(normal, number(REBIAS))  # infinity and NaN: the largest exponent of both
    # 2^-14 and the mantissa below it, less 2^-14: no float32 on the way is subnormal (or flushed)
    least = number(REBIAS + (1 << 23))
    above = builder.bitcast(builder.add(shifted, least), floats)
    small = builder.fsub(above, builder.bitcast(least, floats))
    result = builder.select(
        builder.icmp_unsigned("<", magnitude, number(SMALLEST_NORMAL)),
        builder.bitcast(small, integers),
        builder.select(builder.icmp_unsigned("<", magnitude, number(INFINITY)), normal, endless),
    )
    sign = builder.shl(builder.and_(wide, number(SIGN)), number(16))
    return builder.bitcast(builder.or_(result, sign), floats)


def _converts_halves(context):
    triple = context.codegen().magic_tuple()[0]
    return triple.startswith(("aarch64", "arm64")) or has_feature(context, "f16c")


def _like(bits, element):
    lanes = getattr(bits.type, "count", 0)
    return ir.VectorType(element, lanes) if lanes else element
