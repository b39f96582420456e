"""A file of columns, one of which holds vectors: Parquet, and Arrow's files and streams.

`.parquet`, `.pq`, `.arrow`, `.feather` and `.ipc` are read by pyarrow in batches of rows, so that
no more than a batch is held at a time.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hnsw_gpu.files.arrow_columns import decoded

if TYPE_CHECKING:
    import pyarrow

PARQUET = (".parquet", ".pq")
SUFFIXES = (*PARQUET, ".arrow", ".feather", ".ipc")
NEEDS = 'needs pyarrow: pip install "hnsw-gpu[io]"'


def require_pyarrow(what: str) -> None:
    """ImportError says how to get what this needs."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ImportError(f"{what} {NEEDS}") from None


class TableFile:
    """A file of columns, one of which holds the vectors. It is open only while it is read.

    dim: None where it holds no vectors, until who opens several files says theirs.
    """

    def __init__(self, path: Path, column: str) -> None:
        self.path, self._column = path, column
        with _naming_path(path):
            parts, self.schema = _parts_of(path, column)
        self._starts = np.cumsum([0, *parts])
        self.rows = int(self._starts[-1])
        if column not in self.schema.names:
            raise ValueError(
                f"{path}: no column {column!r}; there are "
                f"{', '.join(map(repr, self.schema.names)) or 'none'}"
            )
        self.columns = tuple(name for name in self.schema.names if name != column)
        self._check_type(self.schema.field(self.schema.names.index(column)).type)
        self.dim: Any = self._usual_length()  # int, or None

    def _check_type(self, kind: "pyarrow.DataType") -> None:
        import pyarrow
        import pyarrow.types as types

        stored = kind
        while isinstance(stored, pyarrow.BaseExtensionType) or types.is_dictionary(stored):
            is_extension = isinstance(stored, pyarrow.BaseExtensionType)
            stored = stored.storage_type if is_extension else stored.value_type
        is_list = any(
            is_such(stored)
            for is_such in (
                types.is_list,
                types.is_large_list,
                types.is_fixed_size_list,
                types.is_list_view,
                types.is_large_list_view,
            )
        )
        numbers = (types.is_floating, types.is_integer, types.is_decimal, types.is_null)
        if types.is_null(stored) or (is_list and any(is_a(stored.value_type) for is_a in numbers)):
            return
        raise ValueError(
            f"{self.path}: column {self._column!r} is {kind}, expected lists of numbers (list, "
            "large_list, fixed_size_list, list_view or large_list_view of floats, integers or "
            "decimals, also as extension or dictionary)"
        )

    def _usual_length(self) -> int | None:
        """The most frequent length among the first vectors that have one, of equals the first."""
        for batch, _ in self._batches(0, self.rows, 1024, [self._column]):
            lengths = _lengths(_lists(batch.column(0)))
            lengths = lengths[lengths > 0]
            if len(lengths):
                known, first, counts = np.unique(lengths, return_index=True, return_counts=True)
                return int(known[np.lexsort((first, -counts))[0]])
        return None

    def _batches(
        self, start: int, stop: int, count: int, names: list[str] | None
    ) -> Iterator[tuple["pyarrow.RecordBatch", int]]:
        """Batches of rows start..stop, and the number of the first row of each."""
        ends = self._starts[1:]
        wanted = np.flatnonzero((self._starts[:-1] < stop) & (ends > start)).tolist()
        with _naming_path(self.path):
            before, first = -1, 0
            for part, batch in _read(self.path, wanted, count, names):
                if part != before:
                    before, first = part, int(self._starts[part])
                begin, end = max(start - first, 0), min(stop - first, len(batch))
                if begin < end:
                    yield batch.slice(begin, end - begin), first + begin
                first += len(batch)
                if first >= stop:
                    break

    def blocks(
        self, start: int, stop: int, count: int, on_invalid: str = "raise"
    ) -> Iterator[np.ndarray]:
        """Vectors (m, dim). on_invalid="drop": those that are none, or have nulls, come as NaN."""
        for batch, first in self._batches(start, stop, count, [self._column]):
            lists = _lists(batch.column(0))
            is_null, lengths = np.asarray(lists.is_null()), _lengths(lists)
            is_good = lengths == self.dim
            if on_invalid == "raise" and not is_good.all():
                self._refuse(is_null, "null", first)
                what = f"{lengths[~is_good][0]} numbers, expected {self.dim},"
                self._refuse(~is_good, what, first)
            values = _numbers(lists if is_good.all() else lists.take(np.flatnonzero(is_good)))
            if values.null_count and on_invalid == "raise":
                nulls = values.is_null().to_numpy(zero_copy_only=False)
                self._refuse(nulls.reshape(-1, self.dim).any(axis=1), "null among numbers", first)
            rows = values.to_numpy(zero_copy_only=False).reshape(-1, self.dim)
            if not is_good.all():
                whole = np.full((len(lists), self.dim), np.nan, np.result_type(rows, np.float32))
                whole[is_good] = rows
                rows = whole
            yield rows

    def _refuse(self, is_bad: Any, what: str, first: int) -> None:
        rows = np.flatnonzero(np.asarray(is_bad)) + first
        if len(rows):
            listed = ", ".join(self._place(row) for row in rows[:5])
            more = f" and {len(rows) - 5} more of this batch" if len(rows) > 5 else ""
            raise ValueError(f"{self.path}: column {self._column!r}: {what} in {listed}{more}")

    def _place(self, row: int) -> str:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        name = "row group" if self.path.suffix.lower() in PARQUET else "batch"
        return f"row {row} ({name} {group})"

    def column(self, name: str, start: int, stop: int, count: int) -> Iterator["pyarrow.Array"]:
        for batch, _ in self._batches(start, stop, count, [name]):
            with _naming_path(self.path):
                yield decoded(batch.column(0))

    def tables(self, start: int, stop: int, count: int) -> Iterator["pyarrow.RecordBatch"]:
        for batch, _ in self._batches(start, stop, count, None):
            yield batch

    def where(self, row: int) -> str:
        return f"{self.path}, {self._place(row)}"


def rows_of_column(table: "pyarrow.Table", name: str, dim: int) -> np.ndarray:
    """Vectors (m, dim) of a column of a table in memory, of any type that files may have."""
    if name not in table.column_names:
        there = ", ".join(map(repr, table.column_names)) or "none"
        raise ValueError(f"no column {name!r}; there are {there}")
    if not len(table):
        return np.empty((0, dim), np.float32)
    lists = _lists(table.combine_chunks().column(name).chunk(0))
    lengths = _lengths(lists)
    wrong = np.flatnonzero(lengths != dim)
    if len(wrong):
        told = "null" if lengths[wrong[0]] < 0 else f"{lengths[wrong[0]]} numbers"
        raise ValueError(f"column {name!r}: {told} in row {wrong[0]} of a batch, expected {dim}")
    values = _numbers(lists)
    if values.null_count:
        raise ValueError(f"column {name!r}: null among the numbers of a batch")
    rows: np.ndarray = values.to_numpy(zero_copy_only=False).reshape(-1, dim)
    return rows


@contextmanager
def _naming_path(path: Path) -> Iterator[None]:
    """Errors of pyarrow name the path."""
    try:
        yield
    except ModuleNotFoundError:
        raise ImportError(f"{path} {NEEDS}") from None
    except (ValueError, OSError, NotImplementedError, KeyError) as error:
        is_of_system = isinstance(error, OSError) and error.errno is not None
        if is_of_system or str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {error}") from None


def _parts_of(path: Path, column: str) -> tuple[list[int], "pyarrow.Schema"]:
    """Rows of each row group or record batch, and the schema."""
    path.open("rb").close()  # OSError of the system as it is
    if path.suffix.lower() in PARQUET:
        with _parquet(path) as file:
            groups = range(file.metadata.num_row_groups)
            rows = [file.metadata.row_group(group).num_rows for group in groups]
            return rows, file.schema_arrow
    schema = _ipc(path, None)[1]
    if column not in schema.names:
        return [], schema
    return [len(batch) for batch in _ipc(path, [column])[0]], schema


def _read(
    path: Path, parts: list[int], count: int, names: list[str] | None
) -> Iterator[tuple[int, "pyarrow.RecordBatch"]]:
    """Batches of at most `count` rows of some parts, ascending, each with the part's number."""
    if not parts:
        return
    if path.suffix.lower() in PARQUET:
        with _parquet(path) as file:
            for part in parts:
                for batch in file.iter_batches(
                    batch_size=count, row_groups=[part], columns=names, use_threads=False
                ):
                    yield part, batch
        return
    for part, batch in enumerate(_ipc(path, names, first=parts[0])[0], parts[0]):
        for start in range(0, len(batch), count):
            yield part, batch.slice(start, count)
        if part == parts[-1]:
            return


def _parquet(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


def _ipc(
    path: Path, names: list[str] | None, first: int = 0
) -> tuple[Iterator["pyarrow.RecordBatch"], "pyarrow.Schema"]:
    """Record batches from the first on, read one at a time, and the schema."""
    import pyarrow

    mapped = pyarrow.memory_map(str(path))
    try:
        opened, is_file = pyarrow.ipc.open_file(mapped), True
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        opened, is_file = pyarrow.ipc.open_stream(mapped), False
    schema = opened.schema
    if names is not None:  # other columns are not even decompressed
        chosen = [schema.names.index(name) for name in names]
        options = pyarrow.ipc.IpcReadOptions(included_fields=chosen)
        mapped.seek(0)
        open_again = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        opened = open_again(mapped, options=options)
    if is_file:
        return (opened.get_batch(i) for i in range(first, opened.num_record_batches)), schema
    return itertools.islice(opened, first, None), schema


def _lists(column: Any) -> Any:
    """Vectors of any type that is read, as lists."""
    import pyarrow
    import pyarrow.types as types

    while True:
        kind = column.type
        if isinstance(kind, pyarrow.BaseExtensionType):
            column = column.storage
        elif types.is_dictionary(kind):
            column = column.dictionary.take(column.indices)
        elif types.is_list_view(kind) or types.is_large_list_view(kind):
            ends = np.cumsum(column.value_lengths().fill_null(0).to_numpy(), dtype=np.int64)
            offsets = pyarrow.array(np.concatenate([[0], ends]))
            column = pyarrow.LargeListArray.from_arrays(  # a cast loses the last offset
                offsets, column.flatten(), mask=column.is_null()
            )
        elif types.is_null(kind):
            column = column.cast(pyarrow.list_(pyarrow.float32()))
        else:
            return column


def _lengths(lists: Any) -> np.ndarray:
    """int64 (m,), -1 where null."""
    lengths: np.ndarray = lists.value_lengths().fill_null(-1).to_numpy().astype(np.int64)
    return lengths


def _numbers(lists: Any) -> Any:
    """The numbers of lists that are no nulls."""
    import pyarrow
    import pyarrow.types as types

    values = lists.flatten()  # of the slice, which `.values` is not
    if types.is_decimal(values.type) or types.is_null(values.type):
        return values.cast(pyarrow.float64())
    return values
