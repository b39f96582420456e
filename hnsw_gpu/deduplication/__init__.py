"""Near-duplicates, of rows in memory and in files. (`hnsw_gpu.dedup` is the function.)"""

from hnsw_gpu.deduplication.in_files import FileSettings, dedup_files, interrupted_state
from hnsw_gpu.deduplication.in_memory import DedupResult, dedup
from hnsw_gpu.deduplication.preview import dedup_preview, preview_text

__all__ = [
    "DedupResult",
    "FileSettings",
    "dedup",
    "dedup_files",
    "dedup_preview",
    "interrupted_state",
    "preview_text",
]
