"""Files of vectors, one after the other, read in blocks, with the columns beside the vectors.

Arrays are read as `vector_files.py` does, `.safetensors` by its package, tables as `table_files.py`
does. A folder is its files in order of their names.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hnsw_gpu.files import table_files, vector_files
from hnsw_gpu.files.table_files import TableFile

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (*vector_files.SUFFIXES, ".safetensors", *table_files.SUFFIXES)
BATCH_ROWS = 16384
BATCH_BYTES = 1 << 25  # of vectors, as float32
READ_BYTES = 1 << 22


class ArrayFile:
    """A file that is one array of vectors."""

    columns: tuple[str, ...] = ()

    def __init__(self, path: Path, column: str) -> None:
        self.path, self._column = path, column
        self._array = _tensor(path, column) if path.suffix == ".safetensors" else None
        if self._array is None:
            self._array = vector_files.read_vectors(path)
        self.rows, self.dim = self._array.shape

    def blocks(self, start: int, stop: int, count: int) -> Iterator[np.ndarray]:
        assert self._array is not None
        for first in range(start, stop, count):
            yield np.asarray(self._array[first : min(first + count, stop)])

    def tables(self, start: int, stop: int, count: int) -> Iterator["pyarrow.RecordBatch"]:
        import pyarrow

        for block in self.blocks(start, stop, count):
            values = pyarrow.array(block.reshape(-1))
            vectors = pyarrow.FixedSizeListArray.from_arrays(values, self.dim)
            yield pyarrow.record_batch({self._column: vectors})

    def where(self, row: int) -> str:
        return f"{self.path}, row {row}"


class Sources:
    """The rows of several files, numbered through. dim: of every vector."""

    def __init__(self, files: list[ArrayFile | TableFile]) -> None:
        self.files, self.dim = files, files[0].dim
        for file in files:
            if file.dim != self.dim:
                raise ValueError(
                    f"{file.path}: vectors of {file.dim} numbers, and {files[0].path} has "
                    f"{self.dim}"
                )
        self._identities = {file.path: _identity(file.path) for file in files}
        self._starts = np.cumsum([0] + [file.rows for file in files])
        self._count = max(1, min(BATCH_ROWS, BATCH_BYTES // (4 * self.dim)))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def paths(self) -> list[Path]:
        """Of the files on disk."""
        return [_data_path(file.path) for file in self.files]

    def require_unchanged(self) -> None:
        """ValueError where a file is not as it was when it was opened."""
        for path in self._identities:
            self._require_unchanged(path)

    def _require_unchanged(self, path: Path) -> None:
        if _identity(path) != self._identities[path]:
            raise ValueError(f"{path} was changed while it was read: run the command again")

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Any, int, int]]:
        """Files with rows of start..stop, and which of theirs."""
        for file, first in zip(self.files, self._starts.tolist(), strict=False):
            begin, end = max(start - first, 0), min(stop - first, file.rows)
            if begin < end:
                yield file, begin, end

    def vectors(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows start..stop in blocks (m, dim), as stored; ValueError where a file was changed."""
        for file, begin, end in self._spans(start, stop):
            self._require_unchanged(file.path)
            for block in file.blocks(begin, end, self._count):
                yield block
                self._require_unchanged(file.path)

    def column(self, name: str) -> "pyarrow.ChunkedArray":
        """A column of all rows; ValueError where a value is null or a file lacks it."""
        import pyarrow

        parts = []
        for row, part in self._column_parts(name):
            if part.null_count:
                bad = row + int(np.flatnonzero(np.asarray(part.is_null()))[0])
                raise ValueError(f"{self.where(bad)}: null in column {name!r}")
            parts.append(part)
        return pyarrow.chunked_array(parts)

    def take(self, name: str, rows: np.ndarray) -> list[Any]:
        """Values of a column in some rows, ascending."""
        values: list[Any] = []
        for first, part in self._column_parts(name):
            here = rows[(rows >= first) & (rows < first + len(part))]
            values += part.take(here - first).to_pylist()
        return values

    def _column_parts(self, name: str) -> Iterator[tuple[int, "pyarrow.Array"]]:
        """A column in parts, each with the number of its first row."""
        row = 0
        for file in self.files:
            if name not in file.columns or not isinstance(file, TableFile):
                there = ", ".join(map(repr, file.columns)) or "none"
                raise ValueError(f"{file.path}: no column {name!r} beside the vectors: {there}")
            for part in file.column(name, 0, file.rows, BATCH_ROWS):
                yield row, part
                row += len(part)

    def tables(self) -> Iterator["pyarrow.RecordBatch"]:
        """All columns of all rows, in batches."""
        for file in self.files:
            yield from file.tables(0, file.rows, self._count)

    def require_same_columns(self) -> None:
        """ValueError where two files differ in names or types of columns."""
        schemas = [next(iter(file.tables(0, file.rows, 1))).schema for file in self.files]
        for file, schema in zip(self.files, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise ValueError(
                    f"{file.path}: columns {_types(schema)}, and {self.files[0].path} "
                    f"has {_types(schemas[0])}"
                )

    def where(self, row: int) -> str:
        """The file and the row in it, for people."""
        for file, begin, _ in self._spans(row, row + 1):
            return str(file.where(begin))
        raise IndexError(f"row {row} of {len(self)}")

    def fingerprints(self) -> list[dict[str, Any]]:
        """Path, rows, bytes and checksum (CRC-32) of each file."""
        return [
            {
                "path": str(file.path),
                "rows": file.rows,
                "size": path.stat().st_size,
                "checksum": file_checksum(path),
            }
            for file, path in zip(self.files, self.paths, strict=True)
        ]


def open_sources(paths: Sequence[Path], *, column: str = "embedding") -> Sources:
    """Files and folders of vectors. ValueError, OSError that name the file."""
    files = [_opened(path, column) for given in paths for path in _listed(Path(given))]
    if not files:
        raise ValueError("no files of vectors")
    return Sources(files)


def file_checksum(path: Path) -> str:
    """CRC-32 of a file's bytes."""
    total = 0
    with open(path, "rb") as file:
        while part := file.read(READ_BYTES):
            total = zlib.crc32(part, total)
    return f"{total:08x}"


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        found = _data_path(path).stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _data_path(path: Path) -> Path:
    """Without the name of an array inside: FILE.npz:NAME."""
    text = os.fspath(path)
    cut = text.lower().rfind(".npz:")
    return path if cut < 0 or path.exists() else Path(text[: cut + 4])


def _listed(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    ]
    if not found:
        raise ValueError(f"{path}: no files of vectors; known are {', '.join(SUFFIXES)}")
    return found


def _opened(path: Path, column: str) -> ArrayFile | TableFile:
    if path.suffix.lower() in table_files.SUFFIXES:
        return TableFile(path, column)
    suffix = _data_path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {suffix!r}; known are {', '.join(SUFFIXES)}")
    return ArrayFile(path, column)


def _tensor(path: Path, name: str) -> Any:
    """The tensor of that name, or the only one; rows are read when they are asked for."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(f'{path} needs safetensors: pip install "hnsw-gpu[io]"') from None
    path.open("rb").close()  # its own error has no path
    try:
        file = safe_open(path, "numpy")
        names = list(file.keys())
        name = names[0] if len(names) == 1 else name
        if name not in names:
            raise ValueError(f"{path}: no tensor {name!r}; there are {', '.join(names)}")
        part = file.get_slice(name)
        shape, dtype = part.get_shape(), part.get_dtype()
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or no safetensors file: {error}") from None
    if len(shape) != 2 or dtype not in ("F16", "F32", "F64", "I8", "U8"):
        raise ValueError(f"{path}: tensor {name!r} is {dtype} {shape}, expected (n, dim) floats")
    return _Slices(part, tuple(shape))


class _Slices:
    """A tensor of a file, sliced like an array."""

    def __init__(self, part: Any, shape: tuple[int, int]) -> None:
        self._part, self.shape = part, shape

    def __getitem__(self, place: slice) -> np.ndarray:
        return self._part[place]


def _types(schema: "pyarrow.Schema") -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
