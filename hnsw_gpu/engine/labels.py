"""The caller's labels and the nodes that carry them."""

from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine.appending import appended
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.keys import KEY_NONE, key_distance, key_node
from hnsw_gpu.engine.label_table import LabelTable


class Deleted(NamedTuple):
    """What was removed and can come back: labels, none twice nor in use, and their nodes."""

    labels: np.ndarray = np.empty(0, np.int64)
    nodes: np.ndarray = np.empty(0, np.int64)

    def without(self, labels):
        """What is left but for labels that are in use, or forgotten."""
        if not len(self.labels):
            return self
        is_left = ~np.isin(self.labels, labels)
        return Deleted(self.labels[is_left], self.nodes[is_left])

    def places(self, labels, told=None):
        """int64 places of labels (m,); KeyError names the first not here, as `told` (m,) does."""
        order = np.argsort(self.labels)
        place = np.searchsorted(self.labels, labels, sorter=order)
        known = place < len(order)
        known[known] = self.labels[order[place[known]]] == labels[known]
        if not known.all():
            missing = (labels if told is None else told)[~known].tolist()
            raise KeyError(f"label {missing[0]!r}: was not deleted, or is gone for good")
        return order[place]


class Labels:
    """Labels of nodes 0..n-1: node i carries `labels[offsets[i]:offsets[i + 1]]`, ascending.

    Equal vectors share a node, so it can carry many; none, and it is deleted. An entry is a place
    in `labels`. While every node carries one, `offsets` is 0..n and entries are nodes.
    """

    def __init__(self, offsets=None, labels=None, deleted=None):
        self.offsets = np.zeros(1, np.int64) if offsets is None else offsets
        self.labels = np.empty(0, np.int64) if labels is None else labels
        self.deleted = Deleted() if deleted is None else deleted
        self._room = self.offsets, self.labels  # each followed by what may be written
        self._order = None  # entries by label, made when first asked for, as is the next
        self._table = None  # of labels that do not ascend
        # looked up when first asked for; a cached_property has a lock, which a fork may leave held
        self._ascends = self._live_count = None

    def __len__(self):
        return len(self.labels)

    @property
    def nbytes(self):
        """Bytes held."""
        order = 0 if self._order is None else self._order.nbytes
        order += 0 if self._table is None else self._table.nbytes
        order += sum(array.nbytes for array in self.deleted)
        return self.offsets.nbytes + self.labels.nbytes + order

    @property
    def sorted(self):
        """int64 labels, ascending."""
        return self.labels if self._is_ascending else self.labels[self._entry_order()]

    @property
    def _is_ascending(self):
        if self._ascends is None:
            self._ascends = bool((self.labels[1:] > self.labels[:-1]).all())
        return self._ascends

    def _entry_order(self):
        if self._order is None:
            self._order = np.argsort(self.labels, kind="stable")
        return self._order

    def find(self, labels):
        """int64 entries of the given labels (m,); -1 where there is none."""
        if not len(self.labels):
            return np.full(len(labels), -1, np.int64)
        if self._is_ascending:
            place = np.minimum(np.searchsorted(self.labels, labels), len(self.labels) - 1)
            return np.where(self.labels[place] == labels, place, -1)
        if self._table is None:
            self._table = LabelTable(self.offsets, self.labels)
        return self._table.find(self.offsets, self.labels, labels)

    def entries_of(self, labels, told=None):
        """int64 entries of labels (m,); KeyError names the first not here, as `told` (m,) does."""
        entries = self.find(labels)
        if (entries < 0).any():
            missing = (labels if told is None else told)[entries < 0].tolist()
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise KeyError(f"label {missing[0]!r}{more}: not in the index")
        return entries

    def nodes(self, entries):
        """int64 nodes of entries."""
        if self._are_nodes:
            return entries
        return np.searchsorted(self.offsets, entries, side="right") - 1

    def with_added(self, labels, nodes, count):
        """Labels after giving `labels` (m,) to `nodes` (m,), of `count` nodes in all.

        Where all of the nodes are new that takes time in proportion to them; else all is copied.
        """
        known, deleted = len(self.offsets) - 1, self.deleted.without(labels)
        order = np.lexsort((labels, nodes))
        labels, nodes = labels[order], nodes[order]
        split = np.searchsorted(nodes, known)
        if split:  # copies of vectors that are already here
            places = np.empty(split, np.int64)
            _place(self.offsets, self.labels, nodes[:split], labels[:split], places)
            more = np.concatenate([[0], np.cumsum(np.bincount(nodes[:split], minlength=known))])
            merged = np.insert(self.labels, places, labels[:split])
            here = Labels(self.offsets + more, merged, deleted)
            here._table = self._table_with(labels[:split], nodes[:split], here)
            return here.with_added(labels[split:], nodes[split:], count)
        counts = np.bincount(nodes - known, minlength=count - known)
        ends = len(self.labels) + np.cumsum(counts)
        added = Labels(deleted=deleted)
        added._room = (
            appended(self._room[0], known + 1, ends),
            appended(self._room[1], len(self.labels), labels),
        )
        added.offsets = added._room[0][: count + 1]
        added.labels = added._room[1][: len(self.labels) + len(labels)]
        added._table = self._table_with(labels, nodes, added)
        joint = np.concatenate([self.labels[-1:], labels])
        added._ascends = self._is_ascending and bool((joint[1:] > joint[:-1]).all())
        added._live_count = self.live_count + int((counts > 0).sum())
        return added

    def _table_with(self, labels, nodes, held):
        """The table of `held`, which has labels (m,) of nodes (m,) more; None if there is none."""
        table = self._table
        return table and table.with_added(labels, nodes, held.offsets, held.labels)

    def without(self, entries):
        """Labels after removing entries, which `undeleted` brings back; the nodes stay."""
        kept = np.ones(len(self.labels), bool)
        kept[entries] = False
        before = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
        gone = self.labels[entries], self.nodes(entries)
        joint = [np.concatenate(pair) for pair in zip(self.deleted, gone, strict=True)]
        left = Labels(before[self.offsets], self.labels[kept], Deleted(*joint))
        left._ascends = self._ascends  # what is left of others may ascend, and need not be known to
        left._table = self._table
        emptied = np.unique(gone[1])
        emptied = emptied[left.offsets[emptied] == left.offsets[emptied + 1]]
        left._live_count = self.live_count - len(emptied)
        return left

    def undeleted(self, labels, told=None):
        """Labels after `without` was taken back; KeyError as of `Deleted.places`."""
        nodes = self.deleted.nodes[self.deleted.places(labels, told)]
        return self.with_added(labels, nodes, len(self.offsets) - 1)

    def forgetting(self, labels, told=None):
        """The same labels; deleted ones (m,) cannot come back. KeyError as `undeleted`."""
        self.deleted.places(labels, told)
        return Labels(self.offsets, self.labels, self.deleted.without(labels))

    def of_nodes(self, nodes, deleted):
        """Labels of some nodes (m,) that between them carry all labels, renumbered 0..m-1.

        deleted: what can still come back, of these nodes.
        """
        counts = np.diff(self.offsets)[nodes]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        deleted = Deleted(deleted.labels, np.searchsorted(nodes, deleted.nodes))
        return Labels(offsets, self.labels, deleted)

    def renumbered(self, numbers):
        """The labels of the same nodes, where label i has become numbers[i]."""
        count = len(self.offsets) - 1
        nodes = np.repeat(np.arange(count), np.diff(self.offsets))
        deleted = Deleted(numbers[self.deleted.labels], self.deleted.nodes)
        return Labels(deleted=deleted).with_added(numbers[self.labels], nodes, count)

    def grouped(self, nodes, count):
        """The labels where node i has become nodes[i], of `count`: equal ones have become one."""
        mine = np.repeat(nodes, np.diff(self.offsets))
        deleted = Deleted(self.deleted.labels, nodes[self.deleted.nodes])
        return Labels(deleted=deleted).with_added(self.labels, mine, count)

    def problems(self, count, next_label):
        """What is wrong, in sentences, as the labels of `count` nodes, all below `next_label`."""
        offsets, labels = self.offsets, self.labels
        if len(offsets) != count + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
            return ["label_offsets do not divide the labels among the nodes"]
        if offsets[-1] != len(labels):
            return ["label_offsets do not cover the labels"]
        found = []
        is_within = np.ones(max(len(labels) - 1, 0), bool)  # a label and the next share a node
        firsts = offsets[1:-1]
        is_within[firsts[(firsts > 0) & (firsts < len(labels))] - 1] = False
        if (np.diff(labels)[is_within] <= 0).any():
            found.append("the labels of a node do not ascend")
        ordered = np.sort(labels)
        if len(labels) and (ordered[0] < 0 or (np.diff(ordered) == 0).any()):
            found.append("labels are negative or repeated")
        if len(labels) and ordered[-1] >= next_label:
            found.append(f"the next label is {next_label}, and {ordered[-1]} is there")
        return found + self._deleted_problems(ordered, count)

    def _deleted_problems(self, in_use, count):
        """What is wrong, in sentences, with what can come back to `count` nodes."""
        labels, nodes = self.deleted
        if len(labels) != len(nodes):
            return ["deleted labels and their nodes differ in number"]
        if not len(labels):
            return []
        found = []
        if nodes.min() < 0 or nodes.max() >= count:
            found.append("deleted labels name nodes that are not there")
        ordered = np.sort(labels)
        is_used = np.isin(ordered, in_use).any()
        if ordered[0] < 0 or (np.diff(ordered) == 0).any() or is_used:
            found.append("deleted labels are negative, repeated or in use")
        return found

    def count(self, nodes):
        """How many labels nodes (m,) carry, together."""
        return int((self.offsets[nodes + 1] - self.offsets[nodes]).sum())

    def live_nodes(self):
        """bool (n,): nodes that carry a label."""
        return self.offsets[1:] > self.offsets[:-1]

    @property
    def live_count(self):
        """How many nodes carry a label."""
        if self._live_count is None:
            self._live_count = int(self.live_nodes().sum())
        return self._live_count

    @property
    def kept_count(self):
        """How many nodes carry a label, or can carry one again."""
        is_kept = self.live_nodes()
        is_kept[self.deleted.nodes] = True
        return int(is_kept.sum())

    @property
    def are_all_live(self):
        """Does every node carry a label? Looked up by every search, and labels never change."""
        return self.live_count == len(self.offsets) - 1

    @property
    def _are_nodes(self):
        """Is each entry a node's only one?"""
        return self.are_all_live and self.live_count == len(self.labels)

    def any_of_node(self, entries):
        """bool (..., n): nodes with at least one True among their entries, bool (..., entries)."""
        if self._are_nodes:
            return entries
        starts, ends = self.offsets[:-1], self.offsets[1:]
        result = np.empty((*entries.shape[:-1], len(starts)), bool)
        for row in np.ndindex(entries.shape[:-1]):
            before = np.concatenate([[0], np.cumsum(entries[row])])
            result[row] = before[ends] > before[starts]
        return result

    def keys_to_labels(self, keys, k, allowed=None, skipped=None):
        """Labels and distances (q, k) of keys (q, m): each node's labels, ascending.

        `allowed` is None or packed bits of entries, uint32 (1 or q, words); `skipped` int64 (q,)
        one entry a query that is left out. Too few: label -1, distance +inf.
        """
        labels = np.empty((len(keys), k), np.int64)
        distances = np.empty((len(keys), k), np.float32)
        allowed = np.empty((0, 0), np.uint32) if allowed is None else allowed
        skipped = np.empty(0, np.int64) if skipped is None else skipped
        _keys_to_labels(keys, self.offsets, self.labels, allowed, skipped, labels, distances)
        return labels, distances


@jit
def _place(offsets, labels, nodes, added, places):
    """Entries before which labels `added` (m,) belong, among those of nodes (m,)."""
    for i in range(len(added)):
        low, high = offsets[nodes[i]], offsets[nodes[i] + 1]
        while low < high:
            middle = (low + high) // 2
            if labels[middle] < added[i]:
                low = middle + 1
            else:
                high = middle
        places[i] = low


@jit
def _keys_to_labels(keys, offsets, entry_labels, allowed, skipped, labels, distances):
    k = labels.shape[1]
    for q in range(keys.shape[0]):
        count = 0
        row = q if allowed.shape[0] > 1 else 0
        skip = skipped[q] if len(skipped) else -1
        for i in range(keys.shape[1]):
            key = keys[q, i]
            if key == KEY_NONE or count == k:
                break
            node = key_node(key)
            for entry in range(offsets[node], offsets[node + 1]):
                if count == k:
                    break
                if entry == skip:
                    continue
                if allowed.shape[0]:
                    bits = allowed[row, entry >> 5]
                    if not bits >> np.uint32(entry & 31) & np.uint32(1):
                        continue
                labels[q, count] = entry_labels[entry]
                distances[q, count] = key_distance(key)
                count += 1
        for i in range(count, k):
            labels[q, i] = -1
            distances[q, i] = np.inf
