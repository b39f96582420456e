"""What the PTX ISA says of each arithmetic instruction, in slow Python: bits in, bits out."""

import math
import re
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np

BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "f16": 16}
BITS |= {f"{kind}{bits}": bits for kind in "usbf" for bits in (16, 32, 64)}
FLOATS = {"f16": "e", "f32": "f", "f64": "d"}
UNSIGNED = {"f16": "H", "f32": "I", "f64": "Q"}


def of_bits(bits: int, kind: str):
    """The number that the low bits of a register are."""
    bits %= 2 ** BITS[kind]
    if kind in FLOATS:
        value = struct.unpack(f"<{FLOATS[kind]}", struct.pack(f"<{UNSIGNED[kind]}", bits))[0]
        return np.float64(value) if kind == "f64" else np.float32(value)
    return bits - 2 ** BITS[kind] if kind[0] == "s" and bits >> BITS[kind] - 1 else bits


def to_bits(value, kind: str) -> int:
    if kind == "f32" and math.isnan(value):
        return 0x7FFFFFFF
    if kind in FLOATS:
        return struct.unpack(f"<{UNSIGNED[kind]}", struct.pack(f"<{FLOATS[kind]}", value))[0]
    return int(value) % 2 ** BITS[kind]


def flushed(value):
    if isinstance(value, np.float32) and 0 < abs(value) < np.float32(2.0**-126):
        return np.copysign(np.float32(0), value)
    return value


# --- integers -------------------------------------------------------------------------------------


def bit(value: int, i: int) -> int:
    return value >> i & 1


def from_bits(bits) -> int:
    return sum(one << i for i, one in enumerate(bits))


def bfi(bits: int, a: int, b: int, c: int, d: int) -> int:
    found = [bit(b, i) for i in range(bits)]
    position, length = c & 255, d & 255
    for i in range(length):
        if position + i < bits:
            found[position + i] = bit(a, i)
    return from_bits(found)


def bfe(is_signed: bool, a: int, b: int, c: int) -> int:
    position, length = b & 255, c & 255
    sign = bit(a, min(position + length - 1, 31)) if is_signed and length else 0
    inside = [i < length and position + i < 32 for i in range(32)]
    return from_bits(bit(a, position + i) if inside[i] else sign for i in range(32))


def lop3(a: int, b: int, c: int, table: int) -> int:
    return from_bits(bit(table, bit(a, i) * 4 + bit(b, i) * 2 + bit(c, i)) for i in range(32))


def prmt(a: int, b: int, c: int) -> int:
    source = struct.pack("<II", a, b)
    found = []
    for i in range(4):
        selector = c >> 4 * i & 15
        byte = source[selector & 7]
        found.append((255 if byte >> 7 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(found), "little")


def shf(mode: str, a: int, b: int, c: int) -> int:
    direction, kind = mode.split(".")
    by = c & 31 if kind == "wrap" else min(c, 32)
    if direction == "l":
        return (b << by | a >> 32 - by) % 2**32
    return (b << 32 - by | a >> by) % 2**32


def dp4a(kind: str, a: int, b: int, c: int) -> int:
    code = "4b" if kind == "s" else "4B"
    pairs = zip(*(struct.unpack(code, struct.pack("<I", x)) for x in (a, b)), strict=True)
    return c + sum(x * y for x, y in pairs)


def highest(value: int) -> int:
    return value.bit_length() - 1


INTEGERS: dict[str, Callable] = {  # of a type; `bits` are its own
    "mov": lambda bits, a: a,
    "add": lambda bits, a, b: a + b,
    "sub": lambda bits, a, b: a - b,
    "mul.lo": lambda bits, a, b: a * b,
    "mul.hi": lambda bits, a, b: a * b >> bits,
    "mul.wide": lambda bits, a, b: a * b,
    "mad.lo": lambda bits, a, b, c: a * b + c,
    "mad.wide": lambda bits, a, b, c: a * b + c,
    "neg": lambda bits, a: -a,
    "abs": lambda bits, a: abs(a),
    "min": lambda bits, a, b: min(a, b),
    "max": lambda bits, a, b: max(a, b),
    "and": lambda bits, a, b: a & b,
    "or": lambda bits, a, b: a | b,
    "xor": lambda bits, a, b: a ^ b,
    "not": lambda bits, a: 2**bits - 1 - a,
    "shl": lambda bits, a, b: a << min(b, bits),
    "shr": lambda bits, a, b: a >> min(b, bits),
    "popc": lambda bits, a: a.bit_count(),
    "clz": lambda bits, a: bits - 1 - highest(a),
    "bfind": lambda bits, a: highest(a),
    "bfind.shiftamt": lambda bits, a: bits - 1 - highest(a) if a else -1,
    "brev": lambda bits, a: int(f"{a:0{bits}b}"[::-1], 2),
    "bfi": bfi,
    "lop3": lambda bits, *given: lop3(*given),
    "prmt": lambda bits, *given: prmt(*given),
    "selp": lambda bits, a, b, p: a if p else b,
    "pack": lambda bits, a, b: a | b << bits // 2,
    "unpack": lambda bits, a: (a % 2 ** (bits // 2), a >> bits // 2),
    "cvta.global": lambda bits, a: a,
    "cvta.to.global": lambda bits, a: a,
}

# --- floats ---------------------------------------------------------------------------------------


def fma(a, b, c):
    """a * b + c, rounded once."""
    if not all(map(np.isfinite, (a, b, c))):
        return a * b + c
    product = Fraction(float(a)) * Fraction(float(b))
    exact = product + Fraction(float(c))
    if exact == 0:
        is_minus = product == 0 and np.signbit(c) and np.signbit(a) != np.signbit(b)
        return type(a)(-0.0 if is_minus else 0.0)
    return rounded(exact, type(a))


def rounded(exact: Fraction, kind):
    """The nearest number; of two the even one."""
    near = kind(_float(exact))
    steps = (np.nextafter(near, kind(-np.inf)), near, np.nextafter(near, kind(np.inf)))
    finite = [x for x in steps if np.isfinite(x)]
    if len(finite) < 3 and abs(exact) >= _OVERFLOW[kind]:
        return kind(np.inf if exact > 0 else -np.inf)

    def order(x) -> tuple:
        bits = to_bits(x, "f32" if kind is np.float32 else "f64")
        return abs(Fraction(float(x)) - exact), bits & 1

    nearest = min(finite, key=order)
    return np.copysign(nearest, kind(-1 if exact < 0 else 1))


def _float(exact: Fraction) -> float:
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


_OVERFLOW = {  # from here on it is infinite
    np.float32: Fraction(2**128 - 2**103),
    np.float64: Fraction(2**1024 - 2**970),
}


def extreme(choose: Callable, a, b):
    """The smaller or larger; a NaN loses, and -0 is smaller than 0."""
    numbers = [x for x in (a, b) if not np.isnan(x)]
    return choose(numbers, key=lambda x: (x, not np.signbit(x)), default=np.float32(np.nan))


NUMBERS: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": fma,
    "sqrt": np.sqrt,
    "min": lambda a, b: extreme(min, a, b),
    "max": lambda a, b: extreme(max, a, b),
    "abs": abs,
    "neg": lambda a: -a,
}


def converted(value, to: str, rounding: str):
    if rounding == "rni":
        return np.rint(value)
    if rounding == "rzi":  # to s32
        return 0 if math.isnan(value) else int(min(max(float(value), -(2.0**31)), 2.0**31 - 1))
    kinds = {"f32": np.float32, "f64": np.float64}
    return kinds[to](value) if to in kinds else value


# --- comparisons ----------------------------------------------------------------------------------

COMPARISONS: dict[str, Callable] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def compared(name: str, a, b) -> bool:
    is_nan = a != a or b != b
    if name == "nan":
        return is_nan
    if name == "num":
        return not is_nan
    if is_nan:
        return name.endswith("u")
    return COMPARISONS[name.removesuffix("u")](a, b)


# --- all ------------------------------------------------------------------------------------------


def define(mnemonic: str, given: list[int]) -> list[int]:
    """Bits of the targets, of the bits of the sources."""
    is_flushed = ".ftz" in mnemonic
    words = mnemonic.replace(".ftz", "").split(".")
    kinds = [word for word in words if word in BITS]
    stem = ".".join(word for word in words if word not in BITS)
    if stem in ("mov", "selp"):  # no arithmetic: a NaN keeps its bits
        kinds = [f"b{BITS[kind]}" if kind in FLOATS else kind for kind in kinds]
    sources, target = [kinds[-1]] * len(given), kinds[0]
    if stem in ("shl", "shr"):
        sources[1] = "u32"
    elif stem in ("mul.wide", "mad.wide"):
        target = f"{kinds[0][0]}{2 * BITS[kinds[0]]}"
        sources[2:] = [target] * len(sources[2:])
    elif stem == "bfi":
        sources[2:] = ["u32", "u32"]
    elif stem in ("selp", "setp"):
        sources[2:] = ["pred"] * len(sources[2:])
    elif stem in ("popc", "clz", "bfind"):
        target = "u32"
    elif stem == "pack":
        sources = [f"b{BITS[target] // 2}"] * 2
    elif stem == "unpack":
        target = f"b{BITS[target] // 2}"
    elif stem == "bfe":
        sources = [kinds[0], "u32", "u32"]
    comparison = re.fullmatch(r"setp\.(\w+)", stem)
    if comparison:
        target = "pred"
    values = [of_bits(bits, kind) for bits, kind in zip(given, sources, strict=True)]
    if is_flushed:
        values = [flushed(value) for value in values]
    with np.errstate(all="ignore"):
        found = _found(stem, kinds, values, comparison)
    if is_flushed:
        found = flushed(found)
    results = found if isinstance(found, tuple) else (found,)
    return [to_bits(value, target) for value in results]


def _found(stem: str, kinds: list[str], values: list, comparison):
    if comparison:
        return compared(comparison[1], *values)
    name, *rest = stem.split(".")
    if name == "cvt":
        return converted(values[0], kinds[0], rest[0] if rest else "")
    if name == "shf":
        return shf(stem.removeprefix("shf."), *values)
    if name == "dp4a":
        return dp4a(kinds[0][0], *(value % 2**32 for value in values[:2]), values[2])
    if name == "bfe":
        return bfe(kinds[0] == "s32", values[0] % 2**32, *values[1:])
    if kinds[0] in FLOATS:
        return NUMBERS[name](*values)
    return INTEGERS[stem](BITS[kinds[0]], *values)
