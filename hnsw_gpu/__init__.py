"""Deterministic HNSW nearest-neighbour search.

    index = hnsw_gpu.Index(dim=256, metric="cosine")
    index.add(vectors)
    labels, distances = index.search(queries, k=10)

Importing the package loads next to nothing: each public name brings its module when it is first
used.
"""

import concurrent.futures.thread  # noqa: F401 - an error once the main thread has ended
from typing import TYPE_CHECKING

from hnsw_gpu.lazy_names import lazy_names

if TYPE_CHECKING:
    from hnsw_gpu.cluster import Cluster, ShardLostError
    from hnsw_gpu.collection import Collection, load
    from hnsw_gpu.conversion import from_faiss, from_hnswlib, from_usearch
    from hnsw_gpu.deduplication import DedupResult, dedup
    from hnsw_gpu.exhaustive import exact_search
    from hnsw_gpu.files import CorruptIndexError
    from hnsw_gpu.index import Index
    from hnsw_gpu.results import PartialResult, RadiusResult, SearchResult
    from hnsw_gpu.serve import AnswerError, Batch, Batcher, Client, QueueFullError, ServerError
    from hnsw_gpu.warming import warm

__version__ = "0.1.0"

__all__ = [
    "AnswerError",
    "Batch",
    "Batcher",
    "Client",
    "Cluster",
    "Collection",
    "CorruptIndexError",
    "DedupResult",
    "Index",
    "PartialResult",
    "QueueFullError",
    "RadiusResult",
    "SearchResult",
    "ServerError",
    "ShardLostError",
    "__version__",
    "dedup",
    "exact_search",
    "from_faiss",
    "from_hnswlib",
    "from_usearch",
    "load",
    "warm",
]

_HOME = {
    "AnswerError": "serve",
    "Batch": "serve",
    "Batcher": "serve",
    "Client": "serve",
    "Cluster": "cluster",
    "Collection": "collection",
    "CorruptIndexError": "files",
    "DedupResult": "deduplication",
    "Index": "index",
    "PartialResult": "results",
    "QueueFullError": "serve",
    "RadiusResult": "results",
    "SearchResult": "results",
    "ServerError": "serve",
    "ShardLostError": "cluster",
    "dedup": "deduplication",
    "exact_search": "exhaustive",
    "from_faiss": "conversion",
    "from_hnswlib": "conversion",
    "from_usearch": "conversion",
    "load": "collection",
    "warm": "warming",
}

__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
