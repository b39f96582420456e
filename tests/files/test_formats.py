"""A saved index of every past format version still loads, and answers as it did when it was saved.

`PYTHONPATH=. python tests/files/test_formats.py` writes the fixtures of the present version that
are not there yet. A dtype is no new version: a release that does not know it says so.
"""

from pathlib import Path

import numpy as np
import pytest

import hnsw_gpu
from hnsw_gpu.files import read_arrays
from hnsw_gpu.files.storage import FORMAT_VERSION

DATA = Path(__file__).parent / "data"
PAST = sorted(DATA.glob("format-*.safetensors"))
KINDS = ("int8", "int4", "strings")  # dtypes, and int8 with string labels
DIM, COUNT = 8, 300


def vectors() -> np.ndarray:
    """Small integers, exact in every dtype and in every order of summation; some rows repeat."""
    rng = np.random.default_rng(1)
    rows = rng.integers(-3, 4, (COUNT, DIM)).astype(np.float32)
    rows[250:] = rows[:50]
    return rows


def labels_of(numbers: np.ndarray, kind: str) -> list:
    """Labels by the numbers of vectors."""
    return [f"vector {n}ä" if kind == "strings" else 3 * n for n in numbers.tolist()]


def make(kind: str) -> hnsw_gpu.Index:
    dtype = "int8" if kind == "strings" else kind
    index = hnsw_gpu.Index(DIM, "l2", dtype, M=4, ef_construction=20, refine="fp16", seed=5)
    index.add(vectors(), labels=labels_of(np.arange(COUNT), kind))
    index.delete(labels_of(np.arange(3), kind))
    return index


def fixture(kind: str) -> Path:
    suffix = "" if kind == "int8" else f"-{kind}"
    return DATA / f"format-{FORMAT_VERSION}{suffix}.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_the_present_version_has_a_fixture(kind):
    assert fixture(kind).exists()


@pytest.mark.parametrize("path", PAST, ids=lambda p: p.stem)
def test_the_rows_of_a_past_file_are_those_of_today(path):
    """Whose queries find them: codes, scales and lengths bit for bit."""
    arrays, about = read_arrays(path)
    now = hnsw_gpu.Index(DIM, about["metric"], about["dtype"], refine=about["refine"])
    now.add(vectors()[:250])  # without copies
    for name in ("vectors", "refine_vectors"):
        np.testing.assert_array_equal(arrays[name], now._state.arrays()[name])


@pytest.mark.parametrize("path", PAST, ids=lambda p: p.stem)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_past_file_loads_and_answers(path, mmap):
    index = hnsw_gpu.load(path, mmap=mmap)
    kind, kept = "strings" if "strings" in path.stem else "integers", np.arange(3, COUNT)
    labels = labels_of(kept, kind)
    assert index.label_kind == kind and index.labels.tolist() == labels
    assert (index.metric, index.refine, index.M) == ("l2", "fp16", 4)
    assert index.dtype == ("int4" if "int4" in path.stem else "int8")
    np.testing.assert_array_equal(index.vectors(labels), vectors()[kept])
    found = index.search(vectors(), k=1, ef=COUNT)
    gaps = np.square(vectors()[:, None] - vectors()[None, kept]).sum(axis=2).min(axis=1)
    np.testing.assert_array_equal(found.distances[:, 0], gaps)
    index.check()
    if kind == "strings":
        index.undelete(labels_of(np.arange(1), kind))
        assert index.search(vectors()[:1], k=2).labels.tolist() == [["vector 0ä", "vector 250ä"]]
    else:
        assert index.add(np.full((1, DIM), 9.0)).tolist() == [3 * (COUNT - 1) + 1]


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    missing = [kind for kind in KINDS if not fixture(kind).exists()]
    for kind in missing:
        make(kind).save(fixture(kind))
    if not missing:
        raise SystemExit("all are there: a past file never changes")
