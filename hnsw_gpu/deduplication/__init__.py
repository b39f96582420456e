"""Near-duplicates, of rows in memory and in files. (`hnsw_gpu.dedup` is the function.)"""

from hnsw_gpu.deduplication.checkpoints import interrupted_state
from hnsw_gpu.deduplication.in_files import dedup_files
from hnsw_gpu.deduplication.in_memory import dedup
from hnsw_gpu.deduplication.preview import dedup_preview, preview_text
from hnsw_gpu.deduplication.result import DedupResult
from hnsw_gpu.deduplication.settings import Settings

__all__ = [
    "DedupResult",
    "Settings",
    "dedup",
    "dedup_files",
    "dedup_preview",
    "interrupted_state",
    "preview_text",
]
