"""What the first `add` and `search` on a new machine compile: counted, and held.

Each dtype begins in a process of its own with nothing kept; fp32 is held, the others are told. The
counts are of functions and of lines that numba writes for LLVM, which reads, optimises and
translates them; they depend on numba, not on the machine:

    HNSW_GPU_WRITE_BASELINES=1 python -m pytest tests/engine/test_first_use.py
"""

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numba
import pytest

ROOT = Path(__file__).parents[2]
BASELINE = Path(__file__).parent / "baselines" / "first_use.txt"
DTYPES = ("fp32", "fp16", "int8", "int4")
MOST_MORE = 1.02  # a processor without a dtype's instructions is told longer what to do
DESCRIPTION = f"""\
# What the first add and the first search of a process compile, with nothing kept on disk: cosine.
#
# compiled: functions that numba compiles; of which Python calls: those with machine code of their
# own, the others become part of them. lines: what numba writes for LLVM, all functions together.
# twice: functions that are compiled for more than one list of types, or for one more than once.
#
# Written by   HNSW_GPU_WRITE_BASELINES=1 python -m pytest tests/engine/test_first_use.py
# Another numba gives other numbers: they are compared by this version alone.
#
# compiler: numba {numba.__version__}
"""

COUNTS = """
import collections, json, sys
from numba.core import codegen, event

names, lines, called = collections.Counter(), [], []


class Compiled(event.Listener):
    def on_start(self, begun):
        names[begun.data["dispatcher"].py_func.__qualname__] += 1

    def on_end(self, ended):
        pass


event.register("numba:compile", Compiled())
add = codegen.CPUCodeLibrary.add_ir_module


def counted(library, module):
    lines.append(str(module).count(chr(10)))
    if module.name == "wrapper":
        called.append(library.name)
    return add(library, module)


codegen.CPUCodeLibrary.add_ir_module = counted

import numpy as np
import hnsw_gpu

dtype = sys.argv[1]
vectors = np.random.default_rng(0).normal(size=(600, 32)).astype(np.float32)
index = hnsw_gpu.Index(dim=32, dtype=dtype)
index.add(vectors, threads=1)
index.search(vectors[:8], k=5, threads=1)
twice = sorted(name for name, count in names.items() if count > 1)
print(json.dumps([sum(names.values()), len(called), sum(lines), twice]))
"""


def counted(dtype: str, folder: Path) -> list:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COUNTS, dtype]
    return json.loads(subprocess.check_output(command, env=environment, text=True))


def parsed(text: str) -> dict[str, tuple[int, int, int]]:
    rows = re.findall(r"^(\w+) +(\d+) +(\d+) +(\d+)", text, re.M)
    return {name: tuple(map(int, numbers)) for name, *numbers in rows}


@pytest.mark.slow
def test_baseline(tmp_path):
    table = f"{'dtype':<8}{'compiled':>10}{'called':>10}{'lines':>10}  twice\n"
    is_written = bool(os.environ.get("HNSW_GPU_WRITE_BASELINES"))
    for dtype in DTYPES if is_written else DTYPES[:1]:
        compiled, called, lines, twice = counted(dtype, tmp_path / dtype)
        table += f"{dtype:<8}{compiled:>10}{called:>10}{lines:>10}  {' '.join(twice) or '-'}\n"
    made = f"{DESCRIPTION}\n{table}"
    if is_written:
        BASELINE.parent.mkdir(exist_ok=True)
        BASELINE.write_text(made)
    kept = BASELINE.read_text()
    version = re.search(r"# compiler: numba (\S+)", kept)
    if version is None or version[1] != numba.__version__:
        pytest.skip(f"the baseline is of {version and version[1]}, here is {numba.__version__}")
    diff = "\n".join(difflib.unified_diff(kept.split("\n"), made.split("\n"), lineterm="", n=0))
    for dtype, (compiled, called, lines) in parsed(made).items():
        held = parsed(kept)[dtype]
        assert (compiled, called) <= held[:2], diff
        assert lines <= MOST_MORE * held[2], diff
