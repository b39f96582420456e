"""Rows and links begin on a cache line, wherever they came from."""

import numpy as np
import pytest

from hnsw_gpu import Index, load
from hnsw_gpu.files import open_arrays

DIM = 27
KINDS = [("fp32", False), ("fp16", "fp32"), ("int8", False), ("int8", "fp16"), ("int4", "fp16")]


def rows_of(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def astray(index) -> dict[str, int]:
    """Arrays that a walk reads and that do not begin on a line, and where they begin."""
    state = index._state
    arrays = {"rows": state.rows, "neighbors0": state.graph.neighbors0}
    arrays |= {"room": state.room.neighbors0, "neighbors": state.graph.neighbors}
    if state.refine_rows is not None:
        arrays["refine_rows"] = state.refine_rows
    places = {name: array.__array_interface__["data"][0] % 64 for name, array in arrays.items()}
    return {name: place for name, place in places.items() if place and arrays[name].size}


@pytest.mark.parametrize(("dtype", "refine"), KINDS)
@pytest.mark.parametrize("M", [5, 16])
def test_arrays_begin_on_a_cache_line(tmp_path, dtype, refine, M) -> None:
    path = tmp_path / "x"
    for seed in range(3):  # memory comes from different places
        index = Index(DIM, "l2", dtype, refine=refine, M=M, ef_construction=20)
        for count in (1, 3, 400, 50):
            index.add(rows_of(count, seed + count))
            assert astray(index) == {}
        index.add(np.repeat(rows_of(400, seed + 400), 4, axis=0))  # room for copies is given back
        assert astray(index) == {}
        index.delete(index.labels[::7])
        index.compact()
        assert astray(index) == {}
        index.save(path)
        for is_mapped in (False, True):
            again = load(path, mmap=is_mapped)
            assert astray(again) == {}
            again.add(rows_of(30, seed + 7))
            assert astray(again) == {}
            again.check()


@pytest.mark.parametrize(("dtype", "refine"), KINDS)
def test_every_array_of_a_file_begins_on_a_line(tmp_path, dtype, refine) -> None:
    index = Index(DIM, "l2", dtype, refine=refine, M=5)
    index.add(rows_of(123))
    index.save(tmp_path / "x")
    names = tuple(index._state.arrays())
    for mapped in ((), names):
        arrays, _, _ = open_arrays(tmp_path / "x", lambda _, mapped=mapped: mapped)
        assert {name: array.ctypes.data % 64 for name, array in arrays.items()} == dict.fromkeys(
            arrays, 0
        )
