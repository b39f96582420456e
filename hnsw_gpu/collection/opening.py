"""`hnsw_gpu.load`: what lies at a path, an index or a collection of shards."""

import os
from pathlib import Path

from hnsw_gpu.collection.collection import Collection, load_collection
from hnsw_gpu.index import Index, load_index


def load(
    path: str | os.PathLike[str], *, mmap: bool | None = None, device: str = "auto"
) -> Index | Collection:
    """What is saved at `path`: the Index of a file, or the Collection in a folder of shards.

    CorruptIndexError if a file is damaged, or is not what it must be.

    mmap: leave the vectors on disk, and map them; None: those of a collection, not of an index. The
        refine rows are mapped where there are some, of which a search reads `rerank` a query; else
        the rows that it walks on. Neither their checksum nor their values are looked at then
        (`check` looks at the values). Leave the file as it is meanwhile; to replace it, write
        another one and rename it over the old one, as `save` does. Before and after each search the
        size and the time of the file are compared: CorruptIndexError if it was written to or cut in
        place. A file that is cut during a search ends the process (SIGBUS), and a change that keeps
        size and time goes unnoticed.
    """
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        return load_collection(Path(path), mmap=mmap is None or mmap, device=device)
    return load_index(path, mmap=bool(mmap), device=device)
