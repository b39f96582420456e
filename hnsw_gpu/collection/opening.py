"""`hnsw_gpu.load`: what lies at a path, an index or a collection of shards."""

import os
from collections.abc import Mapping
from typing import Any

from hnsw_gpu.collection.collection import Collection, load_collection
from hnsw_gpu.files import folder_at, is_url
from hnsw_gpu.index import Index, load_index


def load(
    path: str | os.PathLike[str],
    *,
    mmap: bool | None = None,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> Index | Collection:
    """What is saved at `path`: the Index of a file, or the Collection in a folder of shards.

    The folder may be a URL that fsspec knows, such as s3://bucket/docs.collection. Its shards are
    copied to this machine, into HNSW_GPU_SHARD_CACHE or the user's cache folder, where they stay
    until somebody deletes them. Of each, size and checksum at the URL are compared with the
    manifest each time, so a copy of another state is never opened. ConnectionError where the URL
    does not answer, several times.

    CorruptIndexError if a file is damaged, or is not what it must be.

    mmap: leave the vectors on disk, and map them; None: those of a collection, not of an index. The
        refine rows are mapped where there are some, of which a search reads `rerank` a query; else
        the rows that it walks on. Neither their checksum nor their values are looked at then
        (`check` looks at the values). Leave the file as it is meanwhile; to replace it, write
        another one and rename it over the old one, as `save` does. Before and after each search the
        size and the time of the file are compared: CorruptIndexError if it was written to or cut in
        place. A file that is cut during a search ends the process (SIGBUS), and a change that keeps
        size and time goes unnoticed.
    storage_options: what fsspec's file system of a URL takes, such as `key`, `secret` and
        `endpoint_url`.
    """
    if is_url(path) or storage_options:
        folder = folder_at(path, storage_options)
        return load_collection(folder, mmap=mmap is None or mmap, device=device)
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        return load_collection(path, mmap=mmap is None or mmap, device=device)
    return load_index(path, mmap=bool(mmap), device=device)
