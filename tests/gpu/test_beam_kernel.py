"""merge and pick of beam.cuh, beside sorted(): 200,000 merges, a pick after each (R2, R4, R5)."""

import emulator
import numpy as np
import pytest

if emulator.missing():
    pytest.skip(emulator.missing(), allow_module_level=True)

import reference
from probes import compile_probe

from hnsw_gpu.engine.keys import KEY_NONE

pytestmark = pytest.mark.slow

LANES = 32
ROUNDS = 20
PROBE = """
extern "C" __global__ void probe(const unsigned long long* keys,  // (beams, rounds, 32)
                                 const int* expands,              // (beams, rounds)
                                 unsigned long long* beams,       // (beams, rounds, capacity)
                                 int* picked,                     // (beams, rounds, 32)
                                 int* counts,                     // (beams, rounds, 2)
                                 int rounds, int capacity) {
    DYNAMIC_SHARED(unsigned char, memory);
    Beam beam;
    uint64* const room = reinterpret_cast<uint64*>(memory);
    beam.keys = room + LANES;
    beam.capacity = capacity;
    beam.size = beam.first = 0;
    int* const found = reinterpret_cast<int*>(beam.keys + capacity);
    for (int round = blockIdx.x * rounds; round < (blockIdx.x + 1) * rounds; round++) {
        merge(beam, keys[round * LANES + lane_number()], room);
        const int count = pick(beam, expands[round], found);
        for (int i = lane_number(); i < beam.size; i += LANES)
            beams[(long long)round * capacity + i] = beam.keys[i];
        if (lane_number() < count) picked[round * LANES + lane_number()] = found[lane_number()];
        if (lane_number() == 0) {
            counts[2 * round] = beam.size;
            counts[2 * round + 1] = count;
        }
        sync_warp();
    }
}
"""
# Capacity and how many beams of it: 10,000 beams of 20 rounds in all.
BEAMS = {1: 1000, 2: 1000, 3: 1000, 31: 1500, 32: 1500, 33: 1500, 64: 1300, 200: 800, 512: 400}


def keys_of(rng: np.random.Generator, beams: int, capacity: int) -> np.ndarray:
    """Keys (beams, ROUNDS, 32) from a small pool a beam: ties and copies, also within a round."""
    pool = np.array(
        [
            [
                reference.key(distance, node)
                for distance, node in zip(
                    rng.integers(-3, 6, size).astype(np.float32),
                    rng.integers(0, 2**31 - 1, size).tolist(),
                    strict=True,
                )
            ]
            for size in [min(2 * capacity + 5, 400)] * beams
        ],
        np.uint64,
    )
    drawn = rng.integers(0, pool.shape[1], (beams, ROUNDS, LANES))
    keys = np.take_along_axis(pool, drawn.reshape(beams, -1), axis=1).reshape(drawn.shape)
    share = rng.choice(
        [0.0, 0.03, 0.1, 0.3, 1.0], (beams, ROUNDS, 1), p=[0.1, 0.3, 0.35, 0.15, 0.1]
    )
    return np.where(rng.random(keys.shape) < share, keys, KEY_NONE)


@pytest.mark.parametrize("capacity", BEAMS)
def test_merge_and_pick(capacity) -> None:
    rng = np.random.default_rng(capacity)
    count = BEAMS[capacity]
    keys = keys_of(rng, count, capacity)
    expands = rng.choice([1, 2, 4, 8, 32], (count, ROUNDS)).astype(np.int32)
    beams = np.full((count, ROUNDS, capacity), KEY_NONE, np.uint64)
    picked = np.full((count, ROUNDS, LANES), -1, np.int32)
    counts = np.zeros((count, ROUNDS, 2), np.int32)
    compile_probe(["warp.cuh", "beam.cuh"], PROBE).launch(
        (count,),
        (LANES,),
        (keys, expands, beams, picked, counts, np.int32(ROUNDS), np.int32(capacity)),
        shared_mem=8 * (LANES + capacity) + 4 * LANES,
        seed=capacity,
    )
    for number in range(count):
        assert_rounds(
            keys[number].tolist(),
            expands[number].tolist(),
            beams[number].tolist(),
            picked[number].tolist(),
            counts[number].tolist(),
            capacity,
        )


def assert_rounds(keys, expands, beams, picked, counts, capacity) -> None:
    """One beam, round after round."""
    beam: list[int] = []
    expanded: set[int] = set()
    none = int(KEY_NONE)
    for r, entering in enumerate(keys):
        beam = sorted({*beam, *(key for key in entering if key != none)})[:capacity]
        step = [key for key in beam if key not in expanded][: expands[r]]
        expanded.update(step)
        assert counts[r] == [len(beam), len(step)]
        assert picked[r][: len(step)] == [reference.node_of(key) for key in step]
        assert beams[r][: len(beam)] == [key | (key in expanded) for key in beam]
