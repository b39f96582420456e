"""The graph: flat arrays, and `check`, which says whether they are a sound HNSW graph."""

from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine.compiled import jit


class Graph(NamedTuple):
    """Layer 0 and, one behind the other, the layers above.

    Layer l in 1..top holds rows `layer_offsets[l - 1]:layer_offsets[l]` of `nodes`, `neighbors` and
    `below`; a node's number there counts from 0 on each layer, in order of ids.
    """

    neighbors0: np.ndarray  # (n, M0) int32 ids, -1 = empty, filled from the left
    layer_offsets: np.ndarray  # (top + 1,) int64, the first is 0
    nodes: np.ndarray  # (N,) int32 ids, ascending on each layer
    neighbors: np.ndarray  # (N, M) int32 layer-local numbers, -1 = empty, filled from the left
    below: np.ndarray  # (N,) int32 number of the same node one layer down (layer 1: its id)

    @property
    def top(self):
        """The highest layer."""
        return len(self.layer_offsets) - 1

    @property
    def entry_point(self):
        """The id where every search starts: the smallest on the top layer."""
        return int(self.nodes[self.layer_offsets[-2]]) if self.top else 0


def unlinked(graph, is_gone):
    """The graph without links to nodes (bool (n,)): no walk meets them, but as the entry point."""
    neighbors0, neighbors = np.empty_like(graph.neighbors0), np.empty_like(graph.neighbors)
    _unlink(graph.neighbors0, neighbors0, is_gone)
    for layer in range(1, graph.top + 1):
        start, stop = graph.layer_offsets[layer - 1 : layer + 1]
        used = np.searchsorted(graph.nodes[start:stop], len(is_gone))  # room follows
        part = slice(start, start + used)
        _unlink(graph.neighbors[part], neighbors[part], is_gone[graph.nodes[part]])
    return graph._replace(neighbors0=neighbors0, neighbors=neighbors)


@jit
def _unlink(before, links, is_gone):
    """Write the lists `before` (n, width), filled from the left, without links to gone nodes."""
    for row in range(len(links)):
        kept = 0
        for j in range(links.shape[1]):
            link = before[row, j]
            if link >= 0 and not is_gone[link]:
                links[row, kept] = link
                kept += 1
        for j in range(kept, links.shape[1]):
            links[row, j] = -1


def check_graph(graph):
    """What is wrong with a graph: a list of sentences, empty when it is sound.

    `check_links`, and every node reachable on layer 0 from the entry point.
    """
    problems = check_links(graph)
    if not problems and len(graph.neighbors0):
        missing = unreachable(graph)
        if len(missing):
            problems.append(
                f"layer 0: {len(missing)} nodes are not reachable from the entry point, "
                f"the first is {missing[0]}"
            )
    return problems


def check_links(graph):
    """What no search may meet in a graph, in sentences.

    Shapes, dtypes, ranges, no self-links, no repeats, rows filled from the left, every node of a
    layer present on the layer below.
    """
    problems = _check_shapes(graph)
    if problems:
        return problems
    problems = _check_rows("layer 0", graph.neighbors0)
    numbers_below = np.arange(len(graph.neighbors0), dtype=np.int32)
    for layer in range(1, graph.top + 1):
        part = slice(*graph.layer_offsets[layer - 1 : layer + 1])
        nodes, below = graph.nodes[part], graph.below[part]
        name = f"layer {layer}"
        if (np.diff(nodes) <= 0).any():
            problems.append(f"{name}: nodes are not ascending")
        if len(below) == 0:
            problems.append(f"{name}: has no nodes")
        elif below.min() < 0 or below.max() >= len(numbers_below):
            problems.append(f"{name}: 'below' leaves the layer below")
        elif (numbers_below[below] != nodes).any():
            problems.append(f"{name}: 'below' names another node")
        problems += _check_rows(name, graph.neighbors[part])
        numbers_below = nodes
    return problems


def _check_shapes(graph):
    problems = []
    for name, dimensions in (("neighbors0", 2), ("neighbors", 2), ("nodes", 1), ("below", 1)):
        array = getattr(graph, name)
        if array.dtype != np.int32 or array.ndim != dimensions:
            problems.append(f"{name}: {array.dtype} {array.shape}, expected int32, {dimensions}-d")
    if problems:
        return problems
    offsets = graph.layer_offsets
    if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) == 0:
        problems.append(f"layer_offsets: {offsets.dtype} {offsets.shape}, expected int64, 1-d")
    elif offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != len(graph.nodes):
        problems.append(f"layer_offsets: do not divide the {len(graph.nodes)} upper nodes")
    if not problems and graph.neighbors0.shape[1] != 2 * graph.neighbors.shape[1]:
        problems.append(
            f"neighbors0 is {graph.neighbors0.shape[1]} wide, expected twice the "
            f"{graph.neighbors.shape[1]} of neighbors"
        )
    if not problems and not len(graph.nodes) == len(graph.neighbors) == len(graph.below):
        problems.append("nodes, neighbors and below differ in length")
    return problems


def _check_rows(name, neighbors):
    """Ranges, self-links, holes and repeats of one layer's rows."""
    defects = {
        1: "links out of range",
        2: "a link to itself",
        3: "a hole (-1 before a link)",
        4: "the same link twice",
    }
    kind, row = _first_link_defect(neighbors)
    return [f"{name}: node {row} has {defects[kind]}"] if kind else []


@jit(allocates=True)
def _first_link_defect(neighbors):
    count, width = neighbors.shape
    for i in range(count):
        ended = False
        for j in range(width):
            link = neighbors[i, j]
            if link == -1:
                ended = True
                continue
            if link < -1 or link >= count:
                return 1, i
            if link == i:
                return 2, i
            if ended:
                return 3, i
            for previous in range(j):
                if neighbors[i, previous] == link:
                    return 4, i
    return 0, -1


def unreachable(graph):
    """int64 ids that cannot be reached on layer 0 from the entry point."""
    count, width = graph.neighbors0.shape
    parents = np.full(count, -1, np.int32)
    starts = np.arange(0, count * width + 1, width)
    queue = np.empty(count, np.int32)
    reach(graph.neighbors0.ravel(), starts, parents, queue, graph.entry_point)
    return np.flatnonzero(parents < 0)


@jit
def reach(links, starts, parents, queue, start):
    """Breadth-first search from `start` through nodes whose parent is -1, writing their parents.

    Node i links to links[starts[i]:starts[i + 1]] up to the first -1, int32. The parent of `start`
    becomes itself. `queue` int32 (n,) is what it works in.
    """
    parents[start] = start
    queue[0] = start
    count, head = 1, 0
    while head < count:
        node = queue[head]
        head += 1
        for place in range(starts[node], starts[node + 1]):
            link = links[place]
            if link < 0:
                break
            if parents[link] < 0:
                parents[link] = node
                queue[count] = link
                count += 1
