"""The launch plan against its own promises, and against NVIDIA's occupancy calculator."""

import json
import subprocess
from importlib import metadata
from pathlib import Path

import emulator
import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="properties are tested with the extra `test`")

from hypothesis import given, settings
from hypothesis import strategies as st

from hnsw_gpu.engine import vectors
from hnsw_gpu.gpu import kernel_source, launch_plan
from hnsw_gpu.gpu.launch_plan import BeamShape

ARCHS = [75, 80, 86, 89, 90, 100, 120]


def plan(walk: BeamShape, *, arch: int = 90, dtype="fp32", dim=128, **changes) -> launch_plan.Plan:
    sizes = {"queries": 100_000, "nodes": 10**6, "limits": launch_plan.of_arch(arch), **changes}
    return launch_plan.plan("l2", dtype, dim, 16, walk, **sizes)


walks = st.builds(
    BeamShape,
    ef=st.integers(1, 40_000),
    k=st.integers(1, 40_000),
    ef_upper=st.integers(1, 3000),
    expand=st.integers(1, 32),
    has_allowed_keys=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(walk=walks, arch=st.sampled_from(ARCHS), queries=st.integers(1, 10**6),
       nodes=st.integers(1, 2**31 - 1), dim=st.integers(1, 5000),
       dtype=st.sampled_from(["fp32", "fp16", "int8", "int4"]))  # fmt: skip
def test_a_plan_can_be_launched(walk, arch, queries, nodes, dim, dtype):
    limits = launch_plan.of_arch(arch)
    largest = launch_plan.largest_ef(walk, nodes, limits)
    if max(walk.ef, walk.k, walk.ef_upper) > largest:
        with pytest.raises(ValueError, match=f"the largest that fits is {largest}$"):
            plan(walk, arch=arch, dtype=dtype, dim=dim, queries=queries, nodes=nodes)
        return
    made = plan(walk, arch=arch, dtype=dtype, dim=dim, queries=queries, nodes=nodes)
    names = made.definitions
    assert names["HAS_ALLOWED_KEYS"] == walk.has_allowed_keys and (names["DIM"], names["M"]) == (
        dim,
        16,
    )
    assert made.block == 32 * names["WARPS"] * made.queries_per_block
    assert made.block <= (256 if names["WARPS"] == 8 else 128)  # launch bounds
    assert made.queries_per_block == 1 or names["WARPS"] == 1
    assert made.shared_mem <= limits.shared_per_block
    assert made.shared_mem % (16 * made.queries_per_block) == 0  # every group starts aligned
    assert made.resident >= limits.sms
    assert made.grid == min(-(-queries // made.queries_per_block), made.resident)
    buckets, tag_bits = made.visited_buckets, names["TAG_BITS"]
    assert 32 <= buckets <= 1024 and buckets & (buckets - 1) == 0
    assert tag_bits == 32 or nodes <= 65535 * buckets


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("has_allowed_keys", [False, True])
def test_the_largest_ef_is_the_largest(arch, has_allowed_keys):
    limits = launch_plan.of_arch(arch)
    for k in (10, 10**6):
        largest = launch_plan.largest_ef(
            BeamShape(1, k, has_allowed_keys=has_allowed_keys), 10**6, limits
        )
        for ef, fits in ((largest, True), (largest + 2, False)):
            walk = BeamShape(ef, min(k, ef), has_allowed_keys=has_allowed_keys)
            buckets, _ = launch_plan.visited_cache(walk, 10**6)
            assert (launch_plan.group_bytes(walk, buckets, 4) <= limits.shared_per_block) == fits
    assert launch_plan.largest_ef(BeamShape(1, 10), 10**6, limits) > 5000


@pytest.mark.parametrize(
    ("name", "walk"),
    [
        ("ef", BeamShape(50_000, 10)),
        ("k", BeamShape(10, 50_000)),
        ("ef_upper", BeamShape(10, 10, 50_000)),
    ],
)
def test_what_is_too_large_is_named(name, walk):
    with pytest.raises(ValueError, match=f"^{name}=50000: .*232,448 bytes; the largest that fits"):
        plan(walk)
    with pytest.raises(ValueError, match="expand=33: a GPU search expands at most 32"):
        plan(BeamShape(10, 10, expand=33))


def test_warps():
    """One while queries fill the GPU; more where they are few, or each of them is large."""
    small, large = BeamShape(64, 10), BeamShape(1024, 10)
    warps = {
        (walk, queries): plan(walk, queries=queries).definitions["WARPS"]
        for walk in (small, large)
        for queries in (1, 132, 133, 528, 529, 10**6)
    }
    assert [warps[small, q] for q in (1, 132, 133, 528, 529, 10**6)] == [8, 8, 4, 4, 1, 1]
    assert [warps[large, q] for q in (1, 132, 133, 10**6)] == [8, 8, 4, 4]
    assert plan(small, dim=1024).definitions["WARPS"] == 1
    assert plan(small, dim=1025).definitions["WARPS"] == 4


def test_visited_cache():
    for ef, nodes, expected in [
        (1, 10**6, (32, 16)),
        (64, 10**6, (128, 16)),
        (73, 10**6, (128, 16)),
        (74, 10**6, (256, 16)),
        (512, 10**6, (1024, 16)),
        (5000, 10**6, (1024, 16)),
        (64, 65535 * 128, (128, 16)),
        (64, 65535 * 128 + 1, (256, 16)),  # twice the buckets hold twice the nodes
        (64, 65535 * 256 + 1, (256, 32)),
        (512, 65535 * 1024 + 1, (1024, 32)),
    ]:
        assert launch_plan.visited_cache(BeamShape(ef, 1), nodes) == expected
        assert (
            launch_plan.visited_cache(BeamShape(1, ef), nodes) == expected
        )  # the beam holds max(ef, k)


def test_memory_of_one_query():
    """`struct Shared` of search.cu, by hand: beam, found, stage, fresh, buckets, ids, state."""
    parts = 8 * 64 + 8 * 64 + 16 * 128 + 4 * (128 + 32) + 16
    assert launch_plan.group_bytes(BeamShape(64, 10), 128, warps=1) == parts == 3728
    assert launch_plan.group_bytes(BeamShape(63, 10), 128, warps=1) == parts
    assert launch_plan.group_bytes(BeamShape(10, 10, ef_upper=64), 128, warps=1) == parts
    assert (
        launch_plan.group_bytes(BeamShape(64, 11, has_allowed_keys=True), 128, warps=1)
        == parts + 8 * 12
    )
    assert launch_plan.group_bytes(BeamShape(64, 10), 128, warps=8) == parts + 8 * 128


def test_smaller_blocks_where_shared_memory_is_short():
    sizes = {
        shared: launch_plan._queries_per_block(shared, launch_plan.of_arch(75), registers=128)
        for shared in (1024, 4096, 6 * 1024, 12 * 1024)
    }
    assert sizes == {1024: 4, 4096: 4, 6 * 1024: 2, 12 * 1024: 1}


def test_sizes_of_queries():
    for dtype in ("fp32", "fp16", "int8", "int4"):
        for dim in (1, 7, 8, 20, 21, 32, 100, 768):
            encoded = vectors.encode_queries(np.ones((3, dim), np.float32), "l2", dtype)
            assert 3 * launch_plan.query_bytes(dtype, dim) == encoded.nbytes


@pytest.mark.parametrize(("queries", "ids"), [(1, 1), (1, 10**7), (8, 64), (9, 65), (10**6, 5000)])
def test_compare_grid(queries, ids):
    for arch in ARCHS:
        limits = launch_plan.of_arch(arch)
        x, y = launch_plan.compare_grid(queries, ids, limits)
        assert x == -(-queries // 8)
        assert 1 <= y <= min(65535, -(-ids // 64))
        assert x * y >= min(8 * limits.sms, x * -(-ids // 64))  # enough, where there is enough
    assert launch_plan.warp_grid(4) == 1 and launch_plan.warp_grid(5) == 2


def test_encoding_in_shared_memory():
    """A warp of int4 rotates in 4 * dim bytes: fewer warps a block where they are many."""
    limits = launch_plan.of_arch(75)
    for dim, warps in ((1, 4), (3072, 4), (3073, 2), (6144, 2), (6145, 1), (16_384, 1)):
        grid, block, shared_mem = launch_plan.encode_launch("int4", dim, 9, limits)
        assert (grid, block, shared_mem) == (-(-9 // warps), 32 * warps, 4 * dim * warps)
        assert launch_plan.encode_launch("int8", dim, 9, limits) == (3, 128, 0)
    with pytest.raises(RuntimeError, match=r"dim=16385: .* 65,536 bytes; 16384 numbers fit$"):
        launch_plan.encode_launch("int4", 16_385, 1, limits)


def test_limits_of_a_device():
    fields = ("multiProcessorCount", "sharedMemPerBlockOptin", "sharedMemPerMultiprocessor",
              "reservedSharedMemPerBlock", "regsPerMultiprocessor", "maxThreadsPerMultiProcessor",
              "maxBlocksPerMultiProcessor")  # fmt: skip
    assert launch_plan.from_device(dict(zip(fields, range(7), strict=True))) == tuple(range(7))


# --- NVIDIA's calculator --------------------------------------------------------------------------

CALCULATOR = r"""
#include <cstdio>
#include <cstring>
#include "cuda_occupancy.h"
int main() {
    int arch, threads, shared, registers, perBlock, perSm, reserved, smThreads, bound;
    while (scanf("%d %d %d %d %d %d %d %d %d", &arch, &threads, &shared, &registers, &perBlock,
                 &perSm, &reserved, &smThreads, &bound) == 9) {
        cudaOccDeviceProp device;
        device.computeMajor = arch / 10; device.computeMinor = arch % 10;
        device.maxThreadsPerBlock = 1024; device.maxThreadsPerMultiprocessor = smThreads;
        device.regsPerBlock = 65536; device.regsPerMultiprocessor = 65536; device.warpSize = 32;
        device.sharedMemPerBlock = 48 << 10; device.sharedMemPerMultiprocessor = perSm;
        device.sharedMemPerBlockOptin = perBlock; device.reservedSharedMemPerBlock = reserved;
        device.numSms = 1;
        cudaOccFuncAttributes kernel;
        memset(&kernel, 0, sizeof kernel);
        kernel.maxThreadsPerBlock = bound; kernel.numRegs = registers; kernel.sharedSizeBytes = 0;
        kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        kernel.maxDynamicSharedSizeBytes = perBlock; kernel.numBlockBarriers = 1;
        cudaOccDeviceState state;
        memset(&state, 0, sizeof state);
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult result;
        memset(&result, 0, sizeof result);
        int status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state,
                                                             threads, shared);
        printf("%d\n", status ? -status : result.activeBlocksPerMultiprocessor);
    }
}
"""


def test_occupancy_is_nvidias(tmp_path: Path):
    """Resident blocks, for each architecture, block, number of registers, and shared memory."""
    try:
        files = metadata.distribution("nvidia-cuda-runtime").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-runtime is not installed: it has cuda_occupancy.h")
    header = next(Path(str(file.locate())) for file in files if file.name == "cuda_occupancy.h")
    if not emulator.compiler():
        pytest.skip(emulator.missing())
    (tmp_path / "occupancy.cpp").write_text(CALCULATOR)
    command = [*emulator.compiler(), "-w", f"-I{header.parent}", "occupancy.cpp", "-o", "occupancy"]
    subprocess.run(command, cwd=tmp_path, check=True)
    cases = [
        (arch, threads, shared, registers)
        for arch in ARCHS
        for threads in (32, 64, 128, 256)
        for registers in (32, 40, 64, 72, 96, 127, 128)
        for shared in (0, 1000, 3984, 4 * 3984, 12_300, 33_000, 65_536, 99 << 10, 227 << 10)
    ]
    lines, mine = [], []
    for arch, threads, shared, registers in cases:
        limits = launch_plan.of_arch(arch)
        mine.append(launch_plan.resident_blocks(threads, shared, limits, registers))
        lines.append(
            f"{arch} {threads} {shared} {registers} {limits.shared_per_block} "
            f"{limits.shared_per_sm} {limits.shared_reserved} {limits.threads_per_sm} {threads}"
        )
    done = subprocess.run(
        [tmp_path / "occupancy"], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    wrong = [
        (case, ours, theirs)
        for case, ours, theirs in zip(cases, mine, map(int, done.stdout.split()), strict=True)
        if ours != max(theirs, 0)
    ]
    assert not wrong, json.dumps(wrong[:20])
    assert max(mine) >= 16 and min(mine) == 0


def test_registers_as_compiled_fill_the_gpu():
    """Kernels that take fewer registers than they may get a larger grid, and the same memory."""
    cap, few = plan(BeamShape(64, 10)), plan(BeamShape(64, 10), registers=64)
    assert kernel_source.REGISTERS_CAP["search"] == 128
    assert (cap.resident, few.resident) == (4 * 132, 8 * 132)
    assert cap[:5] == few[:5]
