"""Finding labels that do not ascend: a hash table of their entries, which grows with them."""

import numpy as np

from hnsw_gpu.engine.bits import is_on
from hnsw_gpu.engine.compiled import jit

NO_BITS = np.empty(0, np.uint32)


class LabelTable:
    """Hash table of entries (`entries.py`) by their labels.

    An entry stays in it, so one table serves the labels of before a change and after it: one thread
    adds at a time, and others may look up meanwhile.
    """

    def __init__(self, labels):
        self._slots = np.full(4 << len(labels).bit_length(), -1, np.int64)
        self._used = len(labels)
        _enter(self._slots, labels, 0)

    @property
    def nbytes(self):
        """Bytes held."""
        return self._slots.nbytes

    def with_added(self, labels, first):
        """A table with the entries from `first` on, of all `labels`, too: this one, if it fits."""
        self._used += len(labels) - first
        if 2 * self._used > len(self._slots):
            return LabelTable(labels)
        _enter(self._slots, labels, first)
        return self

    def find(self, labels, wanted, bits):
        """int64 entries (m,), the last ones of the labels `wanted` (m,); -1 where there is none.

        bits: of the entries that count; None: all of `labels` do.
        """
        entries = np.empty(len(wanted), np.int64)
        _find(self._slots, labels, wanted, NO_BITS if bits is None else bits, entries)
        return entries


@jit(is_inlined=True)
def _slot(slots, label):
    """Where the search for a label begins (multiply-and-shift hash)."""
    h = np.uint64(label) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((h ^ h >> np.uint64(32)) & np.uint64(len(slots) - 1))


@jit
def _enter(slots, labels, first):
    for entry in range(first, len(labels)):
        slot = _slot(slots, labels[entry])
        while slots[slot] >= 0:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = entry


@jit
def _find(slots, labels, wanted, bits, entries):
    for i in range(len(wanted)):
        slot = _slot(slots, wanted[i])
        entries[i] = -1
        while slots[slot] >= 0:
            entry = slots[slot]
            is_it = entry < len(labels) and labels[entry] == wanted[i]
            if is_it and (not len(bits) or is_on(bits, entry)):
                entries[i] = entry
            slot = (slot + 1) & (len(slots) - 1)
