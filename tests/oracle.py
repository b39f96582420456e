"""The truth the tests compare with: brute force in float64, in plain numpy.

Nothing here knows the package: rows are numbers from 0, a label is what the caller gave.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# float32 sums: engines keep up to 16 partial sums, so a chain has at most dim / 16 steps and a
# few more for their total; doubled, because nobody promised the number 16.
_FLOAT32 = 2.0**-24


def distances(queries, vectors, metric) -> Array:
    """All distances, (q, n) float64. `metric` is "l2", "euclidean", "ip" or "cosine"."""
    queries, vectors = np.float64(queries), np.float64(vectors)
    if metric == "cosine":
        queries, vectors = unit(queries), unit(vectors)
    if metric in ("ip", "cosine"):
        return 1.0 - queries @ vectors.T
    # differences, not |q|^2 + |x|^2 - 2 q.x: that loses the digits of small distances
    squared = np.stack([np.square(vectors - query).sum(axis=1) for query in queries])
    return np.sqrt(squared) if metric == "euclidean" else squared


def unit(rows) -> Array:
    """Rows scaled to length 1."""
    rows = np.float64(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def nearest(truth, k, allowed=None) -> tuple[NDArray[np.int64], Array]:
    """The k nearest of `distances`' rows, ties to the smaller number: (q, k) and (q, k).

    `allowed` is bool (n,) or (q, n). Too few: number -1, distance inf.
    """
    if allowed is not None:
        truth = np.where(allowed, truth, np.inf)
    numbers = np.argsort(truth, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(truth, numbers, axis=1)
    numbers[np.isinf(found)] = -1
    missing = ((0, 0), (0, k - numbers.shape[1]))
    return (
        np.pad(numbers, missing, constant_values=-1),
        np.pad(found, missing, constant_values=np.inf),
    )


def recall(found, truth, k, allowed=None) -> float:
    """Recall@k of the row numbers `found` (q, >= k) against all distances `truth` (q, n).

    A number counts when its true distance is at most the true k-th one and a small epsilon, so
    ties are not errors; a number that came twice counts once, one that is not allowed never.
    """
    if allowed is not None:
        truth = np.where(allowed, truth, np.inf)
    goal = min(k, int(np.isfinite(truth).sum(axis=1).min()))
    limit = np.sort(truth, axis=1)[:, goal - 1]
    limit += 1e-6 * np.abs(limit) + 1e-6
    hits = 0
    for row, worst, numbers in zip(truth, limit, found[:, :goal], strict=True):
        numbers = np.unique(numbers[numbers >= 0])
        hits += int((row[numbers] <= worst).sum())
    return hits / (goal * len(truth))


def error_bound(queries, vectors, metric, dtype) -> Array:
    """How far a float32 distance over rows stored as `dtype` may lie from the truth, (q, n).

    Worst case of: the rounding of a stored row (fp16: 11 bits; int8: half a step of max|x|/127,
    queries too), and of sums in float32.
    """
    queries, vectors = np.float64(queries), np.float64(vectors)
    dim = vectors.shape[1]
    truth = distances(queries, vectors, metric)
    if metric == "cosine":
        queries, vectors = unit(queries), unit(vectors)
    q, x = (np.linalg.norm(rows, axis=1) for rows in (queries, vectors))
    moved = _moved(vectors, x, dtype)[None, :]
    if dtype == "int8":
        moved = moved + _moved(queries, q, dtype)[:, None]
    sums = _FLOAT32 * (dim / 8 + 32)
    if metric in ("ip", "cosine"):
        lengths = q[:, None] * x[None, :]
        return moved * (q[:, None] + x[None, :]) + moved**2 + sums * (1 + lengths)
    between = truth if metric == "euclidean" else np.sqrt(truth)
    squared = 2 * between * moved + moved**2 + sums * (q[:, None] ** 2 + x[None, :] ** 2)
    if metric == "euclidean":
        return np.minimum(np.sqrt(squared), squared / np.maximum(truth, 1e-30)) + _FLOAT32 * truth
    return squared


def _moved(rows, lengths, dtype) -> Array:
    """How far storing may move each row, (n,)."""
    if dtype == "fp32":
        return 2.0**-23 * lengths
    if dtype == "fp16":
        return 2.0**-11 * lengths + 2.0**-25 * np.sqrt(rows.shape[1])
    step = np.abs(rows).max(axis=1, initial=0) / 127
    return np.sqrt(rows.shape[1]) * step * 0.501 + 2.0**-22 * lengths


def assert_nearest(result, queries, vectors, k, metric, dtype="fp32", labels=None, allowed=None):
    """`result` holds, for every query, the true k nearest: no more error than storing allows.

    Checks that labels are known, allowed and distinct, that each distance is the one of its
    label, that distances ascend, that as many came as exist, and that none nearer was missed.
    """
    names = np.arange(len(vectors)) if labels is None else np.asarray(labels)
    truth = distances(queries, vectors, metric)
    bound = error_bound(queries, vectors, metric, dtype)
    allowed = np.broadcast_to(True if allowed is None else allowed, truth.shape)
    assert result.labels.shape == result.distances.shape == (len(truth), k)
    assert result.labels.dtype == np.int64
    assert result.distances.dtype == np.float32
    number = {int(name): row for row, name in enumerate(names)}
    for query in range(len(truth)):
        count = min(k, int(allowed[query].sum()))
        got, far = result.labels[query], np.float64(result.distances[query])
        assert (got[count:] == -1).all()
        assert np.isposinf(far[count:]).all()
        rows = np.array([number[int(label)] for label in got[:count]], dtype=np.int64)
        assert allowed[query, rows].all()
        assert len(set(rows.tolist())) == count
        assert (np.diff(far[:count]) >= 0).all()
        error = np.abs(far[:count] - truth[query, rows])
        assert (error <= bound[query, rows]).all(), (query, error.max())
        left = np.setdiff1d(np.flatnonzero(allowed[query]), rows)
        if count and len(left):
            missed = truth[query, left] + bound[query, left] < far[count - 1]
            assert not missed.any(), f"query {query}: nearer and not found: {left[missed]}"


def assert_same(one, other):
    """Two results with the same bits."""
    for left, right in zip(one, other, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, strict=True)


def gaussian(n, dim, seed, clusters=0, spread=0.1):
    """float32 (n, dim) from a seed: one Gaussian, or `clusters` tight ones, drawn at random.

    The centres depend on `clusters` and `dim` alone, so rows and queries can share them.
    """
    random = np.random.default_rng(seed)
    rows = random.standard_normal((n, dim))
    if clusters:
        centres = np.random.default_rng([clusters, dim]).standard_normal((clusters, dim))
        rows = centres[random.integers(clusters, size=n)] + spread * rows
    return rows.astype(np.float32)


def integers(n, dim, seed, largest=3):
    """float32 (n, dim) of small integers, all rows distinct where they can be.

    Every float32 distance over them is exact. One coordinate of each row is 127, so int8 stores
    them exactly too, with a scale of 1.
    """
    random = np.random.default_rng(seed)
    rows = random.integers(-largest, largest + 1, size=(n, dim)).astype(np.float32)
    rows[np.arange(n), random.integers(dim, size=n)] = 127
    return rows
