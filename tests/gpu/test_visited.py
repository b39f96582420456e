"""visited.cuh is a first-in-first-out list a bucket, and never calls an unseen number seen (R7)."""

from typing import NamedTuple

import emulator
import numpy as np
import pytest

if emulator.missing():
    pytest.skip(emulator.missing(), allow_module_level=True)

from probes import compile_probe

LANES = 32
PROBE = """
extern "C" __global__ void probe(const int* numbers,  // (calls, 32), negative: none
                                 int* is_new, int calls, int bucket_count) {
    DYNAMIC_SHARED(unsigned char, memory);
    Visited visited;
    visited.buckets = reinterpret_cast<uint4*>(memory);
    visited.bucket_mask = bucket_count - 1;
    visited.bucket_bits = 31 - __clz(bucket_count);
    forget(visited);
    for (int call = 0; call < calls; call++) {
        const int place = call * LANES + lane_number();
        is_new[place] = visit(visited, numbers[place]);
    }
}
"""


def visit(numbers: np.ndarray, tag_bits: int, buckets: int, seed: int = 0) -> np.ndarray:
    """bool (calls, 32): which lanes were told that their number is new."""
    is_new = np.full(numbers.shape, -1, np.int32)
    compile_probe(["warp.cuh", "visited.cuh"], PROBE, {"TAG_BITS": tag_bits}).launch(
        (1,),
        (LANES,),
        (np.int32(numbers), is_new, np.int32(len(numbers)), np.int32(buckets)),
        shared_mem=16 * buckets,
        seed=seed,
    )
    assert np.isin(is_new, (0, 1)).all()
    return is_new == 1


class Model(NamedTuple):
    """The numbers themselves, newest first, a list a bucket."""

    buckets: list[list[int]]
    ways: int  # numbers that a bucket remembers

    def bucket(self, number: int) -> list[int]:
        count = len(self.buckets)
        high = number // count
        return self.buckets[(number ^ (high * 0x9E3779B1 % 2**32 >> 16)) % count]

    def visit(self, numbers: list[int]) -> list[bool]:
        """Lanes that meet in a bucket take turns, the lowest first."""
        known = [number < 0 or number in self.bucket(number) for number in numbers]
        is_new = []
        for number, was_known in zip(numbers, known, strict=True):
            bucket = [] if number < 0 else self.bucket(number)
            is_new.append(not was_known and number not in bucket)
            if is_new[-1]:
                bucket.insert(0, number)
                del bucket[self.ways :]
        return is_new


def model_of(numbers: np.ndarray, tag_bits: int, buckets: int) -> np.ndarray:
    model = Model([[] for _ in range(buckets)], 128 // tag_bits)
    return np.array([model.visit(row) for row in numbers.tolist()])


def largest(tag_bits: int, buckets: int) -> int:
    """The largest number that may be visited."""
    return 65535 * buckets - 1 if tag_bits == 16 else 2**31 - 2


def streams(tag_bits: int, buckets: int):
    """Name and numbers (calls, 32) of streams that are hard in different ways."""
    rng = np.random.default_rng([tag_bits, buckets])
    most = largest(tag_bits, buckets)
    calls = 60
    low, high = np.arange(400), most - np.arange(400)
    yield "both ends", rng.choice(np.concatenate([low, high]), (calls, LANES))
    yield "anywhere, anew", rng.integers(0, most + 1, (calls, LANES))
    few = rng.integers(0, most + 1, 8 * buckets)
    yield "as many as are remembered", rng.choice(few, (calls, LANES))
    yield "one low part", rng.integers(0, most // buckets, (calls, LANES)) * buckets
    mixed = rng.choice(few[:40], (calls, LANES))
    mixed[rng.random(mixed.shape) < 0.5] = -1
    yield "idle lanes", mixed
    yield "one number", np.full((3, LANES), most)


CASES = [(bits, buckets) for bits in (16, 32) for buckets in (1, 32, 128, 1024)]


@pytest.mark.parametrize(("tag_bits", "buckets"), CASES)
def test_equals_the_model(tag_bits, buckets) -> None:
    for name, numbers in streams(tag_bits, buckets):
        wanted = model_of(numbers, tag_bits, buckets)
        for seed in range(2):
            found = visit(numbers, tag_bits, buckets, seed)
            np.testing.assert_array_equal(found, wanted, err_msg=f"{name}, seed {seed}")


@pytest.mark.parametrize(("tag_bits", "buckets"), CASES)
def test_an_unseen_number_is_new_and_in_one_lane(tag_bits, buckets) -> None:
    # Of the kernel alone, without the model's idea of a bucket.
    for name, numbers in streams(tag_bits, buckets):
        seen: set[int] = set()
        for row, flags in zip(numbers, visit(numbers, tag_bits, buckets), strict=True):
            told = row[flags].tolist()
            unseen = set(row[row >= 0].tolist()) - seen
            assert unseen <= set(told), name
            if buckets > 1:  # else a number may be forgotten between two lanes of one call
                assert len(set(told)) == len(told), name
            assert -1 not in told
            seen |= unseen


@pytest.mark.parametrize(("tag_bits", "buckets"), CASES)
def test_the_last_of_a_bucket_are_remembered(tag_bits, buckets) -> None:
    # Numbers of equal bucket, one a call: the last 8 (4) are known, the one before is forgotten.
    ways, most = 128 // tag_bits, largest(tag_bits, buckets)
    model = Model([[] for _ in range(buckets)], ways)
    rng = np.random.default_rng(7)
    rivals: dict[int, list[int]] = {}
    while not (full := [group for group in rivals.values() if len(group) > ways]):
        number = int(rng.integers(0, most + 1))
        rivals.setdefault(id(model.bucket(number)), []).append(number)
    rivals = full[0]
    again = [*rivals, *rivals[1:], rivals[0]]
    numbers = np.full((len(again), LANES), -1)
    numbers[np.arange(len(again)), rng.integers(0, LANES, len(again))] = again
    flags = visit(numbers, tag_bits, buckets).any(axis=1)
    assert flags.tolist() == [True] * len(rivals) + [False] * ways + [True]


@pytest.mark.parametrize("buckets", [1, 32, 1024])
def test_the_bound_of_16_bits_is_sharp(buckets) -> None:
    first_beyond = 65535 * buckets
    numbers = np.full((2, LANES), -1)
    numbers[:, 0] = first_beyond - 1, first_beyond
    assert visit(numbers, 16, buckets)[:, 0].tolist() == [True, False]
    assert visit(numbers, 32, buckets)[:, 0].tolist() == [True, True]
