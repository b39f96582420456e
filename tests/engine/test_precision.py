"""What rounding costs: distances against float64, and the recall of compressed rows."""

import numpy as np
import oracle
import pytest

import hnsw_gpu

pytestmark = pytest.mark.slow

N, DIM, K = 6000, 96, 10
# largest |distance - float64 distance| over rows of about unit length, by storage
TOLERANCE = {"fp32": 5e-7, "fp16": 4e-4, "int8": 1.2e-2}


def embeddings(n, seed):
    """Rows like those of text: clustered, a few strong directions, about unit length."""
    random = np.random.default_rng(seed)
    mix = (
        np.random.default_rng(100).standard_normal((DIM, DIM))
        / np.sqrt(1 + np.arange(DIM))[:, None]
    )
    centres = np.random.default_rng(101).standard_normal((200, DIM))
    rows = (centres[random.integers(200, size=n)] + 0.8 * random.standard_normal((n, DIM))) @ mix
    return np.float32(oracle.unit(rows) * random.uniform(0.9, 1.1, size=(n, 1)))


@pytest.fixture(scope="module")
def rows():
    return embeddings(N, 1)


@pytest.fixture(scope="module")
def queries():
    return embeddings(500, 2)


@pytest.fixture(scope="module")
def index(rows):
    made = {}

    def build(metric, dtype, refine=False):
        if (metric, dtype, refine) not in made:
            made[metric, dtype, refine] = hnsw_gpu.Index(DIM, metric, dtype, refine=refine)
            made[metric, dtype, refine].add(rows)
        return made[metric, dtype, refine]

    return build


@pytest.mark.parametrize("metric", ("l2", "ip", "cosine"))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_distances(index, rows, queries, metric, dtype):
    labels, distances = index(metric, dtype).search(queries, 50, ef=100)
    truth = np.take_along_axis(oracle.distances(queries, rows, metric), labels, axis=1)
    error = np.abs(distances - truth)
    assert error.max() <= TOLERANCE[dtype] * (4 if metric == "l2" else 2)
    # and the bound that holds for any data
    bound = oracle.error_bound(queries, rows, metric, dtype)
    assert (error <= np.take_along_axis(bound, labels, axis=1)).all()


@pytest.mark.parametrize("metric", ("l2", "ip", "cosine"))
@pytest.mark.parametrize(("refine", "precise"), [(True, "fp32"), ("fp16", "fp16")])
def test_refined_distances_are_those_of_the_kept_rows(
    index, rows, queries, metric, refine, precise
):
    labels, distances = index(metric, "int8", refine).search(queries, K, ef=100)
    truth = np.take_along_axis(oracle.distances(queries, rows, metric), labels, axis=1)
    assert np.abs(distances - truth).max() <= TOLERANCE[precise] * (4 if metric == "l2" else 2)
    assert (np.diff(distances, axis=1) >= 0).all()


@pytest.mark.parametrize("metric", ("l2", "ip", "cosine"))
@pytest.mark.parametrize("ef", (32, 64, 128))
def test_recall_of_refined_rows_is_that_of_fp32(index, rows, queries, metric, ef):
    truth = oracle.distances(queries, rows, metric)

    def recall(dtype, refine):
        return oracle.recall(
            index(metric, dtype, refine).search(queries, K, ef=ef).labels, truth, K
        )

    plain = recall("fp32", False)
    assert recall("int8", True) >= plain - 0.002
    assert recall("fp16", False) >= plain - 0.002
    assert recall("int8", "fp16") >= plain - 0.004
    assert recall("int8", False) >= plain - 0.05
    assert recall("int4", True) >= plain - 0.01
    assert recall("int4", "fp16") >= plain - 0.012


def test_refined_radius_and_neighbours(index, rows, queries):
    truth = oracle.distances(queries, rows, "cosine")
    one = index("cosine", "int8", True)
    offsets, labels, distances = one.search_radius(queries, 0.3, ef=300)
    found = np.repeat(np.arange(len(queries)), np.diff(offsets))
    assert (distances <= np.float32(0.3)).all()
    assert np.abs(distances - truth[found, labels]).max() <= 2 * TOLERANCE["fp32"]
    assert len(labels) >= 0.98 * (truth < 0.3).sum()
    graph = one.neighbor_graph(5)
    between = oracle.distances(rows[:500], rows, "cosine")
    np.put_along_axis(between, np.arange(500)[:, None], np.inf, axis=1)
    far = np.take_along_axis(between, graph.labels[:500], axis=1)
    assert np.abs(graph.distances[:500] - far).max() <= 2 * TOLERANCE["fp32"]
    assert oracle.recall(graph.labels[:500], between, 5) >= 0.97
