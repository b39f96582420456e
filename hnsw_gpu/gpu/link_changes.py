"""Which nodes have other links than the GPU has: noted by who changes them, until it is brought."""

from collections import deque

import numpy as np

from hnsw_gpu.engine import ChangeLock


class LinkChanges:
    """Notes of versions of an index, each of the nodes whose links on layer 0 are new in it.

    No more ids are held than there are nodes on the GPU: bringing all costs less then.
    """

    def __init__(self) -> None:
        self._changing = ChangeLock()
        self._since = 0  # all changes of later versions are in the notes
        self._notes: deque[tuple[int, np.ndarray]] = deque()
        self._held = 0  # ids, and notes

    def note(self, version: int, changed: np.ndarray | None, here: int, node_count: int) -> None:
        """Version `version`, later than all before, gives other links to `changed` (m,).

        None: it shares nothing with the version before. `node_count` nodes of version `here` are on
        the GPU; of that and older ones, notes are of no more use.
        """
        with self._changing.lock:
            while self._notes and self._notes[0][0] <= here:
                self._since, ids = self._notes.popleft()
                self._held -= len(ids) + 1
            if changed is not None:
                self._notes.append((version, changed))
                self._held += len(changed) + 1
            if changed is None or self._held > node_count:
                self._since, self._held = version, 0
                self._notes.clear()

    def between(self, here: int, version: int) -> np.ndarray | None:
        """Ids (m,), ascending, whose links differ between two versions; None: it is not known."""
        with self._changing.lock:
            if here < self._since:
                return None
            due = [ids for number, ids in self._notes if here < number <= version]
        return np.unique(np.concatenate([np.empty(0, np.int64), *due]))
