"""Saved indexes with right checksums and wrong numbers; files that change, linger, do not sync."""

import numpy as np
import pytest

from hnsw_gpu import CorruptIndexError, Index, load
from hnsw_gpu.files import read_arrays, write_arrays

DIM = 21  # rows of every dtype are padded


def rows_of(count, dim=DIM):
    return np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)


def saved(path, **how) -> Index:
    index = Index(DIM, **how)
    index.add(rows_of(300))
    index.save(path)
    return index


def forge(path, name, change) -> None:
    """Change an array of a file, with right checksums."""
    arrays, about = read_arrays(path)
    change(arrays[name])
    write_arrays(path, arrays, about)


# ---------------------------------------------------------------- numbers of a forged file


def put(row, place, value):
    def change(array):
        array[row, place] = value

    return change


def put_tail(row, place, dtype, change_value):
    """Change the number at byte `place` of the 12 that end an int8 row."""

    def change(array):
        tail = array[row, -12:].copy()
        number = tail[place : place + 4].view(dtype)
        number[0] = change_value(number[0])
        array[row, -12:] = tail

    return change


FLOATS = [
    (put(299, 20, np.nan), "row 299 has NaN, infinite or too large values"),
    (put(0, 0, np.inf), "row 0 has NaN, infinite or too large values"),
    (put(7, 3, -np.inf), "row 7 has NaN, infinite or too large values"),
    (put(12, 21, 1), "row 12 has values in the padding"),
    (put(12, -1, np.nan), "row 12 has values in the padding"),
]
CODES = [
    (put_tail(5, 0, np.float32, lambda x: np.nan), "row 5 has a scale that is negative or not"),
    (put_tail(5, 0, np.float32, lambda x: np.inf), "row 5 has a scale that is negative or not"),
    (put_tail(5, 0, np.float32, lambda x: -x), "row 5 has a scale that is negative or not"),
    (put_tail(5, 0, np.float32, lambda x: 2 * x), "row 5 has a norm that is not that of its codes"),
    (put_tail(9, 4, np.float32, lambda x: np.nan), "row 9 has a norm that is not that of its"),
    (put_tail(9, 4, np.float32, lambda x: x * 1.01), "row 9 has a norm that is not that of its"),
    (put_tail(9, 8, np.int32, lambda x: x + 1), "row 9 has a sum of codes that is not that of"),
    (put(3, 21, 1), "row 3 has values in the padding"),
    (put(3, 4, 99), "row 3 has a (sum of codes|norm) that is not that of its codes"),
]
LARGE = (put(4, 4, 3e20), "row 4 has NaN, infinite or too large values")
LONG = (put(4, 4, 3), "row 4 has a length other than 1, which cosine needs")
FORGED = [
    ({"metric": metric, "dtype": dtype, "refine": refine}, name, *case)
    for metric, dtype, refine, name, cases in (
        ("l2", "fp32", False, "vectors", [*FLOATS, LARGE]),
        ("ip", "fp32", False, "vectors", FLOATS),
        ("cosine", "fp32", False, "vectors", [*FLOATS, LONG]),
        ("l2", "fp16", False, "vectors", FLOATS),
        ("l2", "int8", False, "vectors", CODES),
        ("cosine", "int8", False, "vectors", CODES),
        ("l2", "int8", "fp16", "refine_vectors", FLOATS),
        ("l2", "fp16", "fp32", "refine_vectors", FLOATS),
        ("cosine", "fp16", "fp32", "refine_vectors", [LONG]),
    )
    for case in cases
]


@pytest.mark.parametrize(("how", "name", "change", "message"), FORGED)
def test_numbers_that_no_add_lets_in(tmp_path, how, name, change, message) -> None:
    path = tmp_path / "x.hnsw"
    saved(path, **how)
    load(path).check()
    forge(path, name, change)
    with pytest.raises(CorruptIndexError, match=f"x.hnsw: {name}: {message}"):
        load(path)
    mapped = load(path, mmap=True)  # reads none of them
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        mapped.check()


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1, 1e12, 1e17])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_numbers_of_any_size_that_add_lets_in(tmp_path, factor, dtype, metric) -> None:
    """Whatever `add` takes, `load` does."""
    index = Index(DIM, metric, dtype)
    rows = rows_of(50) * np.float32(factor)
    rows[0, 1:] = 0  # one code is not 0
    index.add(rows)
    index.save(tmp_path / "x")
    again = load(tmp_path / "x")
    again.check()
    np.testing.assert_array_equal(again.vectors(again.labels), index.vectors(index.labels))
