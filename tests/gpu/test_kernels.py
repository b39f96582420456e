"""The kernels, executed on the emulator and on a GPU, equal the oracle and the CPU engine.

search.cu: keys and hops of `reference.py` and of `search.py` on integer-valued vectors, over a
pairwise design of all that specialises or steers it (`kernel_cases.py`).
"""

import concurrent.futures

import emulated
import emulator
import kernel_cases
import numpy as np
import oracle
import pairwise
import pytest
import reference
from emulator import cupy_stand_in
from kernel_cases import name_of

from hnsw_gpu import inputs
from hnsw_gpu.engine import exact
from hnsw_gpu.engine import vectors as vectors_module
from hnsw_gpu.engine.bits import pack_bits
from hnsw_gpu.engine.keys import KEY_NONE, key_distances, key_nodes
from hnsw_gpu.engine.labels import Labels
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.gpu import kernel_source
from hnsw_gpu.results import reported

pytestmark = pytest.mark.slow

METRICS = ["l2", "ip", "cosine"]
DTYPES = ["fp32", "fp16", "int8"]
CODES = ("int8", "int4")  # a fixed chain of operations: equal on any data


@pytest.fixture(autouse=True)
def runs_somewhere(request: pytest.FixtureRequest) -> None:
    """What does not take `on_gpu` needs the emulator."""
    if "on_gpu" not in request.fixturenames and emulator.missing():
        pytest.skip(emulator.missing())


def compile_all(jobs, on_gpu: bool = False) -> None:
    """Compile (build, kernel, has_allowed_keys), two at a time; CuPy does that for a GPU."""
    if on_gpu:
        return
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: job[0].library(*job[1:]), jobs))


# --- search.cu beside the oracle ------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(on_gpu: bool) -> None:
    jobs = {
        (kernel_cases.build_of(row), "search", row["has_allowed_keys"])
        for row in kernel_cases.launches()
    }
    compile_all(sorted(jobs, key=str), on_gpu)


def assert_same(found, wanted, said: str) -> None:
    np.testing.assert_array_equal(found.keys, wanted.keys, err_msg=f"keys, {said}")
    np.testing.assert_array_equal(found.hops, wanted.hops, err_msg=f"hops, {said}")
    np.testing.assert_array_equal(found.blocked, wanted.blocked, err_msg=f"blocked, {said}")


def test_design_covers_every_pair() -> None:
    met = set().union(*(pairwise.pairs(row) for row in kernel_cases.launches()))
    for one, other in (("dim", "ef"), ("warps", "mode"), ("metric", "k"), ("M", "expand")):
        values = kernel_cases.SPECIALISATION | kernel_cases.STEERING
        first, second = sorted((one, other))
        assert {((first, a), (second, b)) for a in values[first] for b in values[second]} <= met, (
            one,
            other,
        )
    assert len(kernel_cases.specialisations()) <= 35


@pytest.mark.parametrize("row", kernel_cases.launches(), ids=name_of)
def test_parity(compiled, row, on_gpu) -> None:
    asked = kernel_cases.question(row)
    wanted = asked.wanted()
    build = kernel_cases.build_of(row, on_gpu=on_gpu)
    results = [asked.ask(build, **kernel_cases.launch_of(row), seed=seed) for seed in range(3)]
    assert_same(results[0], wanted, "oracle")
    for seed in (1, 2):
        for one, other in zip(results[seed], results[0], strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"seed {seed}")
    assert (results[0].distances >= wanted.distances).all()  # R7: more where it forgot
    engine = search_graph(
        asked.graph,
        asked.data.rows,
        asked.data.queries,
        row["metric"],
        **asked.settings,
        allowed=None if asked.mask is None else pack_bits(asked.mask),
        own=asked.own,
    )
    assert_same(results[0], engine, "CPU engine")


@pytest.mark.parametrize("warps", [1, 4])
def test_searching_again_changes_nothing(warps, on_gpu) -> None:
    # Every query twice, through one group and through more groups than queries.
    row = {"metric": "l2", "dtype": "fp32", "dim": 31, "M": 4, "warps": warps, "tag_bits": 16}
    row |= {"mode": "self per query", "k": 12, "ef": 31, "expand": 2, "ef_upper": 1}
    once = kernel_cases.question(row)
    twice = once._replace(
        data=once.data._replace(queries=np.concatenate([once.data.queries] * 2)),
        mask=np.concatenate([once.mask] * 2),
        own=np.concatenate([once.own] * 2),
    )
    wanted = once.wanted()
    for groups, blocks in ((1, 1), (4, 4)):
        found = twice.ask(kernel_cases.build_of(row, on_gpu=on_gpu), groups=groups, blocks=blocks)
        for half in (slice(0, 4), slice(4, 8)):
            np.testing.assert_array_equal(found.keys[half], wanted.keys)
            np.testing.assert_array_equal(found.hops[half], wanted.hops)
        np.testing.assert_array_equal(found.distances[:4], found.distances[4:])


def test_a_large_visited_cache_forgets_nothing(on_gpu) -> None:
    row = {"metric": "l2", "dtype": "fp32", "dim": 31, "M": 4, "warps": 1, "tag_bits": 16}
    row |= {"mode": "plain", "k": 12, "ef": 31, "expand": 2, "ef_upper": 4}
    asked = kernel_cases.question(row)
    wanted = asked.wanted()
    found = asked.ask(kernel_cases.build_of(row, on_gpu=on_gpu), visited_buckets=1024)
    np.testing.assert_array_equal(found.distances, wanted.distances)
    small = asked.ask(kernel_cases.build_of(row, on_gpu=on_gpu), visited_buckets=1)
    assert (small.distances > wanted.distances).all()
    np.testing.assert_array_equal(small.keys, found.keys)


def test_shared_memory_is_all_that_is_asked_for() -> None:
    row = {"metric": "l2", "dtype": "fp32", "dim": 31, "M": 4, "warps": 1, "tag_bits": 16}
    row |= {"mode": "plain", "k": 12, "ef": 31, "expand": 2, "ef_upper": 4}
    with pytest.raises(emulator.KernelError, match="memory that is not there"):
        kernel_cases.question(row).ask(kernel_cases.build_of(row), limit=16, groups=1)


def test_the_launcher_for_a_gpu() -> None:
    """Over the stand-in for CuPy: what goes up, and comes back, is what the kernel means."""
    row = {"metric": "l2", "dtype": "int8", "dim": 31, "M": 4, "warps": 1, "tag_bits": 16}
    row |= {"mode": "self per query", "k": 12, "ef": 31, "expand": 2, "ef_upper": 4}
    asked = kernel_cases.question(row)
    build = kernel_cases.build_of(row, on_gpu=True)
    emulates = build._replace(on_gpu=False)
    with cupy_stand_in.installed():
        assert_same(asked.ask(build), asked.wanted(), "oracle")
        rows, queries = asked.data.rows, asked.data.queries
        ids = np.arange(50, dtype=np.int32)
        found = emulated.compare(build, rows, queries, ids=ids, k=7)
        np.testing.assert_array_equal(
            found, emulated.compare(emulates, rows, queries, ids=ids, k=7)
        )
        width = queries.view(np.uint8).reshape(len(queries), -1).shape[1]
        found = emulated.encode(build, asked.data.vectors[:5], width)
        np.testing.assert_array_equal(
            found, emulated.encode(emulates, asked.data.vectors[:5], width)
        )
    emulated.forget_gpu_kernels()


# --- beyond 2**31 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "shared", "per query", "self per query"])
@pytest.mark.parametrize(("dtype", "warps"), [("fp32", 1), ("int8", 4)])
def test_offsets_beyond_31_bits(mode, dtype, warps) -> None:
    row = {"metric": "l2", "dtype": dtype, "dim": 31, "M": 4, "warps": warps, "tag_bits": 32}
    row |= {"mode": mode, "k": 100, "ef": 31, "expand": 2, "ef_upper": 4}
    asked = kernel_cases.question(row)
    found = kernel_cases.ask_far(asked, kernel_cases.build_of(row))
    assert_same(found, asked.wanted(), "ids from 2**30, queries from 2**25")


def far_block(kernel: str, first_block: int) -> str:
    """The kernel's text, all of whose blocks have numbers that begin elsewhere."""
    text = kernel_source.source(kernel)
    assert text.count("blockIdx.x") == 1
    return text.replace("blockIdx.x", f"(blockIdx.x + {first_block})")


def test_offsets_of_the_other_kernels() -> None:
    block = 2**21
    build = emulated.Build("l2", "fp32", 31, 4)
    made = kernel_cases.data("l2", "fp32", 31)
    ids = np.arange(200, dtype=np.int32)
    wanted = emulated.compare(build, made.rows, made.queries, ids=ids)
    far = build._replace(source=far_block("compare", block))
    keys = np.zeros(wanted.shape, np.uint64)
    id_base, q = kernel_cases.FAR_ID, 8 * block
    shifted = ids + np.int32(id_base)
    task, held = emulated.struct(
        "Comparison",
        rows=kernel_cases.before(made.rows, id_base * made.rows[0].nbytes),
        queries=kernel_cases.before(made.queries, q * made.queries[0].nbytes),
        ids=shifted,
        candidates=None,
        keys=kernel_cases.before(keys, q * 200 * 8),
        query_count=q + len(made.queries),
        count=200,
        k=0,
    )
    far.library("compare").launch((1, 2), (256,), (task,))
    keys -= np.uint64(id_base << 1)
    np.testing.assert_array_equal(np.sort(keys, axis=1), wanted)
    kept = np.zeros((len(made.queries), 2, 200), np.uint64)
    task["k"], task["keys"] = 200, kernel_cases.before(kept, q * kept[0].nbytes)
    far.library("compare").launch((1, 2), (256,), (task,), shared_mem=8 * (256 + 8 * 200))
    nearest = np.sort(kept.reshape(len(kept), -1), axis=1)[:, :200] - np.uint64(id_base << 1)
    np.testing.assert_array_equal(nearest, wanted)
    del held

    block = 2**26
    q = 4 * block  # a warp a query, in these two
    out = np.zeros((4, 128), np.uint8)
    task, held = emulated.struct(
        "Encoding",
        vectors=kernel_cases.before(made.vectors, q * 31 * 4),
        queries=kernel_cases.before(out, q * 128),
        count=q + 4,
    )
    far = build._replace(source=far_block("encode", block))
    far.library("encode").launch((1,), (128,), (task,))
    np.testing.assert_array_equal(out, emulated.encode(build, made.vectors[:4], 128))

    offsets = np.arange(201, dtype=np.int64)
    names = np.arange(200, dtype=np.int64) * 7
    labels, far_off = np.zeros((4, 9), np.int64), np.zeros((4, 9), np.float32)
    near = emulated.keys_to_labels(build, wanted, offsets, names, 9)
    task, held_too = emulated.struct(
        "KeysToLabels",
        keys=kernel_cases.before(wanted, q * wanted[0].nbytes),
        offsets=offsets,
        entry_labels=names,
        labels=kernel_cases.before(labels, q * labels[0].nbytes),
        distances=kernel_cases.before(far_off, q * far_off[0].nbytes),
        query_count=q + 4,
        m=200,
        k=9,
        root=0,
    )
    far = build._replace(source=far_block("keys_to_labels", block))
    far.library("keys_to_labels").launch((1,), (128,), (task,))
    np.testing.assert_array_equal(labels, near[0])
    np.testing.assert_array_equal(far_off, near[1])
    del held, held_too


# --- real data ------------------------------------------------------------------------------------


class Real:
    """Normal vectors, clustered, with a graph over them."""

    def __init__(self, metric: str, dtype: str, dim: int, n: int = 300, count: int = 7):
        rng = np.random.default_rng([dim, 9])
        self.vectors = oracle.gaussian(n, dim, seed=dim, clusters=8, spread=0.5)
        self.asked = oracle.gaussian(count, dim, seed=dim + 1, clusters=8, spread=0.5)
        self.graph = reference.random_graph(self.vectors, 4, seed=9)
        self.rows = vectors_module.encode(self.vectors, metric, dtype)
        self.queries = vectors_module.encode_queries(self.asked, metric, dtype)
        self.order = rng.permutation(count)
        self.truth = oracle.distances(self.asked, self.vectors, metric)


REAL = [("l2", "fp32", 100), ("ip", "fp32", 768), ("cosine", "fp16", 127), ("l2", "int8", 768)]
REAL += [("cosine", "int4", 768)]


@pytest.mark.parametrize(("metric", "dtype", "dim"), REAL, ids=str)
def test_bits_and_recall_on_real_data(metric, dtype, dim, on_gpu) -> None:
    # R11: neither the warps of a query, nor the batch, nor the place in it, nor the kernel
    # changes a bit; and the answer is as good as the CPU engine's.
    made = Real(metric, dtype, dim)
    builds = [emulated.Build(metric, dtype, dim, 4, warps, on_gpu=on_gpu) for warps in (1, 4, 8)]
    compile_all(
        [(build, "search", False) for build in builds] + [(builds[0], "compare", False)], on_gpu
    )
    settings = {"k": 10, "ef": 40, "expand": 2}
    whole = emulated.search(builds[0], made.graph, made.rows, made.queries, **settings, groups=4)
    for build in builds[1:]:
        found = emulated.search(build, made.graph, made.rows, made.queries, **settings)
        assert_same(found, whole, f"{build.warps} warps")
    turned = emulated.search(
        builds[0], made.graph, made.rows, made.queries[made.order], **settings, blocks=3
    )
    np.testing.assert_array_equal(turned.keys, whole.keys[made.order])
    for q in (0, 4):
        alone = emulated.search(
            builds[0], made.graph, made.rows, made.queries[q : q + 1], **settings, seed=q
        )
        np.testing.assert_array_equal(alone.keys[0], whole.keys[q])
    again = emulated.compare(builds[0], made.rows, made.queries, candidates=whole.keys)
    np.testing.assert_array_equal(again, whole.keys)
    listed = emulated.compare(
        builds[0], made.rows, made.queries, ids=np.arange(len(made.rows), dtype=np.int32)
    )
    assert np.isin(whole.keys, listed).all()

    engine = search_graph(made.graph, made.rows, made.queries, metric, **settings)
    found = key_nodes(whole.keys)
    far = reported(key_distances(whole.keys), metric)
    error = np.abs(far - np.take_along_axis(made.truth, found, axis=1))
    if dtype != "int4":  # an estimate
        bound = oracle.error_bound(made.asked, made.vectors, metric, dtype)
        assert (error <= np.take_along_axis(bound, found, axis=1)).all()
    recalls = [oracle.recall(key_nodes(keys), made.truth, 10) for keys in (whole.keys, engine.keys)]
    assert abs(recalls[0] - recalls[1]) <= 0.002
    if dtype in CODES:
        assert_same(whole, engine, "CPU engine")


# --- distances ------------------------------------------------------------------------------------


def distance_builds():
    rows = [(metric, dtype, 31) for metric in METRICS for dtype in DTYPES]
    rows += [("l2", "fp16", 1), ("l2", "int8", 1), ("ip", "fp32", 127), ("l2", "int8", 768)]
    rows += [("ip", "fp16", 1536), ("cosine", "int8", 1536), ("ip", "fp32", 4096)]
    rows += [("l2", "int4", 1), ("ip", "int4", 100), ("cosine", "int4", 1536), ("l2", "int4", 4096)]
    return [emulated.Build(metric, dtype, dim, 4) for metric, dtype, dim in rows]


@pytest.fixture(scope="module")
def comparing(on_gpu: bool) -> None:
    compile_all([(build, "compare", False) for build in distance_builds()], on_gpu)


@pytest.mark.parametrize("build", distance_builds(), ids=lambda b: f"{b.metric}-{b.dtype}-{b.dim}")
def test_distances(comparing, build, on_gpu) -> None:
    """compare.cu beside float64, and beside exact.py: listed ids and candidates."""
    build = build._replace(on_gpu=on_gpu)
    rng = np.random.default_rng(build.dim)
    scales = 10.0 ** rng.integers(-2, 3, (50, 1))
    vectors = (rng.normal(size=(50, build.dim)) * scales).astype(np.float32)
    asked = rng.normal(size=(9, build.dim)).astype(np.float32)  # nine: a second block of eight
    rows = vectors_module.encode(vectors, build.metric, build.dtype)
    queries = vectors_module.encode_queries(asked, build.metric, build.dtype)
    ids = rng.choice(50, 37, replace=False).astype(np.int32)
    keys = emulated.compare(build, rows, queries, ids=ids)
    truth = oracle.distances(asked, vectors, build.metric)
    bound = oracle.error_bound(asked, vectors, build.metric, build.dtype)
    for q in range(9):
        found = key_nodes(keys[q])
        assert sorted(found) == sorted(ids)
        far = reported(key_distances(keys[q]), build.metric)
        error = np.abs(far.astype(np.float64) - truth[q, found])
        assert build.dtype == "int4" or (error <= bound[q, found]).all()
    kept = emulated.compare(build, rows, queries, ids=ids, k=10)
    np.testing.assert_array_equal(kept, keys[:, :10])
    wanted = exact.exact_ids(rows, ids, queries, build.metric, k=37, threads=1)
    if build.dtype in CODES:
        np.testing.assert_array_equal(keys, wanted)
    # candidates: those keys in any order, with empty places among them
    candidates = rng.permuted(np.where(rng.random(keys.shape) < 0.3, KEY_NONE, keys), axis=1)
    again = emulated.compare(build, rows, queries, candidates=candidates)
    np.testing.assert_array_equal(again, np.sort(candidates, axis=1))
    kept = emulated.compare(build, rows, queries, candidates=candidates, k=30)
    np.testing.assert_array_equal(kept, again[:, :30])
    if build.dtype in CODES:
        found = exact.rerank(
            np.sort(candidates, axis=1), rows, queries, build.metric, k=37, threads=1
        )
        np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compare_equals_exact_on_integers(comparing, dtype, on_gpu) -> None:
    for metric in METRICS:
        made = kernel_cases.data(metric, dtype, 31)
        build = emulated.Build(metric, dtype, 31, 4, on_gpu=on_gpu)
        ids = np.random.default_rng(4).choice(len(made.rows), 100, replace=False).astype(np.int32)
        keys = emulated.compare(build, made.rows, made.queries, ids=ids)
        wanted = exact.exact_ids(made.rows, ids, made.queries, metric, k=100, threads=1)
        np.testing.assert_array_equal(keys, wanted)
        np.testing.assert_array_equal(
            keys, np.sort([[row[i] for i in ids] for row in made.table], axis=1)
        )
        kept = emulated.compare(build, made.rows, made.queries, ids=ids, k=40, shares=3)
        np.testing.assert_array_equal(kept, wanted[:, :40])
        other = vectors_module.encode_queries(-made.vectors[:4], metric, dtype)
        again = emulated.compare(build, made.rows, other, candidates=keys)
        wanted = exact.rerank(keys, made.rows, other, metric, k=100, threads=1)
        np.testing.assert_array_equal(again, wanted)
        kept = emulated.compare(build, made.rows, other, candidates=keys, k=40, shares=1)
        np.testing.assert_array_equal(kept, wanted[:, :40])


@pytest.mark.parametrize("shares", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compare_keeps_the_nearest(comparing, dtype, shares, on_gpu) -> None:
    """Of ids, and of candidates with empty places among them; also where there are fewer than k."""
    made = kernel_cases.data("l2", dtype, 31)
    build = emulated.Build("l2", dtype, 31, 4, on_gpu=on_gpu)
    rng = np.random.default_rng(5)
    sizes = [(1, 1), (1, 3), (130, 1), (130, 40), (130, 130), (150, 200)]
    for m, k in [*sizes, (150, 512), (600, 512), (600, 513)]:
        ids = rng.choice(len(made.rows), m, replace=False).astype(np.int32)
        keys = emulated.compare(build, made.rows, made.queries, ids=ids)
        wanted = np.full((len(keys), k), KEY_NONE, np.uint64)
        wanted[:, : min(k, m)] = keys[:, :k]
        found = emulated.compare(build, made.rows, made.queries, ids=ids, k=k, shares=shares)
        np.testing.assert_array_equal(found, wanted)
        given = rng.permuted(np.where(rng.random(keys.shape) < 0.4, KEY_NONE, keys), axis=1)
        left = np.sort(given, axis=1)[:, :k]
        wanted[:] = KEY_NONE
        wanted[:, : left.shape[1]] = left
        found = emulated.compare(
            build, made.rows, made.queries, candidates=given, k=k, shares=shares
        )
        np.testing.assert_array_equal(found, wanted)


# --- encode.cu ------------------------------------------------------------------------------------


def encoders():
    return [
        emulated.Build(metric, dtype, dim, 4)
        for metric in ("l2", "cosine")  # ip is encoded as l2
        for dtype in DTYPES
        for dim in ((1, 20, 21) if dtype == "int8" else (20,))
    ] + [
        emulated.Build(metric, dtype, dim, 4)
        for metric, dtype, dim in (
            *(("ip", "int8", 127), ("l2", "int4", 1), ("l2", "int4", 20), ("ip", "int4", 64)),
            *(("cosine", "int4", 101), ("l2", "int4", 3073)),  # the last with two warps a block
        )
    ]


@pytest.fixture(scope="module")
def encoding(on_gpu: bool) -> None:
    compile_all([(build, "encode", False) for build in encoders()], on_gpu)


@pytest.mark.parametrize("build", encoders(), ids=lambda b: f"{b.metric}-{b.dtype}-{b.dim}")
def test_encode(encoding, build, on_gpu) -> None:
    build = build._replace(on_gpu=on_gpu)
    rng = np.random.default_rng(build.dim)
    # not below 1.4e-17: a GPU takes subnormal numbers for 0, as the square of an int8 query's scale
    # is one there (test_encode_small_numbers in tests/ptx says what is left)
    vectors = rng.normal(size=(150, build.dim)) * 10.0 ** rng.integers(-14, 18, (150, 1))
    vectors = vectors.astype(np.float32)
    vectors[1] = np.rint(vectors[1]) + 1  # halves and ties of rounding
    vectors[2, :] = np.linspace(-127, 127, build.dim, dtype=np.float32)
    vectors[24:, -1] = rng.choice(np.array([0.0, -0.0, 1e-3], np.float32), 126)
    vectors[24:, 0] += 1
    if build.metric != "cosine":
        vectors[3] = 0
    # halves of a scale that is no power of two
    odd = 2 * rng.integers(-63, 63, (20, build.dim)) + 1
    vectors[4:24] = odd * (1.5 + np.arange(20)[:, None])
    vectors[4:24, 0] = 127 * (3 + 2 * np.arange(20))
    wanted = vectors_module.encode_queries(vectors, build.metric, build.dtype)
    wanted = wanted.view(np.uint8).reshape(150, -1)
    np.testing.assert_array_equal(emulated.encode(build, vectors, wanted.shape[1]), wanted)


UNANSWERED = [
    ("l2", "fp32"),
    ("ip", "fp16"),
    ("cosine", "fp16"),
    ("cosine", "int8"),
    ("l2", "int8"),
    ("ip", "int4"),
]


@pytest.fixture(scope="module")
def asking(on_gpu: bool) -> None:
    builds = [emulated.Build(metric, dtype, 32, 4) for metric, dtype in UNANSWERED]
    compile_all(
        [(build, k, False) for build in builds for k in ("search", "compare", "encode")], on_gpu
    )


@pytest.mark.parametrize(("metric", "dtype"), UNANSWERED)
def test_queries_without_an_answer(asking, metric, dtype, on_gpu) -> None:
    """NaN, infinite, and under cosine zero: encoded as none, and nothing is found."""
    build = emulated.Build(metric, dtype, 32, 4, on_gpu=on_gpu)
    made = kernel_cases.data(metric, dtype, 32)
    asked = made.vectors[:7].copy()
    asked[0, 31], asked[1, 0], asked[2, 5], asked[3, 7] = np.nan, np.inf, -np.inf, np.nan
    asked[4] = np.nan
    asked[5] = 0
    width = made.queries.view(np.uint8).reshape(len(made.queries), -1).shape[1]
    queries = emulated.encode(build, asked, width)
    found = emulated.search(
        build, kernel_cases.graph(metric, dtype, 32, 4), made.rows, queries, k=5, ef=20, blocks=1
    )
    empty = 6 if metric == "cosine" else 5
    assert (found.keys[:empty] == KEY_NONE).all()
    assert (found.hops[:empty] == 0).all()
    assert (found.keys[empty:] != KEY_NONE).all()
    every = np.arange(len(made.rows), dtype=np.int32)
    keys = emulated.compare(build, made.rows, queries, ids=every)
    kept = emulated.compare(build, made.rows, queries, ids=every, k=7)
    np.testing.assert_array_equal(kept, keys[:, :7])
    assert (keys[:empty] == KEY_NONE).all()
    assert (keys[empty:] != KEY_NONE).all()


@pytest.mark.parametrize(("metric", "dtype"), UNANSWERED)
def test_queries_of_any_length(asking, metric, dtype, on_gpu) -> None:
    """An answer where inputs.py takes them: cosine knows no length, and l2 a tiny query."""
    build = emulated.Build(metric, dtype, 32, 4, on_gpu=on_gpu)
    made = kernel_cases.data(metric, dtype, 32)
    asked = made.vectors[:3] / np.linalg.norm(made.vectors[:3], axis=1, keepdims=True)
    asked *= np.float32([[9e-15], [1.1e-14], [1e19]])
    width = made.queries.view(np.uint8).reshape(len(made.queries), -1).shape[1]
    queries = emulated.encode(build, asked, width)
    found = emulated.compare(build, made.rows, queries, ids=np.arange(9, dtype=np.int32))
    is_answered = [metric != "ip", True, metric == "cosine"]
    np.testing.assert_array_equal((found != KEY_NONE).all(axis=1), is_answered)
    np.testing.assert_array_equal((found == KEY_NONE).all(axis=1), np.invert(is_answered))
    for query, is_taken in zip(asked, is_answered, strict=True):
        try:
            inputs.float_vectors("queries", query[None], metric, "")
        except ValueError:
            assert not is_taken
        else:
            assert is_taken


# --- keys_to_labels.cu ----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "euclidean", "ip", "cosine"])
def test_keys_to_labels(metric, on_gpu) -> None:
    rng = np.random.default_rng(6)
    n, count = 90, 30
    carried = rng.integers(0, 6, n)  # labels a node: none to five copies
    carried[7] = 200
    offsets = np.concatenate([[0], np.cumsum(carried)]).astype(np.int64)
    entries = int(offsets[-1])
    names = (rng.permutation(entries) * 2**40 // 7 - 2**41).astype(np.int64)
    for node in range(n):
        names[offsets[node] : offsets[node + 1]].sort()
    labels = Labels(offsets, names)
    root = metric == "euclidean"
    build = emulated.Build("l2" if root else metric, "fp32", 8, 4, on_gpu=on_gpu)
    for m in (1, 12, 32, 33, 80):
        keys = np.full((count, m), KEY_NONE, np.uint64)
        for q in range(count):
            length = (0, m, m, m)[q] if q < 4 else int(rng.integers(0, m + 1))
            far = rng.random(length).astype(np.float32) * 9
            far *= -1 if metric == "ip" else 1
            chosen = rng.choice(n, length, replace=False)
            if q % 3 == 1 and length and 7 not in chosen:
                chosen[0] = 7  # the one with many labels; near or far
            keys[q, :length] = sorted(
                reference.key(value, int(node)) for value, node in zip(far, chosen, strict=True)
            )
        for k in (1, 7, 70, 500):
            wanted = labels.keys_to_labels(keys, k)
            found = emulated.keys_to_labels(build, keys, offsets, names, k, root)
            np.testing.assert_array_equal(found[0], wanted[0])
            np.testing.assert_array_equal(found[1], reported(wanted[1], metric))
