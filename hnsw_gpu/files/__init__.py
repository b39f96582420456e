"""Bytes and arrays: saved indexes, files of vectors, the steps of long jobs."""

from hnsw_gpu.files.arrow_columns import filtered, ordered_values, taken, texts
from hnsw_gpu.files.checkpoints import Checkpoints
from hnsw_gpu.files.folders import Folder, LocalFolder, Place, RemoteFolder, folder_at, is_url
from hnsw_gpu.files.output_folder import held
from hnsw_gpu.files.page import read_page
from hnsw_gpu.files.sources import Sources, file_checksum, list_files, open_sources
from hnsw_gpu.files.step_runner import HERE, UNSEEN, Advance, Here, Shown, StepRunner
from hnsw_gpu.files.storage import (
    FORMAT_VERSION,
    CorruptIndexError,
    arrays_checksum,
    atomic_file,
    open_arrays,
    read_arrays,
    read_some,
    verify_arrays,
    verify_open,
    write_arrays,
)
from hnsw_gpu.files.table_files import require_pyarrow, rows_of_column
from hnsw_gpu.files.vector_files import read_vectors, write_result

__all__ = [
    "FORMAT_VERSION",
    "HERE",
    "UNSEEN",
    "Advance",
    "Checkpoints",
    "CorruptIndexError",
    "Folder",
    "Here",
    "LocalFolder",
    "Place",
    "RemoteFolder",
    "Shown",
    "Sources",
    "StepRunner",
    "arrays_checksum",
    "atomic_file",
    "file_checksum",
    "filtered",
    "folder_at",
    "held",
    "is_url",
    "list_files",
    "open_arrays",
    "open_sources",
    "ordered_values",
    "read_arrays",
    "read_page",
    "read_some",
    "read_vectors",
    "require_pyarrow",
    "rows_of_column",
    "taken",
    "texts",
    "verify_arrays",
    "verify_open",
    "write_arrays",
    "write_result",
]
