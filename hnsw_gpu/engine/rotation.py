"""A fixed random rotation of vectors, the same bits on every machine.

After it no coordinate is much larger than the others, whatever the vectors were, so a few bits a
coordinate keep what tells them apart. Each of ROUNDS rounds changes signs at random and applies the
Walsh-Hadamard transform to the first, or in turn to the last, power of two of the coordinates; where
that is not all of them, pairs from both halves are then turned by 45 degrees (Kac's walk). Sums of two
float32 numbers and nothing else: there is no order of summation to differ.
"""

import numpy as np

from hnsw_gpu.engine.compiled import jit

ROUNDS = 4
HALF_ROOT = np.float32(np.sqrt(0.5))


def rotate(vectors):
    """float32 (m, dim), rotated."""
    rotated = np.array(vectors, np.float32, order="C")
    _rotate(rotated, _signs(vectors.shape[1]))
    return rotated


def rotate_back(vectors):
    """float32 (m, dim), what `rotate` made into `vectors`, but for rounding."""
    turned = np.array(vectors, np.float32, order="C")
    _rotate_back(turned, _signs(vectors.shape[1]))
    return turned


def _signs(dim):
    """float32 (ROUNDS, dim) of -1 and 1 that depend on their place alone (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.arange(1, ROUNDS * dim + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.where(x >> np.uint64(63), np.float32(-1), np.float32(1)).reshape(ROUNDS, dim)


@jit
def _rotate(vectors, signs):
    dim = vectors.shape[1]
    power = _largest_power(dim)
    for i in range(vectors.shape[0]):
        for turn in range(ROUNDS):
            for j in range(dim):
                vectors[i, j] *= signs[turn, j]
            _transform(vectors, i, (turn & 1) * (dim - power), power)
            if power < dim:
                _turn_pairs(vectors, i)


@jit
def _rotate_back(vectors, signs):
    """The steps of `_rotate` in reverse order: each undoes itself."""
    dim = vectors.shape[1]
    power = _largest_power(dim)
    for i in range(vectors.shape[0]):
        for turn in range(ROUNDS - 1, -1, -1):
            if power < dim:
                _turn_pairs(vectors, i)
            _transform(vectors, i, (turn & 1) * (dim - power), power)
            for j in range(dim):
                vectors[i, j] *= signs[turn, j]


@jit
def _largest_power(dim):
    power = 1
    while 2 * power <= dim:
        power *= 2
    return power


@jit
def _transform(vectors, i, first, count):
    """Walsh-Hadamard transform of `count` coordinates from `first`, its own inverse."""
    half = 1
    scale = np.float32(1)
    while half < count:
        for start in range(first, first + count, 2 * half):
            for j in range(start, start + half):
                a, b = vectors[i, j], vectors[i, j + half]
                vectors[i, j] = a + b
                vectors[i, j + half] = a - b
        scale *= HALF_ROOT
        half *= 2
    for j in range(first, first + count):
        vectors[i, j] *= scale


@jit
def _turn_pairs(vectors, i):
    """Turn each pair (j, j + half) by 45 degrees and mirror it: its own inverse."""
    half = vectors.shape[1] // 2
    for j in range(half):
        a, b = vectors[i, j], vectors[i, vectors.shape[1] - half + j]
        vectors[i, j] = (a + b) * HALF_ROOT
        vectors[i, vectors.shape[1] - half + j] = (a - b) * HALF_ROOT
