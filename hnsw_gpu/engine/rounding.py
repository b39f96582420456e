"""What storing takes from vectors by rounding: told to who adds them, and changes nothing.

Where finer rows decide, the coarse ones are looked at all the same: a walk leads to what is near
by them, and past LOST_SHARE to others, which nothing re-ranks.

Two vectors may become equal rows, which share a node. And what tells vectors apart may be small
beside what they share: the mean of all, or one large number that sets the scale of an int8 row.
"""

from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.vectors import ENCODED, decode
from hnsw_gpu.engine.workers import run_chunks

LOST_SHARE = 0.25  # of what tells a vector apart; normal: 0.0005 (fp16), 0.01 (int8), 0.09 (int4)
LEAST_ROWS = 32  # of fewer, the mean is close to each
LEAST_APART = 1e-13  # of squared lengths: below, vectors are copies of each other
LEAST_APART_GIVEN = 1e-30  # the same of float64, before it becomes float32
EPSILON = 2.0**-23  # of a float32 near 1, as dot products of unit vectors are
BLOCK_ROWS = 256  # looked at at a time, as float64
LEAST_SQUARE = 1e-37  # of differences: below, a float32 sum of squares loses them


class Rounded(NamedTuple):
    """How many of the vectors of an `add` rounding harmed."""

    worn: int  # lost more than LOST_SHARE of what tells them apart
    merged: int  # share a node with a vector that was given otherwise
    blurred: int  # lost as much to float32, which all dtypes begin with


def count_blurred(given: np.ndarray, exact: np.ndarray, metric: str) -> int:
    """How many of vectors (m, dim) lose more than LOST_SHARE of what tells them apart to float32.

    They lose it when they become `exact`, float32 (m, dim); or in distances, which are float32 for
    all dtypes: squares of tiny differences vanish, and so does what inner products differ by beside
    what they share. (Under cosine `count_worn` looks at those.)
    """
    if len(given) < LEAST_ROWS or (given.dtype == np.float32 and metric == "cosine"):
        return 0
    mean, count = given.mean(axis=0, dtype=np.float64), 0
    for start in range(0, len(given), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        count += _count_blurred(given[block].astype(np.float64), exact[block], mean, metric)
    return count


def _count_blurred(given: np.ndarray, exact: np.ndarray, mean: np.ndarray, metric: str) -> int:
    apart, squares = _squares(given - mean), _squares(given)
    is_blurred = _squares(given - exact) > LOST_SHARE**2 * apart
    is_blurred &= apart > LEAST_APART_GIVEN * squares
    if metric == "l2":
        is_blurred |= (apart > 0) & (apart < LEAST_SQUARE)
    elif metric == "ip":
        least = np.minimum(apart, squares - np.square(given).max(axis=1))
        is_lost = EPSILON * squares > LOST_SHARE / 2 * least
        is_blurred |= is_lost & (least > LEAST_APART * squares)
    return int(is_blurred.sum())


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", rows, rows)


def count_worn(
    exact: np.ndarray, rows: np.ndarray, metric: str, dtype: str, *, threads: int = 1
) -> int:
    """How many of vectors (m, dim) lost more than LOST_SHARE when they became `rows` (m, ...).

    What tells a vector apart is its difference to their mean, or itself without its largest number,
    whichever is shorter. Under cosine half the square of that is a distance, which an error along
    the vector changes by as much as the error; and so does the rounding of a product, fp32 or not.
    exact: what `scaled` gave.
    """
    if not len(rows) or (dtype == "fp32" and metric != "cosine"):
        return 0
    mean = exact.mean(axis=0, dtype=np.float64).astype(np.float32)
    counts: list[int] = []

    def count(start: int, stop: int) -> None:
        stored = decode(rows[start:stop], exact.shape[1], dtype)
        has_mean = len(rows) >= LEAST_ROWS
        counts.append(_count_worn(exact[start:stop], stored, mean, has_mean, metric == "cosine"))

    run_chunks(count, len(rows), ENCODED, threads)
    return sum(counts)


@jit
def _count_worn(exact, stored, mean, has_mean, is_cosine):
    count = 0
    without_mean = 0.0 if has_mean else np.inf  # numbers in place of branches, each of which
    of_cosine = 1.0 if is_cosine else 0.0  # would double the loop for the compiler
    for i in range(exact.shape[0]):
        lost = along = apart = squares = largest = 0.0
        for j in range(exact.shape[1]):
            value = np.float64(exact[i, j])
            error = stored[i, j] - value
            lost += error * error
            along += error * value
            apart += (value - mean[j]) ** 2
            squares += value * value
            largest = max(largest, abs(value))
        least = min(squares - largest * largest, apart + without_mean)
        is_worn = lost > LOST_SHARE**2 * least
        is_worn |= of_cosine * max(abs(along), EPSILON) > LOST_SHARE * least / 2
        count += is_worn & (least > LEAST_APART * squares)
    return count
