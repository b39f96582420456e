"""Which labels were given to which nodes: entries, in the order in which they came."""

import numpy as np

from hnsw_gpu.engine.appending import appended
from hnsw_gpu.engine.compiled import jit

NO_RINGS = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64)


class Entries:
    """Entry i is label `labels[i]` of node `nodes[i]`. More are added behind, in place.

    While entry i is the only one of node i, for all of them, the arrays of `rings` are empty. Else
    they are `nodes` (entries,), and `lasts` (nodes,) and `nexts` (entries,): the entries of a node
    are a ring, ascending by label. `lasts` has the one of the largest label, -1 where there is
    none; `nexts` the one that follows, which after the last is the first, and -1 of an entry that
    is in no ring.

    One thread at a time adds. Others read meanwhile: they know how many entries there were, and
    pass over what was added. Where somebody else has added behind what the adding thread knows (in
    the process that forked this one, or before an error), it adds to a copy.
    """

    def __init__(self, labels, nodes, count, order):
        """Of labels and nodes (m,), with rings of those in `order`: by node, then label."""
        self.labels, self._used, self._count = labels, len(labels), count
        is_plain = len(nodes) == count and bool((nodes == np.arange(count)).all())
        self.rings = NO_RINGS if is_plain else _rings(nodes, order, count)

    @property
    def nbytes(self):
        """Bytes held, without room for more."""
        nodes, lasts, nexts = self.rings
        if not len(lasts):
            return self._used * self.labels.itemsize
        a_label = self.labels.itemsize + nodes.itemsize + nexts.itemsize
        return self._used * a_label + self._count * lasts.itemsize

    def nodes(self, entries):
        """int64 nodes of entries (m,)."""
        nodes, lasts, _ = self.rings
        return nodes[entries].astype(np.int64) if len(lasts) else entries

    def are_linked(self, entries):
        """bool (m,): whether entries (m,) are found by their nodes."""
        _, lasts, nexts = self.rings
        return nexts[entries] >= 0 if len(lasts) else np.ones(len(entries), bool)

    def with_added(self, known, labels, nodes, count):
        """What has labels (m,) of nodes (m,), ascending by node, then label, behind the others.

        known: how many entries, of how many nodes, there are. count: how many nodes then.
        """
        if known != (self._used, self._count):
            return self._copy(*known).with_added(known, labels, nodes, count)
        first, self._used, self._count = self._used, self._used + len(labels), count
        self.labels = appended(self.labels, first, labels)
        new = np.arange(known[1], count)
        if len(self.rings[1]) or first != known[1] or not np.array_equal(nodes, new):
            self._link(first, nodes, known[1], count)
        return self

    def _link(self, first, nodes, known_nodes, count):
        """Enter the entries from `first` on in rings."""
        rings = self.rings
        if not len(rings[1]):
            rings = _rings(np.arange(first), np.arange(first), known_nodes)
        nodes_of = appended(rings[0], first, nodes.astype(np.int32))
        nexts = appended(rings[2], first, np.full(len(nodes), -1))
        lasts = appended(rings[1], known_nodes, np.full(count - known_nodes, -1))
        if nexts is not rings[2] and lasts is rings[1]:
            lasts = lasts.copy()  # who has the shorter `nexts` finds no entry beyond them
        self.rings = nodes_of, lasts, nexts
        before, is_last = np.full(len(nodes), -1), np.zeros(len(nodes), bool)
        # Three steps: whoever sees what one wrote sees what those before it wrote, as the GIL was
        # taken again in between. Old entries lead to new ones before these become the last.
        _link_to_old(nodes_of, lasts, nexts, self.labels, first, before, is_last)
        _link_from_old(nexts, first, before)
        ends = np.flatnonzero(is_last)
        lasts[nodes[ends]] = first + ends

    def _copy(self, known, count):
        """The first `known` entries, of `count` nodes."""
        entries = np.arange(known)
        labels, nodes = self.labels[:known].copy(), self.nodes(entries)
        order = np.lexsort((labels, nodes))
        return Entries(labels, nodes, count, order[self.are_linked(entries)[order]])


def _rings(nodes, order, count):
    """The rings of entries of nodes (m,): of those in `order`, in which their nodes ascend."""
    ordered = nodes[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(order)])
    starts = np.append(0, ends + 1)[: len(ends)]
    lasts, nexts = np.full(count, -1), np.full(len(nodes), -1)
    lasts[ordered[ends]] = order[ends]
    nexts[order[:-1]] = order[1:]
    nexts[order[ends]] = order[starts]
    return nodes.astype(np.int32), lasts, nexts


@jit
def _link_to_old(nodes, lasts, nexts, labels, first, before, is_last):
    """Let new entries, from `first` on, lead to what follows them; no old one leads to them yet.

    `before` (m,) gets the old entry that will lead to a new one, or -1; `is_last` which will be
    their nodes' last.
    """
    stop = first + len(before)
    for i in range(first, stop):
        nexts[i] = i + 1  # but for the ends of runs between two old ones, which are below
    i = first
    while i < stop:
        start, node = i, nodes[i]
        end = i + 1
        while end < stop and nodes[end] == node:
            end += 1
        last = lasts[node]
        if last < 0:
            nexts[end - 1] = start
            is_last[end - 1 - first] = True
            i = end
            continue
        smallest = nexts[last]
        while i < end and labels[i] < labels[smallest]:
            i += 1
        in_front, old = i, smallest
        while i < end and labels[i] < labels[last]:
            while labels[nexts[old]] <= labels[i]:
                old = nexts[old]
            before[i - first] = old
            while i < end and labels[i] < labels[nexts[old]]:
                i += 1
            nexts[i - 1] = nexts[old]
        if in_front > start:
            nexts[in_front - 1] = smallest
        if i < end:
            before[i - first] = last
            is_last[end - 1 - first] = True
            nexts[end - 1] = start if in_front > start else smallest
        elif in_front > start:
            before[start - first] = last
        i = end


@jit
def _link_from_old(nexts, first, before):
    """Let old entries lead to the new ones behind them."""
    for i in range(len(before)):
        if before[i] >= 0:
            nexts[before[i]] = first + i
