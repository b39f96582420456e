"""hnsw_gpu.sklearn beside what it takes the place of: scikit-learn's own KNeighborsTransformer."""

import pickle

import numpy as np
import oracle
import pytest

pytest.importorskip("sklearn", reason="scikit-learn comes with the extra `sklearn`")

from sklearn.base import clone
from sklearn.cluster import DBSCAN, SpectralClustering
from sklearn.manifold import TSNE, Isomap
from sklearn.neighbors import KNeighborsClassifier, KNeighborsTransformer
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from threadpoolctl import threadpool_limits

from hnsw_gpu.sklearn import HNSWTransformer

COUNT, DIM, K = 400, 8, 10
ROWS = oracle.gaussian(COUNT, DIM, seed=1)
OTHERS = oracle.gaussian(60, DIM, seed=2)
GROUP = np.arange(200) % 4
GROUPED = (6 * np.eye(4)[GROUP] + oracle.gaussian(200, 4, seed=3)).astype(np.float32)


def test_scikit_learns_own_checks():
    check_estimator(HNSWTransformer(), on_skip=None)  # of arrays elsewhere than in memory


@pytest.mark.parametrize("mode", ["distance", "connectivity"])
@pytest.mark.parametrize("metric", ["euclidean", "l2", "sqeuclidean", "cosine"])
def test_the_graph_is_that_of_scikit_learn(metric, mode):
    how = {"mode": mode, "n_neighbors": K, "metric": metric}
    ours, theirs = HNSWTransformer(**how), KNeighborsTransformer(**how, algorithm="brute")
    assert_alike(ours.fit_transform(ROWS), theirs.fit_transform(ROWS), mode)
    assert_alike(ours.transform(OTHERS), theirs.transform(OTHERS), mode)
    own = ours.fit_transform(ROWS).indices.reshape(COUNT, -1)[:, 0]
    assert own.tolist() == list(range(COUNT))


def assert_alike(ours, theirs, mode):
    """The layout, the neighbours but for a few, and the distances of all that both found."""
    assert (type(ours), ours.shape, ours.dtype) == (type(theirs), theirs.shape, np.float64)
    np.testing.assert_array_equal(ours.indptr, theirs.indptr)
    length = ours.indptr[1]
    assert length == K + (mode == "distance")
    weights = ours.data.reshape(-1, length)
    assert (np.diff(weights, axis=1) >= 0).all() and (weights >= 0).all()
    pairs = [
        {(row, column): weight for row, column, weight in zip(*part, strict=True)}
        for part in ((graph.tocoo().row, graph.tocoo().col, graph.data) for graph in (ours, theirs))
    ]
    both = pairs[0].keys() & pairs[1].keys()
    assert len(both) >= 0.99 * len(pairs[1])
    found, true = ([part[pair] for pair in both] for part in pairs)
    np.testing.assert_allclose(found, true, rtol=1e-5, atol=1e-6)


def test_a_graph_of_connections_may_hold_each_row_alone():
    graph = HNSWTransformer(mode="connectivity", n_neighbors=1).fit_transform(ROWS[:1])
    assert graph.toarray().tolist() == [[1]]


def test_copies_are_no_nearer_than_the_row_itself():
    """1 - cosine of float32 rows rounds to either side of 0, and below it estimators refuse."""
    rows = np.repeat(ROWS[:40], 5, axis=0) * np.tile(np.float32([1, 1.1, 1.7, 3, 3]), 40)[:, None]
    graph = HNSWTransformer(n_neighbors=4, metric="cosine", ef=200).fit_transform(rows)
    assert graph.indices[::5].tolist() == list(range(200))
    assert (np.sort(graph.indices.reshape(200, 5)) // 5 == np.arange(200)[:, None] // 5).all()
    assert graph.data.min() == 0 and graph.data.max() < 1e-6


@pytest.fixture(scope="module")
def ours():
    return HNSWTransformer(n_neighbors=70, n_jobs=2)


@pytest.mark.parametrize(
    "estimator",
    [
        KNeighborsClassifier(n_neighbors=5, metric="precomputed"),
        DBSCAN(eps=1.5, metric="precomputed"),
        SpectralClustering(
            4, affinity="precomputed_nearest_neighbors", n_neighbors=70, random_state=0
        ),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_an_estimator_answers_as_behind_scikit_learn(estimator, ours):
    answers = []
    for transformer in (ours, KNeighborsTransformer(n_neighbors=70)):
        pipeline = make_pipeline(clone(transformer), clone(estimator))
        if hasattr(estimator, "fit_predict"):
            answers.append(pipeline.fit_predict(GROUPED))
        else:
            answers.append(pipeline.fit(GROUPED, GROUP).predict(GROUPED + np.float32(0.01)))
    np.testing.assert_array_equal(*answers)
    assert len(set(answers[0])) >= 4


def test_isomap_lays_out_as_behind_scikit_learn(ours):
    points = [
        make_pipeline(each, Isomap(n_neighbors=15, metric="precomputed")).fit_transform(ROWS[:150])
        for each in (ours, KNeighborsTransformer(n_neighbors=70))
    ]
    np.testing.assert_allclose(*np.abs(points), rtol=1e-3, atol=1e-3)  # a sign is free


def test_t_sne_keeps_groups_together(ours):
    layout = TSNE(metric="precomputed", init="random", perplexity=20, max_iter=250, random_state=0)
    with threadpool_limits(1):  # else OpenMP's threads spin for those of other tests
        points = make_pipeline(ours, layout).fit_transform(GROUPED[:100])
    group = GROUP[:100]
    middles = np.stack([points[group == number].mean(axis=0) for number in range(4)])
    nearest = np.linalg.norm(points[:, None] - middles, axis=2).argmin(axis=1)
    assert (nearest == group).mean() > 0.95


def test_it_is_kept_and_tells_its_names():
    estimator = HNSWTransformer(n_neighbors=3, dtype="int8", random_state=7).fit(ROWS)
    graph = estimator.transform(OTHERS)
    assert estimator.n_samples_fit_ == COUNT and estimator.n_features_in_ == DIM
    names = estimator.get_feature_names_out()
    assert (names[0], names[-1]) == ("hnswtransformer0", f"hnswtransformer{COUNT - 1}")
    for other in (pickle.loads(pickle.dumps(estimator)), clone(estimator).fit(ROWS)):
        again = other.set_params(n_jobs=2).transform(OTHERS)
        np.testing.assert_array_equal(again.indices, graph.indices, strict=True)
        np.testing.assert_array_equal(again.data, graph.data, strict=True)
    assert not hasattr(clone(estimator), "index_")
    seeds = {HNSWTransformer(random_state=seed).fit(ROWS[:9]).index_.seed for seed in (0, 1, 0)}
    assert len(seeds) == 2
    assert estimator.index_.dtype == "int8"


def test_columns_keep_their_names():
    pandas = pytest.importorskip("pandas", reason="pandas comes with the extra `ray`")
    frame = pandas.DataFrame(ROWS, columns=[f"feature {i}" for i in range(DIM)])
    estimator = HNSWTransformer().fit(frame)
    assert estimator.feature_names_in_.tolist() == list(frame.columns)
    with pytest.raises(ValueError, match="feature names should match"):
        estimator.transform(frame[frame.columns[::-1]])


def test_what_is_refused():
    for wrong in ({"metric": "ip"}, {"mode": "radius"}, {"n_neighbors": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HNSWTransformer(**wrong).fit(ROWS)
    with pytest.raises(ValueError, match=r"n_neighbors = 6, n_samples_fit = 5, n_samples = 5"):
        HNSWTransformer().fit_transform(ROWS[:5])
    few = HNSWTransformer().fit(ROWS[:5])
    with pytest.raises(ValueError, match=r"n_neighbors = 6, n_samples_fit = 5, n_samples = 60"):
        few.transform(OTHERS)
    with pytest.raises(ValueError, match="X: masked values in row 2"):
        HNSWTransformer().fit(
            np.ma.masked_where(np.arange(len(ROWS))[:, None] + 0 * ROWS == 2, ROWS)
        )
    with pytest.raises(ValueError, match="zero vectors"):
        HNSWTransformer(metric="cosine").fit(np.zeros((9, 2)))
