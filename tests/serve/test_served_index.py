"""What a server answers from: filters and canary beside an index, its checksum, memory."""

import sys

import numpy as np
import pytest

from hnsw_gpu import Index, engine, load
from hnsw_gpu.files import storage
from hnsw_gpu.serve import served_index

ROWS = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    index = Index(6, M=4, ef_construction=20)
    index.add(ROWS)
    index.save(tmp_path / "docs.hnsw")
    return tmp_path / "docs.hnsw"


def loaded(path):
    return served_index.load_served_index(path, 1, device="cpu", threads=1)


def test_the_canary_is_stored_vectors_or_the_file(path):
    index, canary = load(path, device="cpu"), loaded(path).canary
    np.testing.assert_array_equal(canary.queries, index.vectors(np.arange(64) * 300 // 64))
    truth = index.exact_search(canary.queries, 10)
    assert canary.recall(truth) == 1
    far = truth._replace(distances=truth.distances + np.float32(1))
    assert canary.recall(far) == 0
    half = truth.distances.copy()
    half[:, 5:] = np.inf
    assert canary.recall(truth._replace(distances=half)) == 0.5
    np.save(path.with_name("docs.canary.npy"), ROWS[:5] * 3)
    np.testing.assert_array_equal(loaded(path).canary.queries, ROWS[:5] * 3)
    np.save(path.with_name("docs.canary.npy"), ROWS[:5, :2])
    with pytest.raises(ValueError, match=r"docs\.canary\.npy: queries: shape \(5, 2\)"):
        loaded(path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.ones((2, 300), bool), r"shape \(2, 300\), expected \(n,\)"),
        (np.ones(300), "dtype float64"),
        (np.array(["a"], object), "an array of Python objects"),
    ],
)
def test_filters_are_checked(path, rows, words):
    folder = path.with_name("docs.filters")
    folder.mkdir()
    np.save(folder / "good.npy", np.array([1, 2]))
    assert loaded(path).filters["good"].tolist() == [1, 2]
    np.save(folder / "bad.npy", rows, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"bad\.npy: .*{words}"):
        loaded(path)


def test_the_checksum_tells_files_apart(path, tmp_path):
    load(path, device="cpu").save(tmp_path / "same.hnsw")
    other = load(path, device="cpu")
    other.delete([0])
    other.save(tmp_path / "other.hnsw")
    mine = storage.arrays_checksum(path)
    assert len(mine) == 8 and int(mine, 16) >= 0
    assert mine == storage.arrays_checksum(tmp_path / "same.hnsw") == loaded(path).checksum
    assert mine != storage.arrays_checksum(tmp_path / "other.hnsw")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(path):
    free = engine.memory_free()
    assert 2**20 < free < 2**50
    assert path.stat().st_size < served_index.memory_needed(path) < 2 * path.stat().st_size
