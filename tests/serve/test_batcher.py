"""The batcher: answers bit-equal to the index's, how batches form, and what a caller may do."""

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest

from hnsw_gpu import Batch, Batcher, Index, QueueFullError

DIM, ROWS = 16, 3000
RNG = np.random.default_rng(5)
VECTORS = RNG.normal(size=(ROWS, DIM)).astype(np.float32)
QUERIES = RNG.normal(size=(600, DIM)).astype(np.float32)


class Gated(Index):
    """An index whose searches wait at a gate, and note what they were asked."""

    def __init__(self, *given, **how):
        self.calls: list[tuple[int, int, int]] = []  # rows, k, ef
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.error: Exception | None = None
        self.plain = Index(*given, **how)
        super().__init__(*given, **how)

    def search_checked(self, queries, k, **how):
        self.calls.append((len(queries), k, how["ef"]))
        self.entered.release()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return super().search_checked(queries, k, **how)


def gated_index(kind=Gated):
    made = kind(DIM, M=8, ef_construction=40)
    for one in (made, made.plain):
        one.add(VECTORS[:500])
    return made


@pytest.fixture(scope="module")
def index():
    made = Index(DIM, M=8, ef_construction=60)
    made.add(VECTORS)
    return made


@pytest.fixture
def gated():
    made = gated_index()
    yield made
    made.gate.set()


def equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def hold(batcher, gated):
    """Occupy the engine with one request; what comes afterwards waits."""
    first = batcher.submit(QUERIES[:1], 1)
    assert gated.entered.acquire(timeout=30)
    return first


ASKED = [
    {"rows": slice(0, 1), "k": 1},
    {"rows": slice(1, 4), "k": 10},
    {"rows": slice(4, 5), "k": 12},  # with 10 in one batch, of 16
    {"rows": slice(5, 9), "k": 100, "ef": 30},  # more than ef
    {"rows": slice(9, 10), "k": 60},
    {"rows": slice(10, 14), "k": 7, "ef": 10},
    {"rows": slice(0, 0), "k": 3},
    {"rows": slice(14, 15), "k": ROWS + 5},
    {"rows": slice(15, 400), "k": 5},  # larger than a batch
    {"rows": slice(400, 403), "k": 10, "allow": np.arange(0, ROWS, 7)},
    {"rows": slice(403, 405), "k": 3, "allow": np.arange(ROWS) % 2 == 0},
    {"rows": slice(405, 410), "k": 4, "allow": RNG.random((5, ROWS)) < 0.3},
    {"rows": slice(20, 21), "k": 10, "rerank": 10},  # less than the 16 that a batch would ask for
    {"rows": slice(21, 23), "k": 10, "rerank": 20},
    {"rows": slice(23, 24), "k": 9, "rerank": None},
    {"rows": slice(410, 560), "k": 4, "allow": RNG.random((150, ROWS)) < 0.3},
]


def is_mask(allow):
    return allow is not None and allow.dtype.kind == "b"


@pytest.mark.parametrize("kind", ["cosine", "l2", "int8", "int4", "euclidean", "deleted", "copies"])
def test_answers_are_those_of_the_index(kind):
    """All at once, from a loop and from threads; several sizes of batch."""
    metric = kind if kind in ("l2", "euclidean") else "cosine"
    how = {"dtype": kind, "refine": True} if kind in ("int8", "int4") else {}
    index = Index(DIM, metric, M=8, ef_construction=60, **how)
    index.add(np.concatenate([VECTORS, VECTORS[:50]]) if kind == "copies" else VECTORS)
    if kind == "deleted":
        index.delete(np.arange(0, ROWS, 3))
    asked = [{**one} for one in ASKED]
    if kind == "copies":
        asked = [one for one in asked if not is_mask(one.get("allow"))]
    rows = [QUERIES[one.pop("rows")] for one in asked]
    expected = [index.search(q, **how) for q, how in zip(rows, asked, strict=True)]

    async def ask(batcher):
        tasks = (batcher.search(q, **how) for q, how in zip(rows, asked, strict=True))
        return await asyncio.gather(*tasks)

    for batch_rows in (None, 100, 1):
        with Batcher(index, batch_rows=batch_rows) as batcher:
            futures = [batcher.submit(q, **how) for q, how in zip(rows, asked, strict=True)]
            for found, truth in zip(asyncio.run(ask(batcher)), expected, strict=True):
                equal(found, truth)
            for future, truth in zip(futures, expected, strict=True):
                equal(future.result(30), truth)


def test_callers_of_every_kind_at_once(index):
    """Threads, and tasks of two event loops, a thousand requests of mixed shapes."""
    batches: list[Batch] = []
    expected = {k: index.search(QUERIES, k) for k in (3, 10)}
    wrong = []

    def check(found, i, k):
        truth = expected[k]
        if not all((a == b[i : i + 2]).all() for a, b in zip(found, truth, strict=True)):
            wrong.append((i, k))

    with Batcher(index, batch_rows=64, on_batch=batches.append) as batcher:

        async def task(i):
            k = (3, 10)[i % 2]
            check(await batcher.search(QUERIES[i : i + 2], k), i, k)

        async def tasks():
            await asyncio.gather(*map(task, range(300)))

        def thread():
            for i in range(0, 400, 2):
                check(batcher.submit(QUERIES[i : i + 2], 10).result(30), i, 10)

        work = [threading.Thread(target=thread) for _ in range(2)]
        work += [threading.Thread(target=asyncio.run, args=(tasks(),)) for _ in range(2)]
        for one in work:
            one.start()
        for one in work:
            one.join()
    assert wrong == []
    assert sum(batch.rows for batch in batches) == 2 * 1000
    assert sum(len(batch.waited_s) for batch in batches) == 1000
    assert all(batch.rows <= 64 for batch in batches)
    assert len(batches) < 500  # the loops alone gave 600 requests: batches formed


def test_what_waits_goes_together(gated):
    """One at once, and while it is searched the others gather: by k rounded up, ef and allow."""
    allow = np.arange(100)
    with Batcher(gated) as batcher:
        hold(batcher, gated)
        futures = [batcher.submit(QUERIES[i], k) for i, k in enumerate((9, 10, 16, 17, 1))]
        futures += [batcher.submit(QUERIES[i], 10, ef=32) for i in range(3)]
        futures += [batcher.submit(QUERIES[i], 10, allow=allow) for i in range(4)]
        futures += [batcher.submit(QUERIES[i], 10, allow=allow.copy()) for i in range(2)]
        assert (batcher.waiting_requests, batcher.waiting_rows) == (14, 14)
        gated.gate.set()
        for future in futures:
            future.result(30)
    rows_k_ef = [(1, 1, 64), (3, 16, 64), (1, 32, 64), (1, 1, 64), (3, 16, 32), (4, 10, 64)]
    assert gated.calls == [*rows_k_ef, (1, 10, 64), (1, 10, 64)]
    assert (batcher.waiting_requests, batcher.waiting_rows) == (0, 0)


def test_after_deletes_each_k_is_asked_by_itself(gated):
    gated.delete([3])
    with Batcher(gated) as batcher:
        hold(batcher, gated)
        futures = [batcher.submit(QUERIES[i], k) for i, k in enumerate((9, 10, 9))]
        gated.gate.set()
        for future in futures:
            future.result(30)
    assert gated.calls[1:] == [(2, 9, 64), (1, 10, 64)]


def test_a_caller_may_use_its_array_again(gated):
    mine = QUERIES[:3].copy()
    with Batcher(gated) as batcher:
        hold(batcher, gated)
        waiting = batcher.submit(mine, 5)
        mine[:] = np.nan
        gated.gate.set()
        equal(waiting.result(30), gated.plain.search(QUERIES[:3], 5))


def test_groups_take_turns(gated):
    with Batcher(gated, batch_rows=4) as batcher:
        hold(batcher, gated)
        many = [batcher.submit(QUERIES[i : i + 2], 8) for i in range(8)]
        few = batcher.submit(QUERIES[:1], 8, ef=20)
        gated.gate.set()
        few.result(30)
        for future in many:
            future.result(30)
    assert gated.calls[1:4] == [(4, 8, 64), (1, 8, 20), (4, 8, 64)]


def test_large_requests_are_split_and_small_ones_are_not(gated):
    with Batcher(gated, batch_rows=100) as batcher:
        hold(batcher, gated)
        large = batcher.submit(QUERIES[:250], 5)
        small = [batcher.submit(QUERIES[300 + 30 * i : 330 + 30 * i], 5) for i in range(3)]
        gated.gate.set()
        equal(large.result(30), gated.plain.search(QUERIES[:250], 5, ef=64))
        for i, future in enumerate(small):
            truth = gated.plain.search(QUERIES[300 + 30 * i : 330 + 30 * i], 5, ef=64)
            equal(future.result(30), truth)
    assert [rows for rows, _, _ in gated.calls[1:]] == [100, 90, 100, 50]  # in turns


def test_full(gated):
    with Batcher(gated, queue_rows=10) as batcher:
        hold(batcher, gated)
        huge = batcher.submit(QUERIES[:20], 3)  # alone it may be larger than the queue
        with pytest.raises(QueueFullError, match=r"20 rows wait and 1 more.*queue_rows=10") as full:
            batcher.submit(QUERIES[:1], 3)
        assert full.value.retry_after_s > 0
        assert huge.cancel()
        ten = [batcher.submit(QUERIES[:5], 3) for _ in range(2)]

        async def ask():
            await batcher.search(QUERIES[:1], 3)

        with pytest.raises(QueueFullError):
            asyncio.run(ask())
        gated.gate.set()
        for future in ten:
            future.result(30)
        batcher.submit(QUERIES[:1], 3).result(30)


def test_who_leaves_is_not_searched(gated):
    with Batcher(gated) as batcher:
        hold(batcher, gated)

        async def leave():
            tasks = [asyncio.create_task(batcher.search(QUERIES[i], 4)) for i in range(50)]
            stays = asyncio.create_task(batcher.search(QUERIES[:3], 4))
            await asyncio.sleep(0)
            futures = [batcher.submit(QUERIES[i], 4) for i in range(50)]
            assert batcher.waiting_rows == 103
            for future in futures + tasks:
                future.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert all(task.cancelled() for task in tasks)
            assert (batcher.waiting_rows, batcher.waiting_requests) == (3, 1)
            gated.gate.set()
            equal(await stays, gated.plain.search(QUERIES[:3], 4, ef=64))
            for future in futures:
                with pytest.raises(CancelledError):
                    future.result(0)

        asyncio.run(leave())
    assert gated.calls == [(1, 1, 64), (3, 4, 64)]


def test_who_leaves_during_the_search_costs_nobody_else(gated):
    """Of a request in parts the rest is not searched."""
    with Batcher(gated, batch_rows=10) as batcher:
        large = batcher.submit(QUERIES[:35], 4)
        assert gated.entered.acquire(timeout=30)
        other = batcher.submit(QUERIES[:1], 4, ef=10)
        assert batcher.waiting_rows == 26
        assert large.cancel()
        assert batcher.waiting_rows == 1
        gated.gate.set()
        equal(other.result(30), gated.plain.search(QUERIES[:1], 4, ef=10))
    assert gated.calls == [(10, 4, 64), (1, 4, 10)]


def test_too_late(gated):
    with Batcher(gated) as batcher:
        hold(batcher, gated)

        async def ask():
            with pytest.raises(TimeoutError, match=r"no answer within timeout_s=0.01 "):
                await batcher.search(QUERIES[:7], 4, timeout_s=0.01)

        late = batcher.submit(QUERIES[:2], 4, timeout_s=1e-6)
        asyncio.run(ask())
        assert batcher.waiting_rows == 2
        good = batcher.submit(QUERIES[:1], 4, timeout_s=60)
        gated.gate.set()
        good.result(30)
        with pytest.raises(TimeoutError, match="timeout_s=1e-06"):
            late.result(30)
    assert gated.calls[1:] == [(1, 4, 64)]


def test_an_error_reaches_the_callers_of_its_batch_alone(gated):
    batches: list[Batch] = []
    with Batcher(gated, on_batch=batches.append) as batcher:
        hold(batcher, gated)
        gated.error = MemoryError("no room")

        async def ask():
            return await asyncio.gather(
                *(batcher.search(QUERIES[i], 5) for i in range(3)), return_exceptions=True
            )

        threaded = batcher.submit(QUERIES[:1], 5)
        gated.gate.set()
        for error in asyncio.run(ask()):
            assert isinstance(error, MemoryError)
        assert str(threaded.exception(30)) == "no room"
        gated.error = None
        equal(batcher.submit(QUERIES[:1], 5).result(30), gated.plain.search(QUERIES[:1], 5, ef=64))
    assert [batch.is_ok for batch in batches][-1] and not batches[0].is_ok


def test_an_error_ends_a_request_in_parts(gated):
    gated.error = MemoryError("no room")
    gated.gate.set()
    with Batcher(gated, batch_rows=10) as batcher, pytest.raises(MemoryError, match="no room"):
        asyncio.run(batcher.search(QUERIES[:35], 4))
    assert (gated.calls, batcher.waiting_rows) == ([(10, 4, 64)], 0)


def test_a_task_that_left_is_not_answered(gated):
    """Its future is done: to set it again would be an error in the loop."""
    complaints = []

    async def leave():
        asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told))
        task = asyncio.create_task(batcher.search(QUERIES[:1], 4))
        await asyncio.to_thread(gated.entered.acquire)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gated.gate.set()
        await batcher.search(QUERIES[:1], 4)

    with Batcher(gated) as batcher:
        asyncio.run(leave())
    assert complaints == []


def test_what_is_wrong_with_a_request_is_its_callers_alone(index):
    """Said before it is in a batch."""
    bad = QUERIES[:3].copy()
    bad[1, 0] = np.nan

    async def ask(batcher):
        good = asyncio.create_task(batcher.search(QUERIES[:1], 5))
        await asyncio.sleep(0)
        for queries, k, how, error, words in [
            (bad, 5, {}, ValueError, "NaN or infinite values in row 1"),
            (QUERIES[:, :3], 5, {}, ValueError, r"shape \(600, 3\), expected \(n, 16\)"),
            (QUERIES[:1], 0, {}, ValueError, "k=0"),
            (QUERIES[:1], 5, {"ef": 2.5}, TypeError, "ef=2.5"),
            (QUERIES[:1], 5, {"timeout_s": 0}, ValueError, "timeout_s=0"),
            (QUERIES[:1], 5, {"allow": "all"}, TypeError, "allow"),
            (QUERIES[:1], 5, {"allow": np.ones(7, bool)}, ValueError, "a mask of 7"),
            (
                QUERIES[:2],
                5,
                {"allow": np.ones((3, ROWS), bool)},
                ValueError,
                r"shape \(3, 3000\), expected one row for each of 2 queries",
            ),
        ]:
            with pytest.raises(error, match=words):
                await batcher.search(queries, k, **how)
        equal(await good, index.search(QUERIES[:1], 5))

    with Batcher(index) as batcher:
        with pytest.raises(TypeError, match="index: NoneType, expected an Index"):
            batcher.swap(None)
        asyncio.run(ask(batcher))
    for wrong in ({"batch_rows": 0}, {"queue_rows": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Batcher(index, **wrong)


def test_swap(gated, index):
    """Requests stay with the index that they were asked of; the old one is then let go."""
    batcher = Batcher(gated)
    hold(batcher, gated)
    old = batcher.submit(QUERIES[:3], 5)
    other = Index(DIM + 1)
    other.add(RNG.normal(size=(40, DIM + 1)))
    batcher.swap(other)
    assert batcher.index is other
    wide = RNG.normal(size=(2, DIM + 1))
    new = batcher.submit(wide, 5)
    with pytest.raises(ValueError, match=r"expected \(n, 17\)"):
        batcher.submit(QUERIES[:1], 5)
    gated.gate.set()
    equal(old.result(30), gated.plain.search(QUERIES[:3], 5, ef=64))
    equal(new.result(30), other.search(wide, 5))
    mine = Index(DIM)
    mine.add(VECTORS[:20])
    gone = weakref.ref(mine)
    batcher.swap(mine)
    batcher.submit(QUERIES[:1], 5).result(30)
    batcher.swap(index)
    batcher.submit(QUERIES[:1], 5).result(30)
    del mine
    gc.collect()
    assert gone() is None
    batcher.close()


def test_close_answers_what_waits(gated):
    batcher = Batcher(gated)
    hold(batcher, gated)
    futures = [batcher.submit(QUERIES[i], 5, ef=10 + i) for i in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(RuntimeError, match="closed"):
        while True:  # until the other thread has come so far
            futures.append(batcher.submit(QUERIES[0], 5))
    gated.gate.set()
    closing.join(30)
    assert not closing.is_alive()
    assert all(future.done() for future in futures)
    batcher.close()  # twice does no harm


def test_closes_at_the_end_of_a_block(index):
    async def ask():
        async with Batcher(index) as batcher:
            pending = asyncio.ensure_future(batcher.search(QUERIES[:2], 3))
            await asyncio.sleep(0)
        equal(await pending, index.search(QUERIES[:2], 3))
        with pytest.raises(RuntimeError, match="closed"):
            await batcher.search(QUERIES[:2], 3)

    asyncio.run(ask())


def test_on_batch_may_fail(index, caplog):
    def fail(_batch):
        raise ZeroDivisionError

    with Batcher(index, on_batch=fail) as batcher:
        for _ in range(3):
            batcher.submit(QUERIES[:1], 3).result(30)
    assert "on_batch failed" in caplog.text


def test_a_loop_that_was_closed_harms_nobody(gated):
    with Batcher(gated) as batcher:
        hold(batcher, gated)
        loop = asyncio.new_event_loop()
        task = loop.create_task(batcher.search(QUERIES[:1], 5))
        loop.run_until_complete(asyncio.sleep(0))
        task._log_destroy_pending = False
        loop.close()
        other = batcher.submit(QUERIES[:1], 5)
        gated.gate.set()
        other.result(30)


def test_answers_do_not_keep_their_batch(index):
    with Batcher(index) as batcher:
        found = batcher.submit(QUERIES[:2], 3).result(30)
    assert found.labels.base is None and found.distances.base is None


class TwoAtOnce(Gated):
    """Says of itself that it is on a GPU: two batches are in flight then."""

    @property
    def device(self):
        return "cuda"


def test_two_batches_in_flight_on_a_gpu():
    index = gated_index(TwoAtOnce)
    with Batcher(index, batch_rows=10) as batcher:
        until = time.monotonic() + 30
        while batcher._sleepers < 2:
            assert time.monotonic() < until
        first = batcher.submit(QUERIES[:30], 5)  # three parts of one request
        for _ in range(2):
            assert index.entered.acquire(timeout=30)
        assert not index.entered.acquire(timeout=0.05)
        index.gate.set()
        equal(first.result(30), index.plain.search(QUERIES[:30], 5, ef=64))


def test_a_future_that_stays_locked_stops_nobody_else(gated) -> None:
    """As Ctrl-C leaves it, when it comes between two lines of Future.result."""
    with Batcher(gated) as batcher:
        locked = batcher.submit(QUERIES[:1])
        locked._condition.acquire()  # and no one will release it
        others = [batcher.submit(QUERIES[:1]) for _ in range(5)]
        gated.gate.set()
        for future in others:
            assert len(future.result(timeout=20).labels) == 1
        assert len(batcher.submit(QUERIES[:2]).result(timeout=20).labels) == 2
        locked._condition.release()
        assert len(locked.result(timeout=20).labels) == 1
