"""The executor, compiled, and the structs that it shares with Python (executor/instruction.h)."""

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import emulator
import numpy as np

SOURCES = Path(__file__).parent / "executor"
BUILD = emulator.ROOT / "build" / "ptx"
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]

INSTRUCTION = np.dtype(
    [(name, np.uint8) for name in ("kind", "mode", "space", "flags", "targets", "sources", "size")]
    + [("unused", np.uint8), ("operation", np.int32), ("guard", np.int32)]
    + [("target", np.int32, 4), ("source", np.int32, 6), ("jump", np.int32), ("offset", np.int64)],
    align=True,
)
ALLOCATION = np.dtype(
    [(n, np.uint64) for n in ("begin", "size", "is_writable", "bytes_read", "sectors_read")]
)
CONSTANT = np.dtype([("value", "u8"), ("slot", "i4"), ("width", "u1")], align=True)
COUNT = np.dtype([(name, np.uint64) for name in ("executions", "lanes", "units")])

SPECIAL = ("%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%nctaid.x", "%nctaid.y", "%laneid")


class Launch(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_void_p),
        ("length", ctypes.c_int),
        ("slots", ctypes.c_int),
        ("constants", ctypes.c_void_p),
        ("constant_count", ctypes.c_int),
        ("special", ctypes.c_int * len(SPECIAL)),
        ("grid_x", ctypes.c_int),
        ("grid_y", ctypes.c_int),
        ("block", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("parameter_bytes", ctypes.c_int),
        ("parameters", ctypes.c_void_p),
        ("allocations", ctypes.c_void_p),
        ("allocation_count", ctypes.c_int),
        ("is_converged", ctypes.c_int),
        ("resident", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("steps_limit", ctypes.c_uint64),
        ("counts", ctypes.c_void_p),
    )


class Operation(NamedTuple):
    """An instruction that each lane executes for itself; widths as in executor/arithmetic.h."""

    number: int
    targets: str
    sources: str


@functools.cache
def library() -> ctypes.CDLL:
    """The executor, compiled where that was not done before; named by the hash of its text."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    command = [*emulator.compiler(), *FLAGS]
    origin = "\0".join([*texts, *command, _processor()])
    path = BUILD / f"executor-{hashlib.sha256(origin.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / path.name
            subprocess.run([*command, SOURCES / "executor.cpp", "-o", made], check=True)
            os.replace(made, path)
    found = ctypes.CDLL(str(path))
    for function in (found.operation_mnemonic, found.operation_signature, found.execute_launch):
        function.restype = ctypes.c_char_p
    return found


def _processor() -> str:
    """Its instructions, which -march=native makes use of."""
    flags = re.search(r"^flags\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)
    return flags[0] if flags else ""


@functools.cache
def operations() -> dict[str, Operation]:
    found: dict[str, Operation] = {}
    while mnemonic := library().operation_mnemonic(len(found)):
        targets, sources = library().operation_signature(len(found)).decode().split(":")
        assert mnemonic.decode() not in found, f"{mnemonic.decode()} is defined twice"
        found[mnemonic.decode()] = Operation(len(found), targets, sources)
    return found
