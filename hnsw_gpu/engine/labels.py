"""The caller's labels and the nodes that carry them."""

import copy
from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine.bits import (
    are_on,
    bits_of_octets,
    count_on,
    is_on,
    pack_bits,
    places_on,
    unpack_bits,
    with_bits,
)
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.entries import Entries
from hnsw_gpu.engine.keys import KEY_NONE, key_distance, key_node
from hnsw_gpu.engine.label_table import LabelTable

USELESS = 1024  # entries in rings, and an eighth of the live ones: more that are not are left out
MANY = 16  # labels times this, more than there are: those that there are are looked up among them
NONE, _NO_BITS = np.empty(0, np.int64), np.empty(0, np.uint32)


class Deleted(NamedTuple):
    """What was removed and can come back: labels, none twice nor in use, and their nodes."""

    labels: np.ndarray = NONE
    nodes: np.ndarray = NONE


class Labels:
    """Labels of nodes 0..n-1. They never change: each change gives others.

    Equal vectors share a node, so it can carry many; none, and it is deleted. An entry is a label
    of a node, by its place among all that there were (`entries.py`). A bit of each says whether it
    is live, another one whether it was deleted and can come back. So a change takes time in
    proportion to itself, but for copying these bits.
    """

    def __init__(self, offsets=None, labels=None, deleted=None):
        """As in a file: node i carries `labels[offsets[i]:offsets[i + 1]]`, ascending."""
        count = 0 if offsets is None else len(offsets) - 1
        labels = NONE if labels is None else labels
        nodes = np.repeat(np.arange(count), np.diff(offsets)) if count else NONE
        self._count, self._deleted_count = len(labels), 0  # of live entries, and of deleted ones
        self._live = self._deleted = None  # bits of entries; None: all live, none deleted
        is_live = np.ones(len(labels), bool)
        if deleted is not None and len(deleted.labels):
            labels = np.concatenate([labels, deleted.labels])
            nodes = np.concatenate([nodes, deleted.nodes])
            order = np.lexsort((labels, nodes))
            labels, nodes, is_live = labels[order], nodes[order], order < self._count
            self._live, self._deleted = pack_bits(is_live), pack_bits(~is_live)
            self._deleted_count = len(deleted.labels)
        self._entries = Entries(labels, nodes, count, np.flatnonzero(is_live))
        self._known = len(labels), count  # entries and nodes
        self._linked = len(labels) if self._is_plain else self._count  # entries found by nodes
        self._ascends = self._sorted = self._table = None  # made when first asked for
        self._live_nodes = self.node_bits(_all_on(self._live, len(labels)))
        self.live_count = int(count_on(self._live_nodes))  # how many nodes carry a label
        self._live_nodes = None if self.are_all_live else self._live_nodes

    @classmethod
    def of_nodes(cls, labels, nodes, count, deleted=None):
        """Labels (m,) of nodes (m,), in any order, of `count` nodes."""
        offsets, labels = _packed(labels, nodes, count)
        return cls(offsets, labels, deleted)

    def _changed(self):
        """The same, to be changed."""
        changed = copy.copy(self)
        changed._sorted = None
        return changed

    # ---------------------------------------------------------------- what is there

    def __len__(self):
        return self._count

    @property
    def nbytes(self):
        """Bytes held."""
        made = self._live, self._deleted, self._live_nodes, self._sorted, self._table
        return self._entries.nbytes + sum(one.nbytes for one in made if one is not None)

    @property
    def entry_labels(self):
        """int64: the label of each entry, live or not."""
        return self._entries.labels[: self._known[0]]

    @property
    def sorted(self):
        """int64 labels, ascending."""
        if self._sorted is None:
            live = self.entry_labels
            live = live if self._live is None else live[self._live_mask()]
            self._sorted = live if self._is_ascending else np.sort(live)
        return self._sorted

    @property
    def _is_ascending(self):
        if self._ascends is None:
            self._ascends = bool((self.entry_labels[1:] > self.entry_labels[:-1]).all())
        return self._ascends

    def pairs(self):
        """Labels and nodes, int64 (m,) both, of the live entries."""
        entries = np.flatnonzero(self._live_mask())
        return self.entry_labels[entries], self.nodes(entries)

    def packed(self):
        """Offsets int64 (n + 1,), and labels: node i carries `labels[offsets[i]:offsets[i + 1]]`,
        ascending."""
        labels, nodes = self.pairs()
        return _packed(labels, nodes, self._known[1])

    @property
    def deleted(self):
        """What can come back."""
        if self._deleted is None:
            return Deleted()
        entries = places_on(self._deleted, self._known[0])
        entries = entries[np.argsort(self.entry_labels[entries])]
        return Deleted(self.entry_labels[entries], self.nodes(entries))

    def find(self, labels):
        """int64 entries of the given labels (m,); -1 where there is none."""
        return self._find(labels, self._live)

    def _find(self, labels, bits):
        """int64 entries of labels (m,), the last of each, whose bit is set; None: any."""
        held = self.entry_labels
        if not len(held):
            return np.full(len(labels), -1, np.int64)
        if not self._is_ascending:
            if self._table is None:
                self._table = LabelTable(held)
            return self._table.find(held, labels, bits)
        place = np.minimum(np.searchsorted(held, labels), len(held) - 1)
        is_there = held[place] == labels
        if bits is not None:
            is_there &= are_on(bits, place)
        return np.where(is_there, place, -1)

    def entries_of(self, labels, told=None):
        """int64 entries of labels (m,); KeyError names the first not here, as `told` (m,) does."""
        entries = self.find(labels)
        if (entries < 0).any():
            missing = (labels if told is None else told)[entries < 0].tolist()
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise KeyError(f"label {missing[0]!r}{more}: not in the index")
        return entries

    def _deleted_entries(self, labels, told):
        """int64 entries that can come back; KeyError names the first label (m,) that cannot."""
        entries = np.full(len(labels), -1, np.int64)
        if self._deleted is not None:
            entries = self._find(labels, self._deleted)
        if (entries < 0).any():
            missing = (labels if told is None else told)[entries < 0].tolist()
            raise KeyError(f"label {missing[0]!r}: was not deleted, or is gone for good")
        return entries

    def nodes(self, entries):
        """int64 nodes of entries."""
        return self._entries.nodes(entries)

    @property
    def _is_plain(self):
        """Is each entry, live or not, the only one of the node of its number?"""
        return not len(self._entries.rings[1])

    def _live_mask(self):
        """bool: which entries are live."""
        if self._live is None:
            return np.ones(self._known[0], bool)
        return unpack_bits(self._live, self._known[0])

    def carried(self, nodes):
        """int64 (m,): how many labels each of nodes (m,) carries."""
        counts, bits = np.empty(len(nodes), np.int64), self._live
        _, lasts, nexts = self._entries.rings
        bits = _NO_BITS if bits is None else bits
        _carried(nodes, self._known[0], lasts, nexts, bits, counts)
        return counts

    @property
    def live_bits(self):
        """Packed bits, uint32: which nodes carry a label; None: all do."""
        return self._live_nodes

    def live_nodes(self):
        """bool (n,): nodes that carry a label."""
        count = self._known[1]
        return np.ones(count, bool) if self.are_all_live else unpack_bits(self._live_nodes, count)

    @property
    def are_all_live(self):
        """Does every node carry a label?"""
        return self.live_count == self._known[1]

    @property
    def kept_count(self):
        """How many nodes carry a label, or can carry one again."""
        if self._deleted is None:
            return self.live_count
        is_kept = self.live_nodes()
        is_kept[self.deleted.nodes] = True
        return int(is_kept.sum())

    def node_bits(self, bits):
        """Packed bits (..., words) of the nodes that have at least one of the entries of `bits`."""
        if self._is_plain:
            return bits
        known, count = self._known
        nodes = self._entries.rings[0][:known]
        result = np.zeros((*bits.shape[:-1], -(-count // 32)), np.uint32)
        for row in np.ndindex(bits.shape[:-1]):
            mine = nodes[places_on(bits[row], known)].astype(np.int64)
            result[row] = with_bits(_NO_BITS, mine, True, count)
        return result

    def bits_of(self, labels):
        """Packed bits of the live entries of labels (m,), of which some may not be there."""
        known = self._known[0]
        if MANY * len(labels) > known:
            return self._among_live(pack_bits(np.isin(self.entry_labels, labels)))
        entries = self.find(labels)
        return with_bits(_NO_BITS, entries[entries >= 0], True, known)

    def _among_live(self, bits):
        return bits if self._live is None else bits & self._live

    def bits_of_mask(self, mask):
        """Packed bits (..., words) of the live entries that a mask by label, bool (..., m), allows.

        Or packed, uint8 (..., octets). IndexError names the largest label, if it is not covered.
        """
        known, covered = self._known[0], mask.shape[-1] * (8 if mask.dtype == np.uint8 else 1)
        held = self.entry_labels
        if known <= covered and self._is_ascending and held[-1:].tolist() == [known - 1]:
            # as labels that ascend are not negative, each is the number of its entry
            is_packed = mask.dtype == np.uint8
            bits = bits_of_octets(mask, known) if is_packed else pack_bits(mask[..., :known])
            return self._among_live(bits)
        if held.max(initial=-1) >= covered:
            largest = int(held[self._live_mask()].max(initial=-1))
            if largest >= covered:
                raise IndexError(largest)
            mask = np.concatenate([mask, np.zeros((*mask.shape[:-1], 1), mask.dtype)], axis=-1)
            held = np.minimum(held, covered)  # of those that are not live
        if mask.dtype == np.uint8:
            mask = mask[..., held >> 3] >> (held & 7).astype(np.uint8) & 1
        else:
            mask = mask[..., held]
        return self._among_live(pack_bits(mask))

    def keys_to_labels(self, keys, k, allowed=None, skipped=None):
        """Labels and distances (q, k) of keys (q, m): each node's labels, ascending.

        `allowed` is None (all that are live) or packed bits of entries, uint32 (1 or q, words);
        `skipped` int64 (q,) one entry a query that is left out. Too few: label -1, distance +inf.
        """
        labels = np.empty((len(keys), k), np.int64)
        distances = np.empty((len(keys), k), np.float32)
        if allowed is None:
            allowed = np.empty((0, 0), np.uint32) if self._live is None else self._live[None]
        skipped = NONE if skipped is None else skipped
        _, lasts, nexts = self._entries.rings
        _keys_to_labels(keys, self.entry_labels, lasts, nexts, allowed, skipped, labels, distances)
        return labels, distances

    # ---------------------------------------------------------------- what changes them

    def with_added(self, labels, nodes, count):
        """Labels after giving `labels` (m,), none of them in use, to `nodes` (m,) of `count`."""
        others = self._count + self._deleted_count
        if not self._is_plain and self._known[0] - others > USELESS + others // 8:
            return self._renewed().with_added(labels, nodes, count)
        order = np.lexsort((labels, nodes))
        labels, nodes = labels[order], nodes[order]
        added, back = self._changed(), NONE
        added._give_to_nodes(np.unique(nodes), count)
        added._count += len(labels)
        if self._live is not None:
            known = self._find(labels, None)
            added._forget(known[known >= 0])
            is_back = (known >= 0) & (self.nodes(known) == nodes)  # it had this very label before
            is_back &= self._entries.are_linked(known)
            back, labels, nodes = known[is_back], labels[~is_back], nodes[~is_back]
        first = self._known[0]
        added._entries = self._entries.with_added(self._known, labels, nodes, count)
        added._known = first + len(labels), count
        added._linked += len(labels)
        if self._live is not None:
            size = added._known[0]
            added._live = with_bits(self._live, np.append(back, np.arange(first, size)), True, size)
            added._deleted = with_bits(_all_off(added._deleted), NONE, False, size)
        joint = added.entry_labels[max(first - 1, 0) :]
        added._ascends = self._is_ascending and bool((joint[1:] > joint[:-1]).all())
        if self._table is not None:
            goes_on = added._entries is self._entries  # else entries of that number are others'
            table = self._table.with_added(added.entry_labels, first) if goes_on else None
            added._table = table
        return added

    def without(self, entries):
        """Labels after removing live entries, which `undeleted` brings back; the nodes stay."""
        if not len(entries):
            return self
        left, (known, count) = self._changed(), self._known
        left._live = with_bits(_all_on(self._live, known), entries, False, known)
        left._deleted = with_bits(_all_off(self._deleted), entries, True, known)
        left._count -= len(entries)
        left._deleted_count += len(entries)
        emptied = np.unique(self.nodes(entries))
        emptied = emptied[left.carried(emptied) == 0]
        left.live_count -= len(emptied)
        left._live_nodes = with_bits(_all_on(self._live_nodes, count), emptied, False, count)
        if not left._is_plain and left._linked - left._count > USELESS + left._count // 8:
            return left._renewed()
        return left

    def _renewed(self):
        """The same, where only live entries are found by their nodes."""
        labels, nodes = self.pairs()
        return Labels.of_nodes(labels, nodes, self._known[1], self.deleted)

    def undeleted(self, labels, told=None):
        """Labels after `without` was taken back; KeyError names the first label that cannot be."""
        nodes = self.nodes(self._deleted_entries(labels, told))
        return self.with_added(labels, nodes, self._known[1])

    def forgetting(self, labels, told=None):
        """The same labels; deleted ones (m,) cannot come back. KeyError as `undeleted`."""
        left = self._changed()
        left._forget(self._deleted_entries(labels, told))
        return left

    def _forget(self, entries):
        """Let entries not come back, deleted or not."""
        if self._deleted is not None:
            self._deleted_count -= int(are_on(self._deleted, entries).sum())
            self._deleted = with_bits(self._deleted, entries, False, self._known[0])

    def _give_to_nodes(self, nodes, count):
        """Let nodes, none twice, of `count` carry labels."""
        known = self._known[1]
        was_live = np.zeros(len(nodes), bool)
        old = nodes < known
        was_live[old] = self.are_all_live or are_on(self._live_nodes, nodes[old])
        bits = self._live_nodes
        self.live_count += int((~was_live).sum())
        if self.live_count == count:
            self._live_nodes = None
        else:
            self._live_nodes = with_bits(_all_on(bits, known), nodes, True, count)

    def moved(self, node_of, count, *, keep_deleted):
        """The labels where node i has become node_of[i], of `count`: equal ones have become one."""
        labels, nodes = self.pairs()
        deleted = self.deleted if keep_deleted else Deleted()
        deleted = Deleted(deleted.labels, node_of[deleted.nodes])
        return Labels.of_nodes(labels, node_of[nodes], count, deleted)

    def renumbered(self, numbers):
        """The labels of the same nodes, where label i has become numbers[i]."""
        labels, nodes = self.pairs()
        deleted = self.deleted
        deleted = Deleted(numbers[deleted.labels], deleted.nodes)
        return Labels.of_nodes(numbers[labels], nodes, self._known[1], deleted)

    def problems(self, count, next_label):
        """What is wrong, in sentences, as the labels of `count` nodes, all below `next_label`."""
        offsets, labels = self.packed()
        return label_problems(offsets, labels, self.deleted, count, next_label)


def _packed(labels, nodes, count):
    """Labels (m,) of nodes (m,), of `count`, as in a file: offsets, and labels by node."""
    offsets = np.zeros(count + 1, np.int64)
    offsets[1:] = np.cumsum(np.bincount(nodes, minlength=count))
    return offsets, labels[np.lexsort((labels, nodes))]


def _all_on(bits, count):
    return pack_bits(np.ones(count, bool)) if bits is None else bits


def _all_off(bits):
    return _NO_BITS if bits is None else bits


def label_problems(offsets, labels, deleted, count, next_label):
    """What is wrong, in sentences, with labels in a file, of `count` nodes, below `next_label`."""
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
    return found + _deleted_problems(deleted, ordered, count)


def _deleted_problems(deleted, in_use, count):
    """What is wrong, in sentences, with what can come back to `count` nodes."""
    labels, nodes = deleted
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


@jit
def _carried(nodes, known, lasts, nexts, live, counts):
    for i in range(len(nodes)):
        last = lasts[nodes[i]] if len(lasts) else nodes[i]
        entry = nexts[last] if len(lasts) and last >= 0 else last
        counts[i] = 0
        while entry >= 0:
            if entry < known and (not len(live) or is_on(live, entry)):
                counts[i] += 1
            if entry == last:
                break
            entry = nexts[entry]


@jit
def _keys_to_labels(keys, entry_labels, lasts, nexts, allowed, skipped, labels, distances):
    k = labels.shape[1]
    for q in range(keys.shape[0]):
        count = 0
        row = q if allowed.shape[0] > 1 else 0
        skip = skipped[q] if len(skipped) else -1
        for i in range(keys.shape[1]):
            key = keys[q, i]
            if key == KEY_NONE or count == k:
                break
            node = np.int64(key_node(key))
            last = lasts[node] if len(lasts) else node
            entry = nexts[last] if len(lasts) and last >= 0 else last
            while entry >= 0 and count < k:
                is_one = entry < len(entry_labels) and entry != skip
                if is_one and (not len(allowed) or is_on(allowed[row], entry)):
                    labels[q, count] = entry_labels[entry]
                    distances[q, count] = key_distance(key)
                    count += 1
                if entry == last:
                    break
                entry = nexts[entry]
        for i in range(count, k):
            labels[q, i] = -1
            distances[q, i] = np.inf
