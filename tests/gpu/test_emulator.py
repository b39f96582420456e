"""The emulator computes what CUDA defines, and refuses what CUDA does not.

The gates of the kernels' tests are only as good as this: every fault that one of them promises to
catch is planted here, and must be caught by name and line.
"""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import emulator
import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing()),
]

FULL = "0xffffffffu"


def needs(sanitizer: str):
    missing = emulator.missing(sanitizer)
    return pytest.mark.skipif(bool(missing), reason=missing)


@functools.cache
def kernel(
    body: str, parameters: str = "int* out", sanitizer: str | None = None, bounds: str = ""
) -> emulator.Library:
    """The kernel `trial` with this body, whose first line is line 4."""
    source = f"""#include <cuda_fp16.h>
extern "C" __global__ void {bounds}
trial({parameters}) {{
{body}
}}"""
    return emulator.compile("trial", {}, source=source, sanitizer=sanitizer)


def run(body: str, grid=1, block=32, shared_mem=0, seed=0, dtype=np.int32, **given) -> np.ndarray:
    """One number of each thread: what `body` assigns to `result`; `i` is the thread's number."""
    types = {np.int32: "int", np.uint32: "unsigned int", np.float32: "float"}
    types |= {np.uint64: "unsigned long long", np.int64: "long long", np.float64: "double"}
    out = np.zeros((grid, block), dtype)
    parameters = ", ".join(
        [f"{types[dtype]}* out"]
        + [f"const {types[array.dtype.type]}* {name}" for name, array in given.items()]
    )
    library = kernel(
        f"const int i = threadIdx.x; {types[dtype]} result = 0;\n{body}\n"
        "out[blockIdx.x * blockDim.x + i] = result;",
        parameters,
    )
    library.launch((grid,), (block,), (out, *given.values()), shared_mem, seed)
    return out[0] if grid == 1 else out


# --- collectives, beside plain Python ---

VALUES = {
    "int": np.arange(32, dtype=np.int32) * 7 - 99,
    "unsigned long long": (np.arange(32, dtype=np.uint64) << np.uint64(33)) + np.uint64(5),
    "float": np.linspace(-1, 1, 32, dtype=np.float32),
    "double": np.linspace(-1, 1, 32) ** 3,
}


@pytest.mark.parametrize("width", (1, 2, 8, 16, 32))
@pytest.mark.parametrize("type_name", VALUES)
def test_shuffles(type_name, width):
    """As the CUDA C++ programming guide defines them, with their segments of `width` lanes."""
    values = VALUES[type_name]
    lanes = np.arange(32)
    first, last = lanes // width * width, lanes // width * width + width - 1
    for amount in (0, 1, 3, 5, 8, 16, 31):
        up, down, across = lanes - amount, lanes + amount, lanes ^ amount
        expected = {
            "__shfl_sync": first + amount % width,
            "__shfl_up_sync": np.where(up >= first, up, lanes),
            "__shfl_down_sync": np.where(down <= last, down, lanes),
            "__shfl_xor_sync": np.where(across <= last, across, lanes),
        }
        for word, sources in expected.items():
            call = f"result = {word}({FULL}, x[i], numbers[0], numbers[1]);"
            numbers = np.array([amount, width], np.int32)
            got = run(call, dtype=values.dtype.type, x=values, numbers=numbers)
            np.testing.assert_array_equal(got, values[sources], f"{word} {amount}")


def test_shuffle_from_another_lane_each():
    sources = np.random.default_rng(1).integers(0, 32, 32).astype(np.int32)
    got = run(f"result = __shfl_sync({FULL}, 3 * i, source[i]);", source=sources)
    np.testing.assert_array_equal(got, 3 * sources)


def test_votes():
    flags = np.random.default_rng(2).integers(0, 2, 32).astype(np.int32)
    bits = sum(int(flag) << lane for lane, flag in enumerate(flags))
    ballot = run(f"result = __ballot_sync({FULL}, x[i]);", dtype=np.uint32, x=flags)
    assert (ballot == bits).all()
    for values in (flags, np.zeros(32, np.int32), np.full(32, 2, np.int32)):
        assert (run(f"result = __any_sync({FULL}, x[i]);", x=values) == values.any()).all()
        assert (run(f"result = __all_sync({FULL}, x[i]);", x=values) == values.all()).all()


@pytest.mark.parametrize("dtype", (np.int32, np.uint64))
def test_match(dtype):
    values = np.random.default_rng(3).integers(0, 5, 32).astype(dtype)
    call = f"result = (unsigned int)__match_any_sync({FULL}, x[i]);"
    expected = [sum(1 << j for j in range(32) if values[j] == value) for value in values]
    np.testing.assert_array_equal(run(call, dtype=np.uint64, x=values.astype(np.uint64)), expected)


def test_halves_of_a_warp_meet_apart():
    """Two groups of lanes in one collective, each with its own mask."""
    body = "const unsigned mask = i < 16 ? 0x0000ffffu : 0xffff0000u;"
    ballot = run(f"{body} result = __ballot_sync(mask, i % 3 == 0);", dtype=np.uint32)
    every_third = sum(1 << i for i in range(0, 32, 3))
    np.testing.assert_array_equal(
        ballot, [every_third & 0xFFFF] * 16 + [every_third & ~0xFFFF] * 16
    )


def test_a_diverged_warp_meets_again():
    body = f"""
    for (int turn = 0; turn < i; turn++) result += turn;
    __syncwarp({FULL});
    if (i < 8) result += __shfl_sync(0xffu, result, 7);
    result = __shfl_sync({FULL}, result, 31 - i);"""
    sums = [i * (i - 1) // 2 for i in range(32)]
    expected = [value + sums[7] * (i < 8) for i, value in enumerate(sums)][::-1]
    np.testing.assert_array_equal(run(body), expected)


# --- arithmetic, beside numpy ---

WORDS = np.array([0, 1, 2, 3, 5, 0x80, 0xF0F0F0F0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)


def per_word(expression: str, dtype=np.int32) -> list[int]:
    return run(f"result = {expression};", block=len(WORDS), dtype=dtype, x=WORDS).tolist()


def test_bits():
    words = [int(word) for word in WORDS]
    assert per_word("__popc(x[i])") == [word.bit_count() for word in words]
    assert per_word("__popcll(x[i] * 0x100000001ull)") == [2 * word.bit_count() for word in words]
    assert per_word("__ffs(x[i])") == [(word & -word).bit_length() for word in words]
    high = "static_cast<long long>(x[i]) << 31"
    assert per_word(f"__ffsll({high})") == [((w << 31) & -(w << 31)).bit_length() for w in words]
    assert per_word("__clz(x[i])") == [32 - word.bit_length() for word in words]
    reversed_words = [int(f"{word:032b}"[::-1], 2) for word in words]
    assert per_word("__brev(x[i])", np.uint32) == reversed_words
    assert per_word("__float_as_uint(__uint_as_float(x[i] >> 9)) << 9", np.uint32) == [
        word >> 9 << 9 for word in words
    ]


def test_dp4a():
    rng = np.random.default_rng(4)
    a, b = rng.integers(-128, 128, (2, 32, 4)).astype(np.int8)
    a[0], b[0] = -128, -128
    start = rng.integers(-1000, 1000, 32).astype(np.int32)
    got = run(
        "result = __dp4a(a[i], b[i], start[i]);",
        a=a.view(np.int32).ravel(),
        b=b.view(np.int32).ravel(),
        start=start,
    )
    np.testing.assert_array_equal(got, (a.astype(int) * b).sum(1) + start)
    wraps = run("result = __dp4a(0x01010101, 0x01010101, 0x7fffffff);", block=1)
    assert wraps[0] == -(2**31) + 3


def test_rounding():
    """Every operation rounds by itself, except where one is called that fuses."""
    rng = np.random.default_rng(5)
    a, b, c = rng.standard_normal((3, 32)).astype(np.float32)
    given = {"a": a, "b": b, "c": c}
    apart = run("result = a[i] * b[i] + c[i];", dtype=np.float32, **given)
    words = run("result = __fadd_rn(__fmul_rn(a[i], b[i]), c[i]);", dtype=np.float32, **given)
    fused = run("result = fmaf(a[i], b[i], c[i]);", dtype=np.float32, **given)
    np.testing.assert_array_equal(apart, a * b + c)
    np.testing.assert_array_equal(words, a * b + c)
    exact = a.astype(np.float64) * b + c  # the product is exact; one more rounding, almost always
    np.testing.assert_array_equal(fused, exact.astype(np.float32))
    assert (fused != apart).any()


def test_minimum_and_maximum():
    body = (
        "result = min(1, 2) + max(3u, 2) + min(__int_as_float(0x7fc00000), 5.0f) + max(1.5f, 2.f);"
    )
    assert run(body, block=1, dtype=np.float32)[0] == 1 + 3 + 5 + 2  # the number beats the NaN


def test_halves():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    padded = np.resize(finite, (finite.size + 255) // 256 * 256)
    floats, again = np.empty(padded.size, np.float32), np.empty(padded.size, np.int32)
    library = kernel(
        """const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const float2 both = __half22float2(reinterpret_cast<const __half2*>(x)[i / 2]);
    floats[i] = i % 2 ? both.y : both.x;
    const __half nearest = __float2half_rn(floats[i] * 1.0004f);
    again[i] = __half2float(nearest) == __half2float(reinterpret_cast<const __half*>(y)[i]);""",
        "const unsigned int* x, const unsigned int* y, float* floats, int* again",
    )
    with np.errstate(over="ignore"):
        scaled = (padded.astype(np.float32) * np.float32(1.0004)).astype(np.float16)
    arguments = (padded.view(np.uint32), scaled.view(np.uint32), floats, again)
    library.launch((padded.size // 256,), (256,), arguments)
    np.testing.assert_array_equal(floats, padded)
    assert again.all()


# --- the grid ---


def test_threads_and_blocks_in_three_dimensions():
    """Warps are cut from threads in the order x, y, z, as CUDA does."""
    grid, block = (3, 2, 2), (5, 4, 3)
    out = np.full((12, 60, 7), -1, np.int32)
    kernel(
        """const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int* mine = out + (b * 60 + t) * 7;
    mine[0] = threadIdx.x; mine[1] = threadIdx.y; mine[2] = threadIdx.z;
    mine[3] = blockIdx.x; mine[4] = blockIdx.y; mine[5] = blockIdx.z;
    mine[6] = __shfl_sync(t < 32 ? 0xffffffffu : 0x0fffffffu, t, 0);"""
    ).launch(grid, block, (out,))
    for (z, y, x), (w, v, u) in itertools.product(np.ndindex(2, 2, 3), np.ndindex(3, 4, 5)):
        b, t = x + 3 * (y + 2 * z), u + 5 * (v + 4 * w)
        assert out[b, t].tolist() == [u, v, w, x, y, z, t // 32 * 32]


def test_blocks_that_fetch_their_work():
    """A persistent grid, as `search` is: every number is taken once."""
    library = kernel(
        f"""for (;;) {{
        unsigned int taken = 0;
        if (threadIdx.x == 0) taken = atomicAdd(next, 1u);
        taken = __shfl_sync({FULL}, taken, 0);
        if (taken >= 100) return;
        if (threadIdx.x == taken % 32) atomicAdd(times + taken, 1);
    }}""",
        "unsigned int* next, int* times",
    )
    next_one, times = np.zeros(1, np.uint32), np.zeros(100, np.int32)
    library.launch((4,), (32,), (next_one, times), seed=3)
    assert (times == 1).all()
    assert next_one[0] == 104


def test_atomics_add():
    for dtype, step in ((np.int32, -3), (np.uint32, 2**31), (np.uint64, 2**40)):
        total = np.zeros(1, dtype)
        name = {np.int32: "int", np.uint32: "unsigned int", np.uint64: "unsigned long long"}[dtype]
        library = kernel(f"atomicAdd(total, {step});", f"{name}* total")
        library.launch((3,), (33,), (total,))
        assert total[0] == (99 * step) % 2**32 if dtype is np.uint32 else 99 * step


def test_shared_memory_is_poisoned_for_every_block():
    body = "DYNAMIC_SHARED(int, s);\nresult = s[i]; s[i] = 0;"
    assert (run(body, grid=3, shared_mem=128) == np.uint32(0xCBCBCBCB).view(np.int32)).all()


# --- seeds ---

RIGHT = f"""DYNAMIC_SHARED(int, s);
    s[i] = i * i;
    __syncwarp({FULL});
    for (int turn = 0; turn < 5; turn++) {{
        const int other = s[(i + 1) % 32];
        __syncwarp({FULL});
        s[i] += other;
        __syncwarp({FULL});
    }}
    result = s[i];"""
RACING = RIGHT.replace(f"s[i] += other;\n        __syncwarp({FULL});", "s[i] += other;")
ORDER = """result = atomicAdd(reinterpret_cast<unsigned int*>(const_cast<int*>(counter)), 1u);"""


def outcomes(body: str, seeds=range(8), **given) -> set[bytes]:
    shapes = dict(grid=2, shared_mem=128)
    return {run(body, seed=seed, **shapes, **given).tobytes() for seed in seeds}


def test_every_seed_gives_the_bits_of_a_right_kernel():
    assert len(outcomes(RIGHT)) == 1
    expected = np.arange(32) ** 2
    for _ in range(5):
        expected = expected + np.roll(expected, -1)
    np.testing.assert_array_equal(run(RIGHT, shared_mem=128), expected)


def test_seeds_disagree_where_a_barrier_is_missing():
    assert len(outcomes(RACING)) > 1


def test_a_seed_gives_one_order():
    """Of lanes and of blocks: the same again, and another one for another seed."""

    def order(seed):
        return run(ORDER, grid=8, seed=seed, counter=np.zeros(1, np.int32))

    np.testing.assert_array_equal(order(1), order(1))
    assert (order(1) != order(2)).any()
    assert (np.argsort(order(1).min(axis=1)) != np.argsort(order(2).min(axis=1))).any()
    assert (np.argsort(order(1)[0]) != np.arange(32)).any()


# --- what is refused ---

MISUSES = {  # the kernel's lines from line 4 on; threads; what the message says
    "absent": (f"__syncwarp({FULL});", 48, "trial.cu:4", "lanes 16-31 of warp 1"),
    "exited before": (
        f"if (threadIdx.x == 3) return;\n__syncwarp({FULL});",
        32,
        "trial.cu:5",
        "lanes 3 of warp 0 exited",
    ),
    "outside": (
        "if (threadIdx.x == 9)\n__ballot_sync(0xfu, 1);",
        32,
        "trial.cu:5",
        "thread (9, 0, 0)",
        "lane 9 of warp 0",
        "__ballot_sync with mask 0000000f, which lacks the caller",
    ),
    "reads outside": (
        "if (threadIdx.x < 4)\nout[0] = __shfl_sync(0xfu, 1, 9);",
        32,
        "trial.cu:5",
        "reads lane 9",
    ),
    "two words": (
        f"if (threadIdx.x == 5)\n__syncwarp({FULL}); else\n__any_sync({FULL}, 1);",
        32,
        "another collective",
        "__syncwarp",
        "trial.cu:5",
        "__any_sync",
        "trial.cu:6",
    ),
    "two lines": (
        f"if (threadIdx.x == 5)\n__syncwarp({FULL}); else\n__syncwarp({FULL});",
        32,
        "another collective",
        "trial.cu:5",
        "trial.cu:6",
    ),
    "two masks": (
        f"__syncwarp(threadIdx.x ? {FULL} : 0x7u);",
        32,
        "another collective",
        "00000007",
        "ffffffff",
    ),
    "two barriers": (
        "if (threadIdx.x < 32)\n__syncthreads(); else\n__syncthreads();",
        64,
        "__syncthreads meets another",
        "trial.cu:5",
        "trial.cu:6",
    ),
    "deadlock": (
        f"if (threadIdx.x < 8)\n__syncthreads();\n__syncwarp({FULL});",
        32,
        "deadlock",
        "lanes 0-7 of warp 0 wait in __syncthreads() at trial.cu:5",
        "lanes 8-31 of warp 0 wait in __syncwarp(mask ffffffff) at trial.cu:6",
    ),
    "deadlock of a ring": (
        "const unsigned two = 3u << threadIdx.x;\n"
        "if (threadIdx.x < 2) __syncwarp(two); else if (threadIdx.x == 2) __syncwarp(0x5u);",
        3,
        "deadlock",
    ),
    "exits later": (
        "if (threadIdx.x == 3) {\nfor (int turn = 0; turn < 200; turn++) __syncwarp(8u);"
        f"return; }}\n__syncwarp({FULL});",
        32,
        "trial.cu:6",
        "with mask ffffffff, but lanes 3 of warp 0 exited",
    ),
    "exits from a waiting block": (
        f"if (threadIdx.x > 31) {{\nfor (int turn = 0; turn < 200; turn++) __syncwarp({FULL});"
        "return; }\n__syncthreads();",
        64,
        "trial.cu:6",
        "__syncthreads is not reached by thread",
    ),
    "block of which some exited": (
        "if (threadIdx.x > 31) return;\n"
        f"for (int turn = 0; turn < 200; turn++) __syncwarp({FULL});\n__syncthreads();",
        64,
        "trial.cu:6",
        "__syncthreads is not reached by 32 exited threads",
    ),
    "exited from the block": (
        "if (threadIdx.x > 40) return;\n__syncthreads();",
        64,
        "trial.cu:5",
        "exited",
    ),
    "trap": ("if (threadIdx.x == 7)\n__trap();", 32, "trial.cu:5", "thread (7,", "__trap"),
    "below memory": ("out[-(1LL << 42)] = 1;", 1, "memory that is not there", "thread (0,"),
    "above shared memory": (
        "DYNAMIC_SHARED(int, s);\n__syncthreads(); s[32 + threadIdx.x] = 1;",
        1,
        "memory that is not there",
        "after __syncthreads() at trial.cu:5",
    ),
    "below shared memory": (
        "DYNAMIC_SHARED(int, s); s[-4096] = 1;",
        1,
        "memory that is not there",
    ),
    "deep stack": (
        "volatile char big[1 << 18]; for (int i = (1 << 18) - 1; i >= 0; i--) big[i] = 1;",
        1,
        "memory that is not there",
    ),
    "no end": (
        "while (threadIdx.x == 5 && *(volatile int*)out == 0) {}",
        32,
        "no end",
        "thread (5,",
    ),
    "no end in company": (f"for (;;) __syncwarp({FULL});", 32, "no end", "trial.cu:4"),
    "division": ("out[0] = 7 / out[threadIdx.x];", 1, "division by zero"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_an_error_with_a_place(misuse, seed):
    """Whatever the order of lanes; and afterwards the next launch runs as if nothing had been."""
    body, threads, *expected = MISUSES[misuse]
    library = kernel(body)
    library.limit_s = 1
    with pytest.raises(emulator.KernelError) as error:
        library.launch((2,), (threads,), (np.zeros(64, np.int32),), 128, seed)
    message = str(error.value)
    assert message.startswith("trial: ")
    assert all(text in message for text in ["block (", *expected]), message
    np.testing.assert_array_equal(
        run(f"result = __shfl_sync({FULL}, i, 31 - i);"), range(31, -1, -1)
    )


def test_what_a_misuse_resembles_is_allowed():
    """Lanes that exit last, that are waited for while they meet others, and partial warps."""
    for body in (
        f"if (i < 4) __syncwarp(0xfu);\n__syncwarp({FULL}); if (i % 2) return;",
        f"if (i < 8) result = __shfl_sync(0xffu, i, 0);\n__ballot_sync({FULL}, 1);",
    ):
        for seed in range(5):
            run(body, seed=seed)
    assert (run("result = __ballot_sync(0x7fu, 1);", block=7) == 0x7F).all()


def test_faults_elsewhere_stay_what_they_were():
    """The launch puts back the process's own handlers."""
    code = (
        "import faulthandler, ctypes, test_emulator as t\n"
        "faulthandler.enable()\n"
        "t.run('result = i;')\n"
        "ctypes.string_at(0)\n"
    )
    paths = os.pathsep.join(map(str, (emulator.ROOT, *Path(__file__).parents[:2])))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode < 0
    assert "Segmentation fault" in done.stderr and "string_at" in done.stderr


# --- launches ---


def test_limits_of_the_device():
    library = kernel("out[0] = 1;", bounds="__launch_bounds__(32 * (2 + 2), 4)")
    out = (np.zeros(1, np.int32),)
    library.max_shared = 48 * 1024
    library.launch((1,), (128,), out, shared_mem=48 * 1024)
    for grid, block, shared_mem, message in (
        ((1,), (129,), 0, "129 threads a block, of at most 128"),
        ((1,), (32,), 48 * 1024 + 1, "49153 bytes of shared memory a block; the device has 49152"),
        ((0,), (32,), 0, "grid"),
        ((1, 65536), (32,), 0, "grid"),
        ((1,), (1, 1, 65), 0, "block"),
    ):
        with pytest.raises(emulator.KernelError, match=message):
            library.launch(grid, block, out, shared_mem)
    with pytest.raises(emulator.KernelError, match="of at most 1024"):
        kernel("out[0] = 1;").launch((1,), (1024, 2), out)


STRUCTS = """struct Pair { const int* values; int count; };
extern "C" __global__ void total(const Pair pair, long long* sum, float scale) {
    for (int i = 0; i < pair.count; i++) sum[0] += pair.values[i] * scale;
}"""
PAIR = np.dtype([("values", np.uint64), ("count", np.int32)], align=True)


def test_arguments_of_every_kind():
    library = emulator.compile("total", {}, source=STRUCTS)
    values, total = np.arange(5, dtype=np.int32), np.zeros(1, np.int64)
    pair = np.zeros(1, PAIR)
    pair["values"], pair["count"] = values.ctypes.data, 5
    library.launch((1,), (1,), (pair, total, np.float32(2)))
    assert total[0] == 20
    read_only = total.copy()
    read_only.flags.writeable = False
    for arguments, message in (
        ((pair, total), "takes 3 arguments, not 2"),
        ((pair[0], total, np.float32(2)), "pair is a struct"),
        ((np.zeros(2, PAIR), total, np.float32(2)), "pair is a struct"),
        ((np.zeros(1, np.int32), total, np.float32(2)), "Pair of 16 bytes"),
        ((pair, total.astype(np.int32), np.float32(2)), "sum is long long\\*, not .*int32"),
        ((pair, np.zeros(4, np.int64)[::2], np.float32(2)), "contiguous"),
        ((pair, read_only, np.float32(2)), "read-only"),
        ((pair, np.int64(0), np.float32(2)), "sum is a pointer"),
        ((pair, total, np.float64(2)), "scale is float"),
        ((pair, total, 2.0), "scale is float"),
    ):
        with pytest.raises(TypeError, match=message):
            library.launch((1,), (1,), arguments)


def test_structs_of_the_package_are_checked_field_by_field():
    """The right size is not enough."""
    from hnsw_gpu.gpu import kernel_source, kernel_structs

    right = kernel_structs.struct_dtype("Encoding")
    library = emulator.compile("encode", kernel_source.definitions("l2", "fp32", 8, 8, 1))
    wrong = np.dtype([(name, right[name]) for name in ("queries", "vectors", "count")], align=True)
    assert wrong.itemsize == right.itemsize
    library.launch((1,), (32,), (np.zeros(1, right),))
    with pytest.raises(TypeError, match="task is a Encoding"):
        library.launch((1,), (32,), (np.zeros(1, wrong),))


def test_what_does_not_compile_is_an_error_with_a_line():
    with pytest.raises(emulator.KernelError, match=r"trial.cu:5.*__activemask"):
        kernel("\nout[0] = __activemask();")
    with pytest.raises(emulator.KernelError, match="__shared__"):
        kernel("__shared__ int s[4];")
    with pytest.raises(ValueError, match=r"has no .* other"):
        emulator.compile("other", {}, source=STRUCTS)


def test_definitions_and_the_source_make_a_library():
    source = 'extern "C" __global__ void of(int* out) { out[0] = NUMBER; }'
    out = np.zeros(1, np.int32)
    paths = []
    for number in (3, 4, 3):
        library = emulator.compile("of", {"NUMBER": number}, source=source)
        library.launch((1,), (1,), (out,))
        assert out[0] == number
        paths.append(library.path)
    assert paths[0] == paths[2] != paths[1]


def test_steps():
    library = kernel(f"__syncwarp({FULL}); __syncthreads(); __ballot_sync({FULL}, 1);")
    library.launch((3,), (64,), (np.zeros(1, np.int32),))
    assert library.steps == 3 * 64 * 3


# --- the sanitizers ---


def sanitized(
    sanitizer: str, body: str, threads: int = 64, grid: int = 1, shared_mem: int = 256
) -> str:
    """What the launch prints in a process of its own: "done", or KernelError with the report."""
    code = (
        "import numpy as np, test_emulator as t\n"
        f"library = t.kernel({body!r}, 'int* out', {sanitizer!r})\n"
        "out = np.zeros(1024, np.int32)\n"
        "for seed in range(2):\n"
        f"    library.launch(({grid},), ({threads},), (out,), {shared_mem}, seed)\n"
        "print('done')"
    )
    return emulator.run_sanitized(sanitizer, "-c", code, timeout_s=120).strip()


CLEAN = f"""DYNAMIC_SHARED(int, s);
    const int i = threadIdx.x;
    s[i] = i;
    __syncwarp({FULL});
    int sum = s[i ^ 1];
    __syncthreads();
    s[63 - i] = sum;
    __syncthreads();
    for (int turn = 0; turn < 20; turn++) {{
        sum += s[i ^ 5];
        __syncwarp({FULL});
        s[i] = __shfl_xor_sync({FULL}, sum, 3);
        __syncwarp({FULL});
    }}
    atomicAdd(out + 1000, sum);
    out[blockIdx.x * blockDim.x + i] = s[i ^ 1];"""


@pytest.mark.parametrize("sanitizer", ("address", "thread"))
def test_no_sanitizer_complains_of_a_clean_kernel(sanitizer):
    if emulator.missing(sanitizer):
        pytest.skip(emulator.missing(sanitizer))
    assert sanitized(sanitizer, CLEAN, grid=6) == "done"


@needs("address")
@pytest.mark.parametrize(
    ("body", "report"),
    (
        ("\nout[1024 + threadIdx.x] = 1;", "heap-buffer-overflow"),
        ("\nout[0] = out[-1 - (int)threadIdx.x];", "heap-buffer-overflow"),
        ("DYNAMIC_SHARED(int, s);\ns[threadIdx.x + 1] = 1;", "use-after-poison"),
        (
            "DYNAMIC_SHARED(char, s);\ns[threadIdx.x * 4 + 1] = s[256 - threadIdx.x];",
            "use-after-poison",
        ),
        ("DYNAMIC_SHARED(int, s);\nout[0] = s[(int)threadIdx.x - 1];", "use-after-poison"),
        (
            "int own[4] = {};\nout[0] = own[threadIdx.x / 15] + (own[out[0]] = 2);",
            "index 4 out of|overflow",
        ),
        ("\nout[0] = ((const uint4*)(out + 1))->y;", "misaligned address"),
        ("\nout[0] = __ldg((const uint4*)(out + threadIdx.x)).y;", "misaligned address"),
        ("\nout[0] = 1 << (threadIdx.x + out[1]);", "shift exponent"),
        ("\nout[0] = 0x7fffffff + (int)threadIdx.x;", "signed integer overflow"),
        ("\nout[0] = 5 / out[threadIdx.x];", "division by zero"),
    ),
)
def test_bad_addresses_and_undefined_behaviour_are_found_by_line(body, report):
    with pytest.raises(emulator.KernelError, match=report) as error:
        sanitized("address", body)
    assert "trial.cu:5" in str(error.value)


@needs("thread")
@pytest.mark.parametrize(
    ("body", "grid", "lines"),
    (
        (CLEAN.replace(f"s[i] = i;\n    __syncwarp({FULL});", "s[i] = i;"), 1, (6, 7)),
        (
            CLEAN.replace("int sum = s[i ^ 1];\n    __syncthreads();", "int sum = s[i ^ 1];"),
            1,
            (8, 9),
        ),
        (CLEAN.replace("__syncthreads();\n    for", f"__syncwarp({FULL});\n    for"), 1, (10, 13)),
        (CLEAN.replace(f"sum, 3);\n        __syncwarp({FULL});", "sum, 3);"), 1, (13, 15)),
        (CLEAN.replace("atomicAdd(out + 1000, sum);", "out[1000] += sum;"), 1, (18,)),
        ("\nif (threadIdx.x == 0) out[5] += blockIdx.x;", 3, (5,)),
        (
            "if (threadIdx.x == 0) { if (blockIdx.x) atomicAdd(out + 5, 1); else\nout[5] = 1; }",
            3,
            (4, 5),
        ),
        (
            f"if (threadIdx.x == 3)\nout[5] = 1;\n__shfl_sync({FULL}, 1, 3);\n"
            "if (threadIdx.x == 9)\nout[6] = out[5];",
            1,
            (5, 8),
        ),
    ),
)
def test_races_are_found_by_line(body, grid, lines):
    """In a warp, in a block, between blocks; a shuffle orders nothing."""
    with pytest.raises(emulator.KernelError, match="data race") as error:
        sanitized("thread", body, grid=grid)
    report = str(error.value)
    assert any(f"trial.cu:{line}" in report for line in lines), report


@needs("address")
def test_a_failure_in_a_sanitized_process_is_its_own_error():
    with pytest.raises(emulator.KernelError, match="__syncwarp with mask"):
        sanitized("address", f"__syncwarp({FULL});", threads=48)
    with pytest.raises(emulator.KernelError, match="NameError"):
        emulator.run_sanitized("address", "-c", "nothing")
