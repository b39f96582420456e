"""Which nodes are kept, given pairs of near ones and an order: the three ways to link them.

star: the next node in order that no kept one has removed is kept, and removes all near it: every
removed node has a kept one within the limit. any-earlier: a node with a near one before it in order
is removed, whether that one is kept or not (SemDeDup, NeMo Curator). components: of all that hang
together by pairs the first in order is kept.

Of open nodes not all pairs are known. `all_near(nodes)` gives the keys of all that is near each:
star and any-earlier complete those alone that would be kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hnsw_gpu.deduplication.counting_sort import order_of_distances
from hnsw_gpu.engine import jit, key_nodes

LINKAGES = ("star", "components", "any-earlier")
UNDECIDED, KEPT, REMOVED = 0, 1, 2
MOST_AT_ONCE = 1024  # nodes completed together

AllNear = Callable[[np.ndarray], list[np.ndarray]]


class Neighbors(NamedTuple):
    """Near nodes of node i: nodes[starts[i] : ends[i]], nearest first, of equals the smaller."""

    starts: np.ndarray  # int64 (n,)
    ends: np.ndarray  # int64 (n,)
    nodes: np.ndarray  # int32
    distances: np.ndarray  # float32

    def within(self, limit: float) -> "Neighbors":
        """Those up to a distance."""
        ends = np.empty_like(self.ends)
        _end_within(self.starts, self.ends, self.distances, np.float32(limit), ends)
        return self._replace(ends=ends)


@jit
def _end_within(starts, ends, distances, limit, found):
    for node in range(len(starts)):
        own = distances[starts[node] : ends[node]]
        found[node] = starts[node] + np.searchsorted(own, limit, side="right")


def neighbor_lists(a, b, distances, count):
    """Neighbors of `count` nodes, of pairs a < b in ascending order."""
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(a, minlength=count) + np.bincount(b, minlength=count), out=offsets[1:])
    lists = Neighbors(
        offsets[:-1],
        offsets[:-1].copy(),
        np.empty(offsets[-1], np.int32),
        np.empty(offsets[-1], np.float32),
    )
    # one by one at the ends of both lists: in this order smaller nodes come before larger ones
    _fill(a, b, distances, order_of_distances(distances), lists.ends, lists.nodes, lists.distances)
    return lists


@jit
def _fill(a, b, distances, order, ends, nodes, near):
    for p in order:
        for node, other in ((a[p], b[p]), (b[p], a[p])):
            nodes[ends[node]] = other
            near[ends[node]] = distances[p]
            ends[node] += 1


def star(order, near, is_open, all_near: AllNear):
    """uint8 (n,) state of each node, KEPT or REMOVED; and the keys that all_near gave, by node."""
    state, batch, place = np.zeros(len(order), np.uint8), 1, 0
    completed: dict[int, np.ndarray] = {}
    while True:
        place = _star(order, *near[:3], is_open, state, place)
        if place == len(order):
            return state, completed
        node = int(order[place])
        if node not in completed:
            nodes = _next_open(order[place:], state, is_open, completed, batch)
            completed |= zip(nodes.tolist(), all_near(nodes), strict=True)
            batch = min(2 * batch, MOST_AT_ONCE)
        state[node] = KEPT
        for others in (key_nodes(completed[node]), near.nodes[near.starts[node] : near.ends[node]]):
            state[others[state[others] == UNDECIDED]] = REMOVED
        place += 1


@jit
def _star(order, starts, ends, neighbors, is_open, state, place):
    """Decide order[place:]; stops at an open node that would be kept."""
    for p in range(place, len(order)):
        node = order[p]
        if state[node] != UNDECIDED:
            continue
        if is_open[node]:
            return p
        state[node] = KEPT
        for i in range(starts[node], ends[node]):
            if state[neighbors[i]] == UNDECIDED:
                state[neighbors[i]] = REMOVED
    return len(order)


def any_earlier(order, near, is_open, all_near: AllNear):
    """As `star`."""
    position = _positions(order)
    state, batch = np.zeros(len(order), np.uint8), 1
    completed: dict[int, np.ndarray] = {}
    _mark_later(position, *near[:3], state)
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
def _mark_later(position, starts, ends, neighbors, state):
    """Remove every node with a neighbor before it."""
    for node in range(len(position)):
        for i in range(starts[node], ends[node]):
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


def components(order, near):
    """int64 (n,): of each node, the first in order of those that it hangs together with."""
    root = np.full(len(order), -1, np.int64)
    _mark_components(order, *near[:3], root, np.empty(len(order), np.int64))
    return root


@jit
def _mark_components(order, starts, ends, neighbors, root, stack):
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
            for i in range(starts[node], ends[node]):
                other = neighbors[i]
                if root[other] < 0:
                    root[other] = first
                    stack[size] = other
                    size += 1


def nearest_kept(near, state):
    """int64 (n,): of each removed node its nearest kept neighbor, -1 where it has none."""
    root = np.empty(len(state), np.int64)
    _nearest_kept(*near[:3], state, root)
    return root


@jit
def _nearest_kept(starts, ends, neighbors, state, root):
    for node in range(len(state)):
        root[node] = node if state[node] == KEPT else -1
        if state[node] == KEPT:
            continue
        for i in range(starts[node], ends[node]):
            if state[neighbors[i]] == KEPT:
                root[node] = neighbors[i]
                break


def first_ancestor(order, near):
    """int64 (n,): of each node that of its nearest neighbor before it in order; else itself."""
    root = np.empty(len(order), np.int64)
    _first_ancestor(order, _positions(order), *near[:3], root)
    return root


@jit
def _first_ancestor(order, position, starts, ends, neighbors, root):
    for p in range(len(order)):
        node = order[p]
        root[node] = node
        for i in range(starts[node], ends[node]):
            if position[neighbors[i]] < p:
                root[node] = root[neighbors[i]]
                break
