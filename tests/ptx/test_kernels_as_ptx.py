"""The PTX of the kernels, executed, equals the CPU engine, key for key and hop for hop.

Each for compute capability 8.0 or 9.0 or both, in the converged schedule and at random. Where the
executor has something against a kernel (a race, an address, ...), it is an error.
"""

import itertools
import re

import pytest

import ptx

if ptx.missing():
    pytest.skip(ptx.missing(), allow_module_level=True)

import emulated
import kernel_cases
import numpy as np
import reference
from kernel_cases import name_of

from hnsw_gpu.engine import exact
from hnsw_gpu.engine import vectors as vectors_module
from hnsw_gpu.engine.bits import pack_bits
from hnsw_gpu.engine.keys import KEY_NONE, key_distances
from hnsw_gpu.engine.labels import Labels
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.results import reported

pytestmark = pytest.mark.slow

ARCHS = (80, 90)
SCHEDULES = (None, 1, 2)  # converged, and seeds of random ones
METRICS = ("l2", "ip", "cosine")
DTYPES = ("fp32", "fp16", "int8")


# --- search.cu ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", kernel_cases.launches(), ids=name_of)
def test_search(row) -> None:
    """Of one architecture converged, of the other by a random schedule."""
    asked = kernel_cases.question(row)
    wanted = search_graph(
        asked.graph,
        asked.data.rows,
        asked.data.queries,
        row["metric"],
        **asked.settings,
        allowed=None if asked.mask is None else pack_bits(asked.mask),
        own=asked.own,
    )
    distances = []
    for arch, seed in zip(ARCHS, (None, 1), strict=True):
        build = kernel_cases.build_of(row, arch=arch)
        found = asked.ask(build, **kernel_cases.launch_of(row), seed=seed)
        np.testing.assert_array_equal(found.keys, wanted.keys, err_msg=f"seed {seed}")
        np.testing.assert_array_equal(found.hops, wanted.hops, err_msg=f"seed {seed}")
        np.testing.assert_array_equal(found.blocked, wanted.blocked, err_msg=f"seed {seed}")
        distances.append(found.distances)
    assert (distances[0] >= wanted.distances).all()  # R7: more where it forgot
    assert (distances == distances[0]).all()


@pytest.mark.parametrize("mode", ["plain", "shared", "self per query"])
@pytest.mark.parametrize(("dtype", "warps"), [("fp32", 1), ("int8", 4)])
def test_search_beyond_31_bits(mode, dtype, warps) -> None:
    row = {"metric": "l2", "dtype": dtype, "dim": 31, "M": 4, "warps": warps, "tag_bits": 32}
    row |= {"mode": mode, "k": 100, "ef": 31, "expand": 2, "ef_upper": 4}
    asked = kernel_cases.question(row)
    for arch, seed in zip(ARCHS, (None, 1), strict=True):
        found = kernel_cases.ask_far(asked, kernel_cases.build_of(row, arch=arch), seed)
        np.testing.assert_array_equal(found.keys, asked.wanted().keys)


@pytest.mark.parametrize("dtype", [*DTYPES, "int4"])
def test_warps_change_no_bit(dtype) -> None:
    """R11, on vectors whose sums round; those of codes are the CPU's bits too."""
    rng = np.random.default_rng(3)
    vectors, asked = rng.normal(size=(300, 100)), rng.normal(size=(5, 100))
    rows = vectors_module.encode(vectors.astype(np.float32), "l2", dtype)
    queries = vectors_module.encode_queries(asked.astype(np.float32), "l2", dtype)
    graph = reference.random_graph(vectors.astype(np.float32), 4, seed=9)
    results = [
        emulated.search(
            emulated.Build("l2", dtype, 100, 4, warps, arch=90),
            graph, rows, queries, k=10, ef=40, expand=2, seed=seed,
        )
        for warps, seed in ((1, None), (4, 1), (8, 2))
    ]  # fmt: skip
    for one in results[1:]:
        np.testing.assert_array_equal(one.keys, results[0].keys)
    emulator = emulated.search(
        emulated.Build("l2", dtype, 100, 4), graph, rows, queries, k=10, ef=40, expand=2
    )
    np.testing.assert_array_equal(emulator.keys, results[0].keys)
    if dtype in ("int8", "int4"):
        wanted = search_graph(graph, rows, queries, "l2", k=10, ef=40, expand=2)
        np.testing.assert_array_equal(wanted.keys, results[0].keys)


# --- compare.cu -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "dtype", "dim"),
    [*itertools.product(METRICS, DTYPES, (3, 31, 100, 768)),
     ("l2", "int4", 3), ("cosine", "int4", 100), ("ip", "int4", 768)],
)  # fmt: skip
def test_compare(metric, dtype, dim) -> None:
    made = kernel_cases.data(metric, dtype, dim)
    rng = np.random.default_rng(4)
    ids = rng.choice(len(made.rows), 100, replace=False).astype(np.int32)
    wanted = exact.exact_ids(made.rows, ids, made.queries, metric, k=100, threads=1)
    candidates = rng.permuted(np.where(rng.random(wanted.shape) < 0.3, KEY_NONE, wanted), axis=1)
    for seed in SCHEDULES:
        build = emulated.Build(metric, dtype, dim, 4, arch=ARCHS[seed is None])
        keys = emulated.compare(build, made.rows, made.queries, ids=ids, seed=seed)
        np.testing.assert_array_equal(keys, wanted)
        kept = emulated.compare(build, made.rows, made.queries, ids=ids, k=40, shares=3, seed=seed)
        np.testing.assert_array_equal(kept, wanted[:, :40])
        again = emulated.compare(
            build, made.rows, made.queries, candidates=candidates, k=70, seed=seed
        )
        np.testing.assert_array_equal(again, np.sort(candidates, axis=1)[:, :70])


def test_subnormal_numbers_are_zero() -> None:
    """As CuPy compiles; on the CPU they keep an inner product apart from 0."""
    rows = np.zeros((4, 8), np.float32)
    rows[:, 0] = (1e-39, -1e-39, 2e-38, 0)
    queries = vectors_module.encode_queries(np.eye(1, 8, dtype=np.float32), "ip", "fp32")
    ids = np.arange(4, dtype=np.int32)
    build = emulated.Build("ip", "fp32", 8, 4, arch=90)
    encoded = vectors_module.encode(rows, "ip", "fp32")
    found = key_distances(emulated.compare(build, encoded, queries, ids=ids))
    np.testing.assert_array_equal(found, [np.float32([-2e-38, 0, 0, 0])])
    on_cpu = key_distances(exact.exact_ids(encoded, ids, queries, "ip", k=4, threads=1))
    assert np.count_nonzero(on_cpu) == 3


# --- encode.cu ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "dtype", "dim"),
    [*itertools.product(METRICS, DTYPES, (1, 20, 33, 100)),
     ("ip", "int4", 1), ("cosine", "int4", 33), ("l2", "int4", 128), ("l2", "int4", 768)],
)  # fmt: skip
def test_encode(metric, dtype, dim) -> None:
    rng = np.random.default_rng(dim)
    vectors = rng.normal(size=(13, dim)).astype(np.float32)
    vectors[1] = np.rint(vectors[1] * 3) + 1
    vectors[2] = np.linspace(1, 127, dim)
    vectors[3] *= np.float32(1e-12)
    vectors[4] *= np.float32(1e15)
    wanted = vectors_module.encode_queries(vectors, metric, dtype).view(np.uint8).reshape(13, -1)
    for seed in SCHEDULES:
        build = emulated.Build(metric, dtype, dim, 4, arch=ARCHS[seed is None])
        found = emulated.encode(build, vectors, wanted.shape[1], seed)
        np.testing.assert_array_equal(found, wanted)


# What flushed subnormal numbers leave of R1: below, a query's scale, squared, is 0 (int8), or the
# square of its length (int4), and so is the norm in its tail; nothing else, ten decades further.
LEAST = {"int8": 127 * 2.0**-63, "int4": 2.0**-63}  # largest number; length


@pytest.mark.parametrize(("dtype", "dim"), [("int8", 33), ("int4", 128)])
def test_encode_small_numbers(dtype, dim) -> None:
    """To the least the CPU's bytes, and below it but for a norm of 0."""
    rng = np.random.default_rng(dim)
    vectors = rng.normal(size=(40, dim))
    vectors /= np.linalg.norm(vectors, np.inf if dtype == "int8" else 2, axis=1, keepdims=True)
    above, below = 1 + rng.random(20) + 1e-6, 10.0 ** -rng.uniform(1e-6, 10, 20)
    vectors *= LEAST[dtype] * np.concatenate([above, below])[:, None]
    vectors = vectors.astype(np.float32)
    wanted = vectors_module.encode_queries(vectors, "l2", dtype).view(np.uint8)
    norms = wanted[:, -8:-4]
    assert norms[20:].any()
    norms[20:] = 0
    for arch in ARCHS:
        build = emulated.Build("l2", dtype, dim, 4, arch=arch)
        found = emulated.encode(build, vectors, wanted.shape[1], seed=None)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("dtype", "dim"), [("int8", 33), ("int4", 33)])
def test_encoding_is_rounded_as_it_is_written(dtype, dim) -> None:
    """No multiplication and addition became one, and none may: ptxas leaves `.rn` alone."""
    build = emulated.Build("cosine", dtype, dim, 4, arch=90)
    text = build.library("encode").program.text
    floats = [line for line in text if re.search(r"\b(add|sub|mul|fma|mad)\.\S*f(32|64)\b", line)]
    assert floats
    assert [line for line in floats if not re.search(r"\b(add|sub|mul)\.rn\.", line)] == []


@pytest.mark.parametrize("dtype", [*DTYPES, "int4"])
def test_queries_without_an_answer(dtype) -> None:
    made = kernel_cases.data("cosine", dtype, 32)
    asked = made.vectors[:4].copy()
    asked[0, 31], asked[1, 0], asked[2] = np.nan, np.inf, 0
    build = emulated.Build("cosine", dtype, 32, 4, arch=90)
    width = made.queries.view(np.uint8).reshape(len(made.queries), -1).shape[1]
    queries = emulated.encode(build, asked, width)
    ids = np.arange(50, dtype=np.int32)
    keys = emulated.compare(build, made.rows, queries, ids=ids)
    assert (keys[:3] == KEY_NONE).all() and (keys[3] != KEY_NONE).all()


# --- keys_to_labels.cu ----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "euclidean", "ip"])
@pytest.mark.parametrize("m", [1, 33, 80])
def test_keys_to_labels(metric, m) -> None:
    rng = np.random.default_rng(m)
    offsets = np.concatenate([[0], np.cumsum(rng.choice([0, 1, 1, 3, 40], 120))]).astype(np.int64)
    names = np.split(rng.permutation(int(offsets[-1])).astype(np.int64), offsets[1:-1])
    labels = Labels(offsets, np.concatenate([np.sort(of_a_node) for of_a_node in names]))
    far = np.sort(rng.random((9, m)).astype(np.float32), axis=1) * (-1 if metric == "ip" else 1)
    far.sort(axis=1)
    keys = np.array(
        [
            [reference.key(d, int(n)) for d, n in zip(row, rng.permutation(120)[:m], strict=True)]
            for row in far
        ],
        np.uint64,
    )
    keys[2, m // 2 :], keys[3] = KEY_NONE, KEY_NONE
    build_metric = "l2" if metric == "euclidean" else metric
    for k, seed in ((1, None), (10, 1), (70, 2), (400, None)):
        wanted = labels.keys_to_labels(keys, k)
        build = emulated.Build(build_metric, "fp32", 8, 4, arch=ARCHS[seed is None])
        found = emulated.keys_to_labels(
            build, keys, offsets, labels.packed()[1], k, metric == "euclidean", seed
        )
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], reported(wanted[1], metric))
