"""Finding labels that do not ascend: a hash table of their nodes, which grows with the labels."""

import numpy as np

from hnsw_gpu.engine.compiled import jit


class LabelTable:
    """Hash table of nodes by the labels that they carry, or carried once.

    What a node carries no more is passed over. So one table serves the labels of before a change
    and after it: one thread adds at a time, and others may look up meanwhile.
    """

    def __init__(self, offsets, labels):
        nodes = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        self._slots = np.full(4 << len(labels).bit_length(), -1, np.int64)
        self._used = 0
        self._enter(labels, nodes)

    @property
    def nbytes(self):
        """Bytes held."""
        return self._slots.nbytes

    def with_added(self, labels, nodes, offsets, all_labels):
        """A table with `labels` (m,) of `nodes` (m,) too, which are among all: this one if it fits.

        offsets, all_labels: where node i carries `all_labels[offsets[i]:offsets[i + 1]]`.
        """
        if 2 * (self._used + len(labels)) > len(self._slots):
            return LabelTable(offsets, all_labels)
        self._enter(labels, nodes)
        return self

    def _enter(self, labels, nodes):
        _enter(self._slots, labels, nodes)
        self._used += len(labels)

    def find(self, offsets, labels, wanted):
        """int64 places (m,) in `labels` of the labels `wanted` (m,); -1 where not there."""
        places = np.empty(len(wanted), np.int64)
        _find(self._slots, offsets, labels, wanted, places)
        return places


@jit(is_inlined=True)
def _slot(slots, label):
    """Where the search for a label begins (multiply-and-shift hash)."""
    h = np.uint64(label) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((h ^ h >> np.uint64(32)) & np.uint64(len(slots) - 1))


@jit
def _enter(slots, labels, nodes):
    for i in range(len(labels)):
        slot = _slot(slots, labels[i])
        while slots[slot] >= 0:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = nodes[i]


@jit
def _find(slots, offsets, labels, wanted, places):
    for i in range(len(wanted)):
        slot = _slot(slots, wanted[i])
        places[i] = -1
        while slots[slot] >= 0 and places[i] < 0:
            node = slots[slot]
            if node < len(offsets) - 1:
                for place in range(offsets[node], offsets[node + 1]):
                    if labels[place] == wanted[i]:
                        places[i] = place
            slot = (slot + 1) & (len(slots) - 1)
