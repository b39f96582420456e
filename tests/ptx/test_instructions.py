"""Every instruction that the executor knows, beside its definition."""

import zlib

import numpy as np
import pytest

import ptx

if ptx.missing():
    pytest.skip(ptx.missing(), allow_module_level=True)

from ptx.definitions import define
from ptx.executor_library import operations
from ptx.snippets import execute

SPECIAL = np.array(
    [
        *(0, 1, 2, 31, 32, 33, 63, 64, 255, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1),
        *(2**63, 2**64 - 1),
        *(0x3C00, 0x7C00, 0x7E00),  # fp16: 1, infinity, NaN
        *(0x3F800000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF),  # float32
        *(0x7F800000, 0xFF800000, 0x7FC00000),
        *(0x4F000000, 0xCF000000, 0x3F000000, 0x3FC00000, 0x40200000),  # 2^31, halves
        *(0x3FF0000000000000, 0x8000000000000000, 0x7FF0000000000000, 0x7FF8000000000000),
        *(0x47EFFFFFE0000000, 0x3810000000000000, 0x36A0000000000000),  # float32's ends
    ],
    np.uint64,
)


def drawn(rng: np.random.Generator, is_near: bool) -> np.ndarray:
    """32 numbers: any bits, special ones, small ones; near: float32 of similar size."""
    numbers = rng.integers(0, 2**64, 32, dtype=np.uint64)
    if is_near:
        exponent = rng.integers(120, 132, 32, dtype=np.uint64) << np.uint64(23)
        return (numbers & np.uint64(0x807FFFFF)) | exponent
    places = rng.permutation(32)
    numbers[places[:12]] = rng.choice(SPECIAL, 12)
    numbers[places[12:18]] %= np.uint64(70)
    return numbers


def snippet(mnemonic: str) -> str:
    """The instruction between moves from %in and to %out."""
    operation = operations()[mnemonic]
    lines, sources = [], []
    for i, width in enumerate(operation.sources):
        if width == "p":
            lines.append(f"and.b64 %d9, %in{i}, 1; setp.ne.u64 %p{i}, %d9, 0;")
        elif width == "w":
            lines.append(f"cvt.u32.u64 %r{i}, %in{i};")
        sources.append({"p": f"%p{i}", "w": f"%r{i}", "q": f"%in{i}"}[width])
    targets = [
        {"p": "%p8", "w": f"%r{8 + i}", "q": "%out0"}[w] for i, w in enumerate(operation.targets)
    ]
    name, first, second = mnemonic, ", ".join(targets), ", ".join(sources)
    if mnemonic.startswith(("pack", "unpack")):
        name = f"mov.{mnemonic.split('.')[1]}"
        first, second = (f"{{{x}}}" if "," in x else x for x in (first, second))
    lines.append(f"{name} {first}, {second};")
    for i, width in enumerate(operation.targets):
        if width == "p":
            lines.append("selp.u64 %out0, 1, 0, %p8;")
        elif width == "w":
            lines.append(f"cvt.u64.u32 %out{i}, %r{8 + i};")
    return "\n".join(lines)


@pytest.mark.parametrize("mnemonic", operations())
def test_arithmetic(mnemonic: str) -> None:
    rng = np.random.default_rng(zlib.crc32(mnemonic.encode()))
    operation = operations()[mnemonic]
    body = snippet(mnemonic)
    for turn in range(12):
        given = [drawn(rng, ".f32" in mnemonic and turn % 2 == 1) for _ in operation.sources]
        found = execute(body, *given)[:, : len(operation.targets)].tolist()
        wanted = [define(mnemonic, [int(x) for x in row]) for row in zip(*given, strict=True)]
        rows = [i for i in range(32) if found[i] != wanted[i]]
        assert not rows, [
            f"{mnemonic} of {[hex(x[i]) for x in given]}: {list(map(hex, found[i]))}, "
            f"defined {list(map(hex, wanted[i]))}"
            for i in rows[:3]
        ]


def test_every_half() -> None:
    halves = np.arange(2**16, dtype=np.uint64)
    body = "cvt.u32.u64 %r0, %in0; cvt.f32.f16 %r1, %r0; cvt.u64.u32 %out0, %r1;"
    found = np.concatenate([execute(body, part)[:, 0] for part in halves.reshape(-1, 32)])
    wanted = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found.astype(np.uint32).view(np.float32), wanted)


def test_unknown_instructions_are_refused() -> None:
    for text in (
        "sin.approx.f32 %r0, %r1;",
        "ld.global.weird.u32 %r0, [%at0];",
        "add.cc.u32 %r0, %r1, %r2;",
    ):
        with pytest.raises(NotImplementedError, match=text.split()[0]):
            execute(text)


# --- memory ---------------------------------------------------------------------------------------

LOADS = {"u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16}
LOADS |= {"u32": np.uint32, "s32": np.int32, "f32": np.uint32, "b32": np.uint32}


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("space", ["global", "global.nc"])
def test_loads_widen(kind, space) -> None:
    numbers = np.random.default_rng(1).integers(0, 2**64, 32, dtype=np.uint64)
    found = execute(f"ld.{space}.{kind} %r0, [%at0]; cvt.u64.u32 %out0, %r0;", numbers)[:, 0]
    own = numbers.view(LOADS[kind])[:: 8 // np.dtype(LOADS[kind]).itemsize]
    np.testing.assert_array_equal(found, own.astype(np.int32).view(np.uint32))
    found = execute(f"ld.{space}.{kind} %out0, [%at0];", numbers)[:, 0]
    np.testing.assert_array_equal(found, own.astype(np.int64).view(np.uint64))


def test_vectors_are_stored_and_loaded() -> None:
    numbers = np.arange(32, dtype=np.uint64) * 3 + 1
    body = """shl.b32 %r9, %thread, 4; add.s32 %r9, %r9, %base; cvt.u32.u64 %r0, %in0;
        add.s32 %r1, %r0, 1000; add.s32 %r2, %r0, 2000; add.s32 %r3, %r0, 3000;
        st.shared.v4.u32 [%r9], {%r0, %r1, %r2, %r3};
        ld.shared.v2.u64 {%d0, %d1}, [%r9]; ld.shared.u32 %r5, [%r9+8];
        mov.b64 {%r6, %r7}, %d0; sub.s32 %r6, %r7, %r6; cvt.u64.u32 %out0, %r6;
        cvt.u64.u32 %out1, %r5;"""
    found = execute(body, numbers)
    np.testing.assert_array_equal(found[:, 0], np.full(32, 1000))
    np.testing.assert_array_equal(found[:, 1], numbers + np.uint64(2000))


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_an_atomic_gives_each_lane_its_own(seed) -> None:
    body = """st.global.u64 [%result+8], %out1; bar.sync 0; sub.s64 %d0, %result, %offset;
        atom.global.add.u32 %r0, [%d0+8], 5; cvt.u64.u32 %out0, %r0;
        bar.sync 0; ld.global.u64 %out1, [%result+8];"""
    found = execute(body, threads=96, seed=seed)
    np.testing.assert_array_equal(np.sort(found[:, 0]), np.arange(96) * 5)
    assert found[0, 1] == 96 * 5
    assert seed is None or (np.diff(found[:, 0].astype(int)) < 0).any()


# --- lanes together -------------------------------------------------------------------------------


def shuffle_source(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """As the PTX ISA has it."""
    bval, cval, mask = b & 31, c & 31, c >> 8 & 31
    most, least = (lane & mask) | (cval & ~mask), lane & mask
    j, is_in_range = {
        "up": (lane - bval, lane - bval >= most),
        "down": (lane + bval, lane + bval <= most),
        "bfly": (lane ^ bval, lane ^ bval <= most),
        "idx": (least | (bval & ~mask), (least | (bval & ~mask)) <= most),
    }[mode]
    return (j if is_in_range else lane), is_in_range


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode, seed) -> None:
    values = np.random.default_rng(2).integers(0, 2**32, 32, dtype=np.uint64)
    for width in (32, 16, 8, 4, 1):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        for b in (0, 1, 4, 7, 16, 31):
            body = f"""cvt.u32.u64 %r0, %in0; shfl.sync.{mode}.b32 %r1|%p0, %r0, {b}, {clamp}, -1;
                cvt.u64.u32 %out0, %r1; selp.u64 %out1, 1, 0, %p0;"""
            found = execute(body, values, seed=seed).tolist()
            sources = [shuffle_source(mode, lane, b, clamp) for lane in range(32)]
            assert found == [[int(values[j]), int(is_so)] for j, is_so in sources]


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_votes_and_matches(seed) -> None:
    values = np.random.default_rng(3).integers(0, 5, 32, dtype=np.uint64)
    head = "cvt.u32.u64 %r0, %in0; setp.eq.u32 %p0, %r0, 3;"
    is_three = values == 3
    bits = int(sum(1 << int(i) for i in np.flatnonzero(is_three)))
    for text, wanted in (
        ("vote.sync.ballot.b32 %r1, %p0, -1;", [bits] * 32),
        ("vote.sync.ballot.b32 %r1, !%p0, -1;", [bits ^ 2**32 - 1] * 32),
        ("vote.sync.any.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1;", [1] * 32),
        ("vote.sync.all.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1;", [0] * 32),
        (
            "match.any.sync.b32 %r1, %r0, -1;",
            [sum(1 << j for j in range(32) if values[j] == one) for one in values],
        ),
    ):
        found = execute(f"{head} {text} cvt.u64.u32 %out0, %r1;", values, seed=seed)[:, 0]
        assert found.tolist() == wanted, text


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_halves_of_a_warp_vote_apart(seed) -> None:
    body = """setp.lt.u32 %p0, %thread, 16; @%p0 bra $LOW;
        vote.sync.ballot.b32 %r0, %p0, 0xffff0000; bra.uni $END;
        $LOW: vote.sync.ballot.b32 %r0, %p0, 0x0000ffff;
        $END: bar.warp.sync -1; cvt.u64.u32 %out0, %r0;"""
    assert execute(body, seed=seed)[:, 0].tolist() == [0xFFFF] * 16 + [0] * 16


# --- control --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_each_lane_turns_as_often_as_it_must(seed) -> None:
    """Steps of Collatz: lanes part, and come together again."""
    body = """mov.u64 %d0, %in0;
        $TURN: setp.eq.u64 %p0, %d0, 1; @%p0 bra $END;
        add.s64 %out0, %out0, 1; and.b64 %d1, %d0, 1; setp.eq.u64 %p1, %d1, 0;
        @%p1 shr.u64 %d0, %d0, 1;
        @!%p1 mad.lo.s64 %d0, %d0, 3, 1;
        bra $TURN; $END:"""

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    found = execute(body, np.arange(1, 97), threads=96, seed=seed)[:, 0]
    assert found.tolist() == [steps(n) for n in range(1, 97)]


@pytest.mark.parametrize("seed", [None, *range(8)])
def test_barriers_order_memory(seed) -> None:
    """Four warps write, wait, and read what the opposite thread wrote."""
    body = """cvt.u32.u64 %r0, %in0; st.shared.u32 [%own], %r0; bar.sync 0;
        xor.b32 %r1, %thread, 127; shl.b32 %r1, %r1, 2; add.s32 %r1, %r1, %base;
        ld.shared.u32 %r2, [%r1]; cvt.u64.u32 %out0, %r2;"""
    numbers = np.arange(128) * 7
    found = execute(body, numbers, threads=128, seed=seed)[:, 0]
    np.testing.assert_array_equal(found, numbers[::-1])
