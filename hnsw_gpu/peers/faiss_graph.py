"""Indexes of faiss (IndexHNSW and what wraps its ids), read and made through faiss itself.

faiss keeps the links of all layers of a node one behind the other: `offsets[i]` is where those of
node i begin, `cum_nneighbor_per_level` where each layer's do from there; -1 ends a layer's.
"""

import os
from typing import Any

import numpy as np

from hnsw_gpu.files import CorruptIndexError, atomic_file
from hnsw_gpu.peers.peer_graph import MOST_M, PeerGraph, renumbered


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"{error}: pip install faiss-cpu") from None
    return faiss


def read_faiss(index: Any) -> PeerGraph:
    """What an IndexHNSW, in an IndexIDMap or not, or a file of it holds; ValueError of any other.

    faiss reads the file, and trusts it: give it none that may be hostile.
    """
    faiss = _faiss()
    if isinstance(index, (str, os.PathLike)):
        with open(index, "rb"):  # faiss's own error for a path is not a FileNotFoundError
            path = os.fspath(index)
        try:
            index = faiss.read_index(path)
        except RuntimeError as error:
            told = str(error).splitlines()[0]
            raise CorruptIndexError(f"{path}: faiss cannot read it: {told:.200}") from None
    inner, labels = faiss.downcast_index(index), None
    if isinstance(inner, faiss.IndexIDMap):  # so is IndexIDMap2
        labels = faiss.vector_to_array(inner.id_map).astype(np.int64)
        inner = faiss.downcast_index(inner.index)
    metrics = {faiss.METRIC_L2: "l2", faiss.METRIC_INNER_PRODUCT: "ip"}
    if not isinstance(inner, faiss.IndexHNSW) or inner.metric_type not in metrics:
        raise ValueError(
            f"{type(inner).__name__}: expected an IndexHNSW of L2 or inner product, in an "
            "IndexIDMap or not"
        )
    hnsw, count = inner.hnsw, inner.ntotal
    levels = faiss.vector_to_array(hnsw.levels).astype(np.int64) - 1
    offsets = faiss.vector_to_array(hnsw.offsets).astype(np.int64)
    neighbors = faiss.vector_to_array(hnsw.neighbors)
    cuts = faiss.vector_to_array(hnsw.cum_nneighbor_per_level).astype(np.int64)
    labels = np.arange(count) if labels is None else labels
    if labels.min(initial=0) < 0:
        raise ValueError(f"IndexIDMap: id {labels.min()}, expected 0 or more (-1 means none)")
    if not len(levels) == len(offsets) - 1 == len(labels) == count:
        raise ValueError(f"{type(inner).__name__}: its arrays are not those of {count} vectors")
    vectors = np.empty((0, inner.d), np.float32)
    if count:
        vectors = faiss.downcast_index(inner.storage).reconstruct_n(0, count)
    links = []
    for layer in range(max(int(levels.max(initial=0)), 0) + 1):
        links.append(_links(neighbors, offsets, levels, cuts, layer))
    return PeerGraph(
        metric=metrics[inner.metric_type],
        ef_construction=min(max(int(hnsw.efConstruction), 1), 65536),
        capacity=count,
        vectors=vectors,
        labels=labels,
        is_deleted=np.zeros(count, bool),
        levels=levels,
        links=links,
        entry_point=int(hnsw.entry_point),
    )


def _links(
    neighbors: np.ndarray, offsets: np.ndarray, levels: np.ndarray, cuts: np.ndarray, layer: int
) -> np.ndarray:
    """Ids (nodes on the layer, width); ValueError where some lead nowhere."""
    count = len(levels)
    if layer + 1 >= len(cuts) or not 0 <= cuts[layer + 1] - cuts[layer] <= 2 * MOST_M:
        raise ValueError(f"layer {layer}: its width is missing, or beyond {2 * MOST_M}")
    nodes = np.flatnonzero(levels >= layer)
    places = offsets[nodes, None] + np.arange(cuts[layer], cuts[layer + 1])
    if places.size and (places.min() < 0 or places.max() >= len(neighbors)):
        raise ValueError(f"layer {layer}: links beyond the end of their array")
    links = neighbors[places]
    links[~np.logical_and.accumulate(links >= 0, axis=1)] = -1
    if (links >= count).any():
        raise ValueError("links that lead nowhere")
    return links


def faiss_index(peer: PeerGraph, metric: str) -> Any:
    """The graph as an IndexHNSWFlat; in an IndexIDMap2 where the labels are not 0..n-1."""
    if peer.is_deleted.any():
        raise ValueError(
            f"{peer.is_deleted.sum()} nodes are deleted, which faiss's HNSW does not know: "
            "call `compact` first"
        )
    faiss = _faiss()
    count, M = len(peer.vectors), peer.M
    ordered = np.sort(peer.labels)
    is_plain = bool((ordered == np.arange(count)).all())
    if is_plain and count:
        peer = renumbered(peer, peer.labels)
    name = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    made = faiss.IndexHNSWFlat(peer.dim, M, name)
    made.hnsw.efConstruction = peer.ef_construction
    result = made if is_plain else faiss.IndexIDMap2(made)  # which wants it empty
    if count:
        made.storage.add(np.ascontiguousarray(peer.vectors))
        _fill(faiss, made.hnsw, peer, M)
    made.ntotal = count
    if not is_plain:
        faiss.copy_array_to_vector(peer.labels, result.id_map)
        result.ntotal = count
        result.construct_rev_map()
    return result


def write_faiss(path: str | os.PathLike[str], index: Any) -> None:
    """Write an index of faiss as a file, whole or not at all."""
    with atomic_file(path) as file:
        file.write(_faiss().serialize_index(index).tobytes())


def _fill(faiss: Any, hnsw: Any, peer: PeerGraph, M: int) -> None:
    """Write levels and links."""
    sizes = 2 * M + M * peer.levels.astype(np.int64)
    offsets = np.append(0, np.cumsum(sizes))
    neighbors = np.full(offsets[-1], -1, np.int32)
    for layer, links in enumerate(peer.links):
        start = 2 * M + (layer - 1) * M if layer else 0
        places = offsets[peer.nodes(layer), None] + start + np.arange(links.shape[1])
        neighbors[places] = links
    faiss.copy_array_to_vector((peer.levels + 1).astype(np.int32), hnsw.levels)
    faiss.copy_array_to_vector(offsets.astype(np.uint64), hnsw.offsets)
    faiss.copy_array_to_vector(neighbors, hnsw.neighbors)
    hnsw.entry_point, hnsw.max_level = peer.entry_point, len(peer.links) - 1
