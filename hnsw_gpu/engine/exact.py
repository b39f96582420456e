"""Exact distances to many rows: exhaustive search, search over listed ids, re-ranking.

A matrix product sums in an order that depends on its shapes, so it only selects, with a margin for
its error; the distance that decides and is returned is always R1's (R11).
"""

import numpy as np

from hnsw_gpu.engine.beam import insert, size
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import distance, prefetch_row
from hnsw_gpu.engine.keys import KEY_NONE, key_distance, key_node, key_nodes, make_key
from hnsw_gpu.engine.mapped_rows import are_mapped, ask_for
from hnsw_gpu.engine.vectors import METRICS, engine_view, rows_as_queries, squared_lengths
from hnsw_gpu.engine.workers import run_chunks

QUERY_TILE = 512  # queries a matrix product: its result is 16 MB
BLOCK = 8192  # rows a matrix product, at most
BLOCK_VALUES = 1 << 21  # numbers of those rows, likewise
CHUNK = 16  # queries a thread takes at a time
AHEAD = 8  # rows asked for before they are needed


def block_rows(dim):
    """How many rows of `dim` numbers to give `exact_block` at a time."""
    return max(256, min(BLOCK, BLOCK_VALUES // dim))


def exact_block(keys, rows, first, queries, metric, *, threads):
    """Merge a block of fp32 rows, ids first.., into the sorted keys (q, k) of encoded queries.

    The margin: two float32 sums of `dim` products differ by at most 2 (dim + 8) eps |q| |x|.
    """
    lengths, query_lengths = np.sqrt(squared_lengths(rows)), np.sqrt(squared_lengths(queries))
    reach = query_lengths * lengths.max(initial=0)
    if metric == "l2":
        reach = (query_lengths + lengths.max(initial=0)) ** 2
    margins = (2 * (rows.shape[1] + 8) * np.finfo(np.float32).eps * reach).astype(np.float32)
    for start in range(0, len(queries), QUERY_TILE):
        tile = slice(start, start + QUERY_TILE)
        distances = queries[tile] @ rows.T
        if metric == "l2":
            distances *= -2
            distances += (lengths**2).astype(np.float32)
            distances += (query_lengths[tile, None] ** 2).astype(np.float32)
        else:
            np.subtract(1 if metric == "cosine" else 0, distances, out=distances)

        def merge(begin, end, tile=tile, distances=distances):
            _merge_selected(
                keys[tile], distances, margins[tile], rows, first, queries[tile],
                METRICS[metric], begin, end,
            )  # fmt: skip

        run_chunks(merge, len(distances), CHUNK, threads)


@jit
def _merge_selected(keys, distances, margins, rows, first, queries, metric, begin, end):
    """Offer the rows that the matrix product cannot rule out to queries begin..end."""
    k = keys.shape[1]
    for q in range(begin, end):
        worst = _float_distance(keys[q, k - 1]) + margins[q]
        for i in range(rows.shape[0]):
            if distances[q, i] <= worst:
                key = make_key(distance(metric, queries, q, rows, i), first + i)
                insert(keys, q, k, key)
                worst = _float_distance(keys[q, k - 1]) + margins[q]


@jit(is_inlined=True)
def _float_distance(key):
    return np.float32(np.inf) if key == KEY_NONE else key_distance(key)


def exact_ids(rows, ids, queries, metric, *, k, threads):
    """uint64 (q, k) smallest keys among the listed ids (m,) int, for each encoded query."""
    keys = np.full((len(queries), k), KEY_NONE, np.uint64)
    rows, ids = engine_view(rows), np.ascontiguousarray(ids, np.int64)

    def merge(begin, end):
        _merge_ids(keys, rows, ids, queries, METRICS[metric], begin, end)

    run_chunks(merge, len(queries), CHUNK, threads)
    return keys


@jit
def _merge_ids(keys, rows, ids, queries, metric, begin, end):
    k = keys.shape[1]
    for j in range(len(ids)):
        prefetch_row(rows, ids[min(j + AHEAD, len(ids) - 1)])
        for q in range(begin, end):  # a row that was read serves a whole chunk of queries
            key = make_key(distance(metric, queries, q, rows, ids[j]), ids[j])
            if key < keys[q, k - 1]:
                insert(keys, q, k, key)


def rerank(keys, rows, queries, metric, *, k, threads):
    """The k smallest keys (q, k) of the nodes in `keys` (q, m), by their distance in `rows`."""
    result = np.full((len(keys), k), KEY_NONE, np.uint64)
    view = engine_view(rows)

    def merge(begin, end):
        if are_mapped(rows):
            nodes = key_nodes(keys[begin:end])
            ask_for(rows, nodes[nodes >= 0])
        _rerank(result, keys, view, queries, METRICS[metric], begin, end)

    run_chunks(merge, len(keys), CHUNK, threads)
    return result


@jit
def _rerank(result, keys, rows, queries, metric, begin, end):
    k = result.shape[1]
    for q in range(begin, end):
        count = size(keys, q)
        for j in range(min(AHEAD, count)):
            prefetch_row(rows, key_node(keys[q, j]))
        for j in range(count):
            if j + AHEAD < count:
                prefetch_row(rows, key_node(keys[q, j + AHEAD]))
            node = key_node(keys[q, j])
            key = make_key(distance(metric, queries, q, rows, node), node)
            if key < result[q, k - 1]:
                insert(result, q, k, key)


def own_keys(rows, nodes, metric):
    """uint64 (m,) keys of nodes (m,) by their distance to themselves."""
    queries = rows_as_queries(rows[nodes])
    keys = np.empty(len(nodes), np.uint64)
    _own_keys(
        keys, engine_view(rows), np.ascontiguousarray(nodes, np.int64), queries, METRICS[metric]
    )
    return keys


@jit
def _own_keys(keys, rows, nodes, queries, metric):
    for i in range(len(nodes)):
        keys[i] = make_key(distance(metric, queries, i, rows, nodes[i]), nodes[i])
