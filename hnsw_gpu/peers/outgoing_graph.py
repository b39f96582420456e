"""The graph of an index as other libraries hold it: a node a label, and ids in all links."""

import numpy as np

from hnsw_gpu.engine import Graph, State
from hnsw_gpu.peers.peer_graph import PeerGraph


def outgoing(state: State) -> PeerGraph:
    """The graph of a state.

    The first label of a node is its element's; each other one gets an element that is linked as the
    node is, and with the one before and the one behind. Nodes without a label get one that was
    never used, and are deleted.
    """
    arrays, deleted = state.arrays(), state.labels.deleted
    graph = Graph(*(arrays[name] for name in Graph._fields))
    count = len(graph.neighbors0)
    levels, links = np.zeros(count, np.int32), [graph.neighbors0]
    for layer in range(1, graph.top + 1):
        part = slice(*graph.layer_offsets[layer - 1 : layer + 1])
        nodes, neighbors = graph.nodes[part], graph.neighbors[part]
        levels[nodes] = layer
        links.append(np.where(neighbors < 0, -1, nodes[neighbors]))
    live = np.repeat(np.arange(count), np.diff(arrays["label_offsets"]))
    gone = np.append(live, deleted.nodes)
    bare = np.setdiff1d(np.arange(count), gone)  # neither labels, nor deleted ones
    nodes = np.concatenate([live, deleted.nodes, bare])
    labels = [arrays["labels"], deleted.labels, _unused(state, len(bare))]
    is_deleted = np.arange(len(nodes)) >= len(live)
    order = np.argsort(nodes, kind="stable")  # of each node the live ones first
    is_copy = np.append(False, nodes[order][1:] == nodes[order][:-1])[: len(order)]
    order = np.append(order[~is_copy], order[is_copy])
    element_nodes = nodes[order]
    links[0] = _with_copies(links[0], element_nodes[count:])
    return PeerGraph(
        metric=state.parameters.metric,
        ef_construction=state.parameters.ef_construction,
        capacity=0,
        vectors=state.vectors(element_nodes),
        labels=np.concatenate(labels)[order],
        is_deleted=is_deleted[order],
        levels=np.append(levels, np.zeros(len(order) - count, np.int32)),
        links=links,
        entry_point=graph.entry_point,
    )


def _unused(state: State, count: int) -> np.ndarray:
    """int64 (count,) labels that no node has: behind all, or where none are left, between them."""
    used = np.concatenate([state.labels.sorted, state.labels.deleted.labels])
    first = max(state.next_label, int(used.max(initial=-1)) + 1)
    if first + count <= np.iinfo(np.int64).max:
        return first + np.arange(count, dtype=np.int64)
    return np.setdiff1d(np.arange(len(used) + count), used)[:count]


def _with_copies(links: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Links of layer 0 with those of copies of `nodes` (m,) ascending, behind the others.

    The copies of a node are a chain that begins at the node: in an empty slot, or in that of the
    last link, which the first copy takes over.
    """
    count, width = links.shape
    if not len(nodes):
        return links
    copies = count + np.arange(len(nodes))
    is_first = np.append(True, nodes[1:] != nodes[:-1])
    is_last = np.append(is_first[1:], True)
    theirs = links[nodes]
    before = np.where(is_first, nodes, copies - 1)
    behind = np.where(is_last, -1, copies + 1)
    rows = np.column_stack([before, behind, theirs[:, -1:], theirs[:, :-1]])
    to_the_left = np.argsort(rows < 0, axis=1, kind="stable")
    rows = np.take_along_axis(rows, to_the_left, axis=1)[:, :width]
    firsts = nodes[is_first]
    slots = np.minimum((links[firsts] >= 0).sum(axis=1), width - 1)
    links = np.concatenate([links, rows])
    links[firsts, slots] = copies[is_first]
    return links
