"""Exceptions at any line of the main thread, forks in the middle of a change, copies, the exit."""

import concurrent.futures
import copy
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import oracle
import pytest
import tqdm

import hnsw_gpu
import hnsw_gpu.index
from hnsw_gpu import AnswerError, Batcher, CorruptIndexError, Index, QueueFullError, ServerError
from hnsw_gpu.inputs import RowsError
from hnsw_gpu.results import SearchResult
from hnsw_gpu.serve.answer_future import AnswerFuture

DIM, ROWS = 8, 300
VECTORS = oracle.gaussian(ROWS, DIM, seed=1)
QUERIES = oracle.gaussian(5, DIM, seed=2)
TRACED = str(Path(hnsw_gpu.__file__).parent), str(Path(tqdm.__file__).parent)


def built(rows: np.ndarray = VECTORS, **settings) -> Index:
    index = Index(DIM, "l2", M=4, ef_construction=20, **settings)
    index.add(rows)
    return index


# ---------------------------------------------------------------- exceptions between any two lines


class Pressed(BaseException):
    """What a signal handler raises."""


def raise_at(line: int):
    """A trace function that raises at that line of the package and its bars, in this thread."""
    left = line

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Pressed
        return trace

    return trace


def one_vector() -> Index:
    """Of a label that was not there before."""
    index = Index(DIM, "l2", M=4, ef_construction=20)
    index.add(QUERIES[:1], [next(LABELS)])
    return index


LABELS = itertools.count(10 * ROWS)
SCRATCH = tempfile.TemporaryDirectory()
CALLS = {
    "search": lambda index: index.search(QUERIES, 3, threads=2),
    "search with a filter": lambda index: index.search(QUERIES, 3, allow=np.arange(ROWS) > 9),
    "exact_search": lambda index: index.exact_search(QUERIES, 3, threads=2),
    "vectors": lambda index: index.vectors([0, 5]),
    "add": lambda index: index.add(QUERIES),
    "delete": lambda index: index.delete(index.labels[-1:]),
    "check": lambda index: index.check(),
    "compact": lambda index: index.compact(),
    "neighbor_graph": lambda index: index.neighbor_graph(1, progress=True),
    "search_radius": lambda index: index.search_radius(QUERIES, 1.0),
    "tune": lambda index: index.tune(0.1, k=1, queries=QUERIES),
    "replace": lambda index: index.add(VECTORS[:2], [0, 1], replace=True),
    "merge": lambda index: index.merge(one_vector()),
    "save": lambda index: index.save(Path(SCRATCH.name) / "i.hnsw"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file, unclosed
@pytest.mark.parametrize("call", CALLS)
def test_an_exception_at_every_line_leaves_nothing_locked(call) -> None:
    """Other threads search, add and delete afterwards, and the index is sound."""
    index = built()
    for line in range(1, 10_000):
        before = sys.gettrace()
        sys.settrace(raise_at(line))
        try:
            CALLS[call](index)
            was_raised = False
        except Pressed:
            was_raised = True
        finally:
            sys.settrace(before)

        def use() -> None:
            label = index.add(VECTORS[:1] + 100)
            index.search(QUERIES, 3, threads=2)
            index.delete(label)

        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        thread.join(timeout=30)
        assert not thread.is_alive(), f"after an exception at line {line} others wait for ever"
        if not was_raised:
            break
    assert line > 20
    index.check()
    found = index.search(VECTORS, 1, ef=len(index)).labels[:, 0]
    assert (found == np.arange(ROWS))[np.isin(np.arange(ROWS), index.labels)].all()


WAITED_FOR = {
    "result": lambda future: future.result(0.003),
    "exception": lambda future: future.exception(0.003),
    "wait": lambda future: concurrent.futures.wait([future], 0.003),
    "as_completed": lambda future: next(concurrent.futures.as_completed([future], 0.003)),
    "done": lambda future: future.done(),
    "add_done_callback": lambda future: future.add_done_callback(print),
    "cancel": lambda future: future.cancel(),
}
FUTURES = ("_base.py", "threading.py", "answer_future.py")  # whose locks these are


def raise_at_step(step: int):
    """A trace function that raises at that bytecode of `concurrent.futures`, in this thread."""
    left = step

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.endswith(FUTURES):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise Pressed
        return trace

    return trace


@pytest.mark.parametrize("call", WAITED_FOR)
def test_a_caller_that_was_interrupted_stops_no_other(call, monkeypatch) -> None:
    """Wherever it was, with whatever locks: the batcher goes on, and answers whoever shared its
    batch.
    """
    monkeypatch.setattr("hnsw_gpu.serve.answer_future.MOMENT_S", 0.0005)
    index = built()
    search, gate = index.search_checked, threading.Event()
    expected = index.search(QUERIES, 3)

    def gated(*given, **named):
        assert gate.wait(60)
        return search(*given, **named)

    monkeypatch.setattr(index, "search_checked", gated)
    for step in range(1, 5_000):
        gate.clear()
        batcher = Batcher(index)
        batcher.submit(QUERIES[:1], 3)  # occupies the engine: what comes afterwards is one batch
        interrupted, other = batcher.submit(QUERIES[:1], 3), batcher.submit(QUERIES, 3)
        before = sys.gettrace()
        was_raised = False
        sys.settrace(raise_at_step(step))
        try:
            WAITED_FOR[call](interrupted)
        except Pressed:
            was_raised = True
        except TimeoutError:
            pass
        except RuntimeError as error:  # of a lock of the library's that is not held after all
            was_raised = isinstance(error.__context__, Pressed)
            assert was_raised and call not in ("result", "exception")
        finally:
            sys.settrace(before)
            gate.set()
        found: list = []

        def use(batcher=batcher, other=other, found=found) -> None:
            found.append(other.result(20))
            found.append(batcher.submit(QUERIES, 3).result(20))
            batcher.close()

        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive() and len(found) == 2, f"stopped at step {step} of {call}"
        for one in found:
            oracle.assert_same(one, expected)
        if not was_raised:
            break
    assert step > 20


def test_a_cancelled_answer_is_done_for_who_waits() -> None:
    index = built()
    with Batcher(index) as batcher:
        for _ in range(50):
            future = batcher.submit(QUERIES, 3)
            if future.cancel():
                break
        assert future.cancelled() and future.cancel()
        assert concurrent.futures.wait([future], 20).done == {future}
        assert list(concurrent.futures.as_completed([future], 20)) == [future]


def test_an_answer_that_comes_after_all_is_nobodys() -> None:
    """Whoever settles a cancelled future, or one that is settled, goes on to the next."""
    nothing = SearchResult(np.empty((0, 3), np.int64), np.empty((0, 3), np.float32))
    cancelled, settled, failed = AnswerFuture(), AnswerFuture(), AnswerFuture()
    assert cancelled.cancel()
    for _ in range(2):
        cancelled.settle(nothing)
        assert cancelled.settle_now(nothing) is None
        settled.settle(nothing)
        failed.settle(ValueError("once"))
        assert failed.settle_now(nothing) is None
    assert cancelled.cancelled() and settled.result(0) is nothing
    with pytest.raises(ValueError, match="once"):
        failed.result(0)


def test_answers_are_had_by_wait_and_as_completed() -> None:
    index = built()
    expected = index.search(QUERIES, 3)
    with Batcher(index, batch_rows=1) as batcher:
        futures = [batcher.submit(QUERIES[i : i + 1], 3) for i in range(5) for _ in range(40)]
        assert set(concurrent.futures.as_completed(futures, 60)) == set(futures)
        more = [batcher.submit(QUERIES, 3) for _ in range(40)]
        assert concurrent.futures.wait(more, 60).done == set(more)
    for number, future in enumerate(futures):
        np.testing.assert_array_equal(future.result().labels[0], expected.labels[number // 40])
    for future in more:
        oracle.assert_same(future.result(), expected)


# ---------------------------------------------------------------- searches beside a change


def test_a_search_does_not_wait_for_an_add(monkeypatch) -> None:
    """It sees the index as it was; what is added appears at once, when the add ends."""
    index = built()
    expected = index.search(QUERIES, 5)
    goes_on, is_in = threading.Event(), threading.Event()
    insert = hnsw_gpu.index.insert

    def slow(*given, **named):
        insert(*given, **{**named, "advance": lambda _: (is_in.set(), goes_on.wait())})

    monkeypatch.setattr(hnsw_gpu.index, "insert", slow)
    adder = threading.Thread(target=index.add, args=(QUERIES,))
    adder.start()
    try:
        assert is_in.wait(60)
        oracle.assert_same(index.search(QUERIES, 5), expected)
        oracle.assert_same(index.exact_search(QUERIES, 5), expected)
        assert len(index) == ROWS
        np.testing.assert_array_equal(index.vectors([7]), VECTORS[[7]])
    finally:
        goes_on.set()
        adder.join()
    assert len(index) == ROWS + len(QUERIES)
    index.check()


def test_a_state_that_is_held_never_changes() -> None:
    """Whatever is added meanwhile, in small and large calls: links are never written in place."""
    index, rng = built(), np.random.default_rng(3)
    held = []
    for count in [1] * 40 + [30, 1, 1, 200, 1, 1, 5, 1]:
        state = index._state
        graph = [array.copy() for array in state.graph]
        held.append((state, graph, *state.labels.packed()))
        index.add(rng.normal(size=(count, DIM)))
        if count == 5:
            index.check()  # repairs
    for state, graph, offsets, labels in held:
        for name, array, before in zip(state.graph._fields, state.graph, graph, strict=True):
            if name in ("nodes", "below", "neighbors"):  # these have room at the ends of layers
                for start, used in zip(
                    state.graph.layer_offsets, used_rows(state.graph), strict=False
                ):
                    place = slice(start, start + used)
                    np.testing.assert_array_equal(array[place], before[place])
            else:
                np.testing.assert_array_equal(array, before)
        for array, before in zip(state.labels.packed(), (offsets, labels), strict=True):
            np.testing.assert_array_equal(array, before)


def used_rows(graph) -> list[int]:
    count = len(graph.neighbors0)
    ends = [slice(*graph.layer_offsets[i : i + 2]) for i in range(graph.top)]
    return [int((graph.nodes[layer] < count).sum()) for layer in ends]


def test_added_one_by_one_is_added_at_once() -> None:
    """The same answers and the same file as the reference for small calls: a copy at each step."""
    index, copied = built(), built()
    for row in oracle.gaussian(60, DIM, seed=5):
        index.add(row[None])
        copied = pickle.loads(pickle.dumps(copied))
        copied.add(row[None])
    for one, other in zip(
        index._contents()[2].values(), copied._contents()[2].values(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


CHANGES = {
    "add": lambda index, row: index.add(VECTORS[row : row + 1] + 50, threads=1),
    "copy": lambda index, row: index.add(index.vectors([7 * row]), threads=1),
    "update": lambda index, row: index.update([row], VECTORS[row : row + 1] + 50, threads=1),
    "delete": lambda index, row: index.delete([row]),
    "undelete": lambda index, row: (index.delete([0]), index.undelete([0])),
    "delete and search": lambda index, row: (index.delete([row]), index.search(QUERIES, threads=1)),
    "search a few": lambda index, row: index.search(QUERIES, allow=[row, row + 1], threads=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_allocates_what_it_changes(change) -> None:
    """Not in proportion to what is there, but for some bits a node: whether it is visited, has a
    label, a label is live, or may come back.
    """

    def allocated(rows: int) -> float:
        index = built(oracle.gaussian(rows, DIM, seed=4))
        found = []
        tracemalloc.start()
        try:
            for row in range(41):  # now and then one makes room, or repairs
                before = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
                CHANGES[change](index, row)
                found.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
        return float(np.median(found))

    small, large = allocated(2_000), allocated(34_000)
    assert large - small < 2 * 32_000  # two bytes a node; links alone are 32, labels 8


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": "int8", "refine": True}, {"dtype": "fp16"}, {"dtype": "int4"}]
)
def test_pickles_and_copies_are_the_index(settings) -> None:
    index = built(**settings)
    index.delete([3, 4])
    buffers: list[pickle.PickleBuffer] = []
    out_of_band = pickle.dumps(index, protocol=5, buffer_callback=buffers.append)
    assert len(out_of_band) < 5_000 < sum(len(part.raw()) for part in buffers)
    copies = [
        *(pickle.loads(pickle.dumps(index, protocol)) for protocol in range(2, 6)),
        pickle.loads(out_of_band, buffers=[bytes(part.raw()) for part in buffers]),
        copy.copy(index),
        copy.deepcopy(index),
    ]
    expected = index.search(QUERIES, 5)
    grown = copy.deepcopy(index)
    grown.add(QUERIES)
    after = grown.search(QUERIES, 5)
    for one in copies:
        oracle.assert_same(one.search(QUERIES, 5), expected)
        one.add(QUERIES)
        oracle.assert_same(one.search(QUERIES, 5), after)
        one.check()
        oracle.assert_same(index.search(QUERIES, 5), expected)  # nothing is shared
    index.check()


def test_a_mapped_index_is_pickled_as_its_path(tmp_path) -> None:
    path = tmp_path / "x.hnsw"
    built(oracle.gaussian(3000, DIM, seed=4)).save(path)
    index = hnsw_gpu.load(path, mmap=True)
    pickled = pickle.dumps(index)
    assert len(pickled) < 1_000
    oracle.assert_same(pickle.loads(pickled).search(QUERIES, 5), index.search(QUERIES, 5))
    built().save(path)  # another index under the same name
    with pytest.raises(CorruptIndexError, match=r"x\.hnsw: is another index than the one"):
        pickle.loads(pickled)
    index.add(QUERIES)  # no longer what the file holds: pickled whole
    oracle.assert_same(copy.copy(index).search(QUERIES, 5), index.search(QUERIES, 5))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_processes_take_an_index(method) -> None:
    index = built()
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(Index.search, index, QUERIES, 5).result()
    oracle.assert_same(found, index.search(QUERIES, 5))


def asked_and_changed(index: Index) -> tuple[SearchResult, int]:
    found = index.search(QUERIES, 5)
    index.add(QUERIES)
    index.delete(index.labels[:3])
    index.compact()
    return found, len(index)


def test_joblib_takes_an_index(tmp_path) -> None:
    """Which maps arrays of a megabyte from a file, read-only, where others pickle them."""
    joblib = pytest.importorskip("joblib")
    rows = np.random.default_rng(0).normal(size=(9000, DIM)).astype(np.float32)
    index = Index(DIM, "l2", M=4, ef_construction=8)
    index.add(rows)
    assert index._state.rows.nbytes > 2**18
    one = joblib.Parallel(n_jobs=2, max_nbytes=2**18, temp_folder=tmp_path)
    for found, count in one(joblib.delayed(asked_and_changed)(index) for _ in range(2)):
        oracle.assert_same(found, index.search(QUERIES, 5))
        assert count == len(index) + len(QUERIES) - 3


def refused(index: Index) -> None:
    index.add(np.full((2, DIM), np.nan))


def test_an_error_comes_out_of_another_process() -> None:
    """Whatever it says; one that cannot be unpickled breaks the pool of processes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(refused, built())
        with pytest.raises(ValueError, match=r"^vectors: NaN or infinite values in rows 0, 1$"):
            future.result()
    for error in (
        RowsError("x: bad in row 3", "bad", np.array([3])),
        ServerError(429, "full"),
        AnswerError(200, "garbage"),
        QueueFullError("full", 0.5),
        CorruptIndexError("x.hnsw: cut"),
    ):
        for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
            assert type(again) is type(error) and str(again) == str(error)
            assert vars(again) == vars(error)


@pytest.mark.parametrize("method", ["exact", "hnsw"])
@pytest.mark.parametrize("against", [None, "index"])
def test_a_result_of_dedup_can_be_pickled_and_copied(method, against) -> None:
    """And decides again as the one that it is a copy of."""
    rows = np.concatenate([VECTORS, VECTORS[:50] + 0.01, VECTORS[:20]])
    other = built(VECTORS[90:95]) if against else None
    result = hnsw_gpu.dedup(rows, max_distance=0.5, metric="l2", method=method, against=other)
    for one in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result), copy.copy(result)):
        np.testing.assert_array_equal(one.keep, result.keep)
        for linkage in ("star", "components"):
            again, expected = (
                each.regroup(max_distance=1e-4, linkage=linkage) for each in (one, result)
            )
            np.testing.assert_array_equal(again.group, expected.group)
        assert 20 <= (~again.keep).sum() < (~result.keep).sum()


def test_a_batcher_cannot_be_pickled() -> None:
    with Batcher(built()) as batcher:
        for make in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="its index can"):
                make(batcher)


# ---------------------------------------------------------------- forks, and the end of the process


def run(program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(TRACED[0]).parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


BEGIN = f"""
import asyncio, atexit, os, sys, threading, time
import numpy as np
import hnsw_gpu
rows = np.random.default_rng(1).normal(size=({ROWS}, {DIM})).astype("float32")
index = hnsw_gpu.Index({DIM}, "l2", M=4, ef_construction=20)
index.add(rows)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are for POSIX")
def test_forked_in_the_middle_of_an_add() -> None:
    """The child has the index as it was before, and goes on with it."""
    program = (
        BEGIN
        + """
stop = threading.Event()
def keep_adding():
    rng = np.random.default_rng(2)
    while not stop.is_set():
        index.add(rng.normal(size=(40, rows.shape[1])))
def keep_searching():
    while not stop.is_set():
        index.search(rows[:20], 5, threads=2)
threads = [threading.Thread(target=keep_adding), threading.Thread(target=keep_searching)]
for thread in threads:
    thread.start()
children = []
for number in range(25):
    time.sleep(0.01)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before = len(index)
            index.check()
            found = index.search(rows, 1, ef=before, threads=2).labels[:, 0]
            assert (found == np.arange(len(rows))).all()
            index.add(rows + 100, threads=2)
            assert len(index) == before + len(rows)
            index.check()
            code = 0
        finally:
            os._exit(code)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
stop.set()
for thread in threads:
    thread.join()
assert codes == [0] * len(children), codes
print("done")
"""
    )
    assert run(program) == "done\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are for POSIX")
def test_a_batcher_of_before_a_fork_says_so() -> None:
    program = (
        BEGIN
        + """
import concurrent.futures
gate = threading.Event()
search = index.search_checked
index.search_checked = lambda *given, **named: (gate.wait(), search(*given, **named))[1]
batcher = hnsw_gpu.Batcher(index)
gate.set()
settled = batcher.submit(rows[:2])
settled.result()
gate.clear()
unsettled = [batcher.submit(rows[:2]) for _ in range(3)]  # in the engine, and in the queue
waiting = threading.Thread(target=unsettled[0].result)
waiting.start()
while not unsettled[0]._condition._waiters:
    time.sleep(0.001)
unsettled[1]._condition.acquire()  # as a thread that is not in the child may
child = os.fork()
if child == 0:
    code = 1
    try:
        gate.set()
        assert settled.result().labels.shape == (2, 10)
        for future in unsettled:
            done = concurrent.futures.as_completed([future])
            for call in (future.result, lambda: next(done).result()):
                try:
                    call()
                except RuntimeError as error:
                    assert "this process was forked" in str(error)
                else:
                    raise AssertionError("an answer")
        for call in (lambda: batcher.submit(rows[:2]), lambda: batcher.swap(index)):
            try:
                call()
            except RuntimeError as error:
                assert "before this process was forked" in str(error)
            else:
                raise AssertionError("no error")
        batcher.close()
        hnsw_gpu.Batcher(index).submit(rows[:2]).result(timeout=20)
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
unsettled[1]._condition.release()
gate.set()
for future in unsettled:
    assert future.result().labels.shape == (2, 10)
batcher.close()
print("done")
"""
    )
    assert run(program) == "done\n"


AT_EXIT = """
def work():
    index.search(rows, 5, threads=2)
    index.exact_search(rows, 5, threads=2)
    index.add(rows + 100, threads=2)
    index.delete([0])
    index.save({path!r})
    assert len(hnsw_gpu.load({path!r})) == 2 * len(rows) - 1
    print("done", flush=True)
"""
AFTER_MAIN = {
    "atexit": "atexit.register(work)",
    "a thread that outlives main": """
def later():
    time.sleep(0.3)
    work()
threading.Thread(target=later).start()
""",
    "a batcher in use": """
batcher = hnsw_gpu.Batcher(index)
def later():
    time.sleep(0.3)
    batcher.submit(rows[:3]).result()
    work()
threading.Thread(target=later).start()
""",
    "a batcher of asyncio": """
async def ask():
    async with hnsw_gpu.Batcher(index) as batcher:
        await batcher.search(rows[:3])
    work()
atexit.register(lambda: asyncio.run(ask()))
""",
}


@pytest.mark.parametrize("how", AFTER_MAIN)
def test_work_until_the_end(how, tmp_path) -> None:
    program = BEGIN + AT_EXIT.format(path=str(tmp_path / "x.hnsw")) + AFTER_MAIN[how]
    assert run(program) == "done\n"
