"""Exact copies: equal vectors share a node, so they cost a label each and harm nobody."""

import numpy as np
import oracle
import pytest

import hnsw_gpu

COPIES, DISTINCT, DIM = 3000, 1000, 32
STORED = (("fp32", False), ("fp16", False), ("int8", False), ("int8", True), ("int4", True))


def copies_first():
    order = np.arange(COPIES + DISTINCT)
    return order


def shuffled():
    return np.random.default_rng(4).permutation(COPIES + DISTINCT)


@pytest.fixture(scope="module", params=[copies_first, shuffled], ids=lambda order: order.__name__)
def crowd(request):
    """The index of both; labels 0..2999 are the copies, 3000..3999 the distinct rows."""
    rows = oracle.gaussian(1 + DISTINCT, DIM, seed=3)
    rows = np.concatenate([np.repeat(rows[:1], COPIES, axis=0), rows[1:]])
    order = request.param()
    index = hnsw_gpu.Index(DIM, "cosine")
    index.add(rows[order], order)
    return index, rows


def test_distinct_rows_find_themselves(crowd):
    index, rows = crowd
    labels, distances = index.search(rows[COPIES:], 1)
    found = labels[:, 0] == np.arange(COPIES, COPIES + DISTINCT)
    assert found.mean() >= 0.99
    assert np.abs(distances[found]).max() < 1e-5


def test_neighbours_are_the_true_ones(crowd):
    """A copy would fill a whole list of 10: only for queries whose nearest it truly is."""
    index, rows = crowd
    queries = oracle.gaussian(100, DIM, seed=9)
    truth = oracle.distances(queries, rows, "cosine")
    assert oracle.recall(index.search(queries, 10).labels, truth, 10) >= 0.97


def test_all_copies_come_back_in_ascending_order(crowd):
    index, rows = crowd
    labels, distances = index.search(rows[0], COPIES)
    np.testing.assert_array_equal(labels[0], np.arange(COPIES))
    assert (distances == distances[0, 0]).all()
    # one more: the nearest of the others, behind them
    labels, _ = index.search(rows[0], COPIES + 1)
    np.testing.assert_array_equal(labels[0, :COPIES], np.arange(COPIES))
    nearest = oracle.distances(rows[:1], rows[COPIES:], "cosine").argmin() + COPIES
    assert labels[0, COPIES] == nearest
    # fewer: the smallest labels
    np.testing.assert_array_equal(index.search(rows[0], 7).labels[0], np.arange(7))


def test_everything_comes_back(crowd):
    index, rows = crowd
    labels, _ = index.search(rows[[0, COPIES, -1]], COPIES + DISTINCT + 5)
    for found in labels:
        np.testing.assert_array_equal(np.sort(found[:-5]), np.arange(COPIES + DISTINCT))
        np.testing.assert_array_equal(found[-5:], np.full(5, -1))


def test_a_node_is_allowed_while_one_of_its_labels_is(crowd):
    index, rows = crowd
    for allow in ([2999], [5, 2000, 2999], list(range(0, 3000, 2)), [5, 3500]):
        labels, distances = index.search(rows[0], 20, allow=allow)
        expected = sorted(label for label in allow if label < COPIES)[:20]
        np.testing.assert_array_equal(labels[0, : len(expected)], expected)
        rest = [label for label in labels[0, len(expected) :] if label >= 0]
        assert set(rest) <= set(allow)
        assert (distances[0, : len(expected)] == distances[0, 0]).all()
    mask = np.ones(COPIES + DISTINCT, bool)
    mask[:COPIES] = False
    labels, _ = index.search(rows[0], 10, allow=mask)
    truth = oracle.distances(rows[:1], rows, "cosine")
    np.testing.assert_array_equal(labels, oracle.nearest(truth, 10, mask)[0])


def test_copies_as_neighbours_of_one_another(crowd):
    index, _ = crowd
    labels, distances = index.neighbor_graph(10)
    np.testing.assert_array_equal(index.labels, np.arange(COPIES + DISTINCT))
    expected = np.tile(np.arange(10), (COPIES, 1))
    for row in range(10):
        expected[row] = np.delete(np.arange(11), row)
    np.testing.assert_array_equal(labels[:COPIES], expected)
    assert np.abs(distances[:COPIES]).max() < 1e-5
    assert (labels[COPIES:] != np.arange(COPIES, COPIES + DISTINCT)[:, None]).all()


def test_search_radius_returns_every_copy(crowd):
    index, rows = crowd
    offsets, labels, _ = index.search_radius(rows[:1], 1e-4)
    np.testing.assert_array_equal(offsets, [0, COPIES])
    np.testing.assert_array_equal(labels, np.arange(COPIES))


@pytest.mark.parametrize(("dtype", "refine"), STORED)
@pytest.mark.parametrize("metric", ("l2", "ip", "cosine"))
def test_copies_of_every_storage_form(dtype, refine, metric):
    rows = oracle.gaussian(200, 20, seed=8)
    order = np.random.default_rng(5).permutation(1000) % 200
    index = hnsw_gpu.Index(20, metric, dtype, M=8, refine=refine)
    index.add(rows[order])
    labels, distances = index.search(rows, 1000)
    group = order[labels]
    for query in range(200):
        runs = np.flatnonzero(np.diff(group[query])) + 1
        assert len(runs) == 199  # five of a kind stand together
        for copies in np.split(labels[query], runs):
            assert (np.diff(copies) > 0).all()
        assert (distances[query].reshape(200, 5) == distances[query, ::5, None]).all()
    if metric != "ip":
        np.testing.assert_array_equal(group[:, 0], np.arange(200))


def test_copies_across_calls_deletes_and_files(tmp_path):
    rows = oracle.integers(50, 8, seed=1)
    index = hnsw_gpu.Index(8, "l2")
    for start in (0, 50, 100, 150):
        index.add(rows, np.arange(start, start + 50))
    index.delete([0, 100])
    index.save(tmp_path / "index.hnsw")
    for one in (index, hnsw_gpu.load(tmp_path / "index.hnsw")):
        np.testing.assert_array_equal(one.search(rows[0], 2).labels, [[50, 150]])
        one.add(rows[:1], [7000])
        one.add(rows[:1], [0])
        np.testing.assert_array_equal(one.search(rows[0], 4).labels, [[0, 50, 150, 7000]])
        one.delete([50, 150, 7000, 0])
        assert set(one.search(rows[0], 1).labels[0]) & {0, 50, 100, 150, 7000} == set()
        one.compact()
        one.check()
        assert len(one) == 196
        assert not set(one.search(rows[0], 196).labels[0]) & {0, 50, 100, 150, 7000}
        one.add(rows[:1], [42_000])
        np.testing.assert_array_equal(one.search(rows[0], 1).labels, [[42_000]])


def test_rows_equal_in_the_code_only_stay_apart():
    """int8 codes may be equal where the kept rows are not: the kept rows decide."""
    row = np.float32([[127, 3, 5, -7]])
    rows = np.concatenate([row + np.float32([0, 0, 0, step / 100]) for step in range(20)])
    index = hnsw_gpu.Index(4, "l2", "int8", refine=True)
    index.add(rows)
    labels, distances = index.search(rows, 1)
    np.testing.assert_array_equal(labels[:, 0], np.arange(20))
    np.testing.assert_array_equal(distances, np.zeros((20, 1)))
    np.testing.assert_array_equal(index.vectors(np.arange(20)), rows)


def test_fifty_thousand_copies_cost_one_node(tmp_path):
    row = oracle.gaussian(1, 128, seed=1)
    index = hnsw_gpu.Index(128, "cosine")
    index.add(np.broadcast_to(row, (50_000, 128)))
    assert len(index) == 50_000
    assert index.nbytes <= 50_000 * 48
    index.save(tmp_path / "index.hnsw")
    assert (tmp_path / "index.hnsw").stat().st_size <= 50_000 * 24
    for one in (index, hnsw_gpu.load(tmp_path / "index.hnsw")):
        labels, _ = one.search(row, 50_000)
        np.testing.assert_array_equal(labels[0], np.arange(50_000))
        np.testing.assert_array_equal(one.search(-row, 3).labels, [[0, 1, 2]])
    index.add(oracle.gaussian(200, 128, seed=2))
    labels, _ = index.search(oracle.gaussian(200, 128, seed=2), 1)
    np.testing.assert_array_equal(labels[:, 0], np.arange(50_000, 50_200))


@pytest.mark.parametrize("noise", (1e-6, 1e-3))
def test_near_copies_do_not_wall_off_the_others(noise):
    """3,000 rows that are almost equal make 3,000 nodes; a wide beam still finds the others."""
    random = np.random.default_rng(6)
    rows = oracle.gaussian(1 + DISTINCT, DIM, seed=3)
    near = rows[:1] + noise * random.standard_normal((COPIES, DIM)).astype(np.float32)
    for order in (copies_first(), shuffled()):
        index = hnsw_gpu.Index(DIM, "cosine")
        index.add(np.concatenate([near, rows[1:]])[order], order)
        labels, _ = index.search(rows[1:], 1, ef=200)
        assert (labels[:, 0] == np.arange(COPIES, COPIES + DISTINCT)).mean() >= 0.9
