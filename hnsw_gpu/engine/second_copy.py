"""Two copies of links that change: searches read one while an `add` writes the other.

Then the two change places. Before the next change the free copy is brought up to date by the rows
that changed last, so that a small `add` costs little however many rows there are. A copy that a
search still reads is left to it, and another one is made.
"""

import sys

import numpy as np

from hnsw_gpu.engine.alignment import empty_aligned


class SecondCopy:
    """The copy that is free; used by one thread at a time."""

    def __init__(self):
        self.forget()

    def forget(self):
        """Hold nothing; the next `take` copies all."""
        self._free = None
        self._behind = []  # arrays of rows in which it differs from the other

    def take(self, current, used, length):
        """An array of `length` rows that nobody reads, the first `used` equal to `current`'s."""
        free, self._free = self._free, None
        if free is None or len(free) != length or _holders(free) != LEAST:
            free = empty_aligned((length, *current.shape[1:]), current.dtype)
            free[:used] = current[:used]
        else:
            for rows in self._behind:
                free[rows] = current[rows]
        return free

    def give(self, old, changed):
        """Keep what was current until now, which differs in the rows of the arrays `changed`."""
        if old.base is not None and old.flags.writeable:
            self._free, self._behind = old, changed


def _holders(array):
    """How many objects hold an array, and how many its memory, as every view of it does."""
    return sys.getrefcount(array), sys.getrefcount(array.base)


def _least_holders():
    """`_holders`, asked as `take` asks, of an array that nothing else holds."""
    free = empty_aligned((1, 1), np.int32)
    return _holders(free)


LEAST = _least_holders()
