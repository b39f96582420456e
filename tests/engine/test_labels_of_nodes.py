"""Labels of nodes, against lists of them."""

import numpy as np
import pytest

from hnsw_gpu.engine import Labels


@pytest.mark.parametrize("seed", range(20))
def test_changes_in_any_order(seed):
    """New nodes, copies of old ones, deletes, labels that come back: each node carries its list.

    Labels of before a change say afterwards what they said.
    """
    rng = np.random.default_rng(seed)
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
        held = held.with_added(some, nodes, new)
        agree(held, expected)
        if rng.random() < 0.4:
            gone = rng.permutation(held.sorted)[: rng.integers(1, 6)]
            held = held.without(held.entries_of(gone))
            expected = [[one for one in each if one not in gone] for each in expected]
            agree(held, expected)
            if seed % 2 == 0:
                free = rng.permutation(np.concatenate([free, gone]))
        before.append((held, [list(each) for each in expected]))
    for each in before:
        agree(*each)


def test_the_table_of_labels_does_not_grow_by_what_comes_and_goes():
    held = Labels().with_added(np.arange(100)[::-1], np.arange(100), 100)
    held.find(np.array([3]))
    size = held.nbytes
    for _ in range(1000):
        held = held.without(held.find(np.array([7, 30]))).undeleted(np.array([30, 7]))
    assert held.nbytes == size
    agree(held, [[label] for label in range(99, -1, -1)])


def agree(held, expected):
    mine = np.split(held.labels, held.offsets[1:-1])
    assert [each.tolist() for each in mine] == [sorted(each) for each in expected]
    every = sorted(label for each in expected for label in each)
    assert held.sorted.tolist() == every
    assert held.live_count == sum(map(bool, expected))
    if every:
        entries = held.find(np.array([*every, 1000]))
        assert held.labels[entries[:-1]].tolist() == every and entries[-1] == -1
