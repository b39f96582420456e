"""Searches for many callers in batches, in a process or over HTTP.

The server needs the extra `serve`; each name loads its module when it is first used.
"""

from typing import TYPE_CHECKING

from hnsw_gpu.lazy_names import lazy_names

if TYPE_CHECKING:
    from hnsw_gpu.serve.batcher import Batch, Batcher, QueueFullError
    from hnsw_gpu.serve.client import AnswerError, Client, ServerError
    from hnsw_gpu.serve.logs import log_to_stderr
    from hnsw_gpu.serve.process import listen, serve
    from hnsw_gpu.serve.saved_place import name_within, saved_at
    from hnsw_gpu.serve.served_index import ServedIndex
    from hnsw_gpu.serve.settings import OnRay, ServerSettings

__all__ = [
    "AnswerError",
    "Batch",
    "Batcher",
    "Client",
    "OnRay",
    "QueueFullError",
    "ServedIndex",
    "ServerError",
    "ServerSettings",
    "listen",
    "log_to_stderr",
    "name_within",
    "saved_at",
    "serve",
]

_HOME = {
    "AnswerError": "client",
    "Batch": "batcher",
    "Batcher": "batcher",
    "Client": "client",
    "OnRay": "settings",
    "QueueFullError": "batcher",
    "ServedIndex": "served_index",
    "ServerError": "client",
    "ServerSettings": "settings",
    "listen": "process",
    "log_to_stderr": "logs",
    "name_within": "saved_place",
    "saved_at": "saved_place",
    "serve": "process",
}

__getattr__ = lazy_names(__name__, _HOME)
