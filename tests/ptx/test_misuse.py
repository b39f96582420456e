"""What the executor holds against a kernel: each misuse planted, and beside it the right way."""

import pytest

import ptx

if ptx.missing():
    pytest.skip(ptx.missing(), allow_module_level=True)

import numpy as np
from emulator import KernelError

from ptx.snippets import SHARED_BYTES, execute, library

STORE = "cvt.u32.u64 %r0, %in0; st.shared.u32 [%own], %r0;"
NEIGHBOUR = "xor.b32 %r1, %thread, 1; shl.b32 %r1, %r1, 2; add.s32 %r1, %r1, %base;"
NEIGHBOUR += "ld.shared.u32 %r2, [%r1];"
OTHER_WARP = NEIGHBOUR.replace("%thread, 1", "%thread, 32")
RESULT_OF_FIRST = "sub.s64 %d0, %result, %offset;"
READ_FIRST = f"{RESULT_OF_FIRST} ld.global.u64 %d1, [%d0];"
LANE = "and.b32 %r9, %thread, 31;"
FIRST_HALF = f"{LANE} setp.lt.u32 %p0, %r9, 16;"

# words: the wrong instructions, and the right ones (threads of a block: 64)
MISUSES = {
    "global load out of bounds": (
        "ld.global.u64 %d0, [%at0+8];",
        "ld.global.u64 %d0, [%at0];",
    ),
    "global load out of bounds (before)": (
        "ld.global.u64 %d0, [%at0+-8];",
        "setp.gt.u32 %p0, %thread, 0; @%p0 ld.global.u64 %d0, [%at0+-8];",
    ),
    "global store out of bounds": (
        "st.global.u64 [%result+16], %in0;",
        "st.global.u64 [%result+8], %in0;",
    ),
    "store to read-only memory": (
        "st.global.u64 [%at0], %in0;",
        "st.global.u64 [%result], %in0;",
    ),
    "misaligned global access": (
        "ld.global.u64 %d0, [%at0+4];",
        "ld.global.u32 %r0, [%at0+4];",
    ),
    "misaligned global access (of a vector)": (
        "setp.eq.u32 %p0, %thread, 1; @%p0 ld.global.nc.v2.u64 {%d0, %d1}, [%at0];",
        "setp.eq.u32 %p0, %thread, 2; @%p0 ld.global.nc.v2.u64 {%d0, %d1}, [%at0];",
    ),
    "a non-coherent load of memory that the kernel writes": (
        "st.global.u64 [%result], %in0; ld.global.nc.u64 %d0, [%result];",
        "st.global.u64 [%result], %in0; ld.global.u64 %d0, [%result];",
    ),
    "shared access out of bounds": (
        f"st.shared.u32 [%own+{SHARED_BYTES - 63 * 4}], %r9;",
        f"mov.u32 %r9, 1; st.shared.u32 [%own+{SHARED_BYTES - 64 * 4}], %r9;",
    ),
    "shared access out of bounds (before)": (
        "mov.u32 %r9, 1; st.shared.u32 [%own+-4], %r9;",
        "mov.u32 %r9, 1; st.shared.u32 [%own], %r9;",
    ),
    "misaligned shared access": (
        "setp.eq.u32 %p0, %thread, 1; @%p0 st.shared.u64 [%own], %in0;",
        "setp.eq.u32 %p0, %thread, 2; @%p0 st.shared.u64 [%own], %in0;",
    ),
    "shared memory is read that was never written": (
        f"{STORE} ld.shared.u32 %r1, [%own+256];",
        f"{STORE} ld.shared.u32 %r1, [%own];",
    ),
    "an undefined register decides": (
        "setp.eq.u32 %p0, %never, 0; @%p0 bra $A; mov.u64 %out0, 1; $A:",
        "selp.u32 %r0, %never, 1, %p1; add.s32 %r0, %never, 1;",  # nobody looks
    ),
    "an undefined register decides (a vote)": (
        "vote.sync.ballot.b32 %r0, %p1, -1;",
        "setp.eq.u32 %p1, %thread, 0; vote.sync.ballot.b32 %r0, %p1, -1;",
    ),
    "an undefined address, or value stored": (
        "cvt.u64.u32 %out0, %never;",
        "setp.eq.u32 %p0, 1, 1; selp.u32 %r0, 7, %never, %p0; cvt.u64.u32 %out0, %r0;",
    ),
    "an undefined address, or value stored (of memory never written)": (
        f"{STORE} bar.warp.sync -1; ld.shared.u32 %r1, [%own+256]; cvt.u64.u32 %out0, %r1;",
        f"{STORE} bar.warp.sync -1; ld.shared.u32 %r1, [%own]; cvt.u64.u32 %out0, %r1;",
    ),
    "an undefined address, or value stored (by a shuffle)": (
        "shfl.sync.idx.b32 %r0, %never, 3, 31, -1; cvt.u64.u32 %out0, %r0;",
        "shfl.sync.idx.b32 %r0, %thread, 3, 31, -1; cvt.u64.u32 %out0, %r0;",
    ),
    "race: read after write": (
        f"{STORE} {NEIGHBOUR}",
        f"{STORE} bar.warp.sync -1; {NEIGHBOUR}",
    ),
    "race: read after write (of warps)": (
        f"{STORE} bar.warp.sync -1; {OTHER_WARP}",
        f"{STORE} bar.sync 0; {OTHER_WARP}",
    ),
    "race: write after read": (
        f"{STORE} bar.warp.sync -1; {NEIGHBOUR} st.shared.u32 [%own], %r2;",
        f"{STORE} bar.warp.sync -1; {NEIGHBOUR} bar.warp.sync -1; st.shared.u32 [%own], %r2;",
    ),
    "race: write after read (of warps)": (
        f"{STORE} bar.sync 0; {OTHER_WARP} bar.warp.sync -1; st.shared.u32 [%own], %r2;",
        f"{STORE} bar.sync 0; {OTHER_WARP} bar.sync 0; st.shared.u32 [%own], %r2;",
    ),
    "race: read after write (of global memory)": (
        f"st.global.u64 [%result], %in0; bar.warp.sync -1; {READ_FIRST}",
        f"st.global.u64 [%result], %in0; bar.sync 0; {READ_FIRST} bar.sync 0;",
    ),
    "race: write after write (one is an atomic)": (
        f"{RESULT_OF_FIRST} st.global.u32 [%result], %thread; atom.global.add.u32 %r0, [%d0], 1;",
        f"{RESULT_OF_FIRST} atom.global.add.u32 %r0, [%d0], 1; bar.sync 0;"
        "st.global.u32 [%result], %thread;",
    ),
    "race: write after write": (
        "mov.u32 %r0, 7; st.shared.u32 [%base], %r0;",
        "mov.u32 %r0, 7; setp.eq.u32 %p0, %thread, 9; @%p0 st.shared.u32 [%base], %r0;",
    ),
    "race: write after write (a shuffle is no barrier)": (
        f"{STORE} shfl.sync.idx.b32 %r1, %r0, 0, 31, -1; xor.b32 %r2, %own, 4;"
        "st.shared.u32 [%r2], %r0;",
        f"{STORE} bar.warp.sync -1; xor.b32 %r2, %own, 4; st.shared.u32 [%r2], %r0;",
    ),
    "deadlock": (  # lanes of one mask in different *.sync
        f"{FIRST_HALF} @%p0 bra $A; bar.warp.sync -1; bra $B;"
        "$A: vote.sync.ballot.b32 %r0, %p0, -1; $B:",
        f"{FIRST_HALF} @%p0 bra $A; bar.warp.sync 0xffff0000; bra $B;"
        "$A: bar.warp.sync 0x0000ffff; $B: bar.warp.sync -1;",
    ),
    "deadlock (a lane waits in bar.sync)": (
        "setp.eq.u32 %p0, %thread, 3; @%p0 bra $A; bar.warp.sync -1; $A: bar.sync 0;",
        "setp.eq.u32 %p0, %thread, 3; @%p0 bra $A; $A: bar.warp.sync -1; bar.sync 0;",
    ),
    "a *.sync by a lane outside its own mask": (
        "bar.warp.sync 0x7fffffff;",
        f"{LANE} setp.lt.u32 %p0, %r9, 31; @%p0 bar.warp.sync 0x7fffffff;",
    ),
    "a *.sync with different masks": (
        f"{FIRST_HALF} selp.b32 %r0, -1, 0xffff0000, %p0; bar.warp.sync %r0;",
        "mov.u32 %r0, -1; bar.warp.sync %r0;",
    ),
    "a shuffle from a lane that takes no part": (
        f"{FIRST_HALF} @%p0 shfl.sync.idx.b32 %r0, %thread, 20, 31, 0x0000ffff;",
        f"{FIRST_HALF} @%p0 shfl.sync.idx.b32 %r0, %thread, 11, 31, 0x0000ffff;",
    ),
    "a shuffle from a lane that takes no part (it has ended)": (
        f"{LANE} setp.eq.u32 %p0, %r9, 5; @%p0 bra $END;"
        "shfl.sync.idx.b32 %r0, %thread, 5, 31, -1; $END: @%p0 ret;",
        f"{LANE} setp.eq.u32 %p0, %r9, 5; @%p0 bra $END;"
        "shfl.sync.idx.b32 %r0, %thread, 6, 31, -33; $END: @%p0 ret;",
    ),
    "bar.sync in a block of which a warp has ended": (
        "setp.gt.u32 %p0, %thread, 31; @%p0 ret; bar.sync 0;",
        "bar.sync 0; setp.gt.u32 %p0, %thread, 31; @%p0 ret;",
    ),
}


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("words", MISUSES)
def test_misuse_is_told(words, seed) -> None:
    wrong, right = MISUSES[words]
    with pytest.raises(KernelError) as said:
        execute(wrong, np.arange(64), threads=64, seed=seed)
    assert words.partition(" (")[0] in str(said.value)
    execute(right, np.arange(64), threads=64, seed=seed)


def test_where_and_how_often_is_told() -> None:
    body = """setp.lt.u32 %p0, %thread, 3;
        .loc 1 77 5
        @%p0 st.shared.u32 [%base], %thread;"""
    with pytest.raises(KernelError, match=r"race: write after write \(2 times\): @%p0 st.shared"):
        execute(body)


def test_a_kernel_without_end_is_ended(monkeypatch) -> None:
    monkeypatch.setattr("ptx.launches.STEPS_LIMIT", 1000)
    with pytest.raises(KernelError, match="more steps than the limit"):
        execute("$A: bra $A;")


# --- what a profile counts ------------------------------------------------------------------------


def profile_of(body: str, text: str) -> tuple[float, float, float]:
    """Of the instruction that begins with `text`: executions, lanes, sectors or wavefronts."""
    execute(body)
    made = library(body).profile
    (i,) = (i for i, one in enumerate(made.program.text) if one.startswith(text))
    return int(made.executions[i]), int(made.lanes[i]), int(made.units[i])


def shared_at(stride: int, kind: str = "u32", target: str = "%r0") -> str:
    """Every lane writes, then reads, at a multiple of `stride` bytes, beginning anew at 512."""
    return f"""mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0;
        st.shared.v4.u32 [%r9], {{%r1, %r2, %r3, %r4}}; bar.warp.sync -1;
        mul.lo.s32 %r5, %thread, {stride}; and.b32 %r5, %r5, {SHARED_BYTES - 1};
        add.s32 %r5, %r5, %base; ld.shared.{kind} {target}, [%r5];"""


@pytest.mark.parametrize(
    ("stride", "kind", "wavefronts"),
    [
        (4, "u32", 1),
        (0, "u32", 1),
        (8, "u32", 2),
        (128, "u32", 4),
        (8, "v2.u32", 2),
        (0, "v4.u32", 4),
        (16, "v4.u32", 4),
        (32, "v4.u32", 8),
        (64, "v4.u32", 16),
    ],
)
def test_wavefronts(stride, kind, wavefronts) -> None:
    """512 bytes have four rows of 32 banks; of a row one word a bank is read at once."""
    target = {"u32": "%r0", "v2.u32": "{%r0, %r6}", "v4.u32": "{%r0, %r6, %r7, %r8}"}[kind]
    body = "shl.b32 %r9, %thread, 4; add.s32 %r9, %r9, %base;" + shared_at(stride, kind, target)
    assert profile_of(body, "ld.shared") == (1, 32, wavefronts)


@pytest.mark.parametrize(
    ("stride", "sectors"), [(0, 1), (1, 1), (2, 2), (4, 4), (8, 4), (32, 4), (64, 2)]
)
def test_sectors(stride, sectors) -> None:
    """Of the first 128 bytes of an array, the addresses beginning anew behind them."""
    body = f"""mul.wide.u32 %d1, %thread, 8; sub.s64 %d0, %at0, %d1;
        mul.wide.u32 %d1, %thread, {stride}; and.b64 %d1, %d1, 127; add.s64 %d0, %d0, %d1;
        ld.global.u8 %r0, [%d0];"""
    assert profile_of(body, "ld.global.u8") == (1, 32, sectors)


def test_lanes_that_part_are_counted_apart() -> None:
    body = f"{FIRST_HALF} @%p0 bra $A; add.s64 %out0, %in0, 1; bra $B; $A: sub.s64 %out0, %in0, 1;"
    body += "$B: add.s64 %out1, %in0, 2;"
    assert profile_of(body, "sub.s64 %out0, %in0, 1")[:2] == (1, 16)
    assert profile_of(body, "add.s64 %out0, %in0, 1")[:2] == (1, 16)
    assert profile_of(body, "add.s64 %out1, %in0, 2")[:2] == (1, 32)  # together again
