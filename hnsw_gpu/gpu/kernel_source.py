"""The CUDA kernels as text: found, pasted together, specialised; CuPy and compilers are elsewhere.

A kernel's headers are pasted into it, because CuPy's disk cache does not see a header reached by
`-I`: an edited one would run a stale kernel. `#line` keeps the positions of errors right.
"""

import re
from pathlib import Path

import numpy as np

from hnsw_gpu.engine import METRICS, STORAGE, row_length

# extern "C" functions, each in a file of its name, and the most registers a thread of it may take,
# which is what the launch plan reckons with. The compile test holds the kernels to it.
REGISTERS_CAP = {"search": 128, "compare": 128, "encode": 128, "keys_to_labels": 128}
DTYPES = {"fp32": 0, "fp16": 1, "int8": 2, "int4": 3}

_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_PRAGMA_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


def folder() -> Path:
    """Where the kernels lie: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "kernels"
    return installed if installed.is_dir() else package.parent / "kernels"


def source(name: str) -> str:
    """Text of the kernel `name`, each of its own headers pasted in once, where first included."""
    return _pasted(f"{name}.cu", set())


def _pasted(file: str, seen: set[str]) -> str:
    seen.add(file)
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate((folder() / file).read_text(encoding="utf-8").splitlines(), 1):
        include = _INCLUDE.match(line)
        if include is None:
            lines.append("" if _PRAGMA_ONCE.match(line) else line)
        elif include[1] in seen:
            lines.append("")
        else:
            lines += [_pasted(include[1], seen), f'#line {number + 1} "{file}"']
    return "\n".join(lines)


def definitions(
    metric: str,
    dtype: str,
    dim: int,
    M: int,
    warps: int,
    tag_bits: int = 16,
    has_allowed_keys: bool = False,
) -> dict[str, int]:
    """The constants that specialise every kernel.

    METRIC and DTYPE number `metric` and `dtype`; DIM numbers make a vector, ROW_BYTES bytes its
    encoded row; a node has M links (2 M on layer 0); WARPS share a query; TAG_BITS is the width
    of a tag in the visited cache; HAS_ALLOWED_KEYS is 1 where they are kept beside the beam.
    """
    return {
        "METRIC": METRICS[metric],
        "DTYPE": DTYPES[dtype],
        "DIM": dim,
        "ROW_BYTES": row_length(dim, dtype) * np.dtype(STORAGE[dtype]).itemsize,
        "M": M,
        "WARPS": warps,
        "TAG_BITS": tag_bits,
        "HAS_ALLOWED_KEYS": int(has_allowed_keys),
    }


def options(definitions: dict[str, int]) -> tuple[str, ...]:
    """What NVRTC is told, beside the architecture and what CuPy adds by itself."""
    return (*sorted(f"-D{name}={value}" for name, value in definitions.items()), "--std=c++17")
