"""Every node can be reached, shown by a search of our own over the saved arrays."""

from itertools import pairwise

import numpy as np
import oracle
import pytest

import hnsw_gpu

load_file = pytest.importorskip(
    "safetensors.numpy", reason="files are read again by the package of the extra `test`"
).load_file

DIM, N = 24, 4000


def saved_graph(index, folder):
    """The arrays of the saved file, read by the safetensors package."""
    index.save(folder / "index.hnsw")
    return load_file(folder / "index.hnsw")


def reached(links, start):
    """Which rows of `links` (n, width), -1 = none, are reached from `start`: bool (n,)."""
    seen = np.zeros(len(links), bool)
    front = np.array([start])
    while len(front):
        seen[front] = True
        front = np.unique(links[front])
        front = front[front >= 0]
        front = front[~seen[front]]
    return seen


def assert_sound(index, folder):
    """All nodes reached on layer 0 from the entry point, and every array as its comment says."""
    graph = index._state.graph  # before `save` and `check`, which might mend it
    if len(graph.neighbors0):
        missing = np.flatnonzero(~reached(graph.neighbors0, graph.entry_point))
        assert len(missing) == 0, f"{len(missing)} of {len(graph.neighbors0)}: {missing[:9]}"
    index.check()
    arrays = saved_graph(index, folder)
    links, offsets, nodes = arrays["neighbors0"], arrays["layer_offsets"], arrays["nodes"]
    upper, below = arrays["neighbors"], arrays["below"]
    assert {array.dtype for array in (links, nodes, upper, below)} == {np.dtype(np.int32)}
    assert links.shape[1] == 2 * index.M
    assert upper.shape == (len(nodes), index.M)
    assert offsets[0] == 0
    assert offsets[-1] == len(nodes) == len(below)
    assert len(arrays["vectors"]) == len(links)
    assert_rows(links, np.arange(len(links)))
    entry_point, layer_below = 0, np.arange(len(links))
    for start, stop in pairwise(offsets):
        assert stop > start
        assert (np.diff(nodes[start:stop]) > 0).all()
        np.testing.assert_array_equal(layer_below[below[start:stop]], nodes[start:stop])
        assert_rows(upper[start:stop], np.arange(stop - start))
        layer_below, entry_point = nodes[start:stop], nodes[start]
    if len(links):
        missing = np.flatnonzero(~reached(links, entry_point))
        assert len(missing) == 0, f"{len(missing)} of {len(links)} not reached: {missing[:9]}"
    return arrays


def assert_rows(links, own):
    assert links.max(initial=-1) < len(own)
    assert links.min(initial=-1) >= -1
    assert (links != own[:, None]).all()
    filled = links >= 0
    assert (filled[:, 1:] <= filled[:, :-1]).all()
    ordered = np.sort(links, axis=1)
    assert not ((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] >= 0)).any()


def test_the_proof_can_fail():
    links = np.array([[1, -1], [0, -1], [3, 0], [2, -1]])
    np.testing.assert_array_equal(reached(links, 0), [True, True, False, False])
    np.testing.assert_array_equal(reached(links, 3), [True] * 4)
    for bad in ([[0]], [[1, 1]], [[-1, 1]], [[-2]], [[5]]):
        with pytest.raises(AssertionError):
            assert_rows(np.array([*bad, [-1] * len(bad[0])]), np.arange(2))


def one_gaussian():
    return oracle.gaussian(N, DIM, seed=1)


def clusters():
    return oracle.gaussian(N, DIM, seed=2, clusters=50, spread=0.01)


def clusters_far_apart():
    return oracle.gaussian(N, DIM, seed=2, clusters=50, spread=1e-4) * 100


def clusters_in_order():
    rows = oracle.gaussian(N, DIM, seed=2, clusters=50, spread=0.01)
    return rows[np.argsort(oracle.distances(rows[:1], rows, "l2")[0], kind="stable")]


def one_cluster_a_piece():
    random = np.random.default_rng(3)
    centres = np.repeat(random.standard_normal((10, DIM)), N // 10, axis=0)
    return (centres + 0.01 * random.standard_normal((N, DIM))).astype(np.float32)


def sorted_by_a_coordinate():
    rows = oracle.gaussian(N, DIM, seed=4)
    return rows[np.argsort(rows[:, 0])]


def a_line():
    return np.outer(np.arange(1, N + 1), np.ones(DIM)).astype(np.float32)


def growing_outwards():
    """Each row farther out than all before it."""
    rows = oracle.unit(oracle.gaussian(N, DIM, seed=5))
    return (rows * np.geomspace(1, 1000, N)[:, None]).astype(np.float32)


def integer_grid():
    """Ties everywhere, so that "strictly nearer" drops whatever it can."""
    rows = np.stack(np.meshgrid(*[np.arange(4.0)] * 6), axis=-1).reshape(-1, 6)[:N]
    return np.pad(rows, ((0, 0), (0, DIM - 6)))[np.random.default_rng(6).permutation(N)]


def copies_and_outliers():
    rows = np.repeat(oracle.gaussian(40, DIM, seed=7), 100, axis=0)
    rows[::100] *= np.float32(50)
    return rows


ORDERS = (
    one_gaussian,
    clusters,
    clusters_far_apart,
    clusters_in_order,
    one_cluster_a_piece,
    sorted_by_a_coordinate,
    a_line,
    growing_outwards,
    integer_grid,
    copies_and_outliers,
)


@pytest.mark.parametrize("data", ORDERS, ids=lambda data: data.__name__)
@pytest.mark.parametrize("pieces", (1, 10))
def test_after_building(data, pieces, tmp_path):
    rows = data()
    index = hnsw_gpu.Index(DIM, "l2", M=8, ef_construction=50)
    for piece in np.array_split(rows, pieces):
        index.add(piece)
    assert_sound(index, tmp_path)
    assert len(index) == len(rows)
    # reached is not yet found: nearly every row finds itself
    sample = np.random.default_rng(8).permutation(len(rows))[:500]
    _, distances = index.search(rows[sample], 1, ef=100)
    scale = np.square(rows[sample]).sum(axis=1)
    least = 0.7 if data is growing_outwards else 0.98
    assert (distances[:, 0] <= 1e-6 * scale).mean() >= least
    # and a walk that may go on for ever comes everywhere, wherever the layers above let it begin
    for labels in index.search(rows[sample[:25]], len(rows)).labels:
        np.testing.assert_array_equal(np.sort(labels), np.arange(len(rows)))


@pytest.mark.parametrize("metric", ("ip", "cosine"))
@pytest.mark.parametrize(
    ("dtype", "refine"), [("fp32", False), ("fp16", False), ("int8", True), ("int4", "fp16")]
)
def test_other_metrics_and_dtypes(metric, dtype, refine, tmp_path):
    for data in (clusters, growing_outwards):
        index = hnsw_gpu.Index(DIM, metric, dtype, M=6, ef_construction=40, refine=refine)
        index.add(data())
        assert_sound(index, tmp_path)


@pytest.mark.parametrize(
    "data", [one_gaussian, clusters, clusters_in_order, sorted_by_a_coordinate]
)
def test_after_deleting_half_and_compact(data, tmp_path):
    rows = data()
    index = hnsw_gpu.Index(DIM, "l2", M=8, ef_construction=50)
    index.add(rows)
    for choose in (
        lambda labels: np.random.default_rng(1).permutation(labels)[::2],  # any half
        lambda labels: labels[: len(labels) // 2],  # then the half that came first
    ):
        index.delete(choose(index.labels))
        assert_sound(index, tmp_path)
        index.compact()
        arrays = assert_sound(index, tmp_path)
        assert len(arrays["neighbors0"]) == len(index)
    kept = index.labels
    queries = rows[kept[:300]]
    truth = oracle.distances(queries, rows[kept], "l2")
    fresh = hnsw_gpu.Index(DIM, "l2", M=8, ef_construction=50)
    fresh.add(rows[kept], kept)
    found, rebuilt = (
        np.searchsorted(kept, one.search(queries, 10).labels) for one in (index, fresh)
    )
    assert oracle.recall(found, truth, 10) >= oracle.recall(rebuilt, truth, 10) - 0.02


def test_after_many_rounds_of_deleting_and_adding(tmp_path):
    rows = clusters_in_order()
    index = hnsw_gpu.Index(DIM, "l2", M=5, ef_construction=30)
    index.add(rows[:1000], np.arange(1000))
    for turn in range(6):
        index.delete(index.labels[turn % 2 :: 2])
        if turn % 2:
            index.compact()
            assert_sound(index, tmp_path)
        index.add(rows[1000 + 500 * turn : 1500 + 500 * turn])
        assert_sound(index, tmp_path)
    own = rows[index.labels]
    oracle.assert_nearest(
        index.search(own[:40], 10, ef=5000), own[:40], own, 10, "l2", labels=index.labels
    )


def test_smallest_and_largest_degree(tmp_path):
    for M, ef_construction in ((2, 2), (2, 100), (128, 200)):
        index = hnsw_gpu.Index(DIM, "l2", M=M, ef_construction=ef_construction)
        index.add(clusters_in_order()[:1500])
        assert_sound(index, tmp_path)


@pytest.mark.parametrize("pieces", (1, 10))
@pytest.mark.parametrize(
    "order", ("shuffled", "by cluster"), ids=lambda order: order.replace(" ", "-")
)
def test_recall_on_tight_clusters(pieces, order):
    """50 tight Gaussians of 200 rows: the batches of a build do not see one another."""
    random = np.random.default_rng(11)
    centres = random.standard_normal((50, 32))
    rows = np.repeat(centres, 200, axis=0) + 0.05 * random.standard_normal((10_000, 32))
    queries = centres[random.integers(50, size=500)] + 0.05 * random.standard_normal((500, 32))
    if order == "shuffled":
        rows = rows[random.permutation(len(rows))]
    index = hnsw_gpu.Index(32, "l2")
    for piece in np.array_split(rows, pieces):
        index.add(piece)
    truth = oracle.distances(queries, np.float32(rows), "l2")
    for ef, least in ((64, 0.95), (200, 0.98)):
        assert oracle.recall(index.search(queries, 10, ef=ef).labels, truth, 10) >= least
