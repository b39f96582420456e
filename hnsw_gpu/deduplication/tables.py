"""The tables that a deduplication of files writes, as Parquet."""

from pathlib import Path

import numpy as np

from hnsw_gpu.deduplication.result import DedupResult
from hnsw_gpu.files import Sources, atomic_file

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
        writer, row = None, 0
        for batch in sources.tables():
            writer = writer or pyarrow.parquet.ParquetWriter(file, batch.schema)
            kept = pyarrow.array(result.keep[row : row + len(batch)])
            writer.write_batch(batch.filter(kept))
            row += len(batch)
        if writer is not None:
            writer.close()
