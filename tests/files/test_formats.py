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
DTYPES = ("int8", "int4")
DIM, COUNT = 8, 300


def vectors() -> np.ndarray:
    """Small integers, exact in every dtype and in every order of summation; some rows repeat."""
    rng = np.random.default_rng(1)
    rows = rng.integers(-3, 4, (COUNT, DIM)).astype(np.float32)
    rows[250:] = rows[:50]
    return rows


def make(dtype: str) -> hnsw_gpu.Index:
    index = hnsw_gpu.Index(DIM, "l2", dtype, M=4, ef_construction=20, refine="fp16", seed=5)
    index.add(vectors(), labels=np.arange(COUNT) * 3)
    index.delete([0, 3, 6])
    return index


def fixture(dtype: str) -> Path:
    suffix = "" if dtype == "int8" else f"-{dtype}"
    return DATA / f"format-{FORMAT_VERSION}{suffix}.safetensors"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_present_version_has_a_fixture(dtype):
    assert fixture(dtype).exists()


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
    assert index.labels.tolist() == [3 * i for i in range(3, COUNT)]
    assert (index.metric, index.refine, index.M) == ("l2", "fp16", 4)
    assert index.dtype == ("int4" if "int4" in path.stem else "int8")
    kept = np.arange(3, COUNT)
    np.testing.assert_array_equal(index.vectors(kept * 3), vectors()[kept])
    found = index.search(vectors(), k=1, ef=COUNT)
    gaps = np.square(vectors()[:, None] - vectors()[None, kept]).sum(axis=2).min(axis=1)
    np.testing.assert_array_equal(found.distances[:, 0], gaps)
    index.check()
    assert index.add(np.full((1, DIM), 9.0)).tolist() == [3 * (COUNT - 1) + 1]


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    missing = [dtype for dtype in DTYPES if not fixture(dtype).exists()]
    for dtype in missing:
        make(dtype).save(fixture(dtype))
    if not missing:
        raise SystemExit("all are there: a past file never changes")
