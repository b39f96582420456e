"""Collections: a folder of shards and a manifest, searched as one index."""

from hnsw_gpu.collection.building import build_collection, interrupted_state
from hnsw_gpu.collection.collection import Collection, saved_checksum
from hnsw_gpu.collection.manifest import is_collection
from hnsw_gpu.collection.opening import load

__all__ = [
    "Collection",
    "build_collection",
    "interrupted_state",
    "is_collection",
    "load",
    "saved_checksum",
]
