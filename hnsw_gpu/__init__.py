"""Deterministic HNSW nearest-neighbour search.

    index = hnsw_gpu.Index(dim=256, metric="cosine")
    index.add(vectors)
    labels, distances = index.search(queries, k=10)

Importing the package loads nothing else: each public name brings its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hnsw_gpu.batching import Batch, Batcher, QueueFullError
    from hnsw_gpu.client import Client, ServerError
    from hnsw_gpu.deduplication import DedupResult, dedup
    from hnsw_gpu.index import Index, RadiusResult, SearchResult, exact_search, load
    from hnsw_gpu.storage import CorruptIndexError

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Batcher",
    "Client",
    "CorruptIndexError",
    "DedupResult",
    "Index",
    "QueueFullError",
    "RadiusResult",
    "SearchResult",
    "ServerError",
    "__version__",
    "dedup",
    "exact_search",
    "load",
]

_HOME = {
    "Batch": "batching",
    "Batcher": "batching",
    "Client": "client",
    "CorruptIndexError": "storage",
    "DedupResult": "deduplication",
    "Index": "index",
    "QueueFullError": "batching",
    "RadiusResult": "index",
    "SearchResult": "index",
    "ServerError": "client",
    "dedup": "deduplication",
    "exact_search": "index",
    "load": "index",
}


def __getattr__(name: str) -> object:
    """The public name `name`, from its module (PEP 562); kept, so that this runs once a name."""
    if name not in _HOME:
        raise AttributeError(f"module 'hnsw_gpu' has no attribute {name!r}")
    value = getattr(import_module(f"hnsw_gpu.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
