"""Settings of the server."""

from typing import NamedTuple

from hnsw_gpu.serve.saved_place import Saved


class OnRay(NamedTuple):
    """Where a collection's shards are searched, if not in this process."""

    address: str  # of the Ray cluster; "local": one of our own
    replicas: int = 1  # of each shard
    timeout_s: float = 30.0  # of a search


class ServerSettings(NamedTuple):
    """How to serve."""

    path: Saved  # index or collection
    root: Saved  # swaps are confined to this folder
    on_ray: OnRay | None = None
    device: str = "auto"
    mmap: bool = False
    threads: int | None = None
    batch_rows: int | None = None
    queue_rows: int = 16_384
    most_body: int = 2**26  # bytes
    timeout_s: float = 30.0  # to receive a head, a body, to answer, and to be rid of an answer
    drain_s: float = 1.0  # between "not ready" and the end of listening
    token: str | None = None
    has_access_log: bool = False
    allowed_hosts: frozenset[str] | None = None  # besides addresses; None: all
