"""Orders by counting are those of numpy's sorts."""

import numpy as np
import pytest

from hnsw_gpu.deduplication.counting_sort import order_of_distances, order_of_pairs
from hnsw_gpu.deduplication.linkage import neighbor_lists
from hnsw_gpu.deduplication.near_pairs import united

rng = np.random.default_rng(0)


@pytest.mark.parametrize("count", [0, 1, 7, 20_000])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_pairs(count, dtype) -> None:
    a, b = rng.integers(0, 100, (2, count)).astype(dtype)
    np.testing.assert_array_equal(order_of_pairs(a, b), np.lexsort((b, a)))
    distances = rng.random(count).astype(np.float32)
    low, high = np.minimum(a, b), np.maximum(a, b)
    _, first = np.unique(low.astype(np.int64) << 32 | high, return_index=True)
    found = united(a, b, distances)
    for part, wanted in zip(found, (low, high, distances), strict=True):
        np.testing.assert_array_equal(part, wanted[first])
    assert [part.dtype for part in found] == [np.int32, np.int32, np.float32]


def test_distances() -> None:
    special = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38]
    distances = rng.normal(size=5000).astype(np.float32).round(2)
    distances = np.concatenate([distances, np.float32(special * 9), distances * np.float32(1e-30)])
    expected = np.argsort(distances, kind="stable")
    np.testing.assert_array_equal(order_of_distances(distances), expected)


def test_neighbors() -> None:
    a, b = np.triu_indices(40, 1)
    chosen = rng.random(len(a)) < 0.5
    a, b = a[chosen].astype(np.int32), b[chosen].astype(np.int32)
    distances = rng.normal(size=len(a)).astype(np.float32).round(1) * np.float32(0.5)
    lists = neighbor_lists(a, b, distances, 41)
    for limit in (np.inf, 0.5, 0.0, -9.0):
        near = lists.within(limit)
        for node in range(41):
            wanted = [(d, y if x == node else x) for x, y, d in zip(a, b, distances, strict=True)
                      if node in (x, y) and d <= limit]  # fmt: skip
            own = slice(near.starts[node], near.ends[node])
            assert near.nodes[own].tolist() == [other for _, other in sorted(wanted)]
            assert near.distances[own].tolist() == sorted(d for d, _ in wanted)
