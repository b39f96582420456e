"""A fixed random rotation of vectors, the same bits on every machine.

After it no coordinate is much larger than the others, whatever the vectors were, so a few bits a
coordinate keep what tells them apart. Each of ROUNDS rounds changes signs at random and applies the
Walsh-Hadamard transform to the first, or in turn to the last, power of two of the coordinates.
Where that is not all of them, after each two rounds, which leave none out, pairs from both halves
are turned by 45 degrees (Kac's walk). Turned after every round, a number that the first round left
out would in part come back to where the second one leaves it out.

Sums and products of two float32 numbers and nothing else: there is no order of summation to differ.
"""

import functools

import numpy as np

from hnsw_gpu.engine.compiled import jit

ROUNDS = 4
HALF_ROOT = np.float32(np.sqrt(0.5))


def rotate(vectors):
    """float32 (m, dim), rotated."""
    rotated = np.array(vectors, np.float32, order="C")
    _rotate(rotated, _signs(vectors.shape[1]), np.empty(vectors.shape[1], np.float32))
    return rotated


def rotate_back(vectors):
    """float32 (m, dim), what `rotate` made into `vectors`, but for rounding."""
    turned = np.array(vectors, np.float32, order="C")
    _rotate_back(turned, _signs(vectors.shape[1]), np.empty(vectors.shape[1], np.float32))
    return turned


@functools.cache
def _signs(dim):
    """float32 (ROUNDS, dim) of -1 and 1 that depend on their place alone (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.arange(1, ROUNDS * dim + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.where(x >> np.uint64(63), np.float32(-1), np.float32(1)).reshape(ROUNDS, dim)


@jit
def _rotate(vectors, signs, spare):
    dim = vectors.shape[1]
    power = _largest_power(dim)
    for i in range(vectors.shape[0]):
        vector = vectors[i]
        for turn in range(ROUNDS):
            for j in range(dim):
                vector[j] *= signs[turn, j]
            first = (turn & 1) * (dim - power)
            _transform(vector[first : first + power], spare[:power])
            if turn & 1 and power < dim:
                _turn_pairs(vector)


@jit
def _rotate_back(vectors, signs, spare):
    """The steps of `_rotate` in reverse order: each undoes itself."""
    dim = vectors.shape[1]
    power = _largest_power(dim)
    for i in range(vectors.shape[0]):
        vector = vectors[i]
        for turn in range(ROUNDS - 1, -1, -1):
            if turn & 1 and power < dim:
                _turn_pairs(vector)
            first = (turn & 1) * (dim - power)
            _transform(vector[first : first + power], spare[:power])
            for j in range(dim):
                vector[j] *= signs[turn, j]


@jit(is_inner=True)
def _largest_power(dim):
    power = 1
    while 2 * power <= dim:
        power *= 2
    return power


@jit(is_inner=True)
def _transform(values, spare):
    """Walsh-Hadamard transform of a power of two of values, its own inverse.

    Each step adds and subtracts neighbours and moves the sums before the differences (Pease 1968):
    all steps are alike, and all of one step can be done at once.
    """
    now, then, scale = values, spare, np.float32(1)
    steps = len(values)
    while steps > 1:
        _add_and_subtract(now, then)
        now, then = then, now
        scale *= HALF_ROOT
        steps //= 2
    for j in range(len(values)):
        values[j] = now[j] * scale


@jit(is_inner=True)
def _add_and_subtract(values, result):
    half = len(values) // 2
    for j in range(half):
        a, b = values[2 * j], values[2 * j + 1]
        result[j] = a + b
        result[half + j] = a - b


@jit(is_inner=True)
def _turn_pairs(vector):
    """Turn each pair (j, j + half) by 45 degrees and mirror it: its own inverse."""
    half, far = len(vector) // 2, len(vector) - len(vector) // 2
    for j in range(half):
        a, b = vector[j], vector[far + j]
        vector[j] = (a + b) * HALF_ROOT
        vector[far + j] = (a - b) * HALF_ROOT
