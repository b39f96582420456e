"""Finding labels that do not ascend: a hash table of entries, which grows with the labels."""

import numpy as np

from hnsw_gpu.engine.compiled import jit


class LabelTable:
    """Hash table of entries 0, 1, ... by their labels, which are all different.

    One thread adds at a time. Others may look up meanwhile: they are given how many entries they
    know of, and see no more.
    """

    def __init__(self, labels):
        self._slots = np.empty(0, np.int64)
        self.add(labels, 0)

    @property
    def nbytes(self):
        """Bytes held."""
        return self._slots.nbytes

    def add(self, labels, first):
        """Enter `labels` from entry `first` on; those before are in, in the same places."""
        if len(self._slots) < 2 * len(labels):
            first, slots = 0, np.full(4 << len(labels).bit_length(), -1, np.int64)
        else:
            slots = self._slots
        _enter(slots, labels, first)
        self._slots = slots

    def find(self, labels, wanted):
        """int64 entries (m,), of entries of `labels` (n,), of labels (m,); -1 where not there."""
        entries = np.empty(len(wanted), np.int64)
        _find(self._slots, labels, wanted, entries)
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
def _find(slots, labels, wanted, entries):
    for i in range(len(wanted)):
        slot = _slot(slots, wanted[i])
        entries[i] = -1
        while slots[slot] >= 0:
            entry = slots[slot]
            if entry < len(labels) and labels[entry] == wanted[i]:
                entries[i] = entry
                break
            slot = (slot + 1) & (len(slots) - 1)
