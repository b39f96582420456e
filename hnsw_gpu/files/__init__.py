"""Bytes and arrays: saved indexes, files of vectors, the steps of long jobs."""

from hnsw_gpu.files.arrow_columns import filtered, ordered_values, taken, texts
from hnsw_gpu.files.checkpoints import Checkpoints
from hnsw_gpu.files.output_folder import held
from hnsw_gpu.files.page import read_page
from hnsw_gpu.files.sources import Sources, file_checksum, list_files, open_sources
from hnsw_gpu.files.storage import (
    FORMAT_VERSION,
    CorruptIndexError,
    arrays_checksum,
    atomic_file,
    open_arrays,
    read_arrays,
    verify_arrays,
    write_arrays,
)
from hnsw_gpu.files.table_files import rows_of_column
from hnsw_gpu.files.vector_files import read_vectors, write_result

__all__ = [
    "FORMAT_VERSION",
    "Checkpoints",
    "CorruptIndexError",
    "Sources",
    "arrays_checksum",
    "atomic_file",
    "file_checksum",
    "filtered",
    "held",
    "list_files",
    "open_arrays",
    "open_sources",
    "ordered_values",
    "read_arrays",
    "read_page",
    "read_vectors",
    "rows_of_column",
    "taken",
    "texts",
    "verify_arrays",
    "write_arrays",
    "write_result",
]
