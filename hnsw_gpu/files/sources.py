"""Files of vectors, one after the other, read in blocks, with the columns beside the vectors.

Arrays are read as `vector_files.py` does, `.safetensors` by its package, tables as `table_files.py`
does. A folder is its files in order of their names.
"""

import errno
import functools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hnsw_gpu.files import arrow_columns, table_files, vector_files
from hnsw_gpu.files.step_runner import HERE, UNSEEN, Advance, StepRunner
from hnsw_gpu.files.table_files import TableFile

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (*vector_files.SUFFIXES, ".safetensors", *table_files.SUFFIXES)
MOST_OPEN = 64  # files at a time; each of more is opened for each read
BATCH_ROWS = 16384
BATCH_BYTES = 1 << 25  # of vectors, as float32
READ_BYTES = 1 << 22


class ArrayFile:
    """A file that is one array of vectors. stays_open: rather than opened anew for each read."""

    columns: tuple[str, ...] = ()

    def __init__(self, path: Path, column: str, *, stays_open: bool) -> None:
        self.path, self._column = path, column
        array = self.array()
        self.rows, self.dim = array.shape
        first = np.asarray(array[:0])
        self._dtype = (
            np.dtype(f"f{min(first.itemsize, 8)}")
            if first.dtype.kind == "f"
            else (first.dtype.newbyteorder("="))
        )
        is_read_whole = isinstance(array, np.ndarray) and not isinstance(array, np.memmap)
        self._array = array if stays_open or is_read_whole else None

    def array(self) -> Any:
        """What is sliced like an array (rows, dim): of most files one that is mapped."""
        if self.path.suffix.lower() == ".safetensors":
            return _tensor(self.path, self._column)
        return vector_files.read_vectors(self.path)

    @property
    def schema(self) -> "pyarrow.Schema":
        """Of `tables`."""
        import pyarrow

        kind = pyarrow.list_(pyarrow.from_numpy_dtype(self._dtype), self.dim)
        return pyarrow.schema([(self._column, kind)])

    def blocks(
        self, start: int, stop: int, count: int, on_invalid: str = "raise"
    ) -> Iterator[np.ndarray]:
        array = self.array() if self._array is None else self._array
        for first in range(start, stop, count):
            yield np.asarray(array[first : min(first + count, stop)])

    def tables(self, start: int, stop: int, count: int) -> Iterator["pyarrow.RecordBatch"]:
        import pyarrow

        for block in self.blocks(start, stop, count):
            values = pyarrow.array(np.asarray(block, self._dtype).reshape(-1))
            vectors = pyarrow.FixedSizeListArray.from_arrays(values, self.dim)
            yield pyarrow.record_batch([vectors], schema=self.schema)

    def where(self, row: int) -> str:
        return f"{self.path}, row {row}"


class Sources:
    """The rows of several files, numbered through. dim: of every vector.

    A pickle of it opens the same files by their paths, once a process, and refuses others.
    """

    def __init__(self, files: list[ArrayFile | TableFile], column: str) -> None:
        first = next((file for file in files if file.dim), None)
        if first is None:
            raise ValueError(
                f"{files[0].path}: no vectors{' in it or after it' * (len(files) > 1)}"
            )
        self.files = files
        self.dim: int = first.dim
        for file in files:
            if file.dim is None:
                file.dim = self.dim
            if file.dim != self.dim:
                raise ValueError(
                    f"{file.path}: vectors of {file.dim} numbers, and {first.path} has {self.dim}"
                )
        self._identities = {file.path: _identity(file.path) for file in files}
        self._starts = np.cumsum([0] + [file.rows for file in files])
        self._count = max(1, min(BATCH_ROWS, BATCH_BYTES // (4 * self.dim)))
        self._column = column

    def __reduce__(self) -> tuple:
        return _opened_as, (
            tuple(file.path.absolute() for file in self.files),
            self._column,
            self._seen,
        )

    @property
    def _seen(self) -> tuple:
        """What tells these files from others, on whatever machine."""
        times = (identity and identity[2:] for identity in self._identities.values())
        return self.dim, tuple(file.rows for file in self.files), tuple(times)

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

    def vectors(self, start: int, stop: int, on_invalid: str = "raise") -> Iterator[np.ndarray]:
        """Rows start..stop in blocks (m, dim), as stored; ValueError where a file was changed.

        Of rows that are no vectors a ValueError; on_invalid="drop": they come as NaN.
        """
        for file, begin, end in self._spans(start, stop):
            self._require_unchanged(file.path)
            for block in file.blocks(begin, end, self._count, on_invalid):
                yield block
                self._require_unchanged(file.path)

    def column(self, name: str, start: int = 0, stop: int | None = None) -> "pyarrow.ChunkedArray":
        """A column of all rows, or of some; ValueError where a value is null or a file lacks it.

        The type is what Arrow unifies those of the files to, without dictionaries.
        """
        kind, parts, row = self.column_type(name), [], start
        for file, begin, end in self._spans(start, len(self) if stop is None else stop):
            for part in file.column(name, begin, end, BATCH_ROWS):
                if part.null_count:
                    bad = row + int(np.flatnonzero(np.asarray(part.is_null()))[0])
                    raise ValueError(f"{self.where(bad)}: null in column {name!r}")
                parts.append(part if part.type == kind else _as_type(part, kind, file.path, name))
                row += len(part)
        import pyarrow  # where files have columns, it is there

        return pyarrow.chunked_array(parts, kind)

    def column_type(self, name: str) -> "pyarrow.DataType":
        """The type of a column beside the vectors; ValueError where a file lacks it."""
        for file in self.files:
            if name not in file.columns or not isinstance(file, TableFile):
                there = ", ".join(map(repr, file.columns)) or "none"
                raise ValueError(f"{file.path}: no column {name!r} beside the vectors: {there}")
        schemas = [file.schema for file in self._tables()]
        return arrow_columns.decoded_type(
            self._unified(name, [schema.field(schema.names.index(name)).type for schema in schemas])
        )

    def _unified(self, name: str, kinds: "Sequence[pyarrow.DataType]") -> "pyarrow.DataType":
        """One type for a column of all files; ValueError that names two which have none."""
        import pyarrow

        kind = kinds[0]
        for file, other in zip(self.files, kinds, strict=True):
            try:
                kind = arrow_columns.unified_type([kind, other])
            except (ValueError, pyarrow.ArrowTypeError):
                raise ValueError(
                    f"{file.path}: column {name!r} is {other}, and in {self.files[0].path} "
                    f"{kinds[0]}: no type holds both"
                ) from None
        return kind

    def _tables(self) -> Iterator[TableFile]:
        """The files that have columns."""
        return (file for file in self.files if isinstance(file, TableFile))

    def texts(self, name: str, rows: np.ndarray) -> list[str | None]:
        """Values of a column in some rows, ascending, as people read them; None where null."""
        self.column_type(name)
        found: list[str | None] = []
        for file, start in zip(self._tables(), self._starts.tolist(), strict=False):
            here = rows[(rows >= start) & (rows < start + file.rows)] - start
            if not len(here):
                continue
            first = int(here[0])
            for part in file.column(name, first, int(here[-1]) + 1, BATCH_ROWS):
                wanted = here[(here >= first) & (here < first + len(part))] - first
                found += arrow_columns.texts(arrow_columns.taken(part, wanted))
                first += len(part)
        return found

    def schema(self) -> "pyarrow.Schema":
        """Of `tables`; ValueError where files differ in names of columns, or types beyond unity."""
        import pyarrow

        schemas = [file.schema for file in self.files]
        first, fields = schemas[0], []
        for file, schema in zip(self.files, schemas, strict=True):
            if sorted(schema.names) != sorted(first.names):
                raise ValueError(
                    f"{file.path}: columns {_types(schema)}, and {self.files[0].path} "
                    f"has {_types(first)}"
                )
        for place, name in enumerate(first.names):
            kinds = [schema.field(_place(schema, first, place)).type for schema in schemas]
            fields.append(pyarrow.field(name, self._unified(name, kinds)))
        return pyarrow.schema(fields, first.metadata)

    def tables(self) -> Iterator["pyarrow.RecordBatch"]:
        """All columns of all rows, in batches of one schema."""
        import pyarrow

        whole = self.schema()
        for file in self.files:
            places = [_place(file.schema, whole, place) for place in range(len(whole))]
            for batch in file.tables(0, file.rows, self._count):
                columns = [batch.column(place) for place in places]
                columns = [
                    part
                    if part.type == field.type
                    else _as_type(part, field.type, file.path, field.name)
                    for part, field in zip(columns, whole, strict=True)
                ]
                yield pyarrow.RecordBatch.from_arrays(columns, schema=whole)

    def mapped(self) -> np.ndarray | None:
        """All rows (n, dim) as they lie in a file, if they are one array of one file."""
        first = self.files[0]
        array = first.array() if len(self.files) == 1 and isinstance(first, ArrayFile) else None
        return array if isinstance(array, np.ndarray) else None

    def where(self, row: int) -> str:
        """The file and the row in it, for people."""
        for file, begin, _ in self._spans(row, row + 1):
            return str(file.where(begin))
        raise IndexError(f"row {row} of {len(self)}")

    def fingerprints(self, runner: StepRunner = HERE) -> list[dict[str, Any]]:
        """Path, rows, bytes and checksum (CRC-32) of each file."""
        paths = [(path.absolute(),) for path in self.paths]
        checksums = runner.each(_checksum_of, (), paths, [file.rows for file in self.files], UNSEEN)
        return [
            {
                "path": str(file.path),
                "rows": file.rows,
                "size": path.stat().st_size,
                "checksum": checksum,
            }
            for file, (path,), checksum in zip(self.files, paths, checksums, strict=True)
        ]


def _checksum_of(path: Path, *, advance: Advance) -> str:
    return file_checksum(path)


def list_files(paths: Sequence[Path], *, except_for: Sequence[Path] = ()) -> list[Path]:
    """These files, and the files of vectors in these folders.

    except_for: files, and folders with all in them, that are left out of a folder that holds them.
    """
    return [path for given in paths for path in _listed(Path(given), except_for)]


def open_sources(paths: Sequence[Path], *, column: str = "embedding") -> Sources:
    """Files and folders of vectors. ValueError, OSError that name the file."""
    listed = list_files(paths)
    stays_open = len(listed) <= MOST_OPEN
    files = [_opened(path, column, stays_open) for path in listed]
    if not files:
        raise ValueError("no files of vectors")
    return Sources(files, column)


def _opened_as(paths: tuple[Path, ...], column: str, seen: tuple) -> Sources:
    """Sources of a pickle; ValueError where a file is not what it was there."""
    sources = _opened_once(paths, column, seen)
    sources.require_unchanged()
    if sources._seen != seen:
        raise ValueError(f"{paths[0]}, or another input, was changed while it was read: run again")
    return sources


@functools.lru_cache(4)
def _opened_once(paths: tuple[Path, ...], column: str, seen: tuple) -> Sources:
    return open_sources(paths, column=column)


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


def _listed(path: Path, except_for: Sequence[Path]) -> list[Path]:
    if not path.is_dir():
        if not _data_path(path).exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return [path]
    here = path.resolve()
    left_out = [other for other in map(Path.resolve, except_for) if here in other.parents]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        and not (left_out and any(file.resolve().is_relative_to(other) for other in left_out))
    ]
    if not found:
        raise ValueError(f"{path}: no files of vectors; known are {', '.join(SUFFIXES)}")
    return found


def _opened(path: Path, column: str, stays_open: bool) -> ArrayFile | TableFile:
    if path.suffix.lower() in table_files.SUFFIXES:
        return TableFile(path, column)
    suffix = _data_path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {suffix!r}; known are {', '.join(SUFFIXES)}")
    return ArrayFile(path, column, stays_open=stays_open)


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
    if len(shape) != 2 or not shape[1] or dtype not in ("F16", "F32", "F64", "I8", "U8"):
        raise ValueError(f"{path}: tensor {name!r} is {dtype} {shape}, expected (n, dim) floats")
    return _Slices(part, tuple(shape))


class _Slices:
    """A tensor of a file, sliced like an array."""

    def __init__(self, part: Any, shape: tuple[int, int]) -> None:
        self._part, self.shape = part, shape

    def __getitem__(self, place: slice) -> np.ndarray:
        return self._part[place]


def _place(schema: "pyarrow.Schema", whole: "pyarrow.Schema", place: int) -> int:
    """Where a column of the whole is in the schema of a file, whose columns may be in any order."""
    names = schema.names
    return place if names == whole.names else names.index(whole.names[place])


def _as_type(values: Any, kind: "pyarrow.DataType", path: Path, name: str) -> Any:
    import pyarrow

    try:
        plain = arrow_columns.decoded(values).cast(arrow_columns.plain_type(kind))
        return plain.cast(kind)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: column {name!r} as {kind}: {error}") from None


def _types(schema: "pyarrow.Schema") -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
