"""A graph as the other libraries hold it, and as the engine's, which it becomes link for link.

The others keep ids in their links on every layer, an entry point of their own, and copies of a
vector as nodes of their own, which stay so.
"""

from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine import Graph, copy_aligned

LEAST_M, MOST_M = 2, 128
MOST_LEVELS = 64  # of M = 2 and 2^31 nodes the highest level is about 31


class PeerGraph(NamedTuple):
    """What a peer's index holds. Layer l holds the nodes of `levels` l or more, in order of ids."""

    metric: str  # "l2", "ip", "cosine"; "" where the file does not say
    ef_construction: int
    capacity: int  # how many vectors the peer makes room for
    vectors: np.ndarray  # (n, dim) float32
    labels: np.ndarray  # (n,) int64; -1 = none, of what is deleted
    is_deleted: np.ndarray  # (n,) bool: walked through, never returned
    levels: np.ndarray  # (n,) the highest layer of each node
    links: list[np.ndarray]  # of each layer (nodes on it, width) ids, -1 = none, at the end
    entry_point: int

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def M(self) -> int:
        """The least that has room for the links of each layer."""
        widths = [links.shape[1] for links in self.links]
        return max(LEAST_M, -(-widths[0] // 2), *widths[1:])

    def nodes(self, layer: int) -> np.ndarray:
        """int64 ids of the nodes on a layer."""
        return np.flatnonzero(self.levels >= layer)


def ids(links: np.ndarray, counts: np.ndarray, count: int) -> np.ndarray:
    """int32 ids of rows of links, the first of `counts` of each; -1 behind those.

    ValueError where an id is none of `count` nodes.
    """
    is_link = np.arange(links.shape[1]) < counts[:, None]
    if (counts > links.shape[1]).any() or (is_link & (links >= count)).any():
        raise ValueError("links that lead nowhere")
    return np.where(is_link, links.astype(np.int32), -1)


def renumbered(peer: PeerGraph, numbers: np.ndarray) -> PeerGraph:
    """The same graph where node i has become node numbers[i]."""
    order = np.argsort(numbers)
    links = []
    for layer, old in enumerate(peer.links):
        rows = old[np.argsort(numbers[peer.nodes(layer)])]
        links.append(np.where(rows < 0, -1, numbers[rows]))
    return peer._replace(
        vectors=peer.vectors[order],
        labels=peer.labels[order],
        is_deleted=peer.is_deleted[order],
        levels=peer.levels[order],
        links=links,
        entry_point=int(numbers[peer.entry_point]),
    )


def graph_of(peer: PeerGraph) -> tuple[Graph, PeerGraph]:
    """The engine's graph, and the peer's in the order of its nodes; ValueError if it is unsound.

    A search starts at the smallest node of the top layer, which changes places with the entry
    point. Links to the node itself, and the second of two equal ones, lead a search nowhere: they
    are left out.
    """
    count = len(peer.vectors)
    if count:
        _check(peer)
        numbers = np.arange(count, dtype=np.int32)
        first = peer.nodes(len(peer.links) - 1)[0]
        numbers[[first, peer.entry_point]] = peer.entry_point, first
        peer = renumbered(peer, numbers)
    M = peer.M
    if M > MOST_M:
        raise ValueError(f"M: nodes have {M} links on a layer above, or half of layer 0's, and at "
                         f"most {MOST_M} are possible")  # fmt: skip
    nodes, neighbors, below = [], [], []
    numbers_below: np.ndarray = np.arange(count)
    for layer in range(1, len(peer.links)):
        on_layer = peer.nodes(layer)
        local = np.full(count, -1, np.int32)
        local[on_layer] = np.arange(len(on_layer))
        nodes.append(on_layer)
        below.append(numbers_below[on_layer])
        links = _without_defects(peer.links[layer], on_layer)
        rows = np.where(links < 0, -1, local[links])
        if (rows[links >= 0] < 0).any():
            raise ValueError(f"links of layer {layer} lead to nodes that are not on it")
        neighbors.append(_widened(rows, M))
        numbers_below = local
    layer0 = _widened(_without_defects(peer.links[0], np.arange(count)), 2 * M)
    graph = Graph(
        neighbors0=copy_aligned(layer0),
        layer_offsets=np.cumsum([0, *map(len, nodes)], dtype=np.int64),
        nodes=_joined(nodes, ()),
        neighbors=copy_aligned(_joined(neighbors, (M,))),
        below=_joined(below, ()),
    )
    return graph, peer


def _check(peer: PeerGraph) -> None:
    """ValueError where numbers of the graph contradict each other."""
    top = len(peer.links) - 1
    if not 0 <= peer.entry_point < len(peer.vectors):
        raise ValueError(f"entry point {peer.entry_point} is none of {len(peer.vectors)} nodes")
    if peer.levels.min() < 0 or peer.levels.max() != top or top > MOST_LEVELS:
        raise ValueError(f"levels {peer.levels.min()} to {peer.levels.max()}, and top layer {top}")
    if peer.levels[peer.entry_point] != top:
        raise ValueError(f"entry point {peer.entry_point} is not on the top layer, {top}")
    live = peer.labels[~peer.is_deleted]
    if live.min(initial=0) < 0:
        raise ValueError(f"label {live.min()}, expected 0 or more")
    ordered = np.sort(peer.labels[peer.labels >= 0])
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(f"label {repeated[0]} is that of several vectors, expected one of each")


def _without_defects(links: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Links (m, width) of nodes `own` (m,) without links to themselves and repeats."""
    ordered = np.sort(links, axis=1)
    is_repeat = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    bad = np.flatnonzero((links == own[:, None]).any(axis=1) | is_repeat.any(axis=1))
    if not len(bad):
        return links
    result = links.copy()
    for row in bad.tolist():
        kept = [link for link in dict.fromkeys(links[row].tolist()) if link not in (-1, own[row])]
        result[row] = -1
        result[row, : len(kept)] = kept
    return result


def _widened(links: np.ndarray, width: int) -> np.ndarray:
    result = np.full((len(links), width), -1, np.int32)
    result[:, : links.shape[1]] = links
    return result


def _joined(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([np.empty((0, *shape), np.int32), *parts]).astype(np.int32)
