"""hnsw_gpu.hnswlib behaves as hnswlib 0.8: arguments, defaults, errors, files."""

import copy
import pickle

import numpy as np
import oracle
import pytest

import hnsw_gpu.hnswlib as ours

DIM, COUNT = 8, 600
ROWS = oracle.gaussian(COUNT, DIM, seed=1)


@pytest.fixture(params=["ours", "hnswlib"])
def hnswlib(request):
    """The same tests of the library itself, where it is installed."""
    if request.param == "ours":
        return ours
    return pytest.importorskip("hnswlib", reason="hnswlib comes with the extra `peers`")


def filled(hnswlib, space="l2", capacity=COUNT, ids=None, **how):
    index = hnswlib.Index(space=space, dim=DIM)
    index.init_index(max_elements=capacity, ef_construction=60, M=8, **how)
    index.set_ef(50)
    index.add_items(ROWS, ids)
    return index


def found(index, rows=ROWS):
    return index.knn_query(rows, k=1)[0][:, 0]


def test_a_first_search(hnswlib):
    index = filled(hnswlib)
    labels, distances = index.knn_query(ROWS[:20], k=3, num_threads=1)
    assert labels.dtype == np.uint64 and distances.dtype == np.float32
    assert labels.shape == distances.shape == (20, 3)
    assert labels[:, 0].tolist() == list(range(20)) and (np.diff(distances, axis=1) >= 0).all()
    labels, _ = index.knn_query(ROWS[3])  # one query, and k = 1
    assert labels.tolist() == [[3]]
    assert repr(index) == "<hnswlib.Index(space='l2', dim=8)>"


@pytest.mark.parametrize("space", ["l2", "ip", "cosine"])
def test_distances(hnswlib, space):
    index = filled(hnswlib, space)
    labels, distances = index.knn_query(ROWS[:9], k=4)
    truth = oracle.distances(ROWS[:9], ROWS, space)
    expected = np.take_along_axis(truth, labels.astype(int), axis=1)
    np.testing.assert_allclose(distances, expected, atol=1e-4)


def test_what_it_says_of_itself(hnswlib):
    index = hnswlib.Index("l2", DIM)
    assert (index.M, index.ef_construction, index.max_elements, index.element_count) == (0,) * 4
    assert index.ef == 10
    index.init_index(capacity := 40, ef_construction=5)
    assert (index.M, index.ef_construction) == (16, 16)
    assert (index.space, index.dim, index.max_elements) == ("l2", DIM, capacity)
    index.ef, index.num_threads = 33, 3
    assert (index.ef, index.num_threads) == (33, 3)
    index.add_items(ROWS[:7])
    assert index.get_current_count() == index.element_count == 7
    assert index.get_max_elements() == 40


def test_shapes_are_refused(hnswlib):
    with pytest.raises(RuntimeError, match="Space name must be one of l2, ip, or cosine"):
        hnswlib.Index("hamming", DIM)
    index = filled(hnswlib)
    with pytest.raises(RuntimeError, match="already initiated"):
        index.init_index(5)
    with pytest.raises(RuntimeError, match="Wrong dimensionality of the vectors"):
        index.add_items(ROWS[:, :3])
    with pytest.raises(RuntimeError, match="Data must be a 1D or 2D array"):
        index.add_items(ROWS[None])
    with pytest.raises(RuntimeError, match="label shape"):
        index.add_items(ROWS[:3], [1, 2])
    with pytest.raises(RuntimeError, match="Probably ef or M is too small"):
        index.knn_query(ROWS[:1], k=COUNT + 1)


def test_labels_beyond_int64_are_refused():
    """The original takes them."""
    index = filled(ours)
    with pytest.raises(ValueError, match=r"label 9223372036854775813: expected at most 2\^63 - 1"):
        index.add_items(ROWS[:2], np.array([2**63 + 5, 1], np.uint64))


def test_capacity(hnswlib):
    index = filled(hnswlib, capacity=COUNT)
    with pytest.raises(RuntimeError, match="exceeds the specified limit"):
        index.add_items(ROWS[:1])
    index.add_items(ROWS[:5] + 1, np.arange(5))  # takes no more room
    assert found(index, ROWS[:5] + 1).tolist() == list(range(5))
    with pytest.raises(RuntimeError, match="Cannot resize"):
        index.resize_index(COUNT - 1)
    index.resize_index(COUNT + 1)
    index.add_items(ROWS[0] + 7, 9999)
    assert found(index, ROWS[:1] + 7).tolist() == [9999]
    assert index.element_count == index.max_elements == COUNT + 1


def test_labels_go_on_after_what_was_added(hnswlib):
    index = filled(hnswlib, capacity=2 * COUNT, ids=np.arange(COUNT) + 10_000)
    index.add_items(ROWS[:3] + 4)
    assert found(index, ROWS[:3] + 4).tolist() == [COUNT, COUNT + 1, COUNT + 2]
    assert sorted(index.get_ids_list()) == [COUNT, COUNT + 1, COUNT + 2, *range(10_000, 10_600)]


def test_items(hnswlib):
    index = filled(hnswlib)
    np.testing.assert_array_equal(index.get_items([5, 3]), ROWS[[5, 3]])
    assert index.get_items(np.arange(2), return_type="list") == ROWS[:2].tolist()
    with pytest.raises(ValueError, match="list of indices"):
        index.get_items(3)
    with pytest.raises(ValueError, match="return_type"):
        index.get_items([3], return_type="tuple")
    with pytest.raises(RuntimeError, match="Label not found"):
        index.get_items([COUNT])
    index.mark_deleted(3)
    with pytest.raises(RuntimeError, match="Label not found"):
        index.get_items([3])


def test_deleting_and_bringing_back(hnswlib):
    index = filled(hnswlib)
    for label in range(100):
        index.mark_deleted(label)
    assert not (found(index) < 100).any()
    assert index.element_count == COUNT and sorted(index.get_ids_list()) == list(range(COUNT))
    with pytest.raises(RuntimeError, match="already deleted"):
        index.mark_deleted(5)
    with pytest.raises(RuntimeError, match="Label not found"):
        index.mark_deleted(COUNT)
    with pytest.raises(RuntimeError, match="is not deleted"):
        index.unmark_deleted(200)
    with pytest.raises(RuntimeError, match="Label not found"):
        index.unmark_deleted(COUNT)
    for label in range(100):
        index.unmark_deleted(np.uint64(label))
    assert found(index).tolist() == list(range(COUNT))


def test_a_deleted_label_that_is_added_comes_back(hnswlib):
    index = filled(hnswlib)
    index.mark_deleted(5)
    index.add_items(ROWS[5:6] + 3, [5])
    assert found(index, ROWS[5:6] + 3).tolist() == [5] and index.element_count == COUNT


def test_replacing_deleted_elements(hnswlib):
    index = filled(hnswlib, allow_replace_deleted=True)
    for label in range(50, 90):
        index.mark_deleted(label)
    with pytest.raises(RuntimeError, match="exceeds the specified limit"):
        index.add_items(ROWS[:1], [5000])
    with pytest.raises(RuntimeError, match="Can't use addPoint to update"):
        index.add_items(ROWS[:1], [60])
    new = ROWS[50:90] + 2
    index.add_items(new, np.arange(1000, 1040), replace_deleted=True)
    assert index.element_count == COUNT
    assert found(index, new).tolist() == list(range(1000, 1040))
    assert not set(range(50, 90)) & set(index.get_ids_list())
    with pytest.raises(RuntimeError, match="Label not found"):
        index.unmark_deleted(60)
    with pytest.raises(RuntimeError, match="exceeds the specified limit"):
        index.add_items(ROWS[:1], [5000], replace_deleted=True)


def test_replacing_must_be_allowed(hnswlib):
    with pytest.raises(RuntimeError, match="Replacement of deleted elements is disabled"):
        filled(hnswlib).add_items(ROWS[:1], replace_deleted=True)


def test_filters(hnswlib):
    index = filled(hnswlib, ids=np.arange(COUNT) * 2**40)
    labels, _ = index.knn_query(
        ROWS, 2, num_threads=1, filter=lambda label: label // 2**40 % 3 == 0
    )
    assert (labels // 2**40 % 3 == 0).all()
    index.mark_deleted(3 * 2**40)
    labels, _ = index.knn_query(ROWS[3], 2, num_threads=1, filter=lambda label: label <= 4 * 2**40)
    assert 3 * 2**40 not in labels
    with pytest.raises(RuntimeError, match="Probably ef or M is too small"):
        index.knn_query(ROWS[3], 2, num_threads=1, filter=lambda label: label == 0)


def test_pickles_and_copies(hnswlib):
    empty = pickle.loads(pickle.dumps(hnswlib.Index("cosine", DIM)))
    assert (empty.space, empty.dim, empty.max_elements) == ("cosine", DIM, 0)
    index = filled(hnswlib)
    index.mark_deleted(9)
    for again in (pickle.loads(pickle.dumps(index)), hnswlib.Index(index), copy.copy(index)):
        assert (again.ef, again.M, again.max_elements) == (50, 8, COUNT)
        for one, other in zip(again.knn_query(ROWS, 3), index.knn_query(ROWS, 3), strict=True):
            np.testing.assert_array_equal(one, other)
        again.unmark_deleted(9)
        assert 9 in found(again) and 9 not in found(index)


def test_saving_and_loading(hnswlib, tmp_path):
    index = filled(hnswlib, capacity=COUNT + 5)
    index.mark_deleted(9)
    path = str(tmp_path / "index.bin")
    index.save_index(path)
    assert index.index_file_size() == (tmp_path / "index.bin").stat().st_size
    again = hnswlib.Index("l2", DIM)
    again.load_index(path)
    assert (again.ef, again.M, again.max_elements, again.element_count) == (10, 8, COUNT + 5, COUNT)
    again.set_ef(50)
    np.testing.assert_array_equal(again.knn_query(ROWS, 3)[1], index.knn_query(ROWS, 3)[1])
    again.unmark_deleted(9)
    again.add_items(ROWS[:5] + 3)
    assert found(again, ROWS[:5] + 3).tolist() == list(range(COUNT, COUNT + 5))
    more = hnswlib.Index("l2", DIM)
    more.load_index(path, max_elements=5000, allow_replace_deleted=True)
    assert more.max_elements == 5000
    with pytest.raises(RuntimeError, match="Cannot open file"):
        hnswlib.Index("l2", DIM).load_index(str(tmp_path / "none"))


def test_brute_force(hnswlib, tmp_path):
    index = hnswlib.BFIndex(space="l2", dim=DIM)
    index.init_index(max_elements=COUNT)
    index.add_items(ROWS, np.arange(COUNT) + 50)
    index.set_num_threads(2)
    labels, distances = index.knn_query(ROWS[:40], k=5)
    truth = oracle.distances(ROWS[:40], ROWS, "l2")
    numbers, expected = oracle.nearest(truth, 5)
    np.testing.assert_array_equal(labels, numbers + 50)
    np.testing.assert_allclose(distances, expected, atol=1e-4)
    with pytest.raises(RuntimeError, match="exceeds the specified limit"):
        index.add_items(ROWS[:1], [5])
    index.save_index(str(tmp_path / "index.bin"))
    index.add_items(ROWS[:1] + 5, [60])
    assert index.knn_query(ROWS[:1] + 5)[0].tolist() == [[60]]
    index.delete_vector(50), index.delete_vector(99999)
    assert index.get_current_count() == COUNT - 1 and index.get_max_elements() == COUNT
    assert index.knn_query(ROWS[:1], filter=lambda label: label < 70)[0][0, 0] in range(51, 70)
    again = hnswlib.BFIndex("l2", DIM)
    again.load_index(str(tmp_path / "index.bin"))
    np.testing.assert_array_equal(again.knn_query(ROWS[:40], k=5)[0], labels)
    assert repr(again) == "<hnswlib.BFIndex(space='l2', dim=8)>"


def test_files_are_hnswlibs(tmp_path):
    """What one saves the other loads, in both directions."""
    theirs = pytest.importorskip("hnswlib", reason="hnswlib comes with the extra `peers`")
    for one, other in ((ours, theirs), (theirs, ours)):
        for space in ("l2", "cosine"):
            index = filled(one, space, capacity=COUNT + 9)
            index.mark_deleted(3)
            index.add_items(ROWS[5:8] + 2, [5, 6, 7])
            index.save_index(str(tmp_path / "index.bin"))
            again = other.Index(space, DIM)
            again.load_index(str(tmp_path / "index.bin"))
            again.set_ef(50)
            assert (again.element_count, again.max_elements) == (COUNT, COUNT + 9)
            assert (found(again) == found(index)).mean() > 0.995
            exact = one.BFIndex(space, DIM)
            exact.init_index(COUNT)
            exact.add_items(ROWS)
            exact.save_index(str(tmp_path / "exact.bin"))
            same = other.BFIndex(space, DIM)
            same.load_index(str(tmp_path / "exact.bin"))
            np.testing.assert_array_equal(found(same)[:50], np.arange(50))


def test_what_no_search_can_order_is_refused():
    index = filled(ours, "cosine", capacity=2 * COUNT)
    with pytest.raises(ValueError, match="NaN"):
        index.add_items(ROWS[:2] * np.nan)
    with pytest.raises(ValueError, match="zero vectors"):
        index.add_items(ROWS[:2] * 0)
    assert index.element_count == COUNT
    with pytest.raises(RuntimeError, match="not inited"):
        ours.Index("l2", DIM).knn_query(ROWS[:1])
