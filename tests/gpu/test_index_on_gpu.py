"""An Index on a GPU answers as the same Index on the CPU: everything that the public face offers.

Without a GPU the kernels are emulated and CuPy is replaced, as in test_gpu_engine.py. Vectors are
small integers, so that every summation order gives the same float.
"""

import contextlib
import inspect
import itertools
import logging
import sys
import threading
from pathlib import Path

import numpy as np
import oracle
import pytest
from collections_of import make
from emulator import cupy_stand_in

import hnsw_gpu
from hnsw_gpu.engine.walk import Queries, Walk
from hnsw_gpu.gpu import device_index
from hnsw_gpu.gpu.gpu_engine import GpuEngine

DIM = 16
ROWS = 240
ADDS = 10 * ROWS  # of one vector each
FORMS = [("l2", "fp32", False), ("ip", "fp16", False), ("cosine", "int8", True)]


def vectors(count: int, seed: int) -> np.ndarray:
    """Small integers, a few rows more than once."""
    rows = oracle.integers(count, DIM, seed=seed)
    rows[rows.any(axis=1) == 0, 0] = 1  # cosine has no zero vectors
    rows[-count // 8 :] = rows[: -(-count // 8)]
    return rows.astype(np.float32)


def pair(metric: str = "l2", dtype: str = "fp32", refine: bool = False) -> list[hnsw_gpu.Index]:
    """The same index on the CPU and on the GPU."""
    made = []
    for device in ("cpu", "cuda"):
        index = hnsw_gpu.Index(
            DIM, metric, dtype, M=4, ef_construction=20, refine=refine, device=device
        )
        index.add(vectors(ROWS, seed=1), labels=np.arange(ROWS)[::-1].copy())
        made.append(index)
    return made


def assert_alike(cpu: hnsw_gpu.Index, gpu: hnsw_gpu.Index, exact: bool = True, **how) -> None:
    queries = vectors(9, seed=2)
    one, other = cpu.search(queries, 7, expand=2, **how), gpu.search(queries, 7, expand=2, **how)
    if exact:
        oracle.assert_same(one, other)
    else:  # under cosine rows are no integers: sums differ in their last bits, and so do ties
        np.testing.assert_allclose(one.distances, other.distances, rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_searches(device, form):
    cpu, gpu = pair(*form)
    exact = form[0] != "cosine"
    assert gpu.device == "cuda" and "device='cuda'" in repr(gpu)
    assert_alike(cpu, gpu, exact)
    assert_alike(cpu, gpu, exact, ef=20, ef_upper=3)
    assert_alike(cpu, gpu, exact, allow=np.arange(0, ROWS, 3))
    masks = np.random.default_rng(3).random((9, ROWS)) < 0.7
    assert_alike(cpu, gpu, exact, allow=masks)
    cpu.delete(np.arange(40)), gpu.delete(np.arange(40))
    assert_alike(cpu, gpu, exact)


def test_labels_that_are_strings(device):
    import cupy

    cpu, gpu = made = [hnsw_gpu.Index(DIM, "l2", M=4, device=where) for where in ("cpu", "cuda")]
    names = [f"row {i}" for i in range(ROWS)]
    for index in made:
        index.add(vectors(ROWS, seed=1), names)
    assert_alike(cpu, gpu)
    assert_alike(cpu, gpu, allow=names[::3])
    with pytest.raises(TypeError, match="queries: on a GPU, where no labels can lie"):
        gpu.search(cupy.asarray(vectors(9, seed=2)))


def test_a_graph_of_hnswlib(device, tmp_path):
    """It came from a file of hnswlib, link for link; its entry point is where it was."""
    path = Path(__file__).parents[1] / "peers" / "data" / "hnswlib-0.8.0.bin"
    rows = np.random.default_rng(3).integers(-20, 21, (40, 6)).astype(np.float32)
    cpu, gpu = (hnsw_gpu.from_hnswlib(path, 6, "l2", device=one) for one in ("cpu", "cuda"))
    assert gpu.device == "cuda" and gpu._state.graph.top >= 2
    for how in ({}, {"ef": 30, "ef_upper": 2}, {"allow": cpu.labels[::2]}):
        one, other = (index.search(rows, 7, expand=2, **how) for index in (cpu, gpu))
        oracle.assert_same(one, other)
    deleted = cpu.deleted
    cpu.undelete(deleted), gpu.undelete(deleted)
    oracle.assert_same(*(index.search(rows, 7, expand=2) for index in (cpu, gpu)))
    cpu.add(rows + 1), gpu.add(rows + 1)
    oracle.assert_same(*(index.search(rows, 7, expand=2) for index in (cpu, gpu)))


def test_adding_and_deleting(device):
    """Searches between changes, which bring the GPU what is new."""
    cpu, gpu = pair("l2", "int8", True)
    for turn in range(4):
        for index in (cpu, gpu):
            index.add(vectors(30 + 40 * turn, seed=20 + turn) * 2)
        assert_alike(cpu, gpu)
        for index in (cpu, gpu):
            index.delete(index.labels[turn::9])
        assert_alike(cpu, gpu)
        assert_alike(cpu, gpu, allow=cpu.labels[::2])
    oracle.assert_same(cpu.neighbor_graph(5, ef=2000), gpu.neighbor_graph(5, ef=2000))


def test_radius_and_neighbour_graph(device):
    cpu, gpu = pair()
    queries = vectors(9, seed=2)
    for one, other in zip(
        cpu.search_radius(queries, 60.0, ef=ROWS),
        gpu.search_radius(queries, 60.0, ef=ROWS),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    # at ef = n both meet every node, whatever they expand at a time
    oracle.assert_same(cpu.neighbor_graph(5, ef=ROWS), gpu.neighbor_graph(5, ef=ROWS))
    cpu.delete(np.arange(50)), gpu.delete(np.arange(50))
    oracle.assert_same(cpu.neighbor_graph(5, ef=ROWS), gpu.neighbor_graph(5, ef=ROWS))


def test_int4(device, tmp_path):
    """By default a part of the beam is re-ranked; whatever is asked, as on the CPU."""
    cpu, gpu = pair("l2", "int4", True)
    masks = np.random.default_rng(3).random((9, 2 * ROWS)) < 0.7
    for turn in range(2):
        for rerank in ("auto", None, 9):
            assert_alike(cpu, gpu, ef=60, rerank=rerank)
            assert_alike(cpu, gpu, ef=60, rerank=rerank, allow=np.arange(0, ROWS, 3))
        assert_alike(cpu, gpu, allow=masks)
        queries = vectors(9, seed=2)
        for one, other in zip(
            cpu.search_radius(queries, 60.0, ef=2000),
            gpu.search_radius(queries, 60.0, ef=2000),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
        oracle.assert_same(cpu.neighbor_graph(5, ef=2000), gpu.neighbor_graph(5, ef=2000))
        oracle.assert_same(cpu.exact_search(queries, 7), gpu.exact_search(queries, 7))
        for index in (cpu, gpu):
            index.add(vectors(70, seed=20 + turn) * 2)
            index.delete(np.arange(40 * turn, 40 * turn + 40))
    gpu.save(tmp_path / "x.hnsw")
    loaded = hnsw_gpu.load(tmp_path / "x.hnsw")  # "auto"
    assert loaded.device == "cuda"
    assert_alike(cpu, loaded, ef=60)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_refine_rows_that_do_not_fit_stay_on_the_host(machine, caplog, dtype):
    """The GPU walks on the codes, and the CPU re-ranks: the same answers, whatever is asked."""
    import cupy

    cpu, gpu = (hnsw_gpu.Index(DIM, "l2", dtype, M=4, refine=True, device="cpu") for _ in "12")
    for index in (cpu, gpu):
        index.add(vectors(ROWS, seed=1))
    parts = gpu.memory(queries=0)
    machine.free = sum(parts.values()) - parts["labels"] - 1
    with caplog.at_level(logging.INFO, "hnsw_gpu"):
        gpu.to("cuda")
    assert "refine rows, 0.0 MB, stay in the host's memory" in caplog.text
    held = parts["rows"] + parts["layer 0"] + parts["layers above"]
    assert held <= machine.live < held + 1000
    machine.free += 1 << 20  # for batches
    queries = vectors(9, seed=2)
    for turn in range(2):
        for rerank in ("auto", None):
            assert_alike(cpu, gpu, ef=60, rerank=rerank)
            assert_alike(cpu, gpu, ef=60, rerank=rerank, allow=np.arange(0, ROWS, 3))
        assert_alike(cpu, gpu, allow=[1, 2, 3])
        oracle.assert_same(cpu.neighbor_graph(5, ef=300), gpu.neighbor_graph(5, ef=300))
        oracle.assert_same(cpu.exact_search(queries, 7), gpu.exact_search(queries, 7))
        found = gpu.search(cupy.asarray(queries), 7, ef=60)
        wanted = cpu.search(queries, 7, ef=60, expand=4)
        oracle.assert_same(wanted, hnsw_gpu.SearchResult(*(part.get() for part in found)))
        for index in (cpu, gpu):
            index.add(vectors(3, seed=20 + turn) * 2)
            index.delete(np.arange(40 * turn, 40 * turn + 40))
    gpu.to("cpu").to("cuda")  # where they fit by now
    assert machine.live > held + parts["refine rows"]
    assert_alike(cpu, gpu, ef=60)


def test_int4_of_more_dimensions_than_shared_memory_holds_stays_on_the_cpu(machine, caplog):
    dim = machine.limits.shared_per_block // 4 + 1
    why = f"dim={dim}: an int4 query is rotated in shared memory"
    with pytest.raises(RuntimeError, match=f"device='cuda': {why}"):
        hnsw_gpu.Index(dim, "l2", "int4", device="cuda")
    with caplog.at_level(logging.INFO, "hnsw_gpu"):
        assert hnsw_gpu.Index(dim, "l2", "int4", device="auto").device == "cpu"
    assert f"device='auto': searching on the CPU: {why}" in caplog.text


def test_the_default_of_expand_is_the_devices(device):
    cpu, gpu = pair()
    queries = vectors(9, seed=2)
    oracle.assert_same(gpu.search(queries, 3, ef=12), cpu.search(queries, 3, ef=12, expand=2))
    oracle.assert_same(gpu.search(queries, 3, ef=48), cpu.search(queries, 3, ef=48, expand=4))


def test_only_what_changed_goes_up_again(machine):
    cpu, gpu = pair()
    assert_alike(cpu, gpu)
    whole = machine.sum_of("upload")
    machine.steps.clear()
    assert_alike(cpu, gpu)
    queries_alone = machine.sum_of("upload")
    machine.steps.clear()
    more = vectors(12, seed=5) + 20  # far from all others: few of them are linked anew
    for index in (cpu, gpu):
        index.add(more)
    assert_alike(cpu, gpu)
    assert 12 * DIM * 4 < machine.sum_of("upload") - queries_alone < whole / 2
    machine.steps.clear()
    for index in (cpu, gpu):
        index.delete([3])
    assert_alike(cpu, gpu)
    words = 4 * -(-(ROWS + 12) // 32)
    assert machine.sum_of("upload") - queries_alone <= words


def test_repair_and_interruption_reach_the_gpu(device, monkeypatch):
    cpu, gpu = pair()
    for index in (cpu, gpu):
        index.add(vectors(60, seed=6) * 3)
        index.check()  # repairs
    assert_alike(cpu, gpu)

    def torn(*given, **settings):
        raise RuntimeError("torn")

    for index in (cpu, gpu):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="torn"):
            patched.setattr("hnsw_gpu.engine.build._insert_batch", torn)
            index.add(vectors(20, seed=7) + 2)
    assert_alike(cpu, gpu)
    for index in (cpu, gpu):
        index.add(vectors(20, seed=7) + 2)
    assert_alike(cpu, gpu)


def test_compact_save_load_and_back(device, tmp_path):
    cpu, gpu = pair("l2", "int8", True)
    for index in (cpu, gpu):
        index.delete(np.arange(100, 180))
        index.compact()
    assert_alike(cpu, gpu)
    gpu.save(tmp_path / "a.hnsw")
    loaded = hnsw_gpu.load(tmp_path / "a.hnsw", device="cuda")
    assert loaded.device == "cuda"
    assert_alike(cpu, loaded)
    assert hnsw_gpu.load(tmp_path / "a.hnsw", device="cpu").device == "cpu"
    assert loaded.to("cpu").device == "cpu"
    assert_alike(cpu, loaded)
    assert_alike(cpu, loaded.to("cuda"))


def test_auto_takes_the_gpu_and_says_so(device, caplog):
    with caplog.at_level(logging.INFO, "hnsw_gpu"):
        assert hnsw_gpu.Index(DIM, device="auto").device == "cuda"
    assert "searching on" in caplog.text


def test_a_collection_lies_there_whole_or_not_at_all(machine, tmp_path, monkeypatch):
    make(tmp_path / "c", vectors(ROWS, seed=1), shards=3, metric="l2", M=4)
    queries = vectors(9, seed=2)
    cpu, gpu = (hnsw_gpu.load(tmp_path / "c", device=device) for device in ("cpu", "cuda"))
    assert (cpu.device, gpu.device) == ("cpu", "cuda")
    assert_alike(cpu, gpu)
    assert_alike(cpu, gpu, allow=np.arange(0, ROWS, 3))
    for one, other in zip(
        cpu.search_radius(queries, 30), gpu.search_radius(queries, 30), strict=True
    ):
        assert one.tolist() == other.tolist()
    with pytest.raises(TypeError, match="queries: on a GPU, expected an array in host memory"):
        gpu.search(sys.modules["cupy"].asarray(queries))
    assert gpu.to("cpu").device == "cpu"
    assert_alike(cpu, gpu)
    calls, made = itertools.count(), device_index.DeviceIndex.__init__

    def third_fails(self, *given, **named):
        if next(calls) % 3 == 2:
            raise MemoryError("no more")
        made(self, *given, **named)

    monkeypatch.setattr(device_index.DeviceIndex, "__init__", third_fails)
    with pytest.raises(MemoryError, match="no more"):
        cpu.to("cuda")
    for collection in (cpu, gpu.to("auto")):
        assert {shard.device for shard in collection._shards} == {"cpu"}


def test_an_index_that_does_not_fit(machine, tmp_path, caplog):
    cpu, _ = pair()
    cpu.save(tmp_path / "a.hnsw")
    machine.free = 1000
    for ask in (lambda: cpu.to("cuda"), lambda: hnsw_gpu.load(tmp_path / "a.hnsw", device="cuda")):
        with pytest.raises(MemoryError, match="device='cuda': the index takes"):
            ask()
    assert cpu.device == "cpu"
    with caplog.at_level(logging.INFO, "hnsw_gpu"):
        assert hnsw_gpu.load(tmp_path / "a.hnsw", device="auto").device == "cpu"
    assert "the index takes" in caplog.text


@pytest.mark.parametrize("metric", ["l2", "euclidean"])
def test_queries_on_the_gpu(machine, metric):
    cpu, gpu = pair(metric)
    queries = vectors(9, seed=2)
    on_gpu = cupy_stand_in.asarray(queries)
    gpu.search(queries, 3)
    wanted = cpu.search(queries, 7, expand=4)
    machine.steps.clear()
    found = gpu.search(on_gpu, 7)
    assert not {"synchronize", "download"} & set(machine.names())
    assert isinstance(found.labels, cupy_stand_in.ndarray)
    oracle.assert_same(wanted, hnsw_gpu.SearchResult(*(array.get() for array in found)))
    for index in (cpu, gpu):
        index.delete(np.arange(30))
    out = (cupy_stand_in.empty((9, 7), np.int64), cupy_stand_in.empty((9, 7), np.float32))
    found = gpu.search(on_gpu, 7, out=out)
    assert found.labels is out[0]
    oracle.assert_same(
        cpu.search(queries, 7, expand=4), hnsw_gpu.SearchResult(*(array.get() for array in out))
    )


def test_gpu_arrays_where_they_do_not_belong(device):
    import cupy

    cpu, gpu = pair()
    on_gpu = cupy.asarray(vectors(9, seed=2))
    with pytest.raises(TypeError, match="queries: on a GPU"):
        cpu.search(on_gpu)
    with pytest.raises(TypeError, match="vectors: on a GPU"):
        gpu.add(on_gpu)
    with pytest.raises(ValueError, match="stream"):
        gpu.search(vectors(9, seed=2), stream=cupy.cuda.get_current_stream())


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_memory_says_what_is_uploaded(machine, dtype):
    _, gpu = pair("l2", dtype, True)
    parts = gpu.memory(queries=0)
    gpu.search(cupy_stand_in.asarray(vectors(3, seed=2)))  # labels go up with device queries
    held = gpu._gpu.nbytes
    assert sum(parts.values()) == pytest.approx(held, abs=64)  # the starts of layers
    more = gpu.memory(queries=1000, ef=200)
    assert more["queries"] == 1000 * (gpu.memory(queries=1, ef=200)["queries"])
    assert more["queries"] > 1000 * 200 * (8 if dtype == "int8" else 2)  # rerank: a quarter


def test_a_batcher_has_two_batches_in_flight(device):
    """Requests split among batches that are searched at once: the answers of `search`."""
    _, gpu = pair()
    queries = vectors(60, seed=3)
    allow = np.arange(0, ROWS, 2)
    sizes: list[int] = []

    def noted(batch: hnsw_gpu.Batch) -> None:
        sizes.append(batch.rows)

    with hnsw_gpu.Batcher(gpu, batch_rows=16, on_batch=noted) as batcher:
        whole = batcher.submit(queries, 5)
        parts = [batcher.submit(queries[i : i + 3], 4) for i in range(0, 60, 3)]
        few = batcher.submit(queries[:9], 3, allow=allow)
        oracle.assert_same(gpu.search(queries, 5), whole.result(300))
        for i, part in enumerate(parts):
            oracle.assert_same(gpu.search(queries[3 * i : 3 * i + 3], 4), part.result(300))
        oracle.assert_same(gpu.search(queries[:9], 3, allow=allow), few.result(300))
    assert sum(sizes) == 60 + 60 + 9 and max(sizes) <= 16


@pytest.mark.parametrize("failing", range(6))
def test_an_upload_that_fails_leaves_nothing_half_new(machine, failing, monkeypatch):
    """Searches of the state before and of the one after answer as the CPU."""
    cpu, gpu = pair()
    before, engine = gpu._state, gpu._gpu

    def walked():
        queries = Queries(vectors(9, seed=2))
        return engine.at(before.version, before.cpu, lambda: engine.walk(queries, Walk(7, 64)).keys)

    expected = walked()[0]
    for one in (cpu, gpu):
        one.add(vectors(60, seed=5))
    calls, put = itertools.count(), device_index.DeviceIndex._put

    def fail(*given):
        if next(calls) == failing:
            raise MemoryError("no more")
        return put(*given)

    with monkeypatch.context() as patch:
        patch.setattr(device_index.DeviceIndex, "_put", fail)
        with contextlib.suppress(MemoryError):
            gpu.search(vectors(9, seed=2), 7)
        assert next(calls) > failing
    np.testing.assert_array_equal(walked()[0], expected)
    assert_alike(cpu, gpu)
    for one in (cpu, gpu):
        one.add(vectors(10, seed=6))
    assert_alike(cpu, gpu)


def test_an_engine_that_was_left_is_not_filled_again(device):
    cpu, gpu = pair()
    engine, state = gpu._gpu, gpu._state
    gpu.to("cpu")
    assert engine.at(state.version, state.cpu, lambda: 1) is None and engine.nbytes == 0
    assert_alike(cpu, gpu)


def test_a_search_beside_an_adder(device):
    """Every answer is one that some published state gives."""
    cpu, gpu = pair()
    queries, answers = vectors(9, seed=2), []
    expected = [cpu.search(queries, 7, expand=4).labels]
    for turn in range(12):
        cpu.add(vectors(8, seed=10 + turn))
        expected.append(cpu.search(queries, 7, expand=4).labels)

    def add():
        for turn in range(12):
            gpu.add(vectors(8, seed=10 + turn))

    adder = threading.Thread(target=add)
    adder.start()
    while adder.is_alive():
        answers.append(gpu.search(queries, 7, expand=4).labels)
    adder.join()
    answers.append(gpu.search(queries, 7, expand=4).labels)
    for labels in answers:
        assert any(np.array_equal(labels, each) for each in expected)
    np.testing.assert_array_equal(answers[-1], expected[-1])


def notes(index: hnsw_gpu.Index) -> int:
    """How much is noted of links that the GPU has not."""
    changes = index._gpu._changes
    assert changes._held == sum(len(ids) + 1 for _, ids in changes._notes)
    return changes._held


def test_adds_that_no_search_follows_keep_few_notes(machine):
    cpu, gpu = pair()
    rows = np.random.default_rng(3).permutation(ADDS)[:, None] // 4 ** np.arange(DIM) % 4
    for index in (cpu, gpu):
        for row in rows.astype(np.float32)[:, None]:
            index.add(row)
        assert len(index) == ROWS + ADDS
    assert notes(gpu) <= ROWS
    machine.steps.clear()
    assert_alike(cpu, gpu)
    whole = machine.sum_of("upload")
    assert whole > ADDS * DIM * 4
    for index in (cpu, gpu):
        index.add(rows[:3] + 5)
    assert 0 < notes(gpu) < ROWS
    machine.steps.clear()
    assert_alike(cpu, gpu)  # by the notes: little goes up
    assert machine.sum_of("upload") < whole / 5
    for index in (cpu, gpu):
        index.add(rows[:1] + 6)
    assert len(gpu._gpu._changes._notes) == 1  # what is on the GPU is no longer noted
    assert_alike(cpu, gpu)


def test_an_older_state_comes_up_after_a_failed_upload(machine, monkeypatch):
    """What was noted and brought before is not there any more."""
    cpu, gpu = pair()
    for seed in (4, 5, 6):
        for one in (cpu, gpu):
            one.add(vectors(3, seed) + 1)
        assert_alike(cpu, gpu)
        if seed == 4:
            before, engine = gpu._state, gpu._gpu
    for one in (cpu, gpu):
        one.add(vectors(3, seed=7) + 1)
    assert len(engine._changes._notes) == 1

    def fail(*given):
        raise MemoryError("no more")

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="no more"):
        patch.setattr(device_index.DeviceIndex, "_put", fail)
        gpu.search(vectors(9, seed=2), 7)
    nodes = engine.at(before.version, before.cpu, lambda: engine.node_count)
    assert nodes == (before.node_count,)
    assert_alike(cpu, gpu)
    links = gpu._state.graph.neighbors0
    np.testing.assert_array_equal(engine._index._arrays["neighbors0"].get()[: len(links)], links)


class Pressed(BaseException):
    """What a signal handler raises."""


def test_an_exception_at_every_line_of_an_upload(machine):
    """Afterwards the state before is searched as it was, and the one after as it is."""
    cpu, gpu = pair()
    near = vectors(9, seed=2)
    engine, queries = gpu._gpu, Queries(near)
    source = inspect.getsourcefile(GpuEngine)

    def walk():
        return engine.walk(queries, Walk(30, 64)).keys

    for line in range(1, 1000):
        before = gpu._state
        assert_alike(cpu, gpu)
        expected = engine.at(before.version, before.cpu, walk)
        for one in (cpu, gpu):
            one.add(near + (1 + line // 8) * np.eye(9, DIM, k=line % 8))
        left = line

        def trace(frame, event, _):
            nonlocal left
            if frame.f_code.co_filename != source:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise Pressed
            return trace

        state, traced = gpu._state, sys.gettrace()
        sys.settrace(trace)
        try:
            engine.bring(state.version, state.cpu)
            was_raised = False
        except Pressed:
            was_raised = True
        finally:
            sys.settrace(traced)
        found = engine.at(before.version, before.cpu, walk)
        if was_raised:
            np.testing.assert_array_equal(found, expected)
        assert_alike(cpu, gpu)
        if not was_raised:
            break
    assert line > 10
