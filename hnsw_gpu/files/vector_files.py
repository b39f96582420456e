"""Vectors from the files that people have them in, and results into a file.

    .npy                 memory-mapped
    .fbin .u8bin .i8bin  uint32 n, uint32 dim, then n rows of float32, uint8, int8; memory-mapped
    .fvecs .bvecs        int32 dim before each row of float32, uint8; memory-mapped
    .npz                 one array, or "FILE.npz:NAME"; read into memory

All numbers are little-endian but in .npy and .npz, which say. A header is believed only where it
agrees with the file's size, computed in Python's integers, which cannot overflow.
"""

from __future__ import annotations

import errno
import math
import os
import struct
import zipfile
import zlib
from tokenize import TokenError
from typing import IO, Literal

import numpy as np

from hnsw_gpu.files.storage import Path, atomic_file

BIN_DTYPES = {".fbin": "<f4", ".u8bin": "|u1", ".i8bin": "|i1"}
VECS_DTYPES = {".fvecs": "<f4", ".bvecs": "|u1"}
SUFFIXES = (".npy", ".npz", *BIN_DTYPES, *VECS_DTYPES)


def read_vectors(path: Path) -> np.ndarray:
    """The vectors of a file: (n, dim), the file's dtype, read-only where memory-mapped.

    ValueError with the path when the suffix is unknown, the file is truncated or disagrees with
    itself, or holds something other than a 2-d array of real numbers. OSError of the system as it
    is. A .fvecs or .bvecs cut exactly between two rows is a sound, shorter file.
    """
    text = os.fspath(path)
    file_path, name = text, None
    if ".npz:" in text.lower() and not os.path.exists(text):
        cut = text.lower().rindex(".npz:") + len(".npz")
        file_path, name = text[:cut], text[cut + 1 :]
    suffix = os.path.splitext(file_path)[1].lower()
    try:
        if suffix == ".npy":
            return _read_npy(file_path)
        if suffix == ".npz":
            return _read_npz(file_path, name)
        if suffix in BIN_DTYPES:
            return _read_bin(file_path, np.dtype(BIN_DTYPES[suffix]))
        if suffix in VECS_DTYPES:
            return _read_vecs(file_path, np.dtype(VECS_DTYPES[suffix]))
        raise ValueError(f"unknown suffix {suffix!r}; known are {', '.join(SUFFIXES)}")
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error.__cause__


def write_result(path: Path, labels: np.ndarray, distances: np.ndarray) -> None:
    """Save labels int64 (q, k) and distances float32 (q, k) as .npz, atomically, equal bytes for
    equal arrays. Labels that are strings become numpy's U, which any release of it reads.
    ValueError when `path` does not end in .npz."""
    if os.path.splitext(path)[1].lower() != ".npz":
        raise ValueError(f"{os.fspath(path)}: a result is saved as .npz")
    if labels.dtype.kind == "T":
        labels = np.array(labels.ravel().tolist(), str).reshape(labels.shape)
    with atomic_file(path) as file:
        np.savez(file, allow_pickle=False, labels=labels, distances=distances)


def _check_size(shape: tuple[int, ...], dtype: np.dtype, found: int) -> None:
    if len(shape) != 2 or shape[0] < 0 or shape[1] < 1:
        raise ValueError(f"holds an array of shape {shape}, not (n, dim) with dim >= 1")
    expected = math.prod(shape) * dtype.itemsize
    if expected != found:
        raise ValueError(
            f"truncated or damaged: {found} bytes of rows, where the header describes "
            f"{expected} (shape {shape}, {dtype})"
        )


def _read_bin(path: str, dtype: np.dtype) -> np.ndarray:
    with open(path, "rb") as file:
        header = file.read(8)
        if len(header) < 8:
            raise ValueError(f"truncated: {len(header)} bytes, the header alone has 8")
        n, dim = struct.unpack("<II", header)
        _check_size((n, dim), dtype, os.fstat(file.fileno()).st_size - 8)
        return np.memmap(file, dtype, "r", 8, (n, dim))


def _read_vecs(path: str, dtype: np.dtype) -> np.ndarray:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        dim = int.from_bytes(file.read(4), "little", signed=True)
        row_bytes = 4 + dim * dtype.itemsize
        if dim < 1 or size % row_bytes:
            raise ValueError(
                f"truncated or damaged: {size} bytes are no whole number of rows of dim {dim}, "
                "which the first row states"
            )
        record = np.dtype([("dim", "<i4"), ("row", dtype, (dim,))])
        records = np.memmap(file, record, "r", 0, (size // row_bytes,))
    different = np.flatnonzero(records["dim"] != dim)
    if len(different):
        row = different[0]
        raise ValueError(f"damaged: row {row} has dim {records['dim'][row]}, row 0 has {dim}")
    return records["row"]


def _read_npy(path: str) -> np.ndarray:
    with open(path, "rb") as file:
        shape, order, dtype = _npy_header(file)
        start = file.tell()
        _check_size(shape, dtype, os.fstat(file.fileno()).st_size - start)
        return np.memmap(file, dtype, "r", start, shape, order)


def _read_npz(path: str, name: str | None) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member[:-4] for member in archive.namelist() if member.endswith(".npy")]
            if name is None and len(names) == 1:
                name = names[0]
            if name not in names:
                problem = f"holds {len(names)} arrays" if name is None else f"has no array {name!r}"
                raise ValueError(f"{problem}; name one as FILE.npz:NAME, out of {names}")
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"array {name!r} is compressed as numpy does not")
            with archive.open(info) as member:
                shape, _, dtype = _npy_header(member)
                _check_size(shape, dtype, info.file_size - member.tell())
            with archive.open(info) as member:
                return np.lib.format.read_array(member, allow_pickle=False)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"truncated, or no .npz file: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError("damaged: a member lies outside the file") from error  # a wild seek


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    """Shape, order and dtype (real numbers) of the .npy that `file` begins."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"unknown .npy version {version}")
    # the header is a Python literal, and these are what its parsers raise
    except (ValueError, TypeError, SyntaxError, TokenError, MemoryError, RecursionError) as error:
        raise ValueError(f"truncated, or no .npy array: {error}") from error
    if dtype.kind not in "biuf":
        raise ValueError(f"holds dtype {dtype}, not real numbers")
    return shape, "F" if is_fortran else "C", dtype
