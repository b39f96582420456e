"""Labels at the end of int64, given and forged."""

import numpy as np
import pytest

from hnsw_gpu import CorruptIndexError, Index, load
from hnsw_gpu.engine.labels import Labels
from hnsw_gpu.files import read_arrays, write_arrays

LARGEST = 2**63 - 1


def with_label(label) -> Index:
    index = Index(4, "l2")
    index.add(np.eye(4)[:1], [label])
    return index


def whole(index, path) -> bytes:
    index.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("label", [LARGEST - 2, LARGEST - 1, LARGEST])
def test_automatic_labels_end_before_they_wrap(tmp_path, label) -> None:
    index = with_label(label)
    before = whole(index, tmp_path / "before")
    with pytest.raises(ValueError, match=rf"labels=None: 5 labels from {label + 1} on would pass"):
        index.add(2 * np.eye(5, 4))
    assert index.labels.tolist() == [label]
    assert whole(index, tmp_path / "after") == before
    assert index.add(np.empty((0, 4))).tolist() == []
    fits = LARGEST - label
    if fits:
        found = index.add(2 * np.eye(fits, 4))
        assert found.dtype == np.int64 and found.tolist() == list(range(label + 1, LARGEST + 1))
    assert index.add(3 * np.eye(1, 4), [7]).tolist() == [7]  # given labels still do
    index.check()


def test_the_largest_label_is_saved_and_loaded(tmp_path) -> None:
    index = with_label(LARGEST)
    index.save(tmp_path / "x")
    again = load(tmp_path / "x")
    assert again.labels.tolist() == [LARGEST] and LARGEST in again
    with pytest.raises(ValueError, match="labels=None: 1 labels from 9223372036854775808"):
        again.add(np.ones((1, 4)))


@pytest.mark.parametrize("next_label", [2**63 + 1, 2**64, 10**30, -1, 3, 1.5, True, "7", None])
def test_a_forged_next_label(tmp_path, next_label) -> None:
    with_label(3).save(tmp_path / "x")
    arrays, about = read_arrays(tmp_path / "x")
    write_arrays(tmp_path / "x", arrays, about | {"next_label": next_label})
    with pytest.raises(CorruptIndexError, match=r"next.label"):
        load(tmp_path / "x")


def test_a_forged_next_label_at_the_end(tmp_path) -> None:
    with_label(3).save(tmp_path / "x")
    arrays, about = read_arrays(tmp_path / "x")
    write_arrays(tmp_path / "x", arrays, about | {"next_label": LARGEST})
    index = load(tmp_path / "x")
    with pytest.raises(ValueError, match="labels=None: 2 labels from"):
        index.add(2 * np.eye(2, 4))
    assert index.add(2 * np.eye(1, 4)).tolist() == [LARGEST]


def test_save_writes_nothing_that_load_refuses(tmp_path) -> None:
    index = with_label(3)
    before = whole(index, tmp_path / "x")
    state = index._state
    negative = Labels(state.labels.packed()[0], np.array([-1]))
    for broken, message in (
        (state._replace(next_label=3), "the next label is 3, and 3 is there"),
        (state._replace(next_label=2**63 + 1), "next_label="),
        (state._replace(labels=negative), "labels are negative or repeated"),
        (state._replace(rows=state.rows[:, :4].copy()), "vectors: float32"),
    ):
        index._state = broken
        with pytest.raises(ValueError, match=message):
            index.save(tmp_path / "x")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        assert (tmp_path / "x").read_bytes() == before
