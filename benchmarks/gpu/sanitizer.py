"""Where NVIDIA's compute-sanitizer is, out of its PyPI wheel: prints the path, or nothing.

The wheel for CUDA 12 (12.9.79) is not looked at: its program has no x bit, does not find its
libraries and, told where they are, starts nothing.
"""

import os
from importlib import metadata

WHEEL = "nvidia-cuda-sanitizer-api"


def find() -> str:
    """The wheel's program; empty where it is not installed."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        return ""
    for file in sorted(files, key=lambda file: len(file.parts), reverse=True):
        path = str(file.locate())
        if file.name == "compute-sanitizer" and os.access(path, os.X_OK):
            return path
    return ""


if __name__ == "__main__":
    print(find())
