"""An `add` that ends early, by an error or by Ctrl-C, keeps whole batches and a sound index."""

import contextlib
import signal
import threading
import time

import numpy as np
import oracle
import pytest

import hnsw_gpu
from hnsw_gpu import index as index_module
from hnsw_gpu.engine import build, candidates, growth
from hnsw_gpu.engine.graph import check_graph
from hnsw_gpu.engine.workers import Stopped, run_to_a_stop

DIM = 16


@pytest.mark.parametrize("failing_call", (1, 2, 60))
@pytest.mark.parametrize(
    ("module", "step"), [(build, "_group"), (build, "_new_selection"), (candidates, "walk")]
)
def test_an_error_in_the_middle_of_a_batch(module, step, failing_call, monkeypatch):
    rows = oracle.gaussian(2000, DIM, seed=1)
    index = hnsw_gpu.Index(DIM, "l2", M=4, ef_construction=20)
    index.add(rows[:500])
    calls = 0
    original = getattr(module, step)

    def fail(*given, **named):
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise MemoryError("no more")
        return original(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, fail)
        with pytest.raises(MemoryError, match="no more"):
            index.add(rows[500:], threads=1)
    assert 500 <= len(index) < 2000
    check_prefix(index, rows)
    # what is missing can be added, and copies of what is there are found again
    index.add(rows[len(index) :], labels=np.arange(len(index), 2000))
    check_prefix(index, rows)
    index.add(rows[:10])
    assert len(index) == 2010 and len(index._state.graph.neighbors0) == 2000


def test_an_error_in_the_repair(monkeypatch):
    """All is in; and the second copy of the links is not left without what was repaired."""
    rows = oracle.gaussian(1000, DIM, seed=3)
    index, twin = (hnsw_gpu.Index(DIM, "l2", M=4, ef_construction=20) for _ in range(2))
    for one in (index, twin):
        one.add(rows[:500])

    def fail(*_, **__):
        repair(*_, **__)
        raise MemoryError("no more")

    repair = growth.repair
    with monkeypatch.context() as patch:
        patch.setattr(growth, "repair", fail)
        with pytest.raises(MemoryError, match="no more"):
            index.add(rows[500:600])
    twin.add(rows[500:600])
    assert len(index) == 600
    for row in range(600, 1000, 7):
        for one in (index, twin):
            one.add(rows[row : row + 7])
    for one in (index, twin):
        one.check()
    for mine, theirs in zip(
        index._state.arrays().values(), twin._state.arrays().values(), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


CHANGES = {
    "update": lambda index, rows, _: index.update(np.arange(len(rows)), rows),
    "replace": lambda index, rows, _: index.add(rows, np.arange(len(rows)) + 200, replace=True),
    "merge": lambda index, _, other: index.merge(other),
    "compact": lambda index, *_: index.compact(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("room", "step"), [(build, "_insert_batch"), (growth, "repair")])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_whole_or_not_at_all(monkeypatch, change, room, step, error):
    """Ended at its first batch, or when all is done but to be seen: then it was never begun."""
    rows = oracle.gaussian(3500, DIM, seed=4)
    index, twin, other = (hnsw_gpu.Index(DIM, "l2", M=4, ef_construction=20) for _ in range(3))
    for one in (index, twin):
        one.add(rows[:2000])
        one.delete(np.arange(1900, 2000))
    other.add(rows[2000:], np.arange(1500) + 10_000)
    given = rows[2000:], other
    before = {name: array.copy() for name, array in index._state.arrays().items()}
    original, pressed = getattr(room, step), []

    def ending(*given, **named):
        done = original(*given, **named)
        if error is MemoryError:
            raise error
        pressed.append(True)
        return done

    def run(work):
        """As `run_to_a_stop` where Ctrl-C is pressed in that step."""
        with contextlib.suppress(Stopped):
            work(lambda: bool(pressed))
        if pressed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, step, ending)
        patch.setattr(index_module, "run_to_a_stop", run)
        with pytest.raises(error):
            CHANGES[change](index, *given)
    for name, array in index._state.arrays().items():
        np.testing.assert_array_equal(array, before[name])
    for one in (index, twin):
        CHANGES[change](one, *given)
        one.check()
    for mine, theirs in zip(
        index._state.arrays().values(), twin._state.arrays().values(), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_links_to_nodes_that_did_not_follow_are_dropped():
    index = hnsw_gpu.Index(DIM, "l2", M=4)
    index.add(oracle.gaussian(300, DIM, seed=2))
    graph = index._state.graph
    planted = graph._replace(neighbors0=graph.neighbors0.copy(), neighbors=graph.neighbors.copy())
    planted.neighbors0[5, 0] = 300
    planted.neighbors0[6, 1] = 2**31 - 1
    before = planted.neighbors0.copy()
    mended = build.packed(build.without_unfinished(planted, 300, graph.top))
    assert all("reachable" in problem for problem in check_graph(mended))
    for row in (5, 6):
        kept = [link for link in before[row] if 0 <= link < 300]
        np.testing.assert_array_equal(mended.neighbors0[row][: len(kept)], kept)
        assert (mended.neighbors0[row][len(kept) :] == -1).all()


def check_prefix(index, rows):
    count = len(index)
    np.testing.assert_array_equal(index.labels, np.arange(count))
    index.check()
    found = index.search(rows[:100], k=1, ef=count)
    np.testing.assert_array_equal(found.labels[:, 0], np.arange(100))
    assert (index.search(rows[:5], count).labels >= 0).all()


def test_three_interrupts_wait_for_the_work(monkeypatch):
    """However often Ctrl-C is pressed, the call returns after the work has stopped."""
    from hnsw_gpu.engine import workers

    presses = iter(range(3))
    wait = workers.Job.wait
    ended = []

    def pressed(job):
        if next(presses, None) is not None:
            raise KeyboardInterrupt
        return wait(job)

    def work(is_stopped):
        while not is_stopped():
            time.sleep(0.001)
        ended.append(True)

    monkeypatch.setattr(workers.Job, "wait", pressed)
    with pytest.raises(KeyboardInterrupt):
        run_to_a_stop(work)
    assert ended == [True]


def press_ctrl_c():
    """On a thread that works, while the main one waits for it, and has time to see it."""
    time.sleep(0.3)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(0.5)


def test_an_interrupt_while_vectors_are_encoded(monkeypatch):
    """The next part is not begun, and the index is as it was."""
    rows = oracle.gaussian(600, DIM, seed=4)
    index = hnsw_gpu.Index(DIM, "l2", M=4, ef_construction=20)
    index.add(rows[:500])
    monkeypatch.setattr(index_module, "ENCODE_ROWS", 10)
    checked, checked_rows = [], index.checked_rows

    def interrupted(part, first):
        checked.append(first)
        if first == 20:
            press_ctrl_c()
        return checked_rows(part, first)

    monkeypatch.setattr(index, "checked_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add(rows[500:])
    assert checked == [0, 10, 20] and len(index) == 500
    monkeypatch.undo()
    index.add(rows[500:])
    check_prefix(index, rows)


def test_an_interrupt_while_a_build_makes_codes(monkeypatch):
    """The next part is not begun, and no vector is in."""
    rows = oracle.gaussian(500, 100, seed=5)
    index = hnsw_gpu.Index(100, "l2", M=4, ef_construction=20)
    monkeypatch.setattr(candidates, "LEAST_NUMBERS", 0)
    monkeypatch.setattr(candidates, "PART", 50)
    parts, encode = [], candidates.encode_int8

    def interrupted(vectors, codes):
        parts.append(len(vectors))
        if len(parts) == 2:
            press_ctrl_c()
        encode(vectors, codes)

    monkeypatch.setattr(candidates, "encode_int8", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add(rows)
    assert parts == [50, 50] and len(index) == 0
    monkeypatch.undo()
    index.add(rows, np.arange(500))  # labels that were drawn do not come again
    check_prefix(index, rows)
