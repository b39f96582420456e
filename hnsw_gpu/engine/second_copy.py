"""Two copies of links that change: searches read one while an `add` writes the other.

Then the two change places. Before the next change the free copy is brought up to date by the rows
that changed last, so that a small `add` costs little however many rows there are. A copy that a
search still reads is left to it, and another one is made.
"""

import weakref
from collections.abc import Callable

import numpy as np

from hnsw_gpu.engine.alignment import empty_aligned


class SecondCopy:
    """The copy that is free; used by one thread at a time."""

    def __init__(self):
        self.forget()

    def forget(self):
        """Hold nothing; the next `take` copies all."""
        self._free = None
        self._lease: Callable[[], object] = lambda: None  # of `_free`; None when nobody reads it
        self._behind = []  # arrays of rows in which it differs from the other

    def take(self, current, used, length):
        """An array of `length` rows that nobody reads, the first `used` equal to `current`'s."""
        free, self._free = self._free, None
        if free is None or len(free) != length or self._lease() is not None:
            free = empty_aligned((length, *current.shape[1:]), current.dtype)
            free[:used] = current[:used]
        else:
            for rows in self._behind:
                free[rows] = current[rows]
        return np.asarray(Lease(free))

    def give(self, old, changed):
        """Keep what was current until now, which differs in the rows of the arrays `changed`.

        Only where `take` made it; of another array nobody could say who reads it.
        """
        lease = _lease_of(old)
        if lease is not None:
            self._free, self._lease, self._behind = lease.array, weakref.ref(lease), changed


class Lease:
    """What every array over the memory of `array` holds, but for `array` itself."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


def _lease_of(array):
    """The Lease whose memory an array is of, or None."""
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner if isinstance(owner, Lease) else None
