"""Settings of the server."""

from pathlib import Path
from typing import NamedTuple


class ServerSettings(NamedTuple):
    """How to serve."""

    path: Path  # of the saved index
    root: Path  # swaps are confined to this folder
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
