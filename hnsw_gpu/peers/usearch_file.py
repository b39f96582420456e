"""The file of a usearch index (2.x), little-endian:

    u32 rows, u32 bytes a row (u64 each for a large one) | rows | head, 64 bytes | graph

The graph is `u64 nodes, connectivity, connectivity_base, top layer, entry point`, of each node its
level as i16, then of each a record: `u64 key, i16 level`, and of each layer, the lowest first,
`u32 links, u32 links[connectivity]` (of layer 0 connectivity_base). A removed vector has the
largest key. There is no checksum: every number is looked at.
"""

import os
import struct

import numpy as np

from hnsw_gpu.files import CorruptIndexError
from hnsw_gpu.peers.peer_graph import MOST_LEVELS, MOST_M, PeerGraph, ids

HEAD = struct.Struct("<7s3H4B3Q?")  # magic, version, kinds, present, deleted, dim, multi
HEAD_BYTES = 64
GRAPH = struct.Struct("<5Q")
NODE_BYTES = 10
MAGIC = b"usearch"
METRICS = {ord("i"): "ip", ord("c"): "cosine", ord("e"): "l2"}
BF16, F64, F32, F16, I8 = 4, 10, 11, 12, 23
ITEM_TYPES = {BF16: "<u2", F64: "<f8", F32: "<f4", F16: "<f2", I8: "i1"}
U64, U32 = 14, 15  # of keys and links
REMOVED = np.uint64(2**64 - 1)
EF_CONSTRUCTION = 128  # usearch's default; the file does not say
BLOCK = 65536  # nodes at a time


def read_usearch(path: str | os.PathLike[str]) -> PeerGraph:
    """What an index holds; CorruptIndexError where the file is none of usearch's, or damaged."""
    with open(path, "rb") as file:
        content = np.frombuffer(file.read(), np.uint8)
    try:
        return _contents(content)
    except ValueError as error:
        raise CorruptIndexError(f"{os.fspath(path)}: {error}") from None


def _contents(content: np.ndarray) -> PeerGraph:
    rows, row_bytes, start = _matrix(content)
    end = start + rows * row_bytes
    head = HEAD.unpack(content[end : end + HEAD.size].tobytes())
    _, major, _, _, metric, kind, key_kind, link_kind, _, _, dim, is_multi = head
    graph = end + HEAD_BYTES
    if major != 2 or len(content) < graph + GRAPH.size:
        raise ValueError(f"a file of usearch {major}, expected 2, or cut")
    if metric not in METRICS or kind not in ITEM_TYPES or (key_kind, link_kind) != (U64, U32):
        raise ValueError(
            f"metric {chr(metric)!r}, numbers of kind {kind}, keys of {key_kind}, links of "
            f"{link_kind}: expected ip, cos or l2sq, f64, f32, f16, bf16 or i8, u64 and u32"
        )
    if kind == I8 and METRICS[metric] != "cosine":
        raise ValueError("i8 vectors have lost their lengths: only under cos can they be read")
    item = np.dtype(ITEM_TYPES[kind])
    if is_multi or row_bytes != dim * item.itemsize or not 1 <= dim <= 65536:
        raise ValueError(
            f"rows of {row_bytes} bytes for {dim} numbers, multi={is_multi}: expected one vector a "
            "key, whole"
        )
    nodes, width, width0, top, entry_point = GRAPH.unpack(content[graph:][: GRAPH.size].tobytes())
    if nodes != rows or not 1 <= width <= MOST_M or not 1 <= width0 <= 2 * MOST_M:
        raise ValueError(
            f"{nodes} nodes for {rows} vectors, or links of {width} and {width0}, expected at most "
            f"{MOST_M} and {2 * MOST_M}"
        )
    given = content[start:end].view(item).reshape(rows, dim)
    if kind == BF16:
        given = (given.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # a float64 too large becomes inf, which is refused
        vectors = given.astype(np.float32)
    levels, keys, links = _graph(content[graph + GRAPH.size :], rows, width, width0)
    if rows and top != levels.max():
        raise ValueError(f"top layer {top}, and the highest node's is {levels.max()}")
    is_deleted = keys == REMOVED
    return PeerGraph(
        metric=METRICS[metric],
        ef_construction=EF_CONSTRUCTION,
        capacity=rows,
        vectors=vectors,
        labels=np.where(is_deleted, -1, keys.view(np.int64)),
        is_deleted=is_deleted,
        levels=levels,
        links=links,
        entry_point=entry_point,
    )


def _matrix(content: np.ndarray) -> tuple[int, int, int]:
    """How many rows, of how many bytes, and where they begin."""
    for numbers in (struct.Struct("<2I"), struct.Struct("<2Q")):
        if len(content) >= numbers.size:
            rows, row_bytes = numbers.unpack(content[: numbers.size].tobytes())
            end = numbers.size + rows * row_bytes
            if end + HEAD_BYTES <= len(content) and content[end:][:7].tobytes() == MAGIC:
                return rows, row_bytes, numbers.size
    what = "holds no vectors" if content[:7].tobytes() == MAGIC else "is cut, or none of usearch's"
    raise ValueError(what)


def _graph(
    content: np.ndarray, count: int, width: int, width0: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Levels, keys uint64 and the links of each layer."""
    if len(content) < 2 * count:
        raise ValueError("is cut")
    levels = content[: 2 * count].view("<i2").astype(np.int64)
    if count and (levels.min() < 0 or levels.max() > MOST_LEVELS):
        raise ValueError(f"levels {levels.min()} to {levels.max()}")
    sizes = NODE_BYTES + 4 + 4 * width0 + (4 + 4 * width) * levels
    starts = 2 * count + np.cumsum(sizes) - sizes
    if len(content) != 2 * count + sizes.sum():
        raise ValueError(f"{len(content)} bytes of graph, expected {2 * count + sizes.sum()}")
    heads = _taken(content, starts, NODE_BYTES)
    if (heads[:, 8:].view("<i2")[:, 0] != levels).any():
        raise ValueError("levels that are told twice, differently")
    links = []
    for layer in range(int(levels.max(initial=0)) + 1):
        places, slots = starts[levels >= layer] + NODE_BYTES, width0
        if layer:
            places, slots = places + 4 + 4 * width0 + (layer - 1) * (4 + 4 * width), width
        words = _taken(content, places, 4 + 4 * slots).view("<u4")
        links.append(ids(words[:, 1:], words[:, 0], count))
    return levels, np.ascontiguousarray(heads[:, :8]).view("<u8")[:, 0], links


def _taken(content: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    """uint8 (m, size) that begin at the bytes `starts` (m,)."""
    result = np.empty((len(starts), size), np.uint8)
    for first in range(0, len(starts), BLOCK):
        part = slice(first, first + BLOCK)
        result[part] = content[starts[part, None] + np.arange(size)]
    return result
