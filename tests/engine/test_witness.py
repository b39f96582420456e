"""faiss as an independent witness: over our graph it finds what we find."""

from itertools import pairwise

import numpy as np
import oracle
import pytest

import hnsw_gpu

pytestmark = pytest.mark.slow

faiss = pytest.importorskip("faiss", reason="the witness comes with the extra `test`")
load_file = pytest.importorskip(
    "safetensors.numpy", reason="files are read again by the package of the extra `test`"
).load_file

N, DIM, M, K = 6000, 32, 12, 10
MEASURE = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT, "cosine": faiss.METRIC_L2}


@pytest.fixture(scope="module", params=["l2", "ip", "cosine"])
def case(request, tmp_path_factory):
    """The metric, our index, the rows as stored, and its graph in faiss."""
    metric = request.param
    rows = oracle.gaussian(N, DIM, seed=1, clusters=40, spread=0.6)
    if metric == "ip":
        rows = (
            np.float32(oracle.unit(rows)) * np.float32([0.9, 1.0, 1.1, 1.0])[np.arange(N) % 4, None]
        )
    index = hnsw_gpu.Index(DIM, metric, M=M, ef_construction=100)
    index.add(rows)
    path = tmp_path_factory.mktemp("witness") / "index.hnsw"
    index.save(path)
    rows = index.vectors(np.arange(N))  # of unit length under cosine
    return metric, index, rows, through_faiss(load_file(path), rows, MEASURE[metric])


@pytest.fixture(scope="module")
def queries():
    return oracle.gaussian(1000, DIM, seed=2, clusters=40, spread=0.7)


def through_faiss(arrays, rows, measure):
    """An IndexHNSWFlat with our links: layers above 0 in ids, as faiss has them."""
    other = faiss.IndexHNSWFlat(DIM, M, measure)
    other.storage.add(rows)
    other.ntotal = len(rows)
    offsets, nodes = arrays["layer_offsets"], arrays["nodes"]
    levels = np.zeros(len(rows), np.int32)
    for start, stop in pairwise(offsets):
        levels[nodes[start:stop]] += 1
    # faiss: a node's links of layer 0 (2M), then M a layer
    starts = np.concatenate([[0], np.cumsum(2 * M + levels * M)]).astype(np.uint64)
    links = np.full(int(starts[-1]), -1, np.int32)
    for node, start in enumerate(starts[:-1].astype(int)):
        links[start : start + 2 * M] = arrays["neighbors0"][node]
    for layer, (first, stop) in enumerate(pairwise(offsets)):
        for node, local in zip(nodes[first:stop], arrays["neighbors"][first:stop], strict=True):
            start = int(starts[node]) + 2 * M + layer * M
            links[start : start + M] = np.where(local >= 0, nodes[first:stop][local], -1)
    faiss.copy_array_to_vector(links, other.hnsw.neighbors)
    faiss.copy_array_to_vector(starts, other.hnsw.offsets)
    faiss.copy_array_to_vector(levels + 1, other.hnsw.levels)
    other.hnsw.max_level = len(offsets) - 1
    other.hnsw.entry_point = int(nodes[offsets[-2]]) if len(offsets) > 1 else 0
    return other


@pytest.mark.parametrize("ef", (10, 20, 40, 80, 160))
def test_the_same_recall_over_the_same_graph(case, queries, ef):
    metric, index, rows, other = case
    if metric == "cosine":
        queries = np.float32(oracle.unit(queries))
    truth = oracle.distances(queries, rows, metric)
    other.hnsw.efSearch = ef
    _, witness = other.search(queries, K)
    ours = oracle.recall(index.search(queries, K, ef=ef).labels, truth, K)
    assert ours >= 0.5
    assert abs(ours - oracle.recall(witness, truth, K)) <= 0.005


def test_nearly_every_label_is_the_same(case, queries):
    metric, index, _, other = case
    if metric == "cosine":
        queries = np.float32(oracle.unit(queries))
    other.hnsw.efSearch = 100
    _, witness = other.search(queries, K)
    assert (index.search(queries, K, ef=100).labels == witness).mean() >= 0.995


def test_our_graph_is_as_good_as_the_one_of_faiss(case, queries):
    """Recall at the same M, ef_construction and ef: within 0.02, or better."""
    metric, index, rows, _ = case
    if metric == "cosine":
        queries = np.float32(oracle.unit(queries))
    truth = oracle.distances(queries, rows, metric)
    theirs = faiss.IndexHNSWFlat(DIM, M, MEASURE[metric])
    theirs.hnsw.efConstruction = 100
    theirs.add(rows)
    theirs.hnsw.efSearch = 32
    _, witness = theirs.search(queries, K)
    ours = index.search(queries, K, ef=32).labels
    assert oracle.recall(ours, truth, K) >= oracle.recall(witness, truth, K) - 0.02


@pytest.mark.parametrize("metric", ("l2", "ip", "cosine"))
@pytest.mark.parametrize("k", (1, 100))
def test_exact_search_is_the_one_of_faiss(metric, k, queries):
    rows = oracle.gaussian(5000, DIM, seed=4)
    flat = faiss.IndexFlat(DIM, faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)
    if metric == "cosine":
        flat.add(np.float32(oracle.unit(rows)))
        values, witness = flat.search(np.float32(oracle.unit(queries)), k)
    else:
        flat.add(rows)
        values, witness = flat.search(queries, k)
    labels, distances = hnsw_gpu.exact_search(rows, queries, k, metric)
    expected = values if metric == "l2" else 1 - values
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=2e-5)
    assert (labels == witness).mean() >= 0.999
