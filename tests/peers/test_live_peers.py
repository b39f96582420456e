"""Graphs from the other libraries and back: they answer as before, and as we do."""

import logging

import numpy as np
import oracle
import pytest

import hnsw_gpu

COUNT, DIM, M, K, EF = 3000, 16, 8, 10, 40
QUERIES = oracle.gaussian(400, DIM, seed=2)
ROWS = oracle.gaussian(COUNT, DIM, seed=1)
LABELS = np.random.default_rng(3).permutation(10 * COUNT)[:COUNT]


def peer(name):
    return pytest.importorskip(name, reason=f"{name} comes with the extra `peers`")


def recall(labels, metric, rows=ROWS, names=LABELS):
    return oracle.recall(numbers(labels, names), oracle.distances(QUERIES, rows, metric), K)


def numbers(labels, names):
    """Row numbers of labels."""
    order = np.argsort(names)
    return order[np.searchsorted(names, np.asarray(labels).astype(np.int64), sorter=order)]


def ours(metric="l2", rows=ROWS, labels=LABELS, **how):
    index = hnsw_gpu.Index(DIM, metric, M=M, ef_construction=60, **how)
    index.add(rows, labels)
    return index


def hnswlib_of(path, metric):
    found = peer("hnswlib").Index(metric, DIM)
    found.load_index(str(path))
    found.set_ef(EF)
    return found


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_hnswlib_to_us_and_back(metric, tmp_path):
    there = peer("hnswlib").Index(metric, DIM)
    there.init_index(COUNT, M=M, ef_construction=60)
    there.add_items(ROWS, LABELS, num_threads=1)
    there.set_ef(EF)
    before, distances = there.knn_query(QUERIES, K)
    there.save_index(str(tmp_path / "theirs.bin"))
    index = hnsw_gpu.from_hnswlib(tmp_path / "theirs.bin", DIM, metric, device="cpu")
    found = index.search(QUERIES, K, ef=EF)
    assert abs(recall(found.labels, metric) - recall(before, metric)) <= 0.002
    np.testing.assert_allclose(np.sort(index.vectors(LABELS).ravel()),
                               np.sort(there.get_items(LABELS).ravel()), atol=1e-6)  # fmt: skip
    index.to_hnswlib(tmp_path / "ours.bin")
    after, again = hnswlib_of(tmp_path / "ours.bin", metric).knn_query(QUERIES, K)
    assert (after == before).all()
    np.testing.assert_allclose(again, distances, atol=1e-4)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_us_to_hnswlib(metric, tmp_path):
    index = ours(metric)
    index.to_hnswlib(tmp_path / "ours.bin")
    there = hnswlib_of(tmp_path / "ours.bin", metric)
    found, _ = there.knn_query(QUERIES, K)
    mine = index.search(QUERIES, K, ef=EF)
    assert abs(recall(found, metric) - recall(mine.labels, metric)) <= 0.002
    there.resize_index(COUNT + 10)
    there.add_items(QUERIES[:10])  # and it goes on there


def test_labels_up_to_the_largest_reach_hnswlib(tmp_path):
    largest = 2**63 - 1
    index = ours(labels=[largest, largest - 3, *range(1, COUNT - 1)])
    index.delete([1, 2, 3])
    index.forget([1, 2, 3])  # their elements need labels, and two are left behind all
    index.to_hnswlib(tmp_path / "ours.bin")
    there = hnswlib_of(tmp_path / "ours.bin", "l2")
    numbers = there.get_ids_list()
    assert len(set(numbers)) == COUNT and max(numbers) == largest
    found, _ = there.knn_query(ROWS[:2], 1)
    assert found[:, 0].tolist() == [largest, largest - 3]


def test_copies_and_deleted_ones_reach_hnswlib(tmp_path):
    rows = np.concatenate([ROWS[:1000], np.repeat(ROWS[:1], 40, axis=0), ROWS[1:30]])
    index = ours(rows=rows, labels=np.arange(len(rows)))
    index.delete(np.arange(500, 600))
    index.add(ROWS[500:550], labels=np.arange(500, 550))
    index.to_hnswlib(tmp_path / "ours.bin", max_elements=5000)
    there = hnswlib_of(tmp_path / "ours.bin", "l2")
    assert there.get_max_elements() == 5000
    copies = {0, *range(1000, 1040)}
    labels, distances = there.knn_query(rows[:1], 45)
    assert set(labels[0, :41].tolist()) == copies and distances[0, :41].max() == 0
    assert distances[0, 41] > 0
    labels, _ = there.knn_query(rows[1:1000], 1)
    gone = np.arange(550, 600)
    assert not np.isin(labels, gone).any()
    there.unmark_deleted(599)
    assert there.knn_query(rows[599:600], 1)[0][0, 0] == 599


def faiss_index(metric, wrapped):
    faiss = peer("faiss")
    faiss.omp_set_num_threads(1)
    made = faiss.IndexHNSWFlat(DIM, M, faiss.METRIC_L2 if metric == "l2" else 0)
    made.hnsw.efConstruction = 60
    if not wrapped:
        made.add(ROWS)
        return made
    made = faiss.IndexIDMap2(made)
    made.add_with_ids(ROWS, LABELS)
    return made


def test_labels_that_are_negative_are_refused():
    faiss = peer("faiss")
    made = faiss.IndexIDMap(faiss.IndexHNSWFlat(DIM, M))
    made.add_with_ids(ROWS[:3], np.array([4, -5, 6]))
    with pytest.raises(ValueError, match="id -5, expected 0 or more") as caught:
        hnsw_gpu.from_faiss(made)
    assert type(caught.value) is ValueError  # nothing is damaged


def ask(index):
    faiss = peer("faiss")
    return index.search(QUERIES, K, params=faiss.SearchParametersHNSW(efSearch=EF))


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_faiss_to_us_and_back(metric, wrapped, tmp_path):
    there = faiss_index(metric, wrapped)
    names = LABELS if wrapped else np.arange(COUNT)
    distances, before = ask(there)
    index = hnsw_gpu.from_faiss(there, device="cpu")
    assert index.metric == metric and index._state.graph.top >= 2
    found = index.search(QUERIES, K, ef=EF)
    one, other = (recall(labels, metric, names=names) for labels in (found.labels, before))
    assert abs(one - other) <= 0.002
    back = index.to_faiss()
    assert type(back).__name__ == ("IndexIDMap2" if wrapped else "IndexHNSWFlat")
    again, after = ask(back)
    assert (after == before).all()
    np.testing.assert_allclose(again, distances, atol=1e-4)
    peer("faiss").write_index(there, str(tmp_path / "there.faiss"))
    same = hnsw_gpu.from_faiss(tmp_path / "there.faiss", device="cpu")
    oracle.assert_same(same.search(QUERIES, K, ef=EF), found)


def test_us_to_faiss():
    peer("faiss")
    index = ours("cosine")
    _, labels = ask(index.to_faiss())  # inner product of unit vectors
    mine = index.search(QUERIES, K, ef=EF)
    assert abs(recall(labels, "cosine") - recall(mine.labels, "cosine")) <= 0.002
    index.delete(LABELS[:1])
    with pytest.raises(ValueError, match="1 nodes are deleted"):
        index.to_faiss()
    empty = hnsw_gpu.Index(DIM, "l2").to_faiss()
    assert len(hnsw_gpu.from_faiss(empty, device="cpu")) == 0


def test_other_metrics_of_a_faiss_graph():
    faiss = peer("faiss")
    there = faiss_index("l2", False)
    index = hnsw_gpu.from_faiss(there, "euclidean", device="cpu")
    distances = index.search(QUERIES, K, ef=EF).distances
    np.testing.assert_allclose(distances**2, ask(there)[0], rtol=1e-3)
    with pytest.raises(ValueError, match="of unit length"):
        hnsw_gpu.from_faiss(there, "cosine")
    with pytest.raises(ValueError, match="IndexFlatL2: expected an IndexHNSW"):
        hnsw_gpu.from_faiss(faiss.IndexFlatL2(DIM))
    units = faiss.IndexHNSWFlat(DIM, M, faiss.METRIC_INNER_PRODUCT)
    units.add(np.float32(oracle.unit(ROWS)))
    index = hnsw_gpu.from_faiss(units, "cosine", device="cpu")
    assert recall(index.search(QUERIES, K, ef=EF).labels, "cosine", names=np.arange(COUNT)) > 0.9


def test_hostile_arrays_of_faiss_are_refused():
    faiss = peer("faiss")
    for name, value in (("entry_point", COUNT), ("entry_point", -1), ("max_level", None)):
        there = faiss_index("l2", False)
        if value is None:
            levels = faiss.vector_to_array(there.hnsw.levels)
            levels[7] = 5
            faiss.copy_array_to_vector(levels, there.hnsw.levels)
        else:
            setattr(there.hnsw, name, value)
        with pytest.raises(ValueError, match=r"IndexHNSWFlat: |layer"):
            hnsw_gpu.from_faiss(there)
    there = faiss_index("l2", False)
    links = faiss.vector_to_array(there.hnsw.neighbors)
    links[3] = COUNT
    faiss.copy_array_to_vector(links, there.hnsw.neighbors)
    with pytest.raises(ValueError, match="lead nowhere"):
        hnsw_gpu.from_faiss(there)


@pytest.mark.parametrize(("metric", "dtype"), [("cos", "f32"), ("ip", "f32"), ("l2sq", "bf16")])
def test_usearch_to_us(metric, dtype, tmp_path):
    usearch = pytest.importorskip("usearch.index", reason="usearch comes with the extra `peers`")
    there = usearch.Index(
        ndim=DIM, metric=metric, dtype=dtype, connectivity=M, expansion_add=60, expansion_search=EF
    )
    there.add(LABELS, ROWS, threads=1)
    before = there.search(QUERIES, K, threads=1).keys
    there.save(str(tmp_path / "theirs.usearch"))
    index = hnsw_gpu.from_usearch(tmp_path / "theirs.usearch", device="cpu")
    assert index._state.graph.top >= 2
    rows = index.vectors(LABELS)
    found = index.search(QUERIES, K, ef=EF)
    assert abs(recall(found.labels, index.metric, rows) - recall(before, index.metric, rows)) <= (
        0.004 if dtype == "bf16" else 0.002  # they round queries too
    )


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        ours(rows=ROWS[:10], labels=None).to_faiss()


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, "hnsw_gpu")
