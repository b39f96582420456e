"""Graphs that other libraries built, as an Index: link for link, on every layer."""

import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.engine import empty_rows, encode, unreachable
from hnsw_gpu.files import CorruptIndexError
from hnsw_gpu.index import ENCODE_ROWS, ROWS, Index, restored
from hnsw_gpu.peers import (
    PeerGraph,
    graph_of,
    read_faiss,
    read_hnswlib,
    read_usearch,
    write_faiss,
)

logger = logging.getLogger("hnsw_gpu")


def from_hnswlib(
    path: str | os.PathLike[str],
    dim: int | None,
    metric: str,
    *,
    dtype: str = "fp32",
    refine: bool | str | None = None,
    device: str = "auto",
) -> Index:
    """The Index over the graph of a file that hnswlib saved, whose metric only you know.

    The links are as they were, and the vectors are kept as `dtype` and `refine`: see Index.
    Elements marked as deleted are deleted, and can be undeleted. Copies of a vector stay nodes of
    their own. Nodes that layer 0 does not lead to are told to the logger "hnsw_gpu"; `check` and
    `save` link them. CorruptIndexError where the file is damaged, or none of hnswlib's; ValueError
    where `dim` (None: any) or a vector is not what it must be.
    """
    return index_of(
        read_hnswlib(path, dim), os.fspath(path), metric, dtype=dtype, refine=refine, device=device
    )


def from_faiss(
    index: Any,
    metric: str | None = None,
    *,
    dtype: str = "fp32",
    refine: bool | str | None = None,
    device: str = "auto",
) -> Index:
    """As `from_hnswlib`, of faiss's IndexHNSWFlat, in an IndexIDMap or not, or its file.

    Of an IndexHNSWSQ or IndexHNSWPQ the vectors are those that its codes stand for.
    metric: None, or what is meant by the index's: "cosine" of unit vectors, "euclidean" of L2.
    """
    peer = read_faiss(index)
    name = os.fspath(index) if isinstance(index, (str, os.PathLike)) else type(index).__name__
    return index_of(peer, name, metric, dtype=dtype, refine=refine, device=device)


def from_usearch(
    path: str | os.PathLike[str],
    metric: str | None = None,
    *,
    dtype: str = "fp32",
    refine: bool | str | None = None,
    device: str = "auto",
) -> Index:
    """As `from_hnswlib`, of a file that usearch saved with its vectors; keys become labels."""
    return index_of(
        read_usearch(path), os.fspath(path), metric, dtype=dtype, refine=refine, device=device
    )


def from_file(
    form: str,
    path: str | os.PathLike[str],
    metric: str | None,
    *,
    dtype: str,
    refine: str | None,
    device: str,
) -> Index:
    """The Index of a file of "hnswlib", "faiss" or "usearch"."""
    readers: dict[str, Callable[[Any], PeerGraph]] = {
        "hnswlib": read_hnswlib,
        "faiss": read_faiss,
        "usearch": read_usearch,
    }
    read = readers[form]
    return index_of(read(path), os.fspath(path), metric, dtype=dtype, refine=refine, device=device)


def to_file(form: str, index: Index, path: str | os.PathLike[str]) -> None:
    """Write an index as "hnsw-gpu", "hnswlib" or "faiss" reads it."""
    if form == "hnswlib":
        index.to_hnswlib(path)
    elif form == "faiss":
        write_faiss(path, index.to_faiss())
    else:
        index.save(path)


def index_of(
    peer: PeerGraph,
    name: str,
    metric: str | None,
    *,
    dtype: str = "fp32",
    refine: bool | str | None = None,
    device: str = "auto",
) -> Index:
    """The Index of what a peer's index, which errors call `name`, holds."""
    metric = peer.metric if metric is None else inputs.metric(metric)
    inputs.device(device)
    _check_metric(peer, name, metric)
    try:
        graph, peer = graph_of(peer)
    except ValueError as error:
        raise CorruptIndexError(f"{name}: {error}") from None
    index = Index(
        peer.dim, metric, dtype,
        M=graph.neighbors.shape[1], ef_construction=peer.ef_construction, refine=refine,
    )  # fmt: skip
    is_live, can_return = ~peer.is_deleted, peer.is_deleted & (peer.labels >= 0)
    arrays = {
        **graph._asdict(),
        **_rows(index, peer.vectors),
        "label_offsets": np.append(0, np.cumsum(is_live)),
        "labels": peer.labels[is_live],
        "deleted_labels": peer.labels[can_return],
        "deleted_nodes": np.flatnonzero(can_return),
    }
    cut_off = unreachable(graph) if len(peer.labels) else np.empty(0, np.int64)
    lost = cut_off[is_live[cut_off]]
    if len(lost):
        logger.warning(
            "%s: %s of %s vectors may never be found, as layer 0 does not lead to them, the first "
            "is label %s; `check` and `save` will link them",
            name, f"{len(lost):,}", f"{len(peer.labels):,}", peer.labels[lost[0]],
        )  # fmt: skip
    about = {
        "dim": index.dim, "metric": metric, "dtype": dtype, "M": index.M,
        "ef_construction": index.ef_construction, "refine": index.refine, "seed": index.seed,
        "next_label": int(peer.labels.max(initial=-1)) + 1,
    }  # fmt: skip
    unrepaired = len(peer.labels) if len(cut_off) else 0
    return restored(about, arrays, unread=ROWS, unrepaired=unrepaired).to(device)


def _check_metric(peer: PeerGraph, name: str, metric: str) -> None:
    """ValueError where a graph of the peer's metric is none of this one.

    Files of hnswlib do not tell theirs ("").
    """
    if peer.metric == metric or (peer.metric, metric) == ("l2", "euclidean"):
        return
    with np.errstate(over="ignore"):  # of a file that may hold any numbers
        is_unit = (np.abs(np.linalg.norm(peer.vectors, axis=1) - 1) <= 1e-3).all()
    if metric == "cosine" and not is_unit:
        raise ValueError(
            f"{name}: metric='cosine', and its vectors are not of unit length"
            + (f": the graph is one of {peer.metric!r}" if peer.metric else "")
        )
    if metric != "cosine" and peer.metric:
        raise ValueError(f"{name}: metric={metric!r}, and the graph is one of {peer.metric!r}")


def _rows(index: Index, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """The vectors as the index keeps them, by name; RowsError names those that it cannot."""
    forms = {"vectors": index.dtype} | ({"refine_vectors": index.refine} if index.refine else {})
    found = {form: empty_rows(len(vectors), index.dim, dtype) for form, dtype in forms.items()}
    for start in range(0, len(vectors), ENCODE_ROWS):
        part = index.checked_rows(vectors[start : start + ENCODE_ROWS], start)
        for form, dtype in forms.items():
            place = slice(start, start + len(part))
            found[form][place] = encode(part, inputs.METRICS[index.metric], dtype)
    return found
