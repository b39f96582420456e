"""What changes labels: undelete, forget, update, add(replace=True); and walking over an index."""

import pickle

import numpy as np
import oracle
import pytest

import hnsw_gpu
from hnsw_gpu import CorruptIndexError
from hnsw_gpu.files import read_arrays, write_arrays

DIM = 8
ROWS = oracle.gaussian(400, DIM, seed=1)


def built(labels=None, **how):
    index = hnsw_gpu.Index(DIM, "l2", M=6, ef_construction=40, **how)
    index.add(ROWS, labels)
    return index


def nearest(index, rows=ROWS):
    return index.search(rows, 1).labels[:, 0]


@pytest.mark.parametrize("form", ["as it is", "saved", "pickled"])
def test_what_was_deleted_comes_back(form, tmp_path):
    index, before = built(labels=np.arange(400)[::-1] * 3), built(labels=np.arange(400)[::-1] * 3)
    gone = np.array([0, 33, 300])
    index.delete(gone)
    assert index.deleted.tolist() == gone.tolist()
    assert not np.isin(nearest(index), gone).any() and 33 not in index
    if form == "saved":
        index.save(tmp_path / "index.hnsw")
        index = hnsw_gpu.Index.load(tmp_path / "index.hnsw", device="cpu")
    elif form == "pickled":
        index = pickle.loads(pickle.dumps(index))
    index.undelete(gone[:1])
    assert index.deleted.tolist() == gone[1:].tolist()
    index.undelete(gone[1:])
    assert 33 in index and len(index) == 400 and not len(index.deleted)
    oracle.assert_same(index.search(ROWS, 5), before.search(ROWS, 5))
    index.save(tmp_path / "one"), before.save(tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_what_cannot_come_back():
    index = built()
    index.delete([3, 4, 5])
    with pytest.raises(KeyError, match="label 6: was not deleted"):
        index.undelete([3, 6])
    assert 3 not in index
    with pytest.raises(ValueError, match="label 3 is given more than once"):
        index.undelete([3, 3])
    index.add(ROWS[:1] + 9, [3])  # the label has another vector by now
    with pytest.raises(KeyError, match="label 3: was not deleted, or is gone"):
        index.undelete([3])
    index.forget([4])
    assert index.deleted.tolist() == [5]
    with pytest.raises(KeyError, match="label 4"):
        index.undelete([4])
    with pytest.raises(KeyError, match="label 4"):
        index.forget([4])
    index.compact()
    assert not len(index.deleted) and index._state.node_count == 398
    with pytest.raises(KeyError, match="label 5"):
        index.undelete([5])


def test_compact_keeps_deleted_ones_where_asked():
    index = built()
    index.delete(np.arange(300))
    index.forget(np.arange(100))
    index.compact(keep_deleted=True)
    assert index._state.node_count == 300
    index.add(ROWS[:50] + 50, keep_deleted=True)  # most nodes are deleted, and stay
    index.undelete(np.arange(100, 300))
    index.check()
    assert nearest(index)[100:].tolist() == list(range(100, 400))
    index.delete(np.arange(100, 300))
    index.delete(np.arange(300, 400))
    index.add(ROWS[:2] + 70)
    assert not len(index.deleted)  # `add` made room


def test_a_copy_is_deleted_and_comes_back():
    index = built()
    index.add(ROWS[7:8], [1000])
    index.delete([7])
    assert nearest(index, ROWS[7:8]).tolist() == [1000]
    index.undelete([7])
    assert index.search(ROWS[7:8], 2).labels.tolist() == [[7, 1000]]
    index.delete([7, 1000])
    index.undelete([1000])
    assert nearest(index, ROWS[7:8]).tolist() == [1000]


@pytest.mark.parametrize(
    ("labels", "nodes", "text"),
    [
        ([4], [0], "in use"),
        ([3, 3], [3, 3], "repeated"),
        ([-1], [3], "negative"),
        ([3], [400], "nodes that are not there"),
        ([3], [-1], "nodes that are not there"),
        ([3], [1, 2], "differ in number"),
    ],
)
def test_deleted_labels_of_a_forged_file(labels, nodes, text, tmp_path):
    index = built()
    index.delete([3])
    index.save(tmp_path / "index.hnsw")
    arrays, about = read_arrays(tmp_path / "index.hnsw")
    arrays |= {"deleted_labels": np.array(labels), "deleted_nodes": np.array(nodes)}
    write_arrays(tmp_path / "index.hnsw", arrays, about)
    with pytest.raises(CorruptIndexError, match=text):
        hnsw_gpu.load(tmp_path / "index.hnsw")


def test_a_file_without_deleted_ones_is_as_it_was(tmp_path):
    built().save(tmp_path / "index.hnsw")
    arrays, _ = read_arrays(tmp_path / "index.hnsw")
    assert not any("deleted" in name for name in arrays)


@pytest.mark.parametrize("name", ["update", "replace"])
def test_labels_get_other_vectors(name):
    index, new = built(), oracle.gaussian(60, DIM, seed=2)
    labels = np.arange(100, 160)
    if name == "update":
        index.update(labels, new)
    else:
        index.add(new, labels, replace=True)
    expected = ROWS.copy()
    expected[labels] = new
    assert len(index) == 400 and not len(index.deleted)
    np.testing.assert_array_equal(index.vectors(np.arange(400)), expected)
    assert nearest(index, expected).tolist() == list(range(400))
    assert not (index.search(ROWS[labels], 1).distances == 0).any()
    index.check()


def test_known_and_new_labels_in_one_call():
    index = built()
    index.add(ROWS[:3] + 5, [2, 1000, 0], replace=True)
    assert len(index) == 401
    np.testing.assert_array_equal(index.vectors([2, 1000, 0]), ROWS[:3] + 5)
    assert index.add(ROWS[:1] + 6).tolist() == [1001]
    index.add(ROWS[2:3], [2], replace=True)  # a vector that is there, without a label
    assert nearest(index, ROWS[2:3]).tolist() == [2]
    index.update([5, 6], ROWS[[6, 5]])  # two change places
    assert nearest(index, ROWS[5:7]).tolist() == [6, 5]
    index.check()


def test_updates_refuse_what_is_wrong():
    index = built()
    with pytest.raises(KeyError, match="label 400: not in the index"):
        index.update([1, 400], ROWS[:2] + 1)
    with pytest.raises(ValueError, match="label 1 is given more than once"):
        index.update([1, 1], ROWS[:2] + 1)
    with pytest.raises(ValueError, match="labels: 1 for 2 vectors"):
        index.update([1], ROWS[:2])
    with pytest.raises(ValueError, match="NaN"):
        index.update([1], ROWS[:1] * np.nan)
    with pytest.raises(ValueError, match="label 1 is already in the index"):
        index.add(ROWS[:1], [1])
    np.testing.assert_array_equal(index.vectors(np.arange(400)), ROWS)


def test_replacing_again_and_again_does_not_grow():
    index = built()
    for turn in range(6):
        index.update(np.arange(400), ROWS + turn)
    assert index._state.node_count <= 1200
    assert nearest(index, ROWS + 5).tolist() == list(range(400))


def test_labels_and_items_ascend():
    labels = np.random.default_rng(1).permutation(4000)[:400]
    index = built(labels=labels)
    assert list(index) == sorted(labels.tolist())
    items = list(index.items())
    assert [label for label, _ in items] == sorted(labels.tolist())
    np.testing.assert_array_equal(np.stack([row for _, row in items]), ROWS[np.argsort(labels)])
    assert list(hnsw_gpu.Index(DIM).items()) == []


def test_what_was_deleted_is_saved_the_same(tmp_path):
    """However it was deleted and added, and once more after a load."""
    saved = []
    for parts, gone in (([ROWS[:60]], [[3, 57, 9]]), ([ROWS[:50], ROWS[50:60]], [[57], [9, 3]])):
        index = hnsw_gpu.Index(ROWS.shape[1], "l2", M=4, ef_construction=20)
        for part in parts:
            index.add(np.concatenate([part, part[:1]]), threads=1)
        for some in gone:
            index.delete(some)
        index.compact(keep_deleted=True)
        for path in (tmp_path / "a.hnsw", tmp_path / "b.hnsw"):
            index.save(path)
            saved.append(path.read_bytes())
            index = hnsw_gpu.load(path, device="cpu")
    assert saved[0] == saved[1] and saved[2] == saved[3]
