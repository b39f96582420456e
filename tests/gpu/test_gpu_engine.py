"""The GPU engine equals the CPU engine, key for key, and orders its work on streams as CUDA needs.

The kernels are emulated and CuPy is replaced by `emulator/cupy_stand_in.py`, which runs what is
enqueued as late as it may; tests of values run on a real GPU too, where there is one.
"""

import builtins
import logging
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import emulator
import numpy as np
import pytest
import reference
from emulator import cupy_stand_in

from hnsw_gpu.engine import filtered_search
from hnsw_gpu.engine import vectors as vectors_module
from hnsw_gpu.engine.bits import pack_bits
from hnsw_gpu.engine.cpu_engine import CpuEngine
from hnsw_gpu.engine.keys import KEY_NONE, key_distances, key_nodes
from hnsw_gpu.engine.labels import Labels
from hnsw_gpu.engine.walk import Queries, Walk
from hnsw_gpu.gpu import device_index, gpu_engine, host_batches, launch_plan
from hnsw_gpu.gpu.gpu_engine import GpuEngine
from hnsw_gpu.results import reported

pytestmark = pytest.mark.slow

METRICS = ["l2", "ip", "cosine"]
DTYPES = ["fp32", "fp16", "int8"]
M = 4
DIM = 16
NODES = 200
QUERIES = 9
FORMS = [("l2", "fp32", ""), ("cosine", "int8", ""), ("ip", "fp16", ""), ("l2", "int4", "fp16")]


def searches(machine: cupy_stand_in.Machine) -> list[cupy_stand_in.Launch]:
    return [it for it in machine.launches if it.kernel == "search"]


class Case(NamedTuple):
    """The same index on the CPU and, empty, on the GPU."""

    cpu: CpuEngine
    gpu: GpuEngine
    queries: np.ndarray

    def upload(self, changed: np.ndarray | None = None) -> "Case":
        self.gpu.update(self.cpu, changed)
        return self


def make_case(
    metric: str = "l2", dtype: str = "fp32", refine: str = "", seed: int = 5, count: int = NODES
) -> Case:
    """Integer vectors on a random graph, not uploaded; some queries are stored vectors."""
    rng = np.random.default_rng(seed)
    # int8 distances tie where codes are the same few, and are off where they are many
    largest = 1 if dtype == "int8" and not refine else 3
    pool = reference.integer_vectors(count + QUERIES // 2, DIM, metric, rng, largest)
    vectors = pool[:count]
    queries = np.concatenate([vectors[: QUERIES - QUERIES // 2], pool[count:]])
    rows = vectors_module.encode(vectors, metric, dtype)
    fine = vectors_module.encode(vectors, metric, refine) if refine else None
    graph = reference.random_graph(vectors, M, seed)
    cpu = CpuEngine(graph, rows, fine, metric, dtype, refine)
    return Case(cpu, GpuEngine(metric, dtype, refine, DIM, M), queries)


def truncated(cpu: CpuEngine, count: int, keep_links: bool = False) -> CpuEngine:
    """The engine with the first `count` nodes alone, on a graph of its own."""
    vectors = vectors_module.decode(cpu.rows[:count], DIM, cpu.dtype)
    fine = None if cpu.refine_rows is None else cpu.refine_rows[:count]
    return cpu._replace(
        graph=reference.random_graph(vectors, M, 1), rows=cpu.rows[:count], refine_rows=fine
    )


def walked(engine, queries, k, ef, *, own=None, allowed=None, **how) -> np.ndarray:
    return engine.walk(Queries(queries, own), Walk(k, ef, **how), allowed).keys


def compared(engine, queries, ids, k, own=None) -> np.ndarray:
    return engine.compare(Queries(queries, own), ids, k)


def allowed(mask: np.ndarray | None) -> filtered_search.Allowed | None:
    return None if mask is None else filtered_search.Allowed.of(pack_bits(mask))


def mask_of(shape: tuple[int, ...], share: float = 0.4) -> np.ndarray:
    mask = np.random.default_rng(8).random(shape) < share
    if len(mask) == QUERIES:
        mask[0], mask[1] = False, True
    return mask


# --- the CPU engine's keys ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_walk_and_compare(device: str, metric: str, dtype: str) -> None:
    case = make_case(metric, dtype).upload()
    ids = np.flatnonzero(mask_of((NODES,)))
    own = np.array([7, 0, NODES - 1, 7, 31])
    for settings in ({"k": 5, "ef": 20}, {"k": 1, "ef": 1, "expand": 4, "ef_upper": 3}):
        for _ in range(2):  # what the first leaves behind must not matter
            wanted = walked(case.cpu, case.queries, **settings)
            np.testing.assert_array_equal(walked(case.gpu, case.queries, **settings), wanted)
            wanted = walked(case.cpu, None, own=own, **settings)
            assert not (key_nodes(wanted) == own[:, None]).any()
            np.testing.assert_array_equal(walked(case.gpu, None, own=own, **settings), wanted)
    wanted = compared(case.cpu, case.queries, ids, 7)
    np.testing.assert_array_equal(compared(case.gpu, case.queries, ids, 7), wanted)
    wanted = compared(case.cpu, None, ids, 7, own=own)
    np.testing.assert_array_equal(compared(case.gpu, None, ids, 7, own=own), wanted)
    np.testing.assert_array_equal(case.gpu.own_keys(own), case.cpu.own_keys(own))


@pytest.mark.parametrize(
    ("dtype", "refine"),
    [("int8", "fp32"), ("int8", "fp16"), ("fp16", "fp32"), ("int4", "fp16")],
)
def test_refine(device: str, dtype: str, refine: str) -> None:
    case = make_case("l2", dtype, refine).upload()
    own = np.array([3, 77, 3])
    coarse = walked(case.cpu._replace(refine_rows=None, refine=""), case.queries, 15, 15)
    fine = walked(case.cpu, case.queries, 15, 15)
    assert (dtype == "fp16") == (
        key_nodes(coarse) == key_nodes(fine)
    ).all()  # integers are exact in fp16
    for k, ef, rerank in ((4, 15, 0), (4, 15, 6), (15, 15, 0), (4, 3, 0)):
        wanted = walked(case.cpu, case.queries, k, ef, rerank=rerank)
        np.testing.assert_array_equal(walked(case.gpu, case.queries, k, ef, rerank=rerank), wanted)
        wanted = walked(case.cpu, None, k, ef, own=own, rerank=rerank)
        np.testing.assert_array_equal(walked(case.gpu, None, k, ef, own=own, rerank=rerank), wanted)
    wanted = compared(case.cpu, case.queries, np.arange(NODES), 9)
    np.testing.assert_array_equal(compared(case.gpu, case.queries, np.arange(NODES), 9), wanted)
    np.testing.assert_array_equal(case.gpu.own_keys(own), case.cpu.own_keys(own))


@pytest.mark.parametrize("metric", METRICS)
def test_keys_of_int4_are_the_cpus_on_any_data(device: str, metric: str) -> None:
    """Bit for bit: queries that a kernel rotates, and stored nodes; one filter, and one a query."""
    rng = np.random.default_rng(6)
    vectors = rng.normal(size=(NODES, DIM)) * 10.0 ** rng.integers(-3, 4, (NODES, 1)) + 0.3
    vectors = vectors.astype(np.float32)
    queries = (vectors[:40] + rng.normal(size=(40, DIM)) * 0.1).astype(np.float32)
    rows = vectors_module.encode(vectors, metric, "int4")
    graph = reference.random_graph(vectors, M, 6)
    case = Case(CpuEngine(graph, rows, None, metric, "int4", ""),
                GpuEngine(metric, "int4", "", DIM, M), queries).upload()  # fmt: skip
    own = np.arange(40) * 5
    bits = [None, pack_bits(rng.random(NODES) < 0.3), pack_bits(rng.random((40, NODES)) < 0.3)]
    for allowed in bits:
        for settings in ({"k": 7, "ef": 30}, {"k": 7, "ef": 9, "expand": 4, "ef_upper": 3}):
            for asking in ({"queries": queries}, {"queries": None, "own": own}):
                wanted = walked(case.cpu, **asking, **settings, allowed=allowed)
                found = walked(case.gpu, **asking, **settings, allowed=allowed)
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("shape", [(NODES,), (1, NODES), (QUERIES, NODES)], ids=str)
@pytest.mark.parametrize("refine", ["", "fp32"])
def test_masks(device: str, refine: str, shape: tuple[int, ...]) -> None:
    case = make_case("l2", "int8", refine).upload()
    bits = pack_bits(mask_of(shape))
    for settings in ({"k": 6, "ef": 12}, {"k": 6, "ef": 12, "capacity": 40}):
        for asking in (Queries(case.queries), Queries(own=np.arange(QUERIES))):
            wanted = case.cpu.walk(asking, Walk(**settings), bits)
            assert (wanted.keys == KEY_NONE).any() == (shape[0] == QUERIES)  # a mask of nothing
            assert wanted.blocked.any()
            found = case.gpu.walk(asking, Walk(**settings), bits)
            np.testing.assert_array_equal(found.keys, wanted.keys)
            np.testing.assert_array_equal(found.blocked, wanted.blocked)


def test_policy_over_both_engines(device: str) -> None:
    """`filtered_search.py` asks both alike: filters, radius, neighbours of stored nodes."""
    case = make_case("l2", "fp32").upload()
    others = np.arange(0, NODES, 17)
    for mask in (None, mask_of((NODES,)), mask_of((NODES,), 0.05), mask_of((QUERIES, NODES), 0.9)):
        found = [
            filtered_search.nearest(e, Queries(case.queries), Walk(5, 8), allowed(mask))
            for e in (case.cpu, case.gpu)
        ]
        np.testing.assert_array_equal(*found)
        found = [
            np.concatenate(
                filtered_search.within(
                    e,
                    Queries(case.queries),
                    lambda distance: distance <= 90,
                    Walk(1, 4),
                    allowed(mask),
                )
            )
            for e in (case.cpu, case.gpu)
        ]
        np.testing.assert_array_equal(*found)
        assert len(found[0]) > 4 * QUERIES or mask is not None  # so a beam was full
        if mask is None or mask.ndim == 1:
            found = [
                filtered_search.nearest(e, Queries(own=others), Walk(5, 8), allowed(mask))
                for e in (case.cpu, case.gpu)
            ]
            np.testing.assert_array_equal(*found)


def test_what_a_filter_bars_is_walked_past_on_both_engines(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams double until they hold ef allowed nodes, or no longer fit; then all are compared."""
    monkeypatch.setattr(filtered_search, "FEW", 1)  # so that a small index is walked
    case = make_case().upload()
    truth = case.cpu.compare(Queries(case.queries), np.arange(NODES), NODES)
    mask = np.ones((QUERIES, NODES), bool)
    np.put_along_axis(mask, key_nodes(truth[:, :40]), values=False, axis=1)
    mask[-1] = True
    found = [
        filtered_search.nearest(e, Queries(case.queries), Walk(5, 8), allowed(mask))
        for e in (case.cpu, case.gpu)
    ]
    np.testing.assert_array_equal(*found)
    assert len(searches(machine)) == 5  # of 8 and 10, then of 20, 40 and 80
    exact = np.array([truth[i][mask[i][key_nodes(truth[i])]][:5] for i in range(QUERIES)])
    few_shared_bytes(case.gpu, 4096)
    found = filtered_search.nearest(case.gpu, Queries(case.queries), Walk(5, 20), allowed(mask))
    np.testing.assert_array_equal(found[:-1], exact[:-1])


def test_more_asked_than_there_is(device: str) -> None:
    case = make_case().upload()
    for k, ef in ((NODES + 50, 10), (3, 10 * NODES)):
        wanted = walked(case.cpu, case.queries, k, ef)
        np.testing.assert_array_equal(walked(case.gpu, case.queries, k, ef), wanted)
    assert walked(case.gpu, case.queries, NODES + 50, 10).shape == (QUERIES, NODES)
    wanted = compared(case.cpu, case.queries, np.array([4, 2]), 5)
    np.testing.assert_array_equal(compared(case.gpu, case.queries, np.array([4, 2]), 5), wanted)
    assert walked(case.gpu, case.queries[:0], 3, 5).shape == (0, 3)
    none = np.empty(0, np.int64)
    assert (compared(case.gpu, case.queries, none, 2) == KEY_NONE).all()


def test_an_empty_index(device: str) -> None:
    engine = GpuEngine("l2", "fp32", "", DIM, M)
    rows = vectors_module.empty_rows(0, DIM, "fp32")
    graph = reference.graph_of([{}], M)._replace(layer_offsets=np.zeros(1, np.int64))
    engine.update(CpuEngine(graph, rows, None, "l2", "fp32", ""))
    assert (walked(engine, np.zeros((2, DIM), np.float32), 3, 5) == KEY_NONE).all()


# --- plans ----------------------------------------------------------------------------------------


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Plans are kept by their arguments, of which the module's numbers are none."""
    kept = (launch_plan.plan, launch_plan.largest_ef)
    for plans in kept:
        plans.cache_clear()
    yield
    for plans in kept:
        plans.cache_clear()


@pytest.mark.parametrize("tag_bits", [16, 32])
@pytest.mark.parametrize("warps", [8, 4, 1])
@pytest.mark.parametrize(("metric", "dtype", "refine"), FORMS)
def test_every_variant_of_the_search(
    device: str,
    metric: str,
    dtype: str,
    refine: str,
    warps: int,
    tag_bits: int,
    monkeypatch: pytest.MonkeyPatch,
    fresh_plans: None,
) -> None:
    """As many queries as make the plan choose the warps, and tags as for very many nodes."""
    if tag_bits == 32:
        monkeypatch.setattr(launch_plan, "MOST_TAG", 1)
    case = make_case(metric, dtype, refine).upload()
    sms = case.gpu._index.limits.sms
    count = {8: sms, 4: 4 * sms, 1: 4 * sms + 1}[warps]
    queries = np.tile(case.queries, (-(-count // QUERIES), 1))[:count]
    own = np.arange(count) * 7 % NODES
    bits = pack_bits(mask_of((NODES,)))
    for settings in ({"k": 5, "ef": 20}, {"k": 3, "ef": 9, "expand": 4}):
        for allowed in (None, bits):
            wanted = walked(case.cpu, queries, allowed=allowed, **settings)
            found = walked(case.gpu, queries, allowed=allowed, **settings)
            np.testing.assert_array_equal(found, wanted)
        wanted = walked(case.cpu, None, own=own, **settings)
        np.testing.assert_array_equal(walked(case.gpu, None, own=own, **settings), wanted)
    chosen = {dict(key[1:])["WARPS"] for key in case.gpu._index._kernels if key[0] == "search"}
    tags = {dict(key[1:])["TAG_BITS"] for key in case.gpu._index._kernels if key[0] == "search"}
    assert (chosen, tags) == ({warps}, {tag_bits})


@pytest.mark.parametrize("refine", ["", "fp32"])
def test_keys_are_sorted_in_several_blocks(
    device: str, refine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for more results than a warp keeps, of more nodes than are compared at once."""
    monkeypatch.setattr("hnsw_gpu.gpu.device_index.BLOCK_IDS", 48)
    monkeypatch.setattr("hnsw_gpu.gpu.launch_plan.MOST_KEPT", 0)
    case = make_case("l2", "int8", refine).upload()
    ids = np.random.default_rng(4).permutation(NODES)
    for k in (1, 48, 49, 130, NODES):
        found = compared(case.gpu, case.queries, ids, k)
        np.testing.assert_array_equal(found, compared(case.cpu, case.queries, ids, k))
    wanted = walked(case.cpu, case.queries, 40, 60)
    np.testing.assert_array_equal(walked(case.gpu, case.queries, 40, 60), wanted)


@pytest.mark.parametrize("queries_a_batch", [1, 2, 4])
def test_two_batches_in_flight(
    device: str, queries_a_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_batches, "MOST_QUERIES", queries_a_batch)
    case = make_case("l2", "int8", "fp32").upload()
    bits = pack_bits(mask_of((QUERIES, NODES)))
    for allowed in (None, bits):
        wanted = walked(case.cpu, case.queries, 5, 12, allowed=allowed)
        found = walked(case.gpu, case.queries, 5, 12, allowed=allowed)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("metric", "dtype", "refine"), FORMS)
def test_growing(device: str, metric: str, dtype: str, refine: str) -> None:
    """By new nodes and new links of old ones, once where there is room and once where not."""
    case = make_case(metric, dtype, refine)
    for count in (50, 120, 125, NODES):
        small = truncated(case.cpu, count) if count < NODES else case.cpu
        Case(small, case.gpu, case.queries).upload()
        wanted = walked(small, case.queries, 4, 10)
        np.testing.assert_array_equal(walked(case.gpu, case.queries, 4, 10), wanted)


@pytest.mark.parametrize(("sms", "warps"), [(1, 1), (3, 4), (9, 8)])
def test_any_number_of_warps(sms: int, warps: int) -> None:
    if emulator.missing():
        pytest.skip(emulator.missing())
    with cupy_stand_in.installed(sms=sms) as machine:
        case = make_case().upload()
        for machine.seed in range(3):
            wanted = walked(case.cpu, case.queries, 5, 20)
            np.testing.assert_array_equal(walked(case.gpu, case.queries, 5, 20), wanted)
        assert [it.definitions["WARPS"] for it in searches(machine)] == 3 * [warps]
        grid, block, per_block = searches(machine)[0].grid, searches(machine)[0].block, 4
        assert block == (32 * warps * (per_block if warps == 1 else 1),)
        assert grid == (-(-QUERIES // per_block) if warps == 1 else QUERIES,)


def test_the_grid_is_what_the_gpu_holds(machine: cupy_stand_in.Machine) -> None:
    """By the registers that the kernel takes as compiled: 96 here, of 128 that it may."""
    case = make_case().upload()
    queries = np.repeat(case.queries, 10, axis=0)
    np.testing.assert_array_equal(
        walked(case.gpu, queries, 5, 20), walked(case.cpu, queries, 5, 20)
    )
    assert searches(machine)[0].grid == (5,)  # blocks of 4 warps: 65536 / (5 * 128) registers


def few_shared_bytes(engine: GpuEngine, nbytes: int) -> None:
    engine._index.limits = engine._index.limits._replace(shared_per_block=nbytes)


def test_more_shared_memory_than_a_kernel_has_unasked(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cupy_stand_in, "DEFAULT_SHARED", 4096)
    case = make_case().upload()
    wanted = walked(case.cpu, case.queries, 5, 20)
    np.testing.assert_array_equal(walked(case.gpu, case.queries, 5, 20), wanted)
    assert searches(machine)[0].shared_mem > 4096


def test_an_ef_beyond_shared_memory_is_refused(machine: cupy_stand_in.Machine) -> None:
    case = make_case().upload()
    few_shared_bytes(case.gpu, 4096)
    with pytest.raises(ValueError, match=r"^ef=150: .* a block 4,096 bytes.* fits is 37$"):
        walked(case.gpu, case.queries, 5, 150)
    wanted = walked(case.cpu, case.queries, 5, 32)
    np.testing.assert_array_equal(walked(case.gpu, case.queries, 5, 32), wanted)
    with pytest.raises(ValueError, match="expand=33: a GPU search expands at most 32"):
        walked(case.gpu, case.queries, 5, 10, expand=33)


@pytest.mark.parametrize("mode", ["plain", "shared", "per query", "self"])
def test_a_k_beyond_shared_memory_compares_all(
    machine: cupy_stand_in.Machine, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hnsw_gpu.gpu.device_index.BLOCK_IDS", 48)  # several merges
    monkeypatch.setattr("hnsw_gpu.gpu.launch_plan.MOST_KEPT", 0)
    case = make_case().upload()
    few_shared_bytes(case.gpu, 4096)
    mask = {"shared": mask_of((NODES,)), "per query": mask_of((QUERIES, NODES))}.get(mode)
    own = np.array([5, 6]) if mode == "self" else None
    queries = None if mode == "self" else case.queries
    k = 90
    found = filtered_search.nearest(case.gpu, Queries(queries, own), Walk(k, k), allowed(mask))
    assert "search" not in machine.names()
    count = len(found)
    masks = np.broadcast_to(True if mask is None else mask, (count, NODES)).copy()
    if own is not None:
        masks[np.arange(count), own] = False
    for i in range(count):
        one = None if own is None else own[i : i + 1]
        asked = None if queries is None else queries[i : i + 1]
        wanted = compared(case.cpu, asked, np.flatnonzero(masks[i]), k, own=one)
        np.testing.assert_array_equal(found[i : i + 1], wanted)


@pytest.mark.parametrize(("k", "shared_mem"), [(512, 34816), (513, 0)])
def test_a_warp_keeps_up_to_512_keys(
    machine: cupy_stand_in.Machine, k: int, shared_mem: int
) -> None:
    """In what shared memory a block has unasked; more are all written, and sorted."""
    case = make_case("l2", "int8", "fp32", count=600).upload()
    queries, ids = case.queries[-2:], np.arange(599, -1, -1)
    np.testing.assert_array_equal(
        walked(case.gpu, queries, k, 600), walked(case.cpu, queries, k, 600)
    )
    found = compared(case.gpu, queries, ids, k)
    np.testing.assert_array_equal(found, compared(case.cpu, queries, ids, k))
    launches = [it for it in machine.launches if it.kernel == "compare"]
    assert [it.shared_mem for it in launches] == 2 * [shared_mem]


@pytest.mark.parametrize("sms", [1, 9])
def test_shares_are_sorted_together(sms: int) -> None:
    """Where queries fill the GPU, a warp compares all for its query, and nothing is sorted."""
    if emulator.missing():
        pytest.skip(emulator.missing())
    with cupy_stand_in.installed(sms=sms) as machine:
        case = make_case("l2", "int8", "fp32").upload()
        queries = np.repeat(case.queries, 8, axis=0)
        for ids in (np.arange(NODES), np.array([5])):
            found = compared(case.gpu, queries, ids, 7)
            np.testing.assert_array_equal(found, compared(case.cpu, queries, ids, 7))
        assert [it.grid for it in machine.launches if it.kernel == "compare"] == [
            (9, {1: 1, 9: 4}[sms]),
            (9, 1),
        ]
        assert machine.names().count("sort") == (sms > 1)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", ["", "fp32"])
def test_small_batches_give_the_same_bits(
    machine: cupy_stand_in.Machine, refine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("l2", "int8", refine).upload()
    bits = pack_bits(mask_of((QUERIES, NODES)))
    whole = walked(case.gpu, case.queries, 5, 12, allowed=bits)
    assert machine.names().count("search") == 1
    a_query = (
        launch_plan.bytes_a_query("int8", refine, DIM, 12 + 2 * 5 if refine else 5) + bits[0].nbytes
    )
    searches = 1
    for size in (QUERIES - 1, 2, 1):  # queries a batch, of which two are a quarter of what is free
        machine.free = machine.live + 4 * 2 * size * a_query
        np.testing.assert_array_equal(walked(case.gpu, case.queries, 5, 12, allowed=bits), whole)
        searches += -(-QUERIES // size)
        assert machine.names().count("search") == searches
    machine.free = machine.live + 4 * 2 * a_query - 1
    with pytest.raises(MemoryError, match=r"one query takes 0\.0 MB of GPU memory, and a batch"):
        walked(case.gpu, case.queries, 5, 12, allowed=bits)


@pytest.mark.parametrize("most_kept", [0, 512])
@pytest.mark.parametrize(("refine", "ids"), [("", 0), ("fp32", 0), ("fp32", 20), ("fp32", 150)])
def test_what_a_batch_takes_is_what_was_reckoned(
    machine: cupy_stand_in.Machine,
    refine: str,
    ids: int,
    most_kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two batches in flight take more than half of their share, and no more."""
    monkeypatch.setattr("hnsw_gpu.gpu.device_index.BLOCK_IDS", 64)
    monkeypatch.setattr("hnsw_gpu.gpu.launch_plan.MOST_KEPT", most_kept)
    case = make_case("l2", "int8", refine).upload()
    queries = np.repeat(case.queries, 100 if ids else 30, axis=0)
    before = machine.peak()
    assert before == machine.live
    budget = 104_000  # of few enough queries, shares of the ids would be held beside it
    machine.free = before + 4 * budget
    if ids:
        compared(case.gpu, queries, np.arange(ids), 20)
    else:
        walked(case.gpu, queries, 30, 30)
    assert machine.live == before
    fixed = 2 * 4 * max(ids, 1)  # counters, ids
    assert budget // 2 <= machine.peak() - before - fixed <= budget


def test_an_index_that_cannot_fit_is_refused_with_figures(machine: cupy_stand_in.Machine) -> None:
    case = make_case("l2", "int8", "fp32")
    parts = launch_plan.index_bytes("int8", "fp32", DIM, M, NODES, len(case.cpu.graph.nodes))
    machine.free = sum(parts.values()) - parts["refine rows"] - 1  # they could do without
    expected = r"the index takes 0\.0 MB of GPU memory \(rows 0\.0 MB, refine rows 0\.0 MB, layer 0"
    with pytest.raises(MemoryError, match=expected):
        case.upload()
    assert (machine.live, case.gpu.node_count) == (0, 0)
    machine.free = sum(parts.values()) + 8 * (case.cpu.graph.top + 1)
    case.upload()
    assert machine.live == case.gpu.nbytes == machine.free


def test_memory_is_what_the_arrays_take(machine: cupy_stand_in.Machine) -> None:
    for dtype, refine in (("fp32", ""), ("fp16", ""), ("int8", "fp16"), ("int4", "fp32")):
        case = make_case("l2", dtype, refine).upload()
        graph = case.cpu.graph
        parts = launch_plan.index_bytes(dtype, refine, DIM, M, NODES, len(graph.nodes))
        assert parts["rows"] == case.cpu.rows.nbytes
        assert parts["refine rows"] == (case.cpu.refine_rows.nbytes if refine else 0)
        assert parts["layer 0"] == graph.neighbors0.nbytes
        above = graph.nodes.nbytes + graph.neighbors.nbytes + graph.below.nbytes
        assert parts["layers above"] == above
        assert case.gpu.nbytes == sum(parts.values()) + graph.layer_offsets.nbytes
        labels = launch_plan.index_bytes(dtype, refine, DIM, M, NODES, 0, entry_count=NODES + 3)[
            "labels"
        ]
        assert labels == 8 * (NODES + 1 + NODES + 3)


def test_closing_gives_the_memory_back(machine: cupy_stand_in.Machine) -> None:
    case = make_case().upload()
    walked(case.gpu, case.queries, 3, 10)
    case.gpu.close()
    assert (machine.live, case.gpu.node_count, case.gpu.nbytes) == (0, 0, 0)
    assert not case.gpu._batches._spare  # nor is pinned memory kept
    case.upload()
    wanted = walked(case.cpu, case.queries, 3, 10)
    np.testing.assert_array_equal(walked(case.gpu, case.queries, 3, 10), wanted)


def test_closing_waits_for_searches_on_the_device(machine: cupy_stand_in.Machine) -> None:
    import cupy

    case, labels = make_case().upload(), some_labels()
    stream, uploads = cupy.cuda.Stream(non_blocking=True), machine.steps[-1].stream
    with stream:
        queries = cupy.asarray(case.queries)
        found = case.gpu.search_on_device(queries, Walk(6, 12), labels)
    case.gpu.close()
    machine.streams[uploads].synchronize()  # whoever gets that memory next may write to it
    wanted = labels.keys_to_labels(walked(case.cpu, case.queries, 6, 12), 6)
    np.testing.assert_array_equal(found[0].get(stream), wanted[0])


# --- updates --------------------------------------------------------------------------------------


def grown_from(case: Case, count: int) -> tuple[CpuEngine, np.ndarray]:
    """The index with its first `count` nodes, and the ids of them whose links are then changed."""
    small = truncated(case.cpu, count)
    kept = np.random.default_rng(2).random(count) < 0.8  # links that stay as they will be
    links = case.cpu.graph.neighbors0[:count]
    small.graph.neighbors0[:] = np.where(kept[:, None] & (links < count).all(1)[:, None], links,
                                         small.graph.neighbors0)  # fmt: skip
    return small, np.flatnonzero((small.graph.neighbors0 != links).any(axis=1))


@pytest.mark.parametrize("refine", ["", "fp32"])
def test_only_what_changed_is_uploaded(machine: cupy_stand_in.Machine, refine: str) -> None:
    case = make_case("l2", "int8", refine)
    count = NODES - 30
    small, changed = grown_from(case, count)
    assert 0 < len(changed) < count
    Case(small, case.gpu, case.queries).upload()
    wanted = walked(small, case.queries, 4, 10)
    np.testing.assert_array_equal(walked(case.gpu, case.queries, 4, 10), wanted)
    before = machine.sum_of("upload")
    case.upload(changed)
    graph, rows = case.cpu.graph, case.cpu.rows
    new = rows[count:].nbytes + graph.neighbors0[count:].nbytes
    if refine:
        new += case.cpu.refine_rows[count:].nbytes
    dirty = graph.neighbors0[changed].nbytes + changed.nbytes
    above = (graph.nodes, graph.neighbors, graph.below, graph.layer_offsets)
    upper = sum(array.nbytes for array in above)
    assert machine.sum_of("upload") - before == new + dirty + upper
    wanted = walked(case.cpu, case.queries, 4, 10)
    np.testing.assert_array_equal(walked(case.gpu, case.queries, 4, 10), wanted)


def test_room_for_more(machine: cupy_stand_in.Machine) -> None:
    """Growing by a few does not copy what is there each time, and leaves little room unused."""
    case = make_case()
    Case(truncated(case.cpu, 100), case.gpu, case.queries).upload()
    for count in range(101, 126):
        Case(truncated(case.cpu, count), case.gpu, case.queries).upload()
    graph = truncated(case.cpu, 125).graph
    used = case.cpu.rows[:125].nbytes + sum(array.nbytes for array in graph)
    assert machine.sum_of("copy") < used
    assert case.gpu.nbytes < 1.35 * used  # a quarter more, and of layers that have shrunk since
    wanted = walked(truncated(case.cpu, 125), case.queries, 4, 10)
    np.testing.assert_array_equal(walked(case.gpu, case.queries, 4, 10), wanted)


def test_growing_where_old_and_new_do_not_fit_together(machine: cupy_stand_in.Machine) -> None:
    case = make_case()
    Case(truncated(case.cpu, NODES - 30), case.gpu, case.queries).upload()
    parts = launch_plan.index_bytes("fp32", "", DIM, M, NODES, len(case.cpu.graph.nodes))
    machine.free = sum(parts.values()) + 1024
    before = machine.sum_of("copy")
    case.upload()
    assert machine.sum_of("copy") - before < case.cpu.rows[: NODES - 30].nbytes
    machine.free += 1 << 20
    wanted = walked(case.cpu, case.queries, 4, 10)
    np.testing.assert_array_equal(walked(case.gpu, case.queries, 4, 10), wanted)


# --- the order of things --------------------------------------------------------------------------


def test_streams(machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches in flight; each waits for the index, and its buffers for the batch before."""
    monkeypatch.setattr(host_batches, "MOST_QUERIES", 2)
    case = make_case().upload()
    uploads = len(machine.steps)
    recorded = machine.steps[-2]  # and then the host waits, whose arrays may change
    assert recorded.what == "record"
    found = walked(case.gpu, case.queries, 4, 10)
    np.testing.assert_array_equal(found, walked(case.cpu, case.queries, 4, 10))
    steps = machine.steps[uploads:]
    streams = list(dict.fromkeys(step.stream for step in steps))
    assert len(streams) == 2 and recorded.stream not in streams
    batch = ["wait", "upload", "encode", "zero", "search", "download", "download", "record"]
    for stream, batches in zip(streams, (3, 2), strict=True):
        mine = [step for step in steps if step.stream == stream]
        assert {step.event for step in mine if step.what == "wait"} == {recorded.event}
        names = [step.what for step in mine]
        assert names == batches * [*batch, "synchronize"] + ["synchronize"]  # one before each reuse
    kernels = [step.stream for step in steps if step.what == "search"]
    assert kernels == [streams[i % 2] for i in range(5)]
    streams_made = len(machine.streams)
    walked(case.gpu, case.queries, 4, 10)
    again = {step.stream for step in machine.steps[uploads + len(steps) :]}
    assert len(machine.streams) == streams_made and again == set(streams)
    first_wait = next(i for i, step in enumerate(steps) if step.what == "synchronize")
    assert [step.what for step in steps[:first_wait]].count("search") == 2  # both in flight


def test_many_threads(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight, half of them with arrays on the GPU; each has two batches in flight."""
    import cupy

    monkeypatch.setattr(host_batches, "MOST_QUERIES", 4)
    case, labels = make_case("l2", "int8", "fp32").upload(), some_labels()
    keys = walked(case.cpu, case.queries, 5, 12)
    wanted = labels.keys_to_labels(keys, 5)[0]

    def search(i: int) -> None:
        for _ in range(3):
            if i % 2:
                np.testing.assert_array_equal(walked(case.gpu, case.queries, 5, 12), keys)
                continue
            with cupy.cuda.Stream(non_blocking=True) as stream:
                queries = cupy.asarray(case.queries)
                found = case.gpu.search_on_device(queries, Walk(5, 12), labels)
                np.testing.assert_array_equal(found[0].get(stream), wanted)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(search, range(8)))


def test_an_error_leaves_no_work_behind(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_batches, "MOST_QUERIES", 2)
    case = make_case().upload()
    walk, calls = case.gpu._index.walk, []

    def fails(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return walk(*arguments)

    monkeypatch.setattr(case.gpu._index, "walk", fails)
    with pytest.raises(KeyboardInterrupt):
        walked(case.gpu, case.queries, 4, 10)
    assert all(stream._done == len(stream._ops) or stream.ptr == 0 or not stream._ops
               for stream in machine.streams.values() if stream.ptr in
               {step.stream for step in machine.steps if step.what == "search"})  # fmt: skip
    wanted = walked(case.cpu, case.queries, 4, 10)
    np.testing.assert_array_equal(walked(case.gpu, case.queries, 4, 10), wanted)


def test_arguments_are_held_against_the_signature(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case().upload()
    argument = device_index.argument
    monkeypatch.setattr(
        device_index, "argument", lambda name, **fields: argument(name, **fields).view(np.uint64)
    )
    with pytest.raises(TypeError, match="encode: task is a struct"):
        walked(case.gpu, case.queries, 4, 10)
    with pytest.raises(KeyError, match="query_count"):
        argument("Task", queries=None, allowed=None, own=None, keys=None, counts=None,
               next_query=None, allowed_stride=0)  # fmt: skip


def test_a_specialisation_is_compiled_once_and_told(
    machine: cupy_stand_in.Machine, caplog: pytest.LogCaptureFixture
) -> None:
    case = make_case().upload()
    with caplog.at_level(logging.INFO, "hnsw_gpu"):
        for _ in range(2):
            walked(case.gpu, case.queries, 4, 10)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("kernel search: compiled in ") and "-DDIM=16" in told[0]


# --- arrays on the GPU ----------------------------------------------------------------------------


class Foreign:
    """An array of another library on the GPU, by DLPack; that library's current stream wrote it."""

    def __init__(self, array: Any) -> None:
        import cupy

        self._array, self._stream = array, cupy.cuda.get_current_stream()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **settings: Any) -> Any:
        with self._stream:
            return self._array.__dlpack__(**settings)


class Interface:
    """The same, by `__cuda_array_interface__` without a stream, as torch has it."""

    def __init__(self, array: Any) -> None:
        self._array = array

    @property
    def __cuda_array_interface__(self) -> dict:
        return {**self._array.__cuda_array_interface__, "version": 2, "stream": None}


def some_labels() -> Labels:
    """Two labels on every third node."""
    ids = np.concatenate([np.arange(NODES), np.arange(0, NODES, 3)])
    return Labels().with_added(np.arange(len(ids), dtype=np.int64) * 10, ids, NODES)


@pytest.mark.parametrize("wrapped", [lambda array: array, Foreign, Interface],
                         ids=["cupy", "dlpack", "interface"])  # fmt: skip
@pytest.mark.parametrize(("metric", "dtype", "refine"), FORMS)
def test_device_arrays(device: str, metric: str, dtype: str, refine: str, wrapped: Any) -> None:
    import cupy

    case = make_case(metric, dtype, refine).upload()
    labels = some_labels()
    wanted, far = labels.keys_to_labels(walked(case.cpu, case.queries, 6, 12), 6)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        given = cupy.asarray(case.queries)
        queries = wrapped(given)
        found = case.gpu.search_on_device(queries, Walk(6, 12), labels)
    for on_device, expected in zip(found, (wanted, reported(far, metric)), strict=True):
        assert isinstance(on_device, cupy.ndarray)
        assert on_device.dtype == expected.dtype
        np.testing.assert_array_equal(on_device.get(stream), expected)


@pytest.mark.parametrize("refine", ["", "fp32"])
def test_the_host_waits_for_nothing(machine: cupy_stand_in.Machine, refine: str) -> None:
    import cupy

    case = make_case("l2", "int8", refine).upload()
    labels = some_labels()
    mine, foreign = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    uploaded, started = machine.steps[-2], len(machine.steps)
    with foreign:
        queries = Foreign(cupy.asarray(case.queries))
        found = case.gpu.search_on_device(queries, Walk(6, 12), labels, stream=mine)
    names = machine.names()[started:]
    assert "synchronize" not in names and "download" not in names
    steps = [step for step in machine.steps if step.stream == mine.ptr]
    waits = [step.event for step in steps if step.what == "wait"]
    assert waits[1] == uploaded.event and len(waits) == 3  # and for the queries, as CuPy has them
    assert steps[-1].what == "record"
    kernels = {"encode", "search", "compare", "keys_to_labels", "sort"}
    chain = [step.what for step in steps if step.what in kernels]
    refined = ["compare"] if refine else []
    assert chain == ["encode"] * (2 if refine else 1) + ["search", *refined, "keys_to_labels"]
    wanted = labels.keys_to_labels(walked(case.cpu, case.queries, 6, 12), 6)
    np.testing.assert_array_equal(found[0].get(mine), wanted[0])


def test_a_search_that_breaks_off_is_waited_for(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    case = make_case().upload()

    def torn(*given: Any) -> None:
        raise RuntimeError("torn")

    stream = cupy.cuda.Stream(non_blocking=True)
    queries = cupy.asarray(case.queries)
    monkeypatch.setattr(case.gpu._index, "keys_to_labels", torn)
    with pytest.raises(RuntimeError, match="torn"):
        case.gpu.search_on_device(queries, Walk(3, 8), some_labels(), stream=stream)
    started = len(machine.steps)
    ended = [step.event for step in machine.steps if step.stream == stream.ptr][-1]
    case.upload()
    waits = [step.event for step in machine.steps[started:] if step.what == "wait"]
    assert ended in waits


def test_queries_are_held_until_they_were_read(machine: cupy_stand_in.Machine) -> None:
    """Another library may give their memory away as soon as nobody holds them."""
    import weakref

    import cupy

    case = make_case().upload()
    stream = cupy.cuda.Stream(non_blocking=True)
    given = Foreign(cupy.asarray(case.queries))
    held = weakref.ref(given)
    found = case.gpu.search_on_device(given, Walk(3, 8), some_labels(), stream=stream)
    del given
    assert held() is not None
    stream.synchronize()
    case.gpu.search_on_device(cupy.asarray(case.queries), Walk(3, 8), some_labels(), stream=stream)
    assert held() is None
    np.testing.assert_array_equal(
        found[0].get(stream),
        some_labels().keys_to_labels(walked(case.cpu, case.queries, 3, 8), 3)[0],
    )


def test_a_large_k_on_the_device_compares_all(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    monkeypatch.setattr("hnsw_gpu.gpu.launch_plan.MOST_KEPT", 64)  # as if k were larger still
    machine.limits = machine.limits._replace(shared_per_block=5 * 1024)
    case = make_case().upload()
    queries = cupy.asarray(case.queries)
    labels, _ = case.gpu.search_on_device(queries, Walk(190, 190), some_labels())
    everything = compared(case.cpu, case.queries, np.arange(NODES), 190)
    np.testing.assert_array_equal(labels.get(), some_labels().keys_to_labels(everything, 190)[0])


def test_after_memory_ran_out_all_is_uploaded_again(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    case = make_case()
    small = truncated(case.cpu, NODES - 90)
    Case(small, case.gpu, case.queries).upload()
    empty, asked = cupy.empty, []

    def scarce(shape: Any, dtype: Any) -> Any:
        asked.append(shape)
        if len(asked) == 1:
            raise MemoryError("out of memory")
        return empty(shape, dtype)

    with monkeypatch.context() as patched:
        patched.setattr(cupy, "empty", scarce)
        patched.setattr(case.gpu._index, "free_bytes", lambda: 1)  # old and new do not fit
        patched.setattr(case.gpu._index, "_require_room", lambda graph: None)
        with pytest.raises(MemoryError):
            case.upload()
        case.upload()
    np.testing.assert_array_equal(
        walked(case.gpu, case.queries, 5, 20), walked(case.cpu, case.queries, 5, 20)
    )


def test_an_old_gpu_and_a_missing_compiler_are_named(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.arch = 61
    assert "compute capability is 6.1" in gpu_engine.unavailable_reason()
    machine.arch = 90
    assert gpu_engine.unavailable_reason() == ""

    def no_headers(**given: Any) -> None:
        raise RuntimeError("Failed to find CUDA headers")

    monkeypatch.setattr(cupy_stand_in, "RawModule", no_headers)
    assert "Failed to find CUDA headers" in gpu_engine.unavailable_reason()


def test_an_update_waits_for_searches_on_the_device(machine: cupy_stand_in.Machine) -> None:
    import cupy

    case = make_case()
    small = truncated(case.cpu, NODES - 30)
    Case(small, case.gpu, case.queries).upload()
    labels, stream = some_labels(), cupy.cuda.Stream(non_blocking=True)
    with stream:
        queries = cupy.asarray(case.queries)
    found = case.gpu.search_on_device(queries, Walk(6, 12), labels, stream=stream)
    case.upload()
    after = walked(
        case.gpu, case.queries, 6, 12
    )  # brings the upload about, before the first search
    np.testing.assert_array_equal(after, walked(case.cpu, case.queries, 6, 12))
    wanted = labels.keys_to_labels(walked(small, case.queries, 6, 12), 6)
    np.testing.assert_array_equal(found[0].get(stream), wanted[0])
    more = labels.without(np.array([0]))
    found = case.gpu.search_on_device(queries, Walk(6, 12), labels, stream=stream)
    again = case.gpu.search_on_device(queries, Walk(6, 12), more)
    keys = walked(case.cpu, case.queries, 6, 12)
    np.testing.assert_array_equal(again[0].get(), more.keys_to_labels(keys, 6)[0])
    np.testing.assert_array_equal(found[0].get(stream), labels.keys_to_labels(keys, 6)[0])


def test_out_and_roots(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    case, labels = make_case().upload(), some_labels()
    queries = cupy.asarray(case.queries)
    out = cupy.empty((QUERIES, 6), np.int64), cupy.empty((QUERIES, 6), np.float32)
    monkeypatch.setattr(host_batches, "MOST_QUERIES", 2)
    found = case.gpu.search_on_device(queries, Walk(6, 12), labels, out=out, root=True)
    wanted = labels.keys_to_labels(walked(case.cpu, case.queries, 6, 12), 6)
    np.testing.assert_array_equal(out[0].get(), wanted[0])
    np.testing.assert_array_equal(out[1].get(), np.sqrt(wanted[1]))
    assert [array.data.ptr for array in found] == [array.data.ptr for array in out]


def test_device_queries_of_other_forms(device: str) -> None:
    """float64, not contiguous, and such as have no answer."""
    import cupy

    case, labels = make_case("cosine", "fp32").upload(), some_labels()
    queries = case.queries.copy()
    queries[0], queries[1, 3], queries[2, 0] = 0, np.nan, np.inf
    wide = np.zeros((QUERIES, 2 * DIM))
    wide[:, ::2] = queries
    found = case.gpu.search_on_device(cupy.asarray(wide)[:, ::2], Walk(6, 12), labels)
    wanted = labels.keys_to_labels(walked(case.cpu, case.queries, 6, 12), 6)
    np.testing.assert_array_equal(found[0].get()[3:], wanted[0][3:])
    assert (found[0].get()[:3] == -1).all() and np.isinf(found[1].get()[:3]).all()


def test_wrong_device_arrays_are_named(device: str) -> None:
    import cupy

    case, labels = make_case().upload(), some_labels()
    queries = cupy.asarray(case.queries)
    search = case.gpu.search_on_device
    with pytest.raises(TypeError, match="queries: ndarray, expected an array on the GPU"):
        search(case.queries, Walk(6, 12), labels)
    with pytest.raises(ValueError, match=r"queries: shape \(9, 12\), expected \(q, 16\)"):
        search(queries[:, :12], Walk(6, 12), labels)
    with pytest.raises(ValueError, match=r"queries: shape \(16,\), expected \(q, 16\)"):
        search(queries[0], Walk(6, 12), labels)
    good = cupy.empty((QUERIES, 6), np.int64), cupy.empty((QUERIES, 6), np.float32)
    bad = cupy.empty((QUERIES, 6), np.int32), cupy.empty((QUERIES, 5), np.float32)
    with pytest.raises(ValueError, match=r"out: int32 \(9, 6\), expected int64 \(9, 6\), C order"):
        search(queries, Walk(6, 12), labels, out=(bad[0], good[1]))
    with pytest.raises(ValueError, match=r"out: float32 \(9, 5\), expected float32 \(9, 6\)"):
        search(queries, Walk(6, 12), labels, out=(good[0], bad[1]))
    wide = cupy.empty((QUERIES, 7), np.float32)[:, :6]
    with pytest.raises(ValueError, match=r"out: float32 \(9, 6\), expected .* C order"):
        search(queries, Walk(6, 12), labels, out=(good[0], wide))
    with pytest.raises(TypeError, match="does not implement"):
        search(queries, Walk(6, 12), labels, stream="null")


def test_an_array_on_another_gpu_is_refused(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    case, labels = make_case().upload(), some_labels()
    queries = cupy.asarray(case.queries)
    monkeypatch.setattr(cupy.ndarray, "device", cupy.cuda.Device(1))
    with pytest.raises(ValueError, match="queries: on GPU 1, and the index is on GPU 0"):
        case.gpu.search_on_device(queries, Walk(6, 12), labels)


# --- what is missing ------------------------------------------------------------------------------


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_cupy(name: str, *arguments: Any) -> Any:
        if name.partition(".")[0] == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_cupy)
    with pytest.raises(
        RuntimeError, match=r'pip install "hnsw-gpu\[cuda12\]".*\[cuda13\]".*No mod'
    ):
        make_case()


@pytest.mark.parametrize(("driver", "status", "expected"), [
    (0, 0, "needs NVIDIA's driver, and there is none here"),
    (12020, 35,
     r"driver \(CUDA 12\.2\) offers no GPU to CuPy 14\.2\.0: cudaErrorInsufficientDriver"),
    (13000, 0, r"driver \(CUDA 13\.0\) knows of no GPU"),
])  # fmt: skip
def test_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
    machine: cupy_stand_in.Machine,
    driver: int,
    status: int,
    expected: str,
) -> None:
    def count() -> int:
        if status:
            raise cupy_stand_in.CUDARuntimeError(status)
        return 0

    runtime = types.SimpleNamespace(
        CUDARuntimeError=cupy_stand_in.CUDARuntimeError,
        driverGetVersion=lambda: driver,
        getDeviceCount=count,
    )
    monkeypatch.setattr(cupy_stand_in.cuda, "runtime", runtime)
    monkeypatch.setattr(cupy_stand_in.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=expected):
        make_case()


def test_distances_are_the_cpu_engines_on_real_numbers(device: str) -> None:
    """On data whose sums round, to within the order of summation."""
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((NODES, DIM)).astype(np.float32)
    rows = vectors_module.encode(vectors, "cosine", "fp16")
    cpu = CpuEngine(reference.random_graph(vectors, M, 3), rows, None, "cosine", "fp16", "")
    case = Case(cpu, GpuEngine("cosine", "fp16", "", DIM, M), vectors[:20] + 0.1).upload()
    found = [walked(engine, case.queries, 10, 200) for engine in (case.gpu, cpu)]
    np.testing.assert_array_equal(key_nodes(found[0]), key_nodes(found[1]))
    np.testing.assert_allclose(key_distances(found[0]), key_distances(found[1]), atol=1e-6)
