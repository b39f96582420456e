"""Threads and processes: searching at once, adding while others search, forking."""

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracle
import pytest

import hnsw_gpu
from hnsw_gpu.engine import workers

DIM, N = 24, 3000


@pytest.fixture(scope="module")
def rows():
    return oracle.gaussian(N, DIM, seed=1)


@pytest.fixture(scope="module")
def queries():
    return oracle.gaussian(400, DIM, seed=2)


def built(rows, **settings):
    index = hnsw_gpu.Index(DIM, "l2", M=8, ef_construction=50, **settings)
    index.add(rows)
    return index


@pytest.fixture(scope="module")
def index(rows):
    return built(rows)


@pytest.mark.parametrize("threads", (1, 2, None))
def test_eight_threads_give_the_serial_answers(index, queries, threads):
    """Each its own k, ef, filter and batch: nothing is shared that should not be."""
    allowed = np.random.default_rng(3).random(N) < 0.2

    def answer(number):
        part = queries[number * 5 : number * 5 + 1 + number % 60]
        if number % 5 == 3:
            return index.search_radius(part, 18.0 + number % 7, threads=threads)
        allow = allowed if number % 3 == 0 else None
        k, ef = 1 + number % 17, 10 + 13 * (number % 9)
        return index.search(part, k, ef=ef, allow=allow, threads=threads)

    serial = [answer(number) for number in range(64)]
    start = threading.Barrier(8)

    def worker(first):
        start.wait(timeout=60)
        return [answer(number) for number in range(first, first + 8)]

    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            together = [one for part in pool.map(worker, range(0, 64, 8)) for one in part]
        for got, expected in zip(together, serial, strict=True):
            oracle.assert_same(got, expected)


def test_exact_search_in_eight_threads(rows, queries):
    expected = hnsw_gpu.exact_search(rows, queries, 10, "l2")
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: hnsw_gpu.exact_search(rows, queries, 10, "l2"), range(16)):
            oracle.assert_same(got, expected)


def test_eight_indexes_built_at_once_are_the_same(rows, queries, index):
    expected = index.search(queries, 10)
    with ThreadPoolExecutor(8) as pool:
        for other in pool.map(lambda _: built(rows), range(8)):
            oracle.assert_same(other.search(queries, 10), expected)


CHANGES = {
    "add": lambda index: index.add(oracle.gaussian(1500, DIM, seed=7)),
    "add one": lambda index: index.add(oracle.gaussian(1, DIM, seed=7)),
    "add copies": lambda index: index.add(oracle.gaussian(N, DIM, seed=1)),
    "delete": lambda index: index.delete(np.arange(0, N, 2)),
    "compact": lambda index: index.compact(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_search_beside_a_change_sees_before_or_after(change, rows, queries):
    """Every answer is the whole answer before the change or the whole one after it."""
    index, twin = built(rows), built(rows)
    for one in (index, twin):
        one.delete(np.arange(1, N, 10))
    labels_before, before = twin.labels, twin.search(queries, 10)
    CHANGES[change](twin)
    labels_after, after = twin.labels, twin.search(queries, 10)
    answers, errors = [], []
    is_over = threading.Event()

    def searcher():
        try:
            while True:
                last = is_over.is_set()
                answers.append((index.search(queries, 10, threads=1), index.labels))
                if last:
                    return
        except Exception as error:
            errors.append(error)

    searchers = [threading.Thread(target=searcher) for _ in range(4)]
    for thread in searchers:
        thread.start()
    try:
        CHANGES[change](index)
    finally:
        is_over.set()
        for thread in searchers:
            thread.join()
    assert errors == []

    def equal(one, other):
        return all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))

    for number, (answer, labels) in enumerate(answers):
        assert equal(answer, before) or equal(answer, after), f"answer {number} is neither"
        assert np.array_equal(labels, labels_before) or np.array_equal(labels, labels_after)
    oracle.assert_same(answers[-1][0], after)
    oracle.assert_same(index.search(queries, 10), after)
    np.testing.assert_array_equal(index.labels, labels_after)
    index.check()


@pytest.mark.parametrize("threads", (1, 3))
def test_an_error_in_one_chunk_stops_the_rest(threads):
    """And is what the caller sees, when no thread is at work any more."""
    begun, ended = [], []

    def run(start, stop):
        begun.append(start)
        if start == 3:
            raise ZeroDivisionError
        threading.Event().wait(0.01)
        ended.append(stop - start)

    with pytest.raises(ZeroDivisionError):
        workers.run_chunks(run, 1000, 1, threads)
    assert len(begun) < 20 and len(ended) == len(begun) - 1
    seen = []
    workers.run_chunks(lambda start, stop: seen.extend(range(start, stop)), 1000, 7, threads)
    assert sorted(seen) == list(range(1000))


def test_an_interrupt_while_others_end_waits_for_them():
    """What is raised while the caller waits for the other threads is raised when they are done."""
    begun, ended = threading.Event(), []

    def run(start, stop):
        if threading.current_thread() is threading.main_thread():
            begun.wait(timeout=60)
        else:
            begun.set()
            threading.Event().wait(0.2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            threading.Event().wait(0.5)
            ended.append(start)

    with pytest.raises(KeyboardInterrupt):
        workers.run_chunks(run, 2, 1, threads=2)
    assert len(ended) == 1


def test_two_threads_add_at_once(rows, queries):
    """Both are added, in one order or the other."""
    index = hnsw_gpu.Index(DIM, "l2", M=8, ef_construction=50)
    start = threading.Barrier(4)

    def add(part):
        start.wait(timeout=60)
        return index.add(rows[part::4], np.arange(part, N, 4))

    with ThreadPoolExecutor(4) as pool:
        for part, labels in enumerate(pool.map(add, range(4))):
            np.testing.assert_array_equal(labels, np.arange(part, N, 4))
    index.check()
    np.testing.assert_array_equal(index.labels, np.arange(N))
    np.testing.assert_array_equal(index.vectors(np.arange(N)), rows)
    oracle.assert_nearest(index.search(queries[:20], 10, ef=N), queries[:20], rows, 10, "l2")


def test_many_threads_add_and_delete_single_rows(rows):
    """No number is given twice and no row is lost."""
    index = hnsw_gpu.Index(DIM, "l2", M=8, ef_construction=50)
    start = threading.Barrier(6)

    def work(part):
        start.wait(timeout=60)
        given = [int(index.add(rows[row : row + 1])[0]) for row in range(part, 120, 6)]
        index.delete(given[::2])
        return dict(zip(given[1::2], range(part + 6, 120, 12), strict=True))

    kept = {}
    with ThreadPoolExecutor(6) as pool:
        for part in pool.map(work, range(6)):
            assert not kept.keys() & part.keys()
            kept |= part
    assert len(kept) == 60
    np.testing.assert_array_equal(index.labels, sorted(kept))
    for label, row in kept.items():
        np.testing.assert_array_equal(index.vectors([label]), rows[[row]])
    index.check()


def test_saving_beside_adding_gives_a_whole_file(rows, queries, tmp_path):
    index, twin = built(rows), built(rows)
    before = twin.search(queries, 10)
    more = oracle.gaussian(1000, DIM, seed=7)
    twin.add(more)
    after = twin.search(queries, 10)
    adder = threading.Thread(target=index.add, args=(more,))
    adder.start()
    sizes = set()
    for number in range(6):
        index.save(tmp_path / f"{number}.hnsw")
        loaded = hnsw_gpu.load(tmp_path / f"{number}.hnsw")
        sizes.add(len(loaded))
        oracle.assert_same(loaded.search(queries, 10), before if len(loaded) == N else after)
    adder.join()
    assert sizes <= {N, N + 1000}


FORKING = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import numpy as np
import hnsw_gpu, oracle
sys.path.insert(0, sys.argv[1] + "/engine")
from test_threads import DIM, built
rows, queries = oracle.gaussian(1500, DIM, seed=1), oracle.gaussian(300, DIM, seed=2)
index = built(rows)
expected = index.search(queries, 10, threads=2)
exact = hnsw_gpu.exact_search(rows, queries, 10, "l2")
twin = built(rows)
twin.add(queries)
grown = twin.search(queries, 10)
stop = threading.Event()
def keep_searching():
    while not stop.is_set():
        index.search(queries, 10, threads=2)
beside = threading.Thread(target=keep_searching)
if sys.argv[2] == "busy":
    beside.start()
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs must not outlive the test
        code = 1
        try:
            oracle.assert_same(index.search(queries, 10, threads=2), expected)
            oracle.assert_same(hnsw_gpu.exact_search(rows, queries, 10, "l2"), exact)
            index.add(queries)
            oracle.assert_same(index.search(queries, 10), grown)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
stop.set()
if sys.argv[2] == "busy":
    beside.join()
oracle.assert_same(index.search(queries, 10), expected)
print(codes)
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
@pytest.mark.parametrize("state", ("idle", "busy"))
def test_searching_and_adding_after_a_fork(state):
    """In 8 children of a process that has searched, or is searching in another thread."""
    folder = str(__file__).rpartition("/engine/")[0]
    answer = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING, folder, state],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.stdout.split("\n")[-2:] == [str([0] * 8), ""], answer.stdout + answer.stderr
