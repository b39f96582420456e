"""Every storage dtype compiles and runs for every x86-64 level, and says the same."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from llvmlite.binding import get_host_cpu_features

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine().lower() not in ("x86_64", "amd64"), reason="no x86-64 processor"
    ),
]

# Beside the processor that is there. What a level has is told as a processor's own is: the engine
# looks for its instructions there.
LEVELS = {"x86-64": "", "x86-64-v2": "+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16"}
AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+xsave"
if set(get_host_cpu_features().flatten().split(",")) >= set(AVX2.split(",")):
    LEVELS["x86-64-v3"] = f"{LEVELS['x86-64-v2']},{AVX2}"

# Rows of one, two and three 32-byte blocks of codes (int4), of two, three and six (int8).
DIMS = (40, 84, 168)
JOB = """
import sys
import numpy as np
import hnsw_gpu
from hnsw_gpu.engine import encode_queries, search_graph
random = np.random.default_rng(0)
found = {}
for dim in map(int, sys.argv[2:]):
    whole = random.integers(-8, 9, size=(500, dim)).astype(np.float32)
    real = random.standard_normal((500, dim)).astype(np.float32)
    for dtype in ("fp32", "fp16", "int8", "int4"):
        for metric in ("l2", "ip", "cosine"):
            for name, rows in (("whole", whole), ("real", real)):
                index = hnsw_gpu.Index(dim, metric, dtype)
                index.add(rows[:450])
                labels, distances = index.search(rows, 10)
                near = index.neighbor_graph(5)
                state, asked = index._state, encode_queries(rows, metric, dtype)
                codes = state.rows[:state.node_count]
                walked = search_graph(state.graph, codes, asked, metric, k=9, ef=30)
                parts = (labels, distances, near.labels, near.distances, *state.graph, state.rows)
                parts += (*walked, *([] if dtype == "int8" else [asked]))  # int8: not all in use
                for i, part in enumerate(parts):
                    found[f"{name} {dim} {dtype} {metric} {i}"] = part
np.savez(sys.argv[1], **found)
"""

HALVES = """
import numpy as np
from numba import njit
from hnsw_gpu.engine.distance import L2, as_query, distance

@njit
def convert(rows, queries):
    for i in range(rows.shape[0]):
        as_query(rows, i, queries, i)

@njit
def squares(rows, queries, out):
    for i in range(rows.shape[0]):
        out[i] = distance(L2, queries, 0, rows, i)

halves = np.arange(1 << 16).astype(np.uint16)
numbers = halves.view(np.float16).astype(np.float32)
is_number = ~np.isnan(numbers)
converted = np.empty((len(halves) // 16, 16), np.float32)
convert(halves.reshape(-1, 16), converted)
converted = converted.ravel()
assert converted[is_number].tobytes() == numbers[is_number].tobytes()
assert np.isnan(converted[~is_number]).all()
for columns, at in ((16, 3), (32, 3), (32, 30), (48, 40)):
    rows = np.zeros((len(halves), columns), np.uint16)
    rows[:, at] = halves
    out = np.empty(len(halves), np.float32)
    squares(rows, np.zeros((1, columns), np.float32), out)
    assert out[is_number].tobytes() == np.square(numbers[is_number]).tobytes(), columns
print("done")
"""

INSTRUCTIONS = """
import numpy as np
from numba import njit
from hnsw_gpu.engine.block import write_keys
from hnsw_gpu.engine.distance import L2, distance, prefetch_row
from hnsw_gpu.engine.vectors import encode, encode_queries, engine_view

@njit
def one(queries, rows):
    prefetch_row(rows, 0)
    return distance(L2, queries, 0, rows, 0)

@njit
def several(queries, rows, ids, keys):
    prefetch_row(rows, 0)
    write_keys(L2, queries, 0, rows, ids, 0, 0, 8, keys)

vectors = np.ones((1, 64), np.float32)
ids, keys = np.zeros((1, 16), np.int32), np.zeros(16, np.uint64)
for dtype in ("int8", "int4"):
    rows, queries = engine_view(encode(vectors, "l2", dtype)), encode_queries(vectors, "l2", dtype)
    one(queries, rows)
    several(queries, rows, ids, keys)
for function in (one, several):
    for text in function.inspect_asm().values():
        print(*(name for name in ("prefetcht1", "vpmaddubsw", "vpdpbusd") if name in text))
"""


def run(cpu, cache, *command):
    """A job in a process that compiles for `cpu`, or as all others do."""
    environment = dict(os.environ)
    if cpu != "host":
        environment |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": LEVELS[cpu]}
        environment["NUMBA_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", *map(str, command)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    made = {}

    def ask(cpu):
        if cpu not in made:
            run(cpu, folder / cpu, JOB, folder / f"{cpu}.npz", *DIMS)
            made[cpu] = np.load(folder / f"{cpu}.npz")
        return made[cpu]

    return ask


# v2 has nothing that the engine asks for.
@pytest.mark.parametrize("cpu", [name for name in LEVELS if name != "x86-64-v2"])
def test_answers_and_graphs_are_those_of_this_processor(answers, cpu):
    mine, other = answers("host"), answers(cpu)
    assert mine.files == other.files
    different = {name.rpartition(" ")[0] for name in mine if not same(mine[name], other[name])}
    assert different == set()


def same(a, b):
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize("cpu", ("host", *LEVELS))
def test_every_half_is_converted_exactly(cpu, tmp_path):
    assert run(cpu, tmp_path, HALVES) == "done"


@pytest.mark.parametrize("cpu", LEVELS)
def test_instructions(cpu, tmp_path):
    """Rows come into the second cache; AVX2 multiplies bytes. Answers would be the same without."""
    expected = "prefetcht1" + " vpmaddubsw" * (cpu == "x86-64-v3")
    assert run(cpu, tmp_path, INSTRUCTIONS).splitlines() == [expected] * 4


@pytest.mark.skipif(not get_host_cpu_features().get("avx512vnni"), reason="no AVX-512 VNNI")
def test_instructions_of_this_processor(tmp_path):
    assert run("host", tmp_path, INSTRUCTIONS).splitlines() == ["prefetcht1 vpdpbusd"] * 4
