"""A file of columns, one of which holds vectors: Parquet, and Arrow's files and streams.

`.parquet`, `.pq`, `.arrow`, `.feather` and `.ipc` are read by pyarrow in batches of rows, so that
no more than a batch is held at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow

PARQUET = (".parquet", ".pq")
SUFFIXES = (*PARQUET, ".arrow", ".feather", ".ipc")
NEEDS = 'needs pyarrow: pip install "hnsw-gpu[io]"'


class TableFile:
    """A file of columns, one of which holds the vectors."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self._column = path, column
        with _naming_path(path):
            self._parts, schema = _parts_of(path)
        self._starts = np.cumsum([0] + [rows for rows, _ in self._parts])
        self.rows = int(self._starts[-1])
        if column not in schema.names:
            raise ValueError(
                f"{path}: no column {column!r}; there are {', '.join(map(repr, schema.names))}"
            )
        self.columns = tuple(name for name in schema.names if name != column)
        self.schema = schema
        self._check_type(schema.field(column).type)
        self.dim = self._first_length()

    def _check_type(self, kind: "pyarrow.DataType") -> None:
        import pyarrow.types as types

        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        if not is_list or not (
            types.is_floating(kind.value_type) or types.is_integer(kind.value_type)
        ):
            raise ValueError(
                f"{self.path}: column {self._column!r} is {kind}, expected lists of numbers"
            )

    def _first_length(self) -> int:
        """Numbers in the first vector that is not null."""
        for batch, _ in self._batches(0, self.rows, 256, [self._column]):
            lists = batch.column(0).drop_null()
            if len(lists):
                return len(lists[0])
        raise ValueError(f"{self.path}: column {self._column!r} has no vectors")

    def _batches(
        self, start: int, stop: int, count: int, names: list[str] | None
    ) -> Iterator[tuple["pyarrow.RecordBatch", int]]:
        """Batches of rows start..stop, and the number of the first row of each."""
        with _naming_path(self.path):
            for place, (rows, read) in enumerate(self._parts):
                first = int(self._starts[place])
                if first >= stop or first + rows <= start:
                    continue
                for batch in read(count, names):
                    begin, end = max(start - first, 0), min(stop - first, len(batch))
                    if begin < end:
                        yield batch.slice(begin, end - begin), first + begin
                    first += len(batch)
                    if first >= stop:
                        break

    def blocks(self, start: int, stop: int, count: int) -> Iterator[np.ndarray]:
        for batch, first in self._batches(start, stop, count, [self._column]):
            lists = batch.column(0)
            self._refuse(lists.is_null(), "null", first)
            lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(lengths != self.dim)
            if len(wrong):
                what = f"{lengths[wrong[0]]} numbers, expected {self.dim},"
                self._refuse(lengths != self.dim, what, first)
            values = lists.flatten()  # of the slice, which `.values` is not
            if values.null_count:
                is_null = values.is_null().to_numpy(zero_copy_only=False)
                self._refuse(is_null.reshape(-1, self.dim).any(axis=1), "null among numbers", first)
            yield values.to_numpy(zero_copy_only=False).reshape(-1, self.dim)

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
            column = batch.column(0)
            yield column.dictionary_decode() if hasattr(column, "dictionary_decode") else column

    def tables(self, start: int, stop: int, count: int) -> Iterator["pyarrow.RecordBatch"]:
        for batch, _ in self._batches(start, stop, count, None):
            yield batch

    def where(self, row: int) -> str:
        return f"{self.path}, {self._place(row)}"


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


def _parts_of(path: Path) -> tuple[list[tuple[int, Any]], "pyarrow.Schema"]:
    """(rows, reader of batches) of each row group or record batch, and the schema."""
    import pyarrow

    path.open("rb").close()  # OSError of the system as it is
    if path.suffix.lower() in PARQUET:
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)

        def reader(group: int) -> Any:
            return lambda count, names: file.iter_batches(
                batch_size=count, row_groups=[group], columns=names, use_threads=False
            )

        groups = range(file.metadata.num_row_groups)
        rows = [file.metadata.row_group(group).num_rows for group in groups]
        return [(rows[group], reader(group)) for group in groups], file.schema_arrow
    mapped = pyarrow.memory_map(str(path))
    try:
        opened = pyarrow.ipc.open_file(mapped)
        batches = [opened.get_batch(i) for i in range(opened.num_record_batches)]
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        opened = pyarrow.ipc.open_stream(mapped)
        batches = list(opened)

    def cut(batch: "pyarrow.RecordBatch") -> Any:
        def read(count: int, names: list[str] | None) -> Iterator["pyarrow.RecordBatch"]:
            chosen = batch if names is None else batch.select(names)
            for start in range(0, len(batch), count):
                yield chosen.slice(start, count)

        return read

    return [(len(batch), cut(batch)) for batch in batches], opened.schema
