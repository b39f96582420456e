"""Resident memory that an index adds, each measured in a process of its own (Linux: /proc).

Run as `python -m benchmarks.cpu.memory NAME DATASET THREADS`: builds an index, prints JSON.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import datasets
from benchmarks.peers import Setting, make


def measure(name: str, dataset: str, threads: int) -> dict:
    """`grow`'s figures from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.cpu.memory", name, dataset, str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def grow(name: str, dataset_name: str, threads: int) -> dict:
    """Bytes added by building (settled, and at the worst moment), beside what they should be."""
    base = datasets.load(dataset_name).base
    setting = Setting()
    n, dim = base.shape
    # libraries, compiled kernels and thread stacks are there before the count begins
    peer = make(name, dim)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    peer.build(base, setting, threads)
    peak = status("VmHWM") - before
    growth = resident() - before
    needed = n * dim * 4 + n * 2 * setting.M * 4
    return {
        "rows": n,
        "dim": dim,
        "bytes": growth,
        "peak_bytes": peak,
        "nbytes": peer.nbytes,
        "rows_and_layer_0_bytes": needed,
        "growth_over_rows_and_layer_0": growth / needed,
        "nbytes_over_growth": peer.nbytes / growth if peer.nbytes else None,
    }


def resident() -> int:
    """Resident bytes of this process, once freed memory went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    print(json.dumps(grow(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
