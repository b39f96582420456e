"""The file of an hnswlib index (0.8, unchanged since 0.4), little-endian:

    header | of each element a record | of each element its links above layer 0

A record is `u16 links, u8 deleted, u8, u32 links[maxM0], float32 vector[dim], u64 label`; slots
behind the links may hold anything. Above: `u32 bytes`, then of each layer, the lowest first,
`u32 links, u32 links[maxM]`. There is no checksum and no metric: every number is looked at.
"""

import os
import struct
from typing import NamedTuple

import numpy as np

from hnsw_gpu.files import CorruptIndexError, atomic_file
from hnsw_gpu.peers.peer_graph import MOST_LEVELS, MOST_M, PeerGraph, ids

HEADER = struct.Struct("<QQQQQQiIQQQdQ")
BLOCK = 16384  # records at a time
MOST_DIM = 65536
NO_ENTRY = 2**32 - 1  # of an empty index


class Header(NamedTuple):
    """The numbers of the header, in order."""

    offset: int  # of layer 0: 0
    capacity: int
    elements: int
    record_bytes: int
    label_offset: int
    vector_offset: int
    top: int
    entry_point: int
    maxM: int
    maxM0: int
    M: int
    factor: float  # of levels, 1 / ln(M)
    ef_construction: int

    @property
    def dim(self) -> int:
        return (self.label_offset - self.vector_offset) // 4

    @property
    def record(self) -> np.dtype:
        return np.dtype(
            [
                ("links", "<u2"), ("deleted", "u1"), ("unused", "u1"),
                ("neighbors", "<u4", (self.maxM0,)), ("vector", "<f4", (self.dim,)),
                ("label", "<u8"),
            ]
        )  # fmt: skip


def read_hnswlib(path: str | os.PathLike[str], dim: int | None = None) -> PeerGraph:
    """What an index of vectors of `dim` (None: of any) holds.

    CorruptIndexError where the file is none of hnswlib's, or damaged; ValueError for another dim.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _header(file.read(HEADER.size), size)
            if dim not in (None, header.dim):
                raise ValueError(
                    f"{os.fspath(path)}: holds vectors of {header.dim} numbers, not of dim={dim}"
                )
            try:
                return _contents(file, header)
            except ValueError as error:
                raise CorruptIndexError(str(error)) from None
    except CorruptIndexError as error:
        raise CorruptIndexError(f"{os.fspath(path)}: {error}") from None


def _header(given: bytes, size: int) -> Header:
    if len(given) < HEADER.size:
        raise CorruptIndexError(f"{size} bytes are fewer than the header of an hnswlib index")
    header = Header(*HEADER.unpack(given))
    is_plausible = (
        header.offset == 0
        and 1 <= header.maxM <= MOST_M
        and 1 <= header.maxM0 <= 2 * MOST_M
        and header.vector_offset == 4 + 4 * header.maxM0
        and 4 <= header.label_offset - header.vector_offset <= 4 * MOST_DIM
        and (header.label_offset - header.vector_offset) % 4 == 0
        and header.record_bytes == header.label_offset + 8
        and header.elements <= min(size // header.record_bytes, 2**31 - 1)
    )
    if not is_plausible:
        raise CorruptIndexError(
            f"is no index of hnswlib, or damaged, or has more than {MOST_M} links a node ({size} "
            "bytes)"
        )
    return header


def _contents(file, header: Header) -> PeerGraph:  # type: ignore[no-untyped-def]
    count = header.elements
    vectors = np.empty((count, header.dim), np.float32)
    links = np.empty((count, header.maxM0), np.int32)
    labels, is_deleted = np.empty(count, np.int64), np.empty(count, bool)
    for start in range(0, count, BLOCK):
        part = slice(start, min(start + BLOCK, count))
        given = file.read((part.stop - start) * header.record_bytes)
        if len(given) < (part.stop - start) * header.record_bytes:
            raise CorruptIndexError("is cut")
        block = np.frombuffer(given, header.record)
        vectors[part], labels[part] = block["vector"], block["label"].astype(np.int64)
        if (labels[part] < 0).any():
            raise CorruptIndexError("labels beyond int64")
        is_deleted[part] = block["deleted"] & 1
        links[part] = ids(block["neighbors"], block["links"], count)
    rest = file.read()
    if len(rest) % 4:
        raise CorruptIndexError("links above layer 0 end within a number")
    words = np.frombuffer(rest, "<u4").astype(np.uint32)
    levels, starts = _levels(words, count, header.maxM)
    if count and header.top != levels.max():
        raise CorruptIndexError(f"top layer {header.top}, and the highest node's is {levels.max()}")
    above = []
    for layer in range(1, int(levels.max(initial=0)) + 1):
        places = starts[levels >= layer] + (layer - 1) * (header.maxM + 1)
        there = words[places[:, None] + 1 + np.arange(header.maxM)]
        above.append(ids(there, words[places], count))
    return PeerGraph(
        metric="",
        ef_construction=min(max(header.ef_construction, 1), 65536),
        capacity=header.capacity,
        vectors=vectors,
        labels=labels,
        is_deleted=is_deleted,
        levels=levels,
        links=[links, *above],
        entry_point=header.entry_point,
    )


def _levels(words: np.ndarray, count: int, maxM: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each element its level, and where in the words its links above layer 0 begin."""
    levels, starts = np.zeros(count, np.int32), np.zeros(count, np.int64)
    sizes, place, level_bytes = words.data, 0, 4 * (maxM + 1)
    for element in range(count):
        if place >= len(words):
            raise CorruptIndexError("is cut")
        size = sizes[place]
        place += 1
        if size:
            level, rest = divmod(size, level_bytes)
            if rest or level > MOST_LEVELS or place + size // 4 > len(words):
                raise CorruptIndexError(f"element {element}: {size} bytes of links above layer 0")
            levels[element], starts[element] = level, place
            place += size // 4
    if place != len(words):
        raise CorruptIndexError(f"{4 * (len(words) - place)} bytes behind the last element")
    return levels, starts


def write_hnswlib(path: str | os.PathLike[str], peer: PeerGraph, capacity: int) -> None:
    """Write a file that hnswlib loads, whole or not at all, with room for `capacity` or more."""
    count, M = len(peer.vectors), peer.M
    label_offset = 4 + 8 * M + 4 * peer.dim
    header = Header(
        offset=0,
        capacity=max(count, capacity),
        elements=count,
        record_bytes=label_offset + 8,
        label_offset=label_offset,
        vector_offset=4 + 8 * M,
        top=len(peer.links) - 1 if count else -1,
        entry_point=peer.entry_point if count else NO_ENTRY,
        maxM=M,
        maxM0=2 * M,
        M=M,
        factor=1 / np.log(M),
        ef_construction=peer.ef_construction,
    )
    with atomic_file(path) as file:
        file.write(HEADER.pack(*header))
        for start in range(0, count, BLOCK):
            part = slice(start, start + BLOCK)
            links = peer.links[0][part]
            block = np.zeros(len(links), header.record)
            block["links"] = (links >= 0).sum(axis=1)
            block["deleted"] = peer.is_deleted[part]
            block["neighbors"][:, : links.shape[1]] = np.maximum(links, 0)
            block["vector"], block["label"] = peer.vectors[part], peer.labels[part]
            file.write(block.tobytes())
        file.write(_words_above(peer, M).tobytes())


def _words_above(peer: PeerGraph, M: int) -> np.ndarray:
    """uint32 words of the links above layer 0 of all elements."""
    sizes = peer.levels.astype(np.int64) * (M + 1)
    starts = np.cumsum(sizes + 1) - sizes
    words = np.zeros(int((sizes + 1).sum()), "<u4")
    words[starts - 1] = 4 * sizes
    for layer in range(1, len(peer.links)):
        links = peer.links[layer]
        places = starts[peer.levels >= layer] + (layer - 1) * (M + 1)
        words[places] = (links >= 0).sum(axis=1)
        words[places[:, None] + 1 + np.arange(links.shape[1])] = np.maximum(links, 0)
    return words
