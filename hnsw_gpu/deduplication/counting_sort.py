"""Sorting by counting: pairs of nodes in time that grows with nodes and pairs alone."""

import numpy as np

from hnsw_gpu.engine import jit

DIGIT = 1 << 16


def stable_order(values, count, order=None):
    """int64 (m,): an order, by default 0, 1, .., sorted by values; ties as they were.

    values: integers (m,) of 0 to count - 1.
    """
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(values, minlength=count), out=starts[1:])
    if order is None:
        order = np.arange(len(values))
    result = np.empty(len(values), np.int64)
    _put(values, order, starts, result)
    return result


@jit
def _put(values, order, starts, result):
    for i in order:
        result[starts[values[i]]] = i
        starts[values[i]] += 1


def order_of_pairs(a, b):
    """int64 (p,): by a, then b, not negative; ties as they were."""
    count = int(max(a.max(initial=-1), b.max(initial=-1))) + 1
    return stable_order(a, count, stable_order(b, count))


def order_of_distances(distances):
    """int64 (p,): ascending float32 distances, of which none is NaN; ties as they were."""
    bits = (distances + np.float32(0)).view(np.uint32)  # -0 is 0
    bits = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(0x80000000))
    low = stable_order(bits % DIGIT, DIGIT)
    return stable_order(bits // DIGIT, DIGIT, low)
