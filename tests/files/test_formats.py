"""A saved index of every past format version still loads, and answers as it did when it was saved.

`PYTHONPATH=. python tests/files/test_formats.py` writes the fixture of the present version,
if there is none yet.
"""

from pathlib import Path

import numpy as np
import pytest

import hnsw_gpu
from hnsw_gpu.files.storage import FORMAT_VERSION

DATA = Path(__file__).parent / "data"
DIM, COUNT = 8, 300


def vectors() -> np.ndarray:
    """Small integers, exact in every dtype and in every order of summation; some rows repeat."""
    rng = np.random.default_rng(1)
    rows = rng.integers(-3, 4, (COUNT, DIM)).astype(np.float32)
    rows[250:] = rows[:50]
    return rows


def make() -> hnsw_gpu.Index:
    index = hnsw_gpu.Index(DIM, "l2", "int8", M=4, ef_construction=20, refine="fp16", seed=5)
    index.add(vectors(), labels=np.arange(COUNT) * 3)
    index.delete([0, 3, 6])
    return index


def test_the_present_version_has_a_fixture():
    assert (DATA / f"format-{FORMAT_VERSION}.safetensors").exists()


@pytest.mark.parametrize("path", sorted(DATA.glob("format-*.safetensors")), ids=lambda p: p.stem)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_past_file_loads_and_answers(path, mmap):
    index = hnsw_gpu.load(path, mmap=mmap)
    assert index.labels.tolist() == [3 * i for i in range(3, COUNT)]
    assert (index.metric, index.dtype, index.refine, index.M) == ("l2", "int8", "fp16", 4)
    kept = np.arange(3, COUNT)
    np.testing.assert_array_equal(index.vectors(kept * 3), vectors()[kept])
    found = index.search(vectors(), k=1, ef=COUNT)
    gaps = np.square(vectors()[:, None] - vectors()[None, kept]).sum(axis=2).min(axis=1)
    np.testing.assert_array_equal(found.distances[:, 0], gaps)
    index.check()
    assert index.add(np.full((1, DIM), 9.0)).tolist() == [3 * (COUNT - 1) + 1]


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    fixture = DATA / f"format-{FORMAT_VERSION}.safetensors"
    if fixture.exists():
        raise SystemExit(f"{fixture} is there: a past file never changes")
    make().save(fixture)
