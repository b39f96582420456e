"""The tables that a deduplication of files writes, as Parquet."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hnsw_gpu.deduplication.result import DedupResult
from hnsw_gpu.files import Sources, atomic_file, filtered

if TYPE_CHECKING:
    import pyarrow

PAIRS_AT_ONCE = 1 << 20  # written


def write_tables(out: Path, result: DedupResult, sources: Sources, with_columns: bool) -> None:
    """duplicates.parquet, pairs.parquet, and kept.parquet with all columns or the ids alone."""
    import pyarrow.parquet

    with atomic_file(out / "duplicates.parquet") as file:
        pyarrow.parquet.write_table(result.duplicates, file)
    tables = result.pair_tables(PAIRS_AT_ONCE)
    first = next(tables)
    with (
        atomic_file(out / "pairs.parquet") as file,
        pyarrow.parquet.ParquetWriter(file, first.schema) as writer,
    ):
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
    with atomic_file(out / "kept.parquet") as file:
        if not with_columns:
            rows = np.flatnonzero(result.keep)
            pyarrow.parquet.write_table(pyarrow.table({"id": result.names_array(rows)}), file)
            return
        with pyarrow.parquet.ParquetWriter(file, sources.schema()) as writer:
            row = 0
            for batch in sources.tables():
                writer.write_batch(filtered(batch, result.keep[row : row + len(batch)]))
                row += len(batch)


def require_writable(schema: "pyarrow.Schema") -> None:
    """ValueError that names a column whose type Parquet does not know."""
    import pyarrow.parquet

    for field in schema:
        try:
            one = pyarrow.record_batch([pyarrow.nulls(1, field.type)], [field.name])
            row = filtered(one, np.ones(1, bool))
            pyarrow.parquet.write_table(pyarrow.table(row.columns, row.schema), io.BytesIO())
        except pyarrow.ArrowException:
            raise ValueError(
                f"column {field.name!r} is {field.type}, which cannot be written as Parquet"
            ) from None
