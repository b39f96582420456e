"""Repair: layer 0 leads from every node to every other.

First every node that cannot be reached from the entry point gets a link from one that can be: from
the nearest with an empty slot. Then every node from which the entry point cannot be reached gives a
link to the nearest from which it can be. The nearest are looked for by a search of the graph, and
only where that finds none among all nodes.

Where none that was found has an empty slot, the first that has one gives the link, breadth first
from the nearest; only where there is none at all does a link make way, one that no path found by
the breadth-first search needs. Under inner product, with uneven norms, most nodes are among the
nearest of none: links to them in the places of links to hubs would cost much of the recall, and in
empty slots they cost none. There the hubs are the nearest to all, and every search would meet what
hangs on them: the one with the fewest links gives the link, of all that are found near
(`tests/engine/test_inner_product.py`).
"""

from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine.beam import size
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import IP, distance
from hnsw_gpu.engine.graph import reach
from hnsw_gpu.engine.keys import KEY_NONE, key_node, make_key
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.engine.vectors import METRICS, engine_view, rows_as_queries


class Layer0(NamedTuple):
    """The links of layer 0, and the ways that are known to lead through them."""

    neighbors0: np.ndarray  # (n, M0) int32, written in place
    parents: np.ndarray  # (n,) int32: the node before on the way from the entry point; -1: none
    relinked: np.ndarray  # (n,) bool: becomes True where links are new; (0,): nobody asks


class Visits(NamedTuple):
    """What many breadth-first searches, one after the other, work in."""

    last: np.ndarray  # (n,) int32: number of the last search that came by
    queue: np.ndarray  # (n,) int32


class Nearest(NamedTuple):
    """Some nodes as queries, and what the graph found near each."""

    queries: np.ndarray  # (m, ...) encoded
    keys: np.ndarray  # (m, k) uint64, ascending
    rows: np.ndarray  # (n, row) encoded
    metric: int


def repair(graph, rows, metric, *, ef_construction, threads, relinked=None):
    """Make layer 0 strongly connected; returns how many nodes could not be reached.

    Writes `graph.neighbors0`. `relinked` bool (n or more,) becomes True where links are new.
    """
    neighbors0 = graph.neighbors0
    count, width = neighbors0.shape
    if not count:
        return 0
    parents, queue = np.full(count, -1, np.int32), np.empty(count, np.int32)
    layer0 = Layer0(neighbors0, parents, np.empty(0, bool) if relinked is None else relinked)
    starts = np.arange(0, count * width + 1, width)
    reach(neighbors0.ravel(), starts, parents, queue, graph.entry_point)

    def nearest(missing):
        queries = rows_as_queries(rows[missing])
        k = min(ef_construction, count)
        keys = search_graph(graph, rows, queries, metric, k=k, ef=k, threads=threads).keys
        return Nearest(queries, keys, engine_view(rows), METRICS[metric])

    lost = np.flatnonzero(parents < 0)
    if len(lost):
        _lead_to(layer0, lost, nearest(lost))
    links_back = _reversed_links(neighbors0)
    ways_back = np.full(count, -1, np.int32)  # the next node on the way to the entry point
    reach(*links_back, ways_back, queue, graph.entry_point)
    trapped = np.flatnonzero(ways_back < 0)
    if len(trapped):
        _lead_out(layer0, links_back, ways_back, trapped, nearest(trapped))
    return len(lost)


@jit(allocates=True)
def _lead_to(layer0, lost, near):
    """Give each lost node a link from a node that can be reached."""
    parents, width = layer0.parents, layer0.neighbors0.shape[1]
    starts = np.arange(0, layer0.neighbors0.size + 1, width)
    visits = Visits(np.full(len(parents), -1, np.int32), np.empty(len(parents), np.int32))
    is_giver = np.zeros(len(parents), np.bool_)
    for i in range(len(lost)):
        node = lost[i]
        if parents[node] >= 0:  # a node repaired before leads to it
            continue
        giver, nearest, fewest = np.int64(-1), np.int64(-1), np.int64(0)
        for j in range(size(near.keys, i)):
            candidate = key_node(near.keys[i, j])
            if parents[candidate] >= 0:
                nearest = candidate if nearest < 0 else nearest
                if _has_empty_slot(layer0, candidate):
                    links = _free_slot(layer0, candidate)
                    if giver < 0 or links < fewest:
                        giver, fewest = candidate, links
                    if near.metric != IP:
                        break
        if nearest < 0:
            for other in range(len(parents)):
                is_giver[other] = parents[other] >= 0 and _free_slot(layer0, other) >= 0
            giver = _nearest_of_all(near, i, is_giver)
        elif giver < 0:
            giver = _first_with_room(layer0, nearest, visits, i)
        _link(layer0, giver, node)
        reach(layer0.neighbors0.ravel(), starts, parents, visits.queue, node)
        parents[node] = giver


@jit(allocates=True)
def _lead_out(layer0, links_back, ways_back, trapped, near):
    """Give each trapped node, or one that it leads to, a link on the way to the entry point."""
    sources, starts = links_back
    visits = Visits(np.full(len(ways_back), -1, np.int32), np.empty(len(ways_back), np.int32))
    for i in range(len(trapped)):
        node = np.int64(trapped[i])
        if ways_back[node] >= 0:  # it leads to a node repaired before
            continue
        target = np.int64(-1)
        for j in range(size(near.keys, i)):
            if ways_back[key_node(near.keys[i, j])] >= 0:
                target = key_node(near.keys[i, j])
                break
        if target < 0:
            target = _nearest_of_all(near, i, ways_back >= 0)
        giver = _first_with_room(layer0, node, visits, i)
        _link(layer0, giver, target)
        reach(sources, starts, ways_back, visits.queue, giver)


@jit(is_inner=True)
def _link(layer0, giver, target):
    layer0.neighbors0[giver, _free_slot(layer0, giver)] = target
    if len(layer0.relinked):
        layer0.relinked[giver] = True


@jit(is_inner=True)
def _has_empty_slot(layer0, giver):
    return layer0.neighbors0[giver, -1] < 0


@jit(is_inner=True)
def _free_slot(layer0, giver):
    """The first empty slot of a node, else its last link that is no parent's, else -1."""
    neighbors0, width = layer0.neighbors0, layer0.neighbors0.shape[1]
    if _has_empty_slot(layer0, giver):
        for slot in range(width):
            if neighbors0[giver, slot] < 0:
                return np.int64(slot)
    for slot in range(width - 1, -1, -1):
        if layer0.parents[neighbors0[giver, slot]] != giver:
            return np.int64(slot)
    return np.int64(-1)


@jit(is_inner=True)
def _first_with_room(layer0, start, visits, number):
    """The first node, breadth first from `start`, with an empty slot, else with a free one.

    There is one with a free slot: what `start` leads to holds nodes that are no parents.
    """
    neighbors0, width = layer0.neighbors0, layer0.neighbors0.shape[1]
    with_free_slot = np.int64(-1)
    visits.last[start] = number
    visits.queue[0] = start
    count, head = 1, 0
    while head < count:
        node = np.int64(visits.queue[head])
        head += 1
        if _has_empty_slot(layer0, node):
            return node
        if with_free_slot < 0 and _free_slot(layer0, node) >= 0:
            with_free_slot = node
        for j in range(width):
            link = neighbors0[node, j]
            if visits.last[link] != number:
                visits.last[link] = number
                visits.queue[count] = link
                count += 1
    return with_free_slot


@jit(is_inner=True)
def _nearest_of_all(near, q, is_candidate):
    """The nearest of all candidate nodes to a query."""
    best = KEY_NONE
    for node in range(len(is_candidate)):
        if is_candidate[node]:
            d = distance(near.metric, near.queries, q, near.rows, node)
            best = min(best, make_key(d, node))
    return key_node(best)


def _reversed_links(neighbors0):
    """The nodes that link to node i, (sources, starts): sources[starts[i]:starts[i + 1]]."""
    starts = np.zeros(len(neighbors0) + 2, np.int64)
    sources = np.empty(neighbors0.size, np.int32)
    _reverse_links(neighbors0, sources, starts)
    return sources, starts


@jit
def _reverse_links(neighbors0, sources, starts):
    """Write `sources`, of which the last may be too many, and `starts`, two more than the nodes."""
    count, width = neighbors0.shape
    for i in range(count):
        for j in range(width):
            if neighbors0[i, j] >= 0:
                starts[neighbors0[i, j] + 2] += 1
    for i in range(count):
        starts[i + 2] += starts[i + 1]
    for i in range(count):
        for j in range(width):
            link = neighbors0[i, j]
            if link >= 0:
                sources[starts[link + 1]] = i
                starts[link + 1] += 1
