"""Which nodes are kept, given pairs of near ones and an order: the three ways to link them.

star: the next node in order that no kept one has removed is kept, and removes all near it: every
removed node has a kept one within the limit. any-earlier: a node with a near one before it in order
is removed, whether that one is kept or not (SemDeDup, NeMo Curator). components: of all that hang
together by pairs the first in order is kept.

Of open nodes not all pairs are known. `all_near(nodes)` gives the keys of all that is near each:
star and any-earlier complete those alone that would be kept.
"""

from collections.abc import Callable

import numpy as np

from hnsw_gpu.engine import jit, key_nodes

LINKAGES = ("star", "components", "any-earlier")
UNDECIDED, KEPT, REMOVED = 0, 1, 2
MOST_AT_ONCE = 1024  # nodes completed together

AllNear = Callable[[np.ndarray], list[np.ndarray]]


def neighbor_lists(a, b, distances, count):
    """Pairs as lists: neighbors int32 of node i from offsets[i] to offsets[i + 1], int64 (n + 1,).

    The nearest of a node is first, of equals the smaller number.
    """
    source, target = np.concatenate([a, b]), np.concatenate([b, a])
    both = np.concatenate([distances, distances])
    order = np.lexsort((target, both, source))
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(source, minlength=count), out=offsets[1:])
    return offsets, target[order].astype(np.int32)


def star(order, offsets, neighbors, is_open, all_near: AllNear):
    """uint8 (n,) state of each node, KEPT or REMOVED; and the keys that all_near gave, by node."""
    state, batch, place = np.zeros(len(order), np.uint8), 1, 0
    completed: dict[int, np.ndarray] = {}
    while True:
        place = _star(order, offsets, neighbors, is_open, state, place)
        if place == len(order):
            return state, completed
        node = int(order[place])
        if node not in completed:
            nodes = _next_open(order[place:], state, is_open, completed, batch)
            completed |= zip(nodes.tolist(), all_near(nodes), strict=True)
            batch = min(2 * batch, MOST_AT_ONCE)
        state[node] = KEPT
        for others in (key_nodes(completed[node]), neighbors[offsets[node] : offsets[node + 1]]):
            state[others[state[others] == UNDECIDED]] = REMOVED
        place += 1


@jit
def _star(order, offsets, neighbors, is_open, state, place):
    """Decide order[place:]; stops at an open node that would be kept."""
    for p in range(place, len(order)):
        node = order[p]
        if state[node] != UNDECIDED:
            continue
        if is_open[node]:
            return p
        state[node] = KEPT
        for i in range(offsets[node], offsets[node + 1]):
            if state[neighbors[i]] == UNDECIDED:
                state[neighbors[i]] = REMOVED
    return len(order)


def any_earlier(order, offsets, neighbors, is_open, all_near: AllNear):
    """As `star`."""
    position = _positions(order)
    state, batch = np.zeros(len(order), np.uint8), 1
    completed: dict[int, np.ndarray] = {}
    _mark_later(position, offsets, neighbors, state)
    for node in order[is_open[order]].tolist():
        if state[node] == REMOVED:
            continue
        if node not in completed:
            nodes = _next_open(order[position[node] :], state, is_open, completed, batch)
            completed |= zip(nodes.tolist(), all_near(nodes), strict=True)
            batch = min(2 * batch, MOST_AT_ONCE)
        others = key_nodes(completed[node])
        state[others[position[others] > position[node]]] = REMOVED
        if (position[others] < position[node]).any():
            state[node] = REMOVED
    state[state == UNDECIDED] = KEPT
    return state, completed


@jit
def _mark_later(position, offsets, neighbors, state):
    """Remove every node with a neighbor before it."""
    for node in range(len(position)):
        for i in range(offsets[node], offsets[node + 1]):
            if position[neighbors[i]] < position[node]:
                state[node] = REMOVED
                break


def _next_open(order, state, is_open, completed, count):
    """The next `count` open nodes of an order that are undecided and not completed."""
    waiting = order[is_open[order] & (state[order] == UNDECIDED)]
    return np.array([node for node in waiting.tolist() if node not in completed][:count], np.int64)


def _positions(order):
    """int64 (n,): the place of each node in the order."""
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    return position


def components(order, offsets, neighbors):
    """int64 (n,): of each node, the first in order of those that it hangs together with."""
    root = np.full(len(order), -1, np.int64)
    _mark_components(order, offsets, neighbors, root, np.empty(len(order), np.int64))
    return root


@jit
def _mark_components(order, offsets, neighbors, root, stack):
    for p in range(len(order)):
        if root[order[p]] >= 0:
            continue
        first = order[p]
        root[first] = first
        stack[0] = first
        size = 1
        while size:
            size -= 1
            node = stack[size]
            for i in range(offsets[node], offsets[node + 1]):
                other = neighbors[i]
                if root[other] < 0:
                    root[other] = first
                    stack[size] = other
                    size += 1


def nearest_kept(offsets, neighbors, state):
    """int64 (n,): of each removed node its nearest kept neighbor, -1 where it has none."""
    root = np.empty(len(state), np.int64)
    _nearest_kept(offsets, neighbors, state, root)
    return root


@jit
def _nearest_kept(offsets, neighbors, state, root):
    for node in range(len(state)):
        root[node] = node if state[node] == KEPT else -1
        if state[node] == KEPT:
            continue
        for i in range(offsets[node], offsets[node + 1]):
            if state[neighbors[i]] == KEPT:
                root[node] = neighbors[i]
                break


def first_ancestor(order, offsets, neighbors):
    """int64 (n,): of each node that of its nearest neighbor before it in order; else itself."""
    root = np.empty(len(order), np.int64)
    _first_ancestor(order, _positions(order), offsets, neighbors, root)
    return root


@jit
def _first_ancestor(order, position, offsets, neighbors, root):
    for p in range(len(order)):
        node = order[p]
        root[node] = node
        for i in range(offsets[node], offsets[node + 1]):
            if position[neighbors[i]] < p:
                root[node] = root[neighbors[i]]
                break
