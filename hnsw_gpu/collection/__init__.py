"""Collections: a folder of shards and a manifest, searched as one index."""

from hnsw_gpu.collection.building import build_collection, interrupted_state
from hnsw_gpu.collection.collection import Collection, saved_bytes, saved_checksum
from hnsw_gpu.collection.opening import load

__all__ = [
    "Collection",
    "build_collection",
    "interrupted_state",
    "load",
    "saved_bytes",
    "saved_checksum",
]
