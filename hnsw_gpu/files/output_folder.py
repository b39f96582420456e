"""The folder that a long job writes into: one job at a time."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hnsw_gpu.files.folders import Folder, LocalFolder

try:
    import fcntl
except ImportError:  # of Windows: there jobs are not kept apart
    fcntl = None  # type: ignore[assignment]

IN_USE = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def held(folder: Folder) -> Iterator[None]:
    """Make the folder and hold it; ValueError where another job does. Left empty it is removed.

    The system lets go of it however a job ends. File systems without locks are written to as well,
    and URLs: two of the same job do no harm there, for they write the same bytes.
    """
    if not isinstance(folder, LocalFolder):
        folder.make()
        yield
        return
    out = folder.path
    is_made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    descriptor = -1 if fcntl is None else os.open(out, os.O_RDONLY)
    try:
        if fcntl is not None:
            _lock(descriptor, out)
        yield
    finally:
        if is_made:
            with suppress(OSError):
                out.rmdir()
        if descriptor >= 0:
            os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in IN_USE:
            raise ValueError(
                f"{out}: another job writes into this folder; wait for it, or choose another"
            ) from None
