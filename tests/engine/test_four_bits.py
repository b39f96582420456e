"""int4 rows and queries: the rotation, and the codes against `reference.py`, bit for bit."""

import numpy as np
import oracle
import pytest
import reference

from hnsw_gpu.engine import encode_queries, rows_as_queries, vectors
from hnsw_gpu.engine.rotation import rotate, rotate_back

DIMS = (1, 2, 3, 7, 31, 33, 64, 100, 127, 128, 256, 768)
METRICS = ("l2", "ip", "cosine")


def drawn(dim: int, count: int = 40) -> np.ndarray:
    """Rows of very different sizes and shapes."""
    random = np.random.default_rng(dim)
    rows = random.standard_normal((count, dim)) * 10.0 ** random.integers(-6, 7, (count, 1))
    rows[1] = np.abs(rows[1])
    rows[2, : dim // 2] = 0
    rows[3] = 1  # all alike
    rows[4] = 0
    rows[4, dim // 2] = -5  # a spike
    rows[5, 0] += 1e5 * np.abs(rows[5]).max()
    return rows.astype(np.float32)


@pytest.mark.parametrize("dim", (*DIMS, 1000))
def test_the_rotation_is_orthogonal_and_has_an_inverse(dim):
    square = rotate(np.eye(dim, dtype=np.float32)).astype(np.float64)
    np.testing.assert_allclose(square @ square.T, np.eye(dim), atol=2e-6)
    rows = drawn(dim)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    for there, back in ((rotate, rotate_back), (rotate_back, rotate)):
        error = np.abs(back(there(rows)) - rows)
        assert (error <= 4e-6 * lengths).all()


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_is_that_of_the_reference(dim):
    rows = drawn(dim)
    expected = np.array([reference.rotated(row) for row in rows])
    np.testing.assert_array_equal(rotate(rows), expected)
    np.testing.assert_array_equal(rotate(rows[7:8]), expected[7:8])  # alone as among others


def test_a_spike_is_spread_over_all_coordinates():
    """Else it would set the step of all codes."""
    for dim in (64, 100, 127, 255, 256, 257, 300, 384, 768, 1000, 1023, 1025, 1536):
        spikes = rotate(np.eye(dim, dtype=np.float32)) * np.sqrt(dim)
        assert np.abs(spikes).max() < 6, dim  # the largest of as many normal numbers is 5
        assert (spikes**4).mean() < 3.3, dim  # theirs is 3


def halves(queries: np.ndarray) -> list[np.ndarray]:
    """What meets the low and the high bits of rows; zeros are between them and the tail."""
    assert queries.shape[1] % 32 == 0 and not queries[:, -32:-12].any()
    return np.split(queries[:, :-32], 2, axis=1)


def tail(rows: np.ndarray) -> tuple:
    """Scales, squared lengths and sums of encoded rows or queries."""
    numbers = np.ascontiguousarray(rows[:, -12:])
    return *numbers.view(np.float32)[:, :2].T, numbers.view(np.int32)[:, 2]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", DIMS)
def test_rows_are_those_of_the_reference(dim, metric):
    given = drawn(dim)
    rows = vectors.encode(given, metric, "int4")
    assert rows.shape[1] % 32 == 0 and rows.shape[1] - 44 < -(-dim // 2) <= rows.shape[1] - 12
    scales, squares, sums = tail(rows)
    codes = rows[:, :-12]
    for i, expected in enumerate(reference.stored(row, metric, "int4") for row in given):
        found = np.concatenate([codes[i] & 15, codes[i] >> 4])
        assert (2 * found[:dim].astype(int) - 15).tolist() == expected.codes
        assert not found[dim:].any()
        assert (scales[i], squares[i]) == (expected.scale, expected.square)
        assert sums[i] == sum(expected.codes)
        decoded = vectors.decode(rows[i : i + 1], dim, "int4")[0].astype(np.float64)
        turned = rotate(np.float32(decoded)[None])[0]
        length = np.linalg.norm(reference.int4_value(expected)) + 1e-30
        assert np.abs(turned - reference.int4_value(expected)).max() <= 4e-6 * length


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", DIMS)
def test_queries_are_those_of_the_reference(dim, metric):
    given = drawn(dim)
    queries = encode_queries(given, metric, "int4")
    scales, squares, sums = tail(queries)
    low, high = halves(queries)
    found = np.concatenate([low[:, :-12], high[:, :-12]], axis=1)
    assert not low[:, -12:].any() and not high[:, -12:].any()  # what meets the tail of a row
    for i, expected in enumerate(reference.asked(row, metric, "int4") for row in given):
        assert found[i, :dim].tolist() == expected.codes
        assert not found[i, dim:].any()
        assert (scales[i], squares[i]) == (expected.scale, expected.square)
        assert sums[i] == 15 * sum(expected.codes)


def test_a_row_as_a_query_is_the_row():
    rows = vectors.encode(drawn(100), "l2", "int4")
    queries = rows_as_queries(rows)
    low, high = halves(queries)
    codes = np.concatenate([low[:, :-12], high[:, :-12]], axis=1)[:, :100]
    nibbles = np.concatenate([rows[:, :-12] & 15, rows[:, :-12] >> 4], axis=1)[:, :100]
    np.testing.assert_array_equal(codes, 2 * nibbles.astype(int) - 15)
    for mine, theirs, factor in zip(tail(queries), tail(rows), (1, 1, 15), strict=True):
        np.testing.assert_array_equal(mine, factor * theirs)


def test_zero_vectors_stand_for_zeros():
    rows = vectors.encode(np.zeros((3, 21), np.float32), "l2", "int4")
    assert not vectors.decode(rows, 21, "int4").any()
    scales, squares, sums = tail(rows)
    assert not scales.any() and not squares.any()
    assert sums.tolist() == [-15 * 21] * 3


@pytest.mark.parametrize("dim", [d for d in DIMS if d >= 31])
def test_what_rounding_takes(dim):
    """A tenth of a vector's length, in no direction: its dot product with itself stays."""
    rows = oracle.gaussian(300, dim, seed=2)
    decoded = vectors.decode(vectors.encode(rows, "l2", "int4"), dim, "int4").astype(np.float64)
    squares = np.square(rows.astype(np.float64)).sum(axis=1)
    lost = np.sqrt(np.square(decoded - rows).sum(axis=1) / squares)
    assert 0.08 < lost.mean() < 0.115 and lost.max() < 0.2
    np.testing.assert_allclose((decoded * rows).sum(axis=1), squares, rtol=2e-3)
