"""Finding labels that do not ascend: a hash table of their entries, which grows with them."""

import numpy as np

from hnsw_gpu.engine.bits import is_on
from hnsw_gpu.engine.compiled import jit

NO_BITS = np.empty(0, np.uint32)
NOT_SEEN = -2  # what another thread writes, and this one does not see yet


class LabelTable:
    """Hash table of entries (`entries.py`) by their labels, of which each leads to the one before.

    One table serves the labels of before a change and after it: one thread adds at a time, and
    others may look up meanwhile. They pass over entries that they do not know.
    """

    def __init__(self, labels):
        size = 2 << len(labels).bit_length()
        self._slots = np.full(size, -1, np.int64)  # the last entry of a label
        # Of each entry, the last one before it, or -1.
        self._before = np.full(2 * size // 3, NOT_SEEN, np.int64)
        _enter(self._slots, self._before, labels, 0)

    @property
    def nbytes(self):
        """Bytes held."""
        return self._slots.nbytes + self._before.nbytes

    def with_added(self, labels, first):
        """A table with the entries from `first` on, of all `labels`, too: this one, if it fits."""
        if len(labels) > len(self._before):
            return LabelTable(labels)
        _enter(self._slots, self._before, labels, first)
        return self

    def find(self, labels, wanted, bits):
        """int64 entries (m,): the last of each label in `wanted` (m,), if its bit is set, or -1.

        labels: of the entries that are known. bits: of the entries; None: all are set.
        """
        entries = np.empty(len(wanted), np.int64)
        bits = NO_BITS if bits is None else bits
        while not _find(self._slots, self._before, labels, wanted, bits, entries):
            pass  # the processor shows a slot that was written before what was written before it
        return entries


@jit(is_inlined=True)
def _slot(slots, label):
    """Where the search for a label begins (multiply-and-shift hash)."""
    h = np.uint64(label) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((h ^ h >> np.uint64(32)) & np.uint64(len(slots) - 1))


@jit
def _enter(slots, before, labels, first):
    for entry in range(first, len(labels)):
        slot = _slot(slots, labels[entry])
        while slots[slot] >= 0 and labels[slots[slot]] != labels[entry]:
            slot = (slot + 1) & (len(slots) - 1)
        before[entry] = slots[slot]
        slots[slot] = entry


@jit
def _find(slots, before, labels, wanted, bits, entries):
    """Write `entries`; False where not all is seen yet that another thread wrote."""
    for i in range(len(wanted)):
        slot = _slot(slots, wanted[i])
        entries[i] = -1
        while slots[slot] >= 0:
            entry = slots[slot]
            while entry >= len(labels):
                entry = before[entry]
            if entry == NOT_SEEN:
                return False
            if entry >= 0 and labels[entry] == wanted[i]:
                if not len(bits) or is_on(bits, entry):
                    entries[i] = entry
                break
            slot = (slot + 1) & (len(slots) - 1)
    return True
