"""A few instructions of PTX, run by every thread on numbers of its own."""

import numpy as np

import ptx

_HEAD = """.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry snippet(.param .align 8 .b8 snippet_param_0[40])
{
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %d<20>;
    .reg .b32 %thread, %own, %base, %never;
    .reg .b64 %in<4>, %at<4>, %out0, %out1, %result, %offset;
    ld.param.u64 %at0, [snippet_param_0]; ld.param.u64 %at1, [snippet_param_0+8];
    ld.param.u64 %at2, [snippet_param_0+16]; ld.param.u64 %at3, [snippet_param_0+24];
    ld.param.u64 %result, [snippet_param_0+32];
    mov.u32 %thread, %tid.x; mov.u32 %base, memory;
    shl.b32 %own, %thread, 2; add.s32 %own, %own, %base;
    mul.wide.u32 %offset, %thread, 8;
    add.s64 %at0, %at0, %offset; add.s64 %at1, %at1, %offset;
    add.s64 %at2, %at2, %offset; add.s64 %at3, %at3, %offset;
    ld.global.u64 %in0, [%at0]; ld.global.u64 %in1, [%at1];
    ld.global.u64 %in2, [%at2]; ld.global.u64 %in3, [%at3];
    mul.wide.u32 %offset, %thread, 16; add.s64 %result, %result, %offset;
    mov.u64 %out0, 0; mov.u64 %out1, 0;
"""
_TAIL = """
    st.global.u64 [%result], %out0; st.global.u64 [%result+8], %out1;
    ret;
}
"""
SHARED_BYTES = 512


def library(body: str) -> ptx.Library:
    """The instructions find up to four numbers in %in0 to %in3 and leave two in %out0 and %out1.

    Beside them: %thread; %at0 to %at3, the numbers' addresses; %base, which shared memory begins
    at, and %own, a word of it for each thread; %never, which nothing is written to; registers %p,
    %h, %r, %d.
    """
    return ptx.compile_text(_HEAD + body + _TAIL)


def execute(body: str, *given, threads: int = 32, seed: int | None = None) -> np.ndarray:
    """What the instructions make of numbers given by thread: uint64 (threads, 2)."""
    inputs = [np.zeros(threads, np.uint64) for _ in range(4)]
    for mine, numbers in zip(inputs, given, strict=False):
        mine[:] = numbers
    for mine in inputs:
        mine.flags.writeable = False
    out = np.full((threads, 2), 99, np.uint64)
    addresses = np.array([one.ctypes.data for one in (*inputs, out)], np.uint64)
    library(body).launch(
        (1,), (threads,), (addresses,), memory=[*inputs, out], shared_mem=SHARED_BYTES, seed=seed
    )
    return out
