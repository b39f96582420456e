"""Labels of nodes, against lists of them."""

import itertools

import numpy as np
import pytest

from hnsw_gpu.engine import Labels
from hnsw_gpu.engine.bits import count_on, unpack_bits


@pytest.mark.parametrize("seed", range(24))
def test_changes_in_any_order(seed, monkeypatch):
    """New nodes, copies of old ones, deletes, labels that come back: each node carries its list.

    Labels of before a change say afterwards what they said. With what is useless left out often.
    """
    monkeypatch.setattr("hnsw_gpu.engine.labels.USELESS", (1024, 0, 3)[seed % 3])
    rng, deleted = np.random.default_rng(seed), {}
    free = rng.permutation(400).astype(np.int64)  # labels that nobody had
    if seed % 2:
        free.sort()
    held, expected, before = Labels(), [], []
    while len(free) > 20:
        some, free = np.split(free, [rng.integers(1, 20)])
        new = max(len(expected) + rng.integers(0, 8), 1)
        nodes = rng.integers(0, new, len(some))
        expected += [[] for _ in range(new - len(expected))]
        for label, node in zip(some.tolist(), nodes.tolist(), strict=True):
            expected[node].append(label)
            deleted.pop(label, None)
        held = held.with_added(some, nodes, new)
        agree(held, expected)
        if rng.random() < 0.4:
            gone = rng.permutation(held.sorted)[: rng.integers(1, 6)]
            held = held.without(held.entries_of(gone))
            deleted |= {label: node_of(expected, label) for label in gone.tolist()}
            expected = [[one for one in each if one not in gone] for each in expected]
            agree(held, expected)
            if seed % 2 == 0:
                free = rng.permutation(np.concatenate([free, gone]))
        found = dict(zip(*(one.tolist() for one in held.deleted), strict=True))
        assert found == dict(sorted(deleted.items())) and list(found) == sorted(found)
        if deleted and rng.random() < 0.3:
            back = rng.permutation(list(deleted))[: rng.integers(1, 4)]
            back, forgotten = np.split(back, [rng.integers(0, len(back) + 1)])
            held = held.undeleted(back).forgetting(forgotten)
            for label in back.tolist():
                expected[deleted.pop(label)].append(label)
                free = free[free != label]
            for label in forgotten.tolist():
                del deleted[label]
            agree(held, expected)
        before.append((held, [list(each) for each in expected]))
    for each in before:
        agree(*each)


def test_the_table_of_labels_does_not_grow_by_what_comes_and_goes():
    """Deleted and brought back; deleted and given to the same node, or to others in turn."""
    held = Labels().with_added(np.arange(100)[::-1], np.arange(100), 100)
    held = held.without(held.find(np.array([3]))).undeleted(np.array([3]))
    size, some = held.nbytes, np.array([7, 30])
    for _ in range(1000):
        held = held.without(held.find(some)).undeleted(some[::-1])
    assert held.nbytes == size
    for _ in range(1000):
        held = held.without(held.find(some)).with_added(some, np.array([92, 69]), 100)
    assert held.nbytes == size and not len(held.deleted.labels)
    agree(held, [[label] for label in range(99, -1, -1)])
    for turn in range(10_000):
        held = held.without(held.find(some)).with_added(some, np.array([92, 69]) - turn % 3, 100)
    expected = [[label] for label in range(99, -1, -1)]
    expected[92], expected[69] = [7], [30]
    agree(held, expected)
    assert held.nbytes < 20 * size


@pytest.mark.parametrize("has_copies", [False, True])
@pytest.mark.parametrize("ascends", [False, True])
def test_two_that_go_on_from_the_same(has_copies, ascends):
    """As processes do after a fork, or one after an error: neither sees what the other added."""
    labels = np.arange(0, 60, 2)[:: 1 if ascends else -1]
    start = Labels().with_added(labels, np.arange(30) // (1 + has_copies), 30)
    start.find(labels)  # makes a table, where they do not ascend
    expected = [sorted(each) for each in np.split(start.packed()[1], start.packed()[0][1:-1])]
    expected = [[int(label) for label in each] for each in expected]
    ways = []
    for first in (1, 101, 201):
        new, nodes = first + 2 * np.arange(10), np.array([0, 0, 3, 30, 31, 32, 32, 7, 7, 7])
        ways.append((start.with_added(new, nodes, 33), new, nodes))
    for held, new, nodes in ways:
        mine = [list(each) for each in expected] + [[], [], []]
        for label, node in zip(new.tolist(), nodes.tolist(), strict=True):
            mine[node].append(label)
        agree(held, mine)
    agree(start, expected)


def test_a_label_that_was_given_again_and_again_is_where_it_was():
    """Each of the states, of which one table serves all."""
    held, states = Labels().with_added(np.array([5, 3, 9]), np.arange(3), 3), []
    for node in range(3, 60):
        held = held.without(held.find(np.array([3]))).with_added(
            np.array([3]), np.array([node]), node + 1
        )
        states.append((held, node))
        if node % 7 == 0:
            held = held.without(held.find(np.array([9]))).undeleted(np.array([9]))
    for held, node in states:
        assert held.nodes(held.find(np.array([3, 5, 9, 4]))[:3]).tolist() == [node, 0, 2]
        assert held.find(np.array([4])).tolist() == [-1]


def agree(held, expected):
    offsets, labels = held.packed()
    mine = np.split(labels, offsets[1:-1])
    assert [each.tolist() for each in mine] == [sorted(each) for each in expected]
    every = sorted(label for each in expected for label in each)
    assert held.sorted.tolist() == every
    assert held.live_count == sum(map(bool, expected))
    if every:
        entries = held.find(np.array([*every, 1000]))
        assert held.entry_labels[entries[:-1]].tolist() == every and entries[-1] == -1
        nodes = held.nodes(entries[:-1])
        assert nodes.tolist() == [node_of(expected, label) for label in every]
    count = len(expected)
    counts = [len(each) for each in expected]
    assert held.carried(np.arange(count)).tolist() == counts
    assert held.live_nodes().tolist() == [size > 0 for size in counts]
    keys = 2 * np.arange(count, dtype=np.uint64)[None]  # node after node (R2)
    found = held.keys_to_labels(keys, len(every) + 1)[0][0]
    assert found.tolist() == [*itertools.chain(*map(sorted, expected)), -1]
    mask = np.arange(400) % 3 == 0
    wanted = [any(label % 3 == 0 for label in each) for each in expected]
    packed = np.packbits(mask, bitorder="little")
    for bits in (
        held.bits_of_mask(mask), held.bits_of_mask(packed), held.bits_of(np.flatnonzero(mask)),
        held.bits_of_mask(np.stack([~mask, mask]))[1],
    ):  # fmt: skip
        assert unpack_bits(held.node_bits(bits), count).tolist() == wanted
        assert count_on(bits) == sum(label % 3 == 0 for label in every)


def node_of(expected, label):
    return next(node for node, each in enumerate(expected) if label in each)


def test_who_reads_rings_while_they_grow_finds_every_entry_within_them():
    """Arrays that were taken together lead to no entry behind their end, whatever is added then."""
    held = Labels().with_added(np.arange(9), np.arange(9) % 3, 3)
    for label in range(9, 400):
        _, lasts, nexts = held._entries.rings
        held = held.with_added(np.array([label]), np.array([label % 3]), 3)
        assert lasts[:3].max() < len(nexts)


def test_what_was_deleted_is_not_looked_through():
    """Few of the entries found by nodes are not live; the others come back all the same."""
    every = np.arange(20_000)
    held = Labels().with_added(every, every % 5, 5)
    held = held.without(held.find(every[5:]))
    assert held._entries.are_linked(np.arange(held._known[0])).sum() < 2_000
    offsets, labels = held.undeleted(every[5:]).packed()
    assert np.diff(offsets).tolist() == [4_000] * 5
    assert labels.tolist() == np.arange(20_000).reshape(-1, 5).T.ravel().tolist()
