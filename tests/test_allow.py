"""Which labels may be returned: `allow`, delete, add again, compact."""

import threading

import numpy as np
import oracle
import pytest

import hnsw_gpu
from hnsw_gpu.engine import label_table

N, DIM, Q, K = 12_000, 24, 200, 10


@pytest.fixture(scope="module")
def rows():
    return oracle.gaussian(N, DIM, seed=1, clusters=60, spread=0.7)


@pytest.fixture(scope="module")
def queries():
    return oracle.gaussian(Q, DIM, seed=2, clusters=60, spread=0.8)


@pytest.fixture(scope="module")
def truth(rows, queries):
    return oracle.distances(queries, rows, "l2")


@pytest.fixture(scope="module")
def index(rows):
    index = hnsw_gpu.Index(DIM, "l2")
    index.add(rows)
    return index


def packed(mask):
    return np.packbits(mask, axis=-1, bitorder="little")


@pytest.mark.parametrize("ef", (10, 64, 200))
def test_allow_everything_is_no_allow_bit_for_bit(index, queries, ef):
    everything = np.ones(N, bool)
    expected = index.search(queries, K, ef=ef)
    for allow in (
        everything,
        np.ones((Q, N), bool),
        packed(everything),
        packed(np.ones((Q, N), bool)),
        np.arange(N),
        np.arange(N)[::-1],
        np.arange(N, dtype=np.int32),
        np.append(np.arange(N, dtype=np.uint64), np.uint64(2**64 - 1)),  # which is no label
        list(range(N)),
    ):
        oracle.assert_same(index.search(queries, K, ef=ef, allow=allow), expected)
    within = index.search_radius(queries, 12.0, ef=ef)
    assert len(within.labels) > Q
    oracle.assert_same(index.search_radius(queries, 12.0, ef=ef, allow=everything), within)


@pytest.mark.parametrize("n", (50, 400, 900, 3000))
def test_allow_everything_in_a_small_index(n):
    """Also where comparing all would be exact and the graph, poor and of many dims, is not."""
    rows, queries = oracle.gaussian(n, 64, seed=n), oracle.gaussian(300, 64, seed=5)
    index = hnsw_gpu.Index(64, "l2", M=2, ef_construction=4)
    index.add(rows)
    for ef in (1, 10, 64):
        expected = index.search(queries, 5, ef=ef)
        for allow in (np.ones(n, bool), np.arange(n), np.ones((300, n), bool)):
            oracle.assert_same(index.search(queries, 5, ef=ef, allow=allow), expected)


def test_nothing_allowed_is_nothing_found(index, queries):
    for allow in (
        np.zeros(N, bool),
        np.zeros((Q, N), bool),
        packed(np.zeros(N, bool)),
        np.zeros(0, int),
        [],
    ):
        labels, distances = index.search(queries, K, allow=allow)
        np.testing.assert_array_equal(labels, np.full((Q, K), -1))
        np.testing.assert_array_equal(distances, np.full((Q, K), np.inf, np.float32))
    offsets, labels, _ = index.search_radius(queries, 1e9, allow=np.zeros(N, bool))
    np.testing.assert_array_equal(offsets, np.zeros(Q + 1))
    assert len(labels) == 0


def test_one_allowed_label_is_found(index, queries, truth):
    for label in (0, 1, 31, 32, 6_001, N - 1):
        mask = np.zeros(N, bool)
        mask[label] = True
        for allow in (mask, packed(mask), [label], np.tile(mask, (Q, 1))):
            labels, distances = index.search(queries, 3, ef=10, allow=allow)
            expected = np.tile([label, -1, -1], (Q, 1))
            np.testing.assert_array_equal(labels, expected)
            np.testing.assert_allclose(distances[:, 0], truth[:, label], rtol=1e-4)
            assert np.isposinf(distances[:, 1:]).all()


def test_another_label_for_every_query(index, queries, truth):
    wanted = np.random.default_rng(3).integers(N, size=Q)
    masks = np.zeros((Q, N), bool)
    masks[np.arange(Q), wanted] = True
    for allow in (masks, packed(masks), np.asfortranarray(masks)):
        labels, distances = index.search(queries, 2, allow=allow)
        np.testing.assert_array_equal(labels[:, 0], wanted)
        np.testing.assert_array_equal(labels[:, 1], np.full(Q, -1))
        np.testing.assert_allclose(distances[:, 0], truth[np.arange(Q), wanted], rtol=1e-4)


SHARES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999, 1.0)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("ef", (16, 64))
def test_recall_at_every_share(index, queries, truth, share, ef):
    """At least 0.95 of the recall without a filter at the same ef, and all forms agree."""
    unfiltered = oracle.recall(index.search(queries, K, ef=ef).labels, truth, K)
    allowed = np.random.default_rng(int(share * 1e6)).permutation(N) < max(1, round(share * N))
    result = index.search(queries, K, ef=ef, allow=allowed)
    found = result.labels[result.labels >= 0]
    assert allowed[found].all()
    assert oracle.recall(result.labels, truth, K, allowed) >= 0.95 * unfiltered
    for allow in (
        packed(allowed),
        np.flatnonzero(allowed),
        np.tile(allowed, (Q, 1)),
        packed(np.tile(allowed, (Q, 1))),
    ):
        oracle.assert_same(index.search(queries, K, ef=ef, allow=allow), result)


@pytest.mark.parametrize("kind", ("near", "far", "half space", "clusters"))
@pytest.mark.parametrize("share", (0.02, 0.1, 0.3))
def test_recall_when_the_filter_knows_the_query(index, rows, queries, truth, kind, share):
    """Filters are seldom random: what is allowed may lie just where the query is not."""
    count = int(share * N)
    masks = np.zeros((Q, N), bool)
    if kind in ("near", "far"):
        order = np.argsort(truth, axis=1)
        chosen = order[:, :count] if kind == "near" else order[:, -count:]
        np.put_along_axis(masks, chosen, values=True, axis=1)
    elif kind == "half space":
        masks[:, np.argsort(rows[:, 0])[:count]] = True
    else:
        centres = np.argsort(oracle.distances(rows[:60], rows, "l2"), axis=1)
        masks[:, np.unique(centres[:, : count // 20])[:count]] = True
    unfiltered = oracle.recall(index.search(queries, K).labels, truth, K)
    result = index.search(queries, K, allow=masks)
    assert np.take_along_axis(masks, np.maximum(result.labels, 0), axis=1)[result.labels >= 0].all()
    assert oracle.recall(result.labels, truth, K, masks) >= 0.95 * unfiltered


def test_the_number_of_queries_does_not_change_a_filtered_answer(index, queries):
    for share in (0.0005, 0.01, 0.2, 0.7):
        allowed = np.random.default_rng(7).random(N) < share
        together = index.search(queries, K, allow=allowed)
        for query in range(0, Q, 9):
            alone = index.search(queries[query], K, allow=allowed)
            np.testing.assert_array_equal(alone.labels[0], together.labels[query])
            np.testing.assert_array_equal(alone.distances[0], together.distances[query])


def test_k_beyond_what_is_allowed(index, rows, queries):
    allowed = np.arange(N) % 100 == 7
    result = index.search(queries[:20], 200, allow=allowed)
    oracle.assert_nearest(result, queries[:20], rows, 200, "l2", allowed=allowed)


def test_search_radius_with_a_filter(index, queries, truth):
    allowed = np.random.default_rng(8).random(N) < 0.4
    radius = float(np.quantile(truth, 0.005))
    offsets, labels, _ = index.search_radius(queries, radius, ef=200, allow=allowed)
    assert allowed[labels].all()
    inside = (truth < radius - 1e-4) & allowed
    found = sum(
        np.isin(np.flatnonzero(inside[q]), labels[offsets[q] : offsets[q + 1]]).sum()
        for q in range(Q)
    )
    assert inside.sum() > 2000
    assert found >= 0.97 * inside.sum()


def test_masks_are_indexed_by_label(rows, queries):
    """Labels are not row numbers: bit 5 of a mask is label 5."""
    names = np.random.default_rng(9).permutation(2000)[:500]
    index = hnsw_gpu.Index(DIM, "l2")
    index.add(rows[:500], names)
    mask = np.zeros(2000, bool)
    mask[names[:250]] = True
    mask[np.setdiff1d(np.arange(2000), names)[:100]] = True  # nobody's labels
    mask = mask[: names.max() + 1]
    allowed = np.arange(500) < 250
    for allow in (mask, packed(mask), names[:250]):
        result = index.search(queries[:30], 20, ef=500, allow=allow)
        oracle.assert_nearest(
            result, queries[:30], rows[:500], 20, "l2", labels=names, allowed=allowed
        )


def test_bits_behind_the_last_label_are_ignored(rows, queries):
    index = hnsw_gpu.Index(DIM, "l2")
    index.add(rows[:101])
    bits = packed(np.ones(101, bool))
    bits[-1] = 0xFF
    oracle.assert_same(index.search(queries, 101, allow=bits), index.search(queries, 101))


@pytest.mark.parametrize(
    ("dtype", "refine"), [("fp16", False), ("int8", False), ("int8", True), ("int4", "fp16")]
)
def test_filters_in_every_storage_form(rows, queries, dtype, refine):
    index = hnsw_gpu.Index(DIM, "cosine", dtype, refine=refine)
    index.add(rows[:3000])
    truth = oracle.distances(queries, rows[:3000], "cosine")
    unfiltered = index.search(queries, K)
    goal = 0.95 * oracle.recall(unfiltered.labels, truth, K)
    oracle.assert_same(index.search(queries, K, allow=np.ones(3000, bool)), unfiltered)
    for share in (0.001, 0.02, 0.5):
        allowed = np.random.default_rng(4).permutation(3000) < share * 3000
        labels, _ = index.search(queries, K, allow=allowed)
        assert allowed[labels[labels >= 0]].all()
        assert oracle.recall(labels, truth, K, allowed) >= goal


@pytest.fixture
def small(rows):
    index = hnsw_gpu.Index(DIM, "l2", M=8, ef_construction=60)
    index.add(rows[:1000])
    return index


@pytest.mark.parametrize("share", (0.001, 0.1, 0.5, 0.9, 0.997, 1.0))
def test_deleted_labels_are_never_returned(small, rows, queries, truth, share):
    gone = np.random.default_rng(2).permutation(1000) < share * 1000
    unfiltered = oracle.recall(small.search(queries, K).labels, truth[:, :1000], K)
    small.delete(np.flatnonzero(gone))
    assert len(small) == 1000 - gone.sum()
    np.testing.assert_array_equal(small.labels, np.flatnonzero(~gone))
    for _ in range(2):
        labels, distances = small.search(queries, K)
        assert not gone[labels[labels >= 0]].any()
        if not gone.all():
            assert oracle.recall(labels, truth[:, :1000], K, ~gone) >= 0.95 * unfiltered
        count = min(K, 1000 - gone.sum())
        assert (labels[:, :count] >= 0).all()
        assert np.isposinf(distances[:, count:]).all()
        _, within, _ = small.search_radius(queries, 8.0)
        assert not gone[within].any()
        neighbours = small.neighbor_graph(5).labels
        kept = np.flatnonzero(~gone)
        assert len(neighbours) == len(kept)
        assert not gone[neighbours[neighbours >= 0]].any()
        if len(kept) > 5:
            between = oracle.distances(rows[kept], rows[kept], "l2")
            np.fill_diagonal(between, np.inf)
            assert oracle.recall(np.searchsorted(kept, neighbours), between, 5) >= 0.97
        whole = small.search(queries[:10], 1000)
        oracle.assert_nearest(whole, queries[:10], rows[:1000], 1000, "l2", allowed=~gone)
        small.compact()
        small.check()
        assert len(small) == 1000 - gone.sum()


def test_deleted_and_not_allowed_together(small, rows, queries):
    gone = np.arange(1000) % 3 == 0
    small.delete(np.flatnonzero(gone))
    allowed = np.arange(1000) % 2 == 0
    result = small.search(queries[:20], 1000, allow=allowed)
    allowed &= ~gone
    oracle.assert_nearest(result, queries[:20], rows[:1000], 1000, "l2", allowed=allowed)
    everything = np.ones(1000, bool)
    oracle.assert_same(small.search(queries, K, allow=everything), small.search(queries, K))


def test_delete_then_add_again(small, rows, queries):
    """The same label may come back, with the same vector or with another."""
    small.delete(np.arange(200))
    small.add(rows[:100], np.arange(100))  # the same vectors under the same labels
    small.add(rows[5000:5100], np.arange(100, 200))  # other vectors
    now = rows[:1000].copy()
    now[100:200] = rows[5000:5100]
    for _ in range(2):
        small.check()
        np.testing.assert_array_equal(small.labels, np.arange(1000))
        np.testing.assert_array_equal(small.vectors(np.arange(1000)), now)
        oracle.assert_nearest(small.search(queries[:20], 50, ef=1500), queries[:20], now, 50, "l2")
        labels, distances = small.search(now, 1)
        np.testing.assert_array_equal(labels[:, 0], np.arange(1000))
        np.testing.assert_array_equal(distances, np.zeros((1000, 1)))
        small.compact()


def test_delete_everything_then_start_again(small, rows, queries):
    small.delete(small.labels)
    assert len(small) == 0
    assert (small.search(queries, 3).labels == -1).all()
    small.compact()
    small.check()
    assert small.nbytes < 100_000
    np.testing.assert_array_equal(small.add(rows[:300]), np.arange(1000, 1300))
    result = small.search(queries, 10, ef=300)
    oracle.assert_nearest(result, queries, rows[:300], 10, "l2", labels=np.arange(1000, 1300))


def test_compact_gives_the_memory_back(small, rows, queries):
    before = small.nbytes
    small.delete(np.arange(0, 1000, 2))
    small.compact()
    assert small.nbytes <= 0.55 * before
    np.testing.assert_array_equal(small.vectors([1, 999]), rows[[1, 999]])
    kept = np.arange(1, 1000, 2)
    result = small.search(queries, 10, ef=500)
    oracle.assert_nearest(result, queries, rows[kept], 10, "l2", labels=kept)
    oracle.assert_same(small.search(queries, 10), small.search(queries, 10))


def test_compact_with_nothing_deleted_changes_nothing(small, queries, tmp_path):
    small.save(tmp_path / "before.hnsw")
    small.compact()
    small.save(tmp_path / "after.hnsw")
    assert (tmp_path / "before.hnsw").read_bytes() == (tmp_path / "after.hnsw").read_bytes()


def test_deleted_survives_a_file(small, queries, tmp_path):
    small.delete(np.arange(0, 1000, 3))
    small.save(tmp_path / "index.hnsw")
    for mmap in (False, True):
        other = hnsw_gpu.load(tmp_path / "index.hnsw", mmap=mmap)
        np.testing.assert_array_equal(other.labels, small.labels)
        oracle.assert_same(other.search(queries, K), small.search(queries, K))
        assert 3 not in other
        other.compact()
        other.check()
        np.testing.assert_array_equal(other.labels, small.labels)
        assert (other.search(queries, K).labels % 3 != 0).all()


def test_a_full_row_beside_a_half_row_answers_as_alone():
    """One query's mask is no matter of another's."""
    rows = oracle.gaussian(3000, 24, seed=21)
    queries = oracle.gaussian(40, 24, seed=22)
    index = hnsw_gpu.Index(24, "l2", M=2, ef_construction=10)
    index.add(rows)
    masks = np.ones((40, 3000), bool)
    alone = index.search(queries, 10, ef=50, allow=masks)
    oracle.assert_same(alone, index.search(queries, 10, ef=50))
    masks[1::2, ::2] = False
    mixed = index.search(queries, 10, ef=50, allow=masks)
    np.testing.assert_array_equal(mixed.labels[::2], alone.labels[::2])
    np.testing.assert_array_equal(mixed.distances[::2], alone.distances[::2])


@pytest.mark.parametrize("refine", (False, True))
def test_neighbour_graph_of_the_survivors_of_a_deleted_cluster(refine):
    random = np.random.default_rng(23)
    cluster = 0.01 * random.standard_normal((1000, 16))
    others = 5 + random.standard_normal((9000, 16))
    rows = np.float32(np.concatenate([cluster, others]))
    index = hnsw_gpu.Index(16, "l2", "int8" if refine else "fp32", refine=refine)
    index.add(rows)
    index.delete(np.arange(990))
    labels, _ = index.neighbor_graph(15, ef=20)
    assert (labels >= 0).all()
    own = rows[990:1000]
    kept = rows[990:]
    for i in range(10):
        order = np.argsort(np.square(kept - own[i]).sum(axis=1), kind="stable")
        assert set(labels[i, :9]) == set((order[1:10] + 990).tolist())


def test_a_label_given_again_that_is_half_seen_is_looked_up_again():
    """Where a processor shows the slot of an entry before what the entry leads to."""
    table = label_table.LabelTable(np.array([7, 8, 7]))
    known, wanted = np.array([7, 8]), np.array([7])
    assert table.find(known, wanted, None).tolist() == [0]
    table._before[2] = label_table.NOT_SEEN
    seen = threading.Timer(0.2, table._before.__setitem__, [2, 0])
    seen.start()
    assert table.find(known, wanted, None).tolist() == [0]
    assert not seen.is_alive()


def test_labels_of_any_integers_are_the_same_labels():
    """And compiled code takes them all as one type: nothing is compiled for another."""
    rng = np.random.default_rng(3)
    index = hnsw_gpu.Index(8, "l2", M=4, ef_construction=20)
    index.add(rng.normal(size=(500, 8)), rng.permutation(500))  # which do not ascend
    query, some = np.zeros(8), np.array([3, 70, 101, 7])
    expected = index.search(query, 4, allow=some)
    assert sorted(expected.labels[0].tolist()) == sorted(some.tolist())
    compiled = len(label_table._find.signatures)
    fixed = some.copy()
    fixed.setflags(write=False)
    forms = [some.astype(kind) for kind in ("i1", "i2", "<i4", ">i4", ">i8", "u2", ">u4", "u8")]
    for form in (*forms, fixed, np.repeat(some, 2)[::2], some[::-1], some.tolist()):
        oracle.assert_same(index.search(query, 4, allow=form), expected)
        assert index.holds(form).all()
    assert len(label_table._find.signatures) == compiled
