"""Two copies of links: one is written while whoever came before still reads the other."""

import tracemalloc

import numpy as np
import pytest

from hnsw_gpu.engine.second_copy import SecondCopy

HOLDERS = {
    "the array": lambda array: array,
    "a view": lambda array: array[3:5],
    "a view of a view": lambda array: array[2:].T[1:],
    "its bytes": memoryview,
    "another array over its bytes": lambda array: np.frombuffer(memoryview(array), np.uint8),
    "an iterator": lambda array: iter(array),
    "other numbers": lambda array: array.ravel().view(np.uint8),
}


def address(array) -> int:
    return array.__array_interface__["data"][0]


def changed_places(spare, current, row):
    """The array that takes the place of `current`, with another row."""
    free = spare.take(current, len(current), len(current))
    free[row] += 1
    spare.give(current, [np.array([row])])
    return free


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_copy_that_is_held_is_left_to_its_holder(holder) -> None:
    spare = SecondCopy()
    current = changed_places(spare, np.arange(40, dtype=np.int32).reshape(10, 4), 1)
    held = HOLDERS[holder](current)
    before = np.array(current)
    places = set()
    for row in range(10):
        place = address(current)
        current = changed_places(spare, current, row)
        assert row == 0 or address(current) != place
        places.add(address(current))
    expected = before + 1
    np.testing.assert_array_equal(current, expected)
    for_a_held_one = HOLDERS[holder](before)
    if holder == "an iterator":
        held, for_a_held_one = list(held), list(for_a_held_one)
    np.testing.assert_array_equal(np.asarray(held), np.asarray(for_a_held_one))
    assert len(places) == 2  # the two that nobody holds


def test_a_copy_that_nobody_holds_is_written_again() -> None:
    spare = SecondCopy()
    rows = np.arange(4000, dtype=np.int32).reshape(1000, 4)
    current, expected = rows, rows.copy()
    for row in range(20):
        tracemalloc.start()
        current = changed_places(spare, current, row)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < rows.nbytes // 4 or row < 2
        expected[row] += 1
        np.testing.assert_array_equal(current, expected)
        assert current.flags.writeable and current.flags.c_contiguous
        assert address(current) % 64 == 0
    np.testing.assert_array_equal(rows, np.arange(4000).reshape(1000, 4))  # not ours: only read


@pytest.mark.parametrize("length", [0, 5, 30])
def test_more_rows_are_another_copy(length) -> None:
    spare = SecondCopy()
    current = changed_places(spare, np.arange(80, dtype=np.int32).reshape(20, 4), 3)
    used = min(length, 20)
    free = spare.take(current, used, length)
    assert free.shape == (length, 4)
    np.testing.assert_array_equal(free[:used], current[:used])
