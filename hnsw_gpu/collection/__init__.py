"""Collections: a folder of shards and a manifest, searched as one index."""

from hnsw_gpu.collection.building import build_collection, build_index, interrupted_state
from hnsw_gpu.collection.collection import (
    Collection,
    load_collection,
    open_shard,
    saved_checksum,
    shard_path,
)
from hnsw_gpu.collection.manifest import Manifest, ShardEntry, is_collection, read_manifest
from hnsw_gpu.collection.opening import load
from hnsw_gpu.collection.sharded import Sharded, merged_answers

__all__ = [
    "Collection",
    "Manifest",
    "ShardEntry",
    "Sharded",
    "build_collection",
    "build_index",
    "interrupted_state",
    "is_collection",
    "load",
    "load_collection",
    "merged_answers",
    "open_shard",
    "read_manifest",
    "saved_checksum",
    "shard_path",
]
