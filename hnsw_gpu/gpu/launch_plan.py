"""The launch plan: which specialisation, how many threads, how much shared memory. Pure.

The answer never depends on a plan (R7, R11), only its speed does. A plan keeps the caller's numbers
as they are, or refuses them and says what would fit.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hnsw_gpu.engine import STORAGE, empty_queries, empty_rows, row_length
from hnsw_gpu.gpu import kernel_source

LANES = 32
STAGE = 64  # this and the next four: sizes in search.cu, `struct Shared`
PENDING = 128
KEY_BYTES = 8
BUCKET_BYTES = 16
STATE_BYTES = 16
MOST_EXPANDED = 32  # one lane an expanded node
QUERIES_PER_BLOCK = 4  # of one warp each
LARGE_STATE = 12 * 1024  # bytes of shared memory; beyond, four warps share a query
WIDE_ROW = 4096  # bytes; likewise
BUCKETS = (32, 1024)  # fewest and most of the visited cache
TAGS = 16  # visited numbers that the cache remembers, for every one in the beam
MOST_TAG = 65535  # of 16 bits, less the one that is no tag
COMPARE_BLOCK = 256  # threads: eight warps, a query each
COMPARE_STEP = 64  # ids that a warp of compare.cu may take at a time
MOST_KEPT = 512  # keys that a warp of compare.cu keeps: 34 KB a block, which none must ask for
THREAD_BLOCK = 128  # threads of encode.cu, keys_to_labels.cu: four warps, a query each
UNASKED_SHARED = 48 * 1024  # bytes of shared memory, in which a block of encode.cu stays if it can


class Limits(NamedTuple):
    """What a GPU has. Bytes where it is memory."""

    sms: int
    shared_per_block: int  # with opt-in
    shared_per_sm: int
    shared_reserved: int  # for the system, of every block
    registers_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int


KIB = 1024
_LIMITS = {
    75: Limits(40, 64 * KIB, 64 * KIB, 0, 65536, 1024, 16),  # T4
    80: Limits(108, 163 * KIB, 164 * KIB, KIB, 65536, 2048, 32),  # A100
    86: Limits(72, 99 * KIB, 100 * KIB, KIB, 65536, 1536, 16),  # A10
    89: Limits(128, 99 * KIB, 100 * KIB, KIB, 65536, 1536, 24),  # RTX 4090
    90: Limits(132, 227 * KIB, 228 * KIB, KIB, 65536, 2048, 32),  # H100
    100: Limits(148, 227 * KIB, 228 * KIB, KIB, 65536, 2048, 32),  # B200
    120: Limits(170, 99 * KIB, 100 * KIB, KIB, 65536, 1536, 24),  # RTX 5090
}


def of_arch(arch: int) -> Limits:
    """Limits of a well-known GPU of compute capability `arch` (90 is 9.0)."""
    return _LIMITS[arch]


def from_device(properties: Mapping[str, Any]) -> Limits:
    """Limits from `cudaDeviceProp`, by the names that it and CuPy give its fields."""
    return Limits(
        properties["multiProcessorCount"],
        properties["sharedMemPerBlockOptin"],
        properties["sharedMemPerMultiprocessor"],
        properties["reservedSharedMemPerBlock"],
        properties["regsPerMultiprocessor"],
        properties["maxThreadsPerMultiProcessor"],
        properties["maxBlocksPerMultiProcessor"],
    )


class BeamShape(NamedTuple):
    """What decides the shared memory of a search: the numbers of `struct Task`."""

    ef: int  # beam capacity on layer 0; the beam holds max(ef, k)
    k: int
    ef_upper: int = 1
    expand: int = 1
    has_allowed_keys: bool = False  # an allowed list is kept (R8, R10)


class Plan(NamedTuple):
    """How to launch search.cu."""

    definitions: dict[str, int]
    visited_buckets: int
    queries_per_block: int
    block: int  # threads
    shared_mem: int  # bytes a block
    resident: int  # blocks that the GPU holds at once
    grid: int


@functools.lru_cache(4096)
def plan(
    metric: str,
    dtype: str,
    dim: int,
    M: int,
    walk: BeamShape,
    *,
    queries: int,
    nodes: int,
    limits: Limits,
    registers: int = kernel_source.REGISTERS_CAP["search"],
) -> Plan:
    """The plan for searching `queries` in a graph of `nodes`; ValueError where none fits.

    `registers`: of a thread, as compiled; by default the most that the kernels may take.
    """
    if walk.expand > MOST_EXPANDED:
        raise ValueError(f"expand={walk.expand}: a GPU search expands at most {MOST_EXPANDED}")
    buckets, tag_bits = visited_cache(walk, nodes)
    largest = largest_ef(walk, nodes, limits)
    if max(walk.ef, walk.k) > largest or walk.ef_upper > largest:
        raise ValueError(_too_large(walk, largest, limits))
    warps = _warps(walk, buckets, _row_bytes(dtype, dim), queries, limits)
    group = group_bytes(walk, buckets, warps)
    per_block = _queries_per_block(group, limits, registers) if warps == 1 else 1
    block = LANES * warps * per_block
    resident = limits.sms * resident_blocks(block, per_block * group, limits, registers)
    return Plan(
        kernel_source.definitions(metric, dtype, dim, M, warps, tag_bits, walk.has_allowed_keys),
        buckets,
        per_block,
        block,
        per_block * group,
        resident,
        grid=min(-(-queries // per_block), resident),
    )


def search_variants(metric: str, dtype: str, dim: int, M: int, nodes: int) -> list[dict[str, int]]:
    """The definitions of search.cu that plans for a graph of `nodes` have."""
    fewest, most = BUCKETS
    tags = [16] * (nodes <= MOST_TAG * most) + [32] * (nodes > MOST_TAG * fewest)
    return [
        kernel_source.definitions(metric, dtype, dim, M, warps, tag_bits, has_allowed_keys)
        for tag_bits in tags
        for warps in (1, 4, 8)
        for has_allowed_keys in (False, True)
    ]


def visited_cache(walk: BeamShape, nodes: int) -> tuple[int, int]:
    """Buckets, a power of two, and bits of a tag (visited.cuh).

    Up to an eighth fewer than TAGS numbers want, rather than nearly twice as many: so more queries
    fit, for a row or two in a hundred that are read again.
    16-bit tags are exact while there are few enough nodes for the buckets; twice the buckets hold
    twice the nodes, or as many tags of 32 bits as there were of 16.
    """
    fewest, most = BUCKETS
    wanted = TAGS * max(walk.ef, walk.k) // 8 * 7 // 8
    buckets = min(max(_power_of_two(wanted), fewest), most)
    if nodes > MOST_TAG * buckets:
        buckets = min(2 * buckets, most)
    return buckets, 16 if nodes <= MOST_TAG * buckets else 32


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


def group_bytes(walk: BeamShape, buckets: int, warps: int) -> int:
    """Bytes of shared memory that the walk of one query takes; `divide` in search.cu."""
    slots = _even(max(walk.ef, walk.k, walk.ef_upper))
    slots += _even(walk.k) if walk.has_allowed_keys else 0
    fresh = 0 if warps == 1 else PENDING
    ids = 4 * (PENDING + LANES)
    return KEY_BYTES * (slots + STAGE + fresh) + BUCKET_BYTES * buckets + ids + STATE_BYTES


def _even(count: int) -> int:
    return count + count % 2


@functools.lru_cache(4096)
def largest_ef(walk: BeamShape, nodes: int, limits: Limits) -> int:
    """The largest beam capacity that fits a block; with an allowed list, beside min(k, it) keys."""
    least, above = 0, limits.shared_per_block // KEY_BYTES
    while above - least > 1:
        middle = (least + above) // 2
        smaller = walk._replace(ef=middle, k=min(walk.k, middle), ef_upper=1)
        buckets, _ = visited_cache(smaller, nodes)
        fits = group_bytes(smaller, buckets, warps=4) <= limits.shared_per_block
        least, above = (middle, above) if fits else (least, middle)
    return least


def _too_large(walk: BeamShape, largest: int, limits: Limits) -> str:
    name, given = max(
        (("ef", walk.ef), ("k", walk.k), ("ef_upper", walk.ef_upper)), key=lambda pair: pair[1]
    )
    return (
        f"{name}={given}: the beam of a query lies in shared memory, of which this GPU gives a "
        f"block {limits.shared_per_block:,} bytes; the largest that fits is {largest}"
    )


def _warps(walk: BeamShape, buckets: int, row_bytes: int, queries: int, limits: Limits) -> int:
    """How many warps share a query: one while there are queries enough to fill the GPU."""
    if queries <= limits.sms:
        return 8
    is_large = group_bytes(walk, buckets, 1) > LARGE_STATE or row_bytes > WIDE_ROW
    return 4 if is_large or queries <= QUERIES_PER_BLOCK * limits.sms else 1


def _queries_per_block(group: int, limits: Limits, registers: int) -> int:
    """Of one warp each: as many as let the GPU hold most; the larger of equals."""

    def held(queries: int) -> int:
        return queries * resident_blocks(LANES * queries, queries * group, limits, registers)

    return max((1, 2, QUERIES_PER_BLOCK), key=lambda queries: (held(queries), queries))


def resident_blocks(block: int, shared_mem: int, limits: Limits, registers: int) -> int:
    """Blocks that an SM holds at once, as cuda_occupancy.h reckons; 0 where not even one fits."""
    if shared_mem > limits.shared_per_block:
        return 0
    warps = -(-block // LANES)
    warp_registers = -(-registers * LANES // 256) * 256
    warps_by_registers = limits.registers_per_sm // 4 // warp_registers * 4  # an SM has 4 parts
    granule = 128 if limits.shared_reserved else 256  # Turing's is larger
    shared = -(-(shared_mem + limits.shared_reserved) // granule) * granule
    return min(
        limits.blocks_per_sm,
        limits.threads_per_sm // (warps * LANES),
        warps_by_registers // warps,
        limits.shared_per_sm // shared if shared else limits.blocks_per_sm,
    )


def compare_grid(queries: int, ids: int, limits: Limits) -> tuple[int, int]:
    """Blocks of compare.cu: by queries, and by shares of the ids where queries are few."""
    rows = -(-queries // (COMPARE_BLOCK // LANES))
    wanted = -(-8 * limits.sms // max(rows, 1))
    return rows, min(max(wanted, 1), -(-ids // COMPARE_STEP), 65535)


def compare_shared_mem(k: int) -> int:
    """Bytes of a block of compare.cu that keeps k keys a query."""
    return KEY_BYTES * (COMPARE_BLOCK + COMPARE_BLOCK // LANES * k) if k else 0


def warp_grid(queries: int) -> int:
    """Blocks of keys_to_labels.cu, of THREAD_BLOCK threads."""
    return -(-queries * LANES // THREAD_BLOCK)


def encode_launch(dtype: str, dim: int, queries: int, limits: Limits) -> tuple[int, int, int]:
    """Blocks, threads and bytes of shared memory of encode.cu; RuntimeError where none fits.

    A warp takes a query, and rotates one of int4 as floats in shared memory.
    """
    room = 4 * dim if dtype == "int4" else 0
    if room > limits.shared_per_block:
        raise RuntimeError(
            f"dim={dim}: an int4 query is rotated in shared memory, of which this GPU gives a "
            f"block {limits.shared_per_block:,} bytes; {limits.shared_per_block // 4} numbers fit"
        )
    per_block = THREAD_BLOCK // LANES
    while per_block > 1 and per_block * room > UNASKED_SHARED:
        per_block //= 2
    return -(-queries // per_block), per_block * LANES, per_block * room


def index_bytes(
    dtype: str,
    refine: str,
    dim: int,
    M: int,
    node_count: int,
    top_nodes: int,
    entry_count: int = 0,
) -> dict[str, int]:
    """Bytes of GPU memory that an index takes, by name.

    top_nodes: rows of the layers above 0, all together. entry_count: labels, which lie on the GPU
    where arrays that are there are searched for; 0 leaves them out.
    """
    return {
        "rows": node_count * _row_bytes(dtype, dim),
        "refine rows": node_count * _row_bytes(refine, dim) if refine else 0,
        "layer 0": node_count * 2 * M * 4,
        "layers above": top_nodes * (M + 2) * 4,
        "labels": 8 * (entry_count + node_count + 1) if entry_count else 0,
    }


def bytes_a_query(dtype: str, refine: str, dim: int, keys: int) -> int:
    """Bytes of GPU memory that a query takes with `keys` keys."""
    encoded = query_bytes(dtype, dim) + (query_bytes(refine, dim) if refine else 0)
    return encoded + 4 * dim + KEY_BYTES * keys + 4 * 4  # as given, its own id, and three counts


def _row_bytes(dtype: str, dim: int) -> int:
    return row_length(dim, dtype) * np.dtype(STORAGE[dtype]).itemsize


def query_bytes(dtype: str, dim: int) -> int:
    """Bytes of an encoded query (`encode_queries` in vectors.py)."""
    return empty_queries(1, empty_rows(0, dim, dtype)).nbytes
