"""The kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

Memory out of bounds, misaligned, overflowing or shared without a barrier is a report that names
the kernel's line; and the answers are the oracle's here too. `test_planted_faults.py` shows that
these gates can fail.
"""

import sys

import emulated
import emulator
import kernel_cases
import numpy as np
import pytest

from hnsw_gpu.engine import vectors as vectors_module
from hnsw_gpu.engine.keys import key_nodes
from hnsw_gpu.engine.labels import Labels

pytestmark = pytest.mark.slow

# Chosen to meet: every mode, a query held in registers and not, caches that forget. An instrumented
# build takes seconds; the emulator and the PTX run the pairwise design.
BASE = {"metric": "l2", "dtype": "fp32", "dim": 31, "warps": 1, "M": 16, "tag_bits": 16}
BASE |= {"mode": "plain", "expand": 8, "ef": 200, "ef_upper": 4, "k": 12}
BASE |= {"layout": (2, 2), "buckets": 1}
ROWS = [
    BASE,
    BASE | {"ef": 31, "expand": 1, "buckets": 32, "k": "beyond ef"},
    BASE | {"metric": "cosine", "dtype": "int8", "dim": 100, "mode": "per query", "tag_bits": 32},
    BASE | {"metric": "cosine", "dtype": "int8", "dim": 100, "mode": "self", "tag_bits": 32},
    BASE | {"metric": "ip", "dtype": "fp16", "dim": 127, "warps": 4, "mode": "self per query"},
    BASE | {"metric": "ip", "dtype": "fp16", "dim": 127, "warps": 4, "mode": "shared", "ef": 64},
    BASE | {"dim": 1536, "M": 4, "warps": 8, "ef": 64},
]


def run_searches(sanitizer: str) -> int:
    count = 0
    for row in ROWS:
        asked = kernel_cases.question(row)
        wanted = asked.wanted()
        build = kernel_cases.build_of(row, sanitizer=sanitizer)
        for seed in range(2):
            found = asked.ask(build, **kernel_cases.launch_of(row), seed=seed)
            np.testing.assert_array_equal(
                found.keys, wanted.keys, err_msg=kernel_cases.name_of(row)
            )
            count += 1
    row = BASE | {"tag_bits": 32, "k": 100, "mode": "per query"}
    asked = kernel_cases.question(row)
    found = kernel_cases.ask_far(asked, kernel_cases.build_of(row, sanitizer=sanitizer))
    np.testing.assert_array_equal(found.keys, asked.wanted().keys)
    return count + 1


def run_others(sanitizer: str) -> int:
    """compare.cu, encode.cu and keys_to_labels.cu."""
    made = kernel_cases.data("cosine", "int8", 100)
    build = emulated.Build("cosine", "int8", 100, 4, sanitizer=sanitizer)
    ids = np.arange(0, len(made.rows), 3, dtype=np.int32)[:101]
    keys = emulated.compare(build, made.rows, made.queries, ids=ids)
    again = emulated.compare(build, made.rows, made.queries, candidates=keys)
    np.testing.assert_array_equal(again, keys)
    for k in (9, 150):
        kept = emulated.compare(build, made.rows, made.queries, candidates=keys, k=k)
        np.testing.assert_array_equal(kept[:, :101], keys[:, :k])
    width = made.queries.shape[1]
    asked = made.vectors[:3].copy()
    asked[1, 99], asked[2] = np.nan, 0
    encoded = emulated.encode(build, asked, width)
    wanted = vectors_module.encode_queries(asked[:1], "cosine", "int8")
    np.testing.assert_array_equal(encoded[:1], wanted)
    wanted = vectors_module.encode_queries(asked[:1], "cosine", "int4").view(np.uint8)
    encoded = emulated.encode(build._replace(dtype="int4"), asked, wanted.shape[1])
    np.testing.assert_array_equal(encoded[:1], wanted)
    offsets = np.arange(len(made.rows) + 1, dtype=np.int64)
    labels, _ = emulated.keys_to_labels(build, keys, offsets, offsets[:-1] * 2, 150, root=True)
    np.testing.assert_array_equal(labels[:, :101], 2 * key_nodes(keys).astype(np.int64))
    assert (labels[:, 101:] == -1).all()
    carried = Labels(3 * offsets, np.arange(3 * len(made.rows), dtype=np.int64))
    for k in (7, 70, 400):
        found = emulated.keys_to_labels(build, keys, *carried.packed(), k)
        for mine, wanted in zip(found, carried.keys_to_labels(keys, k), strict=True):
            np.testing.assert_array_equal(mine, wanted)
    return 10


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_report(sanitizer) -> None:
    missing = emulator.missing(sanitizer)
    if missing:
        pytest.skip(missing)
    said = emulator.run_sanitized(sanitizer, __file__, sanitizer)
    assert said.split() == [str(2 * len(ROWS) + 1), "10"]


if __name__ == "__main__":
    print(run_searches(sys.argv[1]), run_others(sys.argv[1]))
