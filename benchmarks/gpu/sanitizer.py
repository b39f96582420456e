"""Where NVIDIA's compute-sanitizer is, out of its PyPI wheel: prints the path, or nothing."""

import os
from importlib import metadata

WHEELS = ("nvidia-cuda-sanitizer-api", "nvidia-cuda-sanitizer-api-cu12")


def find() -> str:
    """The program of the first wheel that is installed; empty where none is."""
    for wheel in WHEELS:
        try:
            files = metadata.files(wheel) or []
        except metadata.PackageNotFoundError:
            continue
        for file in sorted(files, key=lambda file: len(file.parts), reverse=True):
            path = str(file.locate())
            if file.name == "compute-sanitizer" and os.access(path, os.X_OK):
                return path
    return ""


if __name__ == "__main__":
    print(find())
