"""Finding equal rows: they share one node."""

import numpy as np

from hnsw_gpu.engine.appending import appended
from hnsw_gpu.engine.compiled import jit

MOVED = 16384  # rows copied at a time


class NodeTable:
    """Hash table of the nodes' rows. A row is compared byte for byte, as uint64 words."""

    def __init__(self):
        self._slots = np.full(16, -1, np.int32)
        self._count = 0
        self._given = np.empty(0, np.uint64)  # of each node, see `count_unlike`, and room
        self._given_count = 0

    @property
    def nbytes(self):
        """Bytes held."""
        return self._slots.nbytes + self._given.nbytes

    def assign(self, rows, first, stop):
        """int64 nodes (stop - first,) of rows first..stop, and the rows that are new nodes.

        The rows before `first` are nodes already. New ones are numbered first, first + 1, ... in
        order of appearance. Row length in bytes: a multiple of 8.
        """
        words = rows.view(np.uint64)
        needed = stop + stop // 2
        is_current = self._count == first and len(self._slots) >= needed
        self._count = -1  # until all is entered: an interrupt must not leave a table half true
        if not is_current:
            self._slots = np.full(1 << max(needed, 16).bit_length(), -1, np.int32)
            if first:
                _fill(self._slots, words, first)
        nodes = np.empty(stop - first, np.int64)
        sources = np.empty(stop - first, np.int64)
        count = _assign(self._slots, words, first, nodes, sources)
        self._count = first + count
        return nodes, sources[:count]

    def count_unlike(self, nodes, sources, first, given):
        """How many rows share a node with one that was given otherwise, before it was encoded.

        After `assign`, which gave nodes and sources; given: a uint64 (rows,) of what each row was
        made of. Of nodes that a `clear` forgot it is 0, unknown.
        """
        known = self._given if self._given_count == first else np.zeros(first, np.uint64)
        self._given = appended(known, first, given[sources - first])
        self._given_count = first + len(sources)
        theirs = self._given[nodes]
        return int(((theirs != given) & (theirs != 0)).sum())

    def clear(self):
        """Forget all nodes; the next `assign` reads them again."""
        self._count = -1
        self._given_count = -1


def move_together(rows, sources, first=0):
    """rows[first + i] = rows[sources[i]], of ascending sources (m,) that are at least first + i."""
    for start in range(0, len(sources), MOVED):
        part = sources[start : start + MOVED]
        rows[first + start : first + start + len(part)] = rows[part]


def hash_rows(rows):
    """uint64 (n,) hashes of rows (n, ...), equal for equal bytes, and never 0."""
    words = rows.view(np.uint64)
    hashes = np.empty(len(words), np.uint64)
    _hash_rows(words, hashes)
    return hashes


@jit
def _hash_rows(words, hashes):
    for i in range(len(hashes)):
        hashes[i] = _hash(words, i) | np.uint64(1)


@jit(is_inlined=True)
def _hash(words, row):
    """Multiply-and-shift hash of all words of a row."""
    h = np.uint64(0x9E3779B97F4A7C15)
    for j in range(words.shape[1]):
        h = (h ^ words[row, j]) * np.uint64(0xFF51AFD7ED558CCD)
        h ^= h >> np.uint64(32)
    return h


@jit(is_inlined=True)
def _slot(slots, words, row):
    """Where the search for a row begins."""
    return np.int64(_hash(words, row) & np.uint64(len(slots) - 1))


@jit
def _fill(slots, words, count):
    """Enter nodes 0..count, all different."""
    for node in range(count):
        slot = _slot(slots, words, node)
        while slots[slot] >= 0:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = node


@jit(is_inlined=True)
def _is_equal(words, a, b):
    for j in range(words.shape[1]):
        if words[a, j] != words[b, j]:
            return False
    return True


@jit
def _assign(slots, words, first, nodes, sources):
    """Nodes of rows first..; `sources[i]` is the row of new node first + i."""
    count = 0
    for i in range(len(nodes)):
        row = first + i
        slot = _slot(slots, words, row)
        while True:
            node = np.int64(slots[slot])
            if node < 0:
                slots[slot] = first + count
                nodes[i] = first + count
                sources[count] = row
                count += 1
                break
            if _is_equal(words, row, node if node < first else sources[node - first]):
                nodes[i] = node
                break
            slot = (slot + 1) & (len(slots) - 1)
    return count
