"""The kernels' structs: read from their text, laid out as C++ does, and filled by name."""

import functools
import re
from typing import Any

import numpy as np

from hnsw_gpu.gpu import kernel_source

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_FIELD = re.compile(r"(?:const\s+)?([\w ]*?\w)\s*(\*\s*(?:__restrict__\s*)?|\s)(\w+)")
_FIELD_TYPES = {
    "int": np.int32,
    "unsigned": np.uint32,
    "unsigned int": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
}


def struct_dtype(name: str) -> np.dtype:
    """The dtype of `struct <name>` in the kernels: its fields by name, laid out as C++ does.

    A pointer is uint64. A kernel takes such a struct by value as an array of one element.
    """
    bodies = [
        body
        for path in sorted(kernel_source.folder().glob("*.cu*"))
        for body in re.findall(
            rf"\bstruct\s+{name}\s*\{{(.*?)\}}\s*;",
            _COMMENT.sub("", path.read_text(encoding="utf-8")),
            re.DOTALL,
        )
    ]
    if len(bodies) != 1:
        raise ValueError(
            f"struct {name} is defined {len(bodies)} times in {kernel_source.folder()}, not once"
        )
    fields = [field.strip() for field in bodies[0].split(";")]
    return np.dtype([_field(name, field) for field in fields if field], align=True)


def _field(struct: str, text: str) -> tuple[str, type]:
    """Name and dtype of a field such as `const int* neighbors0`."""
    match = _FIELD.fullmatch(" ".join(text.split()))
    if match is None:
        raise ValueError(f"struct {struct}: not a field with a type and a name: {text!r}")
    kind, pointer, name = match.groups()
    if pointer.strip():
        return name, np.uint64
    if kind not in _FIELD_TYPES:
        raise ValueError(f"struct {struct}: {name} is of type {kind!r}, which has no dtype here")
    return name, _FIELD_TYPES[kind]


_kept_dtype = functools.cache(struct_dtype)


def argument(name: str, **fields: Any) -> np.ndarray:
    """A kernel's argument: `struct <name>` of these fields; of a CuPy array, its address."""
    dtype = _kept_dtype(name)
    return np.array([tuple(_number(fields[field]) for field in dtype.names or ())], dtype)


def _number(value: Any) -> int:
    if hasattr(value, "data"):
        return int(value.data.ptr)
    return 0 if value is None else int(value)
