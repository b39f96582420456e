"""The search walked once more, slowly, to count and to record what it does.

The rules leave no freedom: which nodes are expanded and which distances are computed follows from
the graph alone, so the counts of this walk are the engine's, whose hops must agree.
"""

from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine.beam import insert, size
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import distance
from hnsw_gpu.engine.keys import EXPANDED, KEY_NONE, key_node, key_nodes, make_key


class Trace(NamedTuple):
    """What the queries did on layer 0, one query after the other."""

    hops: np.ndarray  # int32 (q,): expansions on all layers, as the engine counts them
    distances: np.ndarray  # int32 (q,): distances computed on all layers
    expanded: np.ndarray  # int32 (h,): node of each expansion
    fresh: np.ndarray  # int32 (h,): neighbours not visited before, of each expansion
    nodes: np.ndarray  # int32 (d,): those neighbours, in order
    keys: np.ndarray  # uint64 (d,): their keys
    query_hops: np.ndarray  # int64 (q + 1,): a query's part of `expanded` and `fresh`
    query_nodes: np.ndarray  # int64 (q + 1,): a query's part of `nodes` and `keys`
    seeds: np.ndarray  # uint64 (q,): the key that layer 0 starts from


def trace(graph, rows, queries, metric: int, ef: int) -> Trace:
    """Walk `queries` (encoded) over `graph`, with `ef_upper` and `expand` of one."""
    state = np.zeros(len(rows), np.bool_)
    every = np.arange(len(rows), dtype=np.int32)
    top = len(graph.layer_offsets) - 1
    walks, seeds = [], np.empty(len(queries), np.uint64)
    hops, distances = np.zeros(len(queries), np.int32), np.ones(len(queries), np.int32)
    for q in range(len(queries)):
        number = 0 if top else graph.entry_point  # on the layer about to be walked
        for layer in range(top, 0, -1):
            part = slice(graph.layer_offsets[layer - 1], graph.layer_offsets[layer])
            layer_nodes = graph.nodes[part]
            seed = seed_key(metric, rows, queries, q, layer_nodes, number)
            expanded, _, visited, _, best = walk(
                graph.neighbors[part], layer_nodes, rows, queries, q, metric, seed, 1, state
            )
            hops[q] += len(expanded)
            distances[q] += len(visited)
            number = graph.below[part][int(key_nodes(best))]
        seeds[q] = seed_key(metric, rows, queries, q, every, number)
        *found, _ = walk(graph.neighbors0, every, rows, queries, q, metric, seeds[q], ef, state)
        hops[q] += len(found[0])
        distances[q] += len(found[2])
        walks.append(found)
    expanded, fresh, visited, keys = (np.concatenate(parts) for parts in zip(*walks, strict=True))
    return Trace(
        hops,
        distances,
        expanded,
        fresh,
        visited,
        keys,
        np.cumsum([0] + [len(w[0]) for w in walks]),
        np.cumsum([0] + [len(w[2]) for w in walks]),
        seeds,
    )


@jit(allocates=True)
def seed_key(metric, rows, queries, q, nodes, number):
    return make_key(distance(metric, queries, q, rows, np.int64(nodes[number])), number)


@jit(allocates=True)
def walk(neighbors, nodes, rows, queries, q, metric, seed, capacity, visited):
    """R4-R6 on one layer: (expanded, fresh of each, nodes in order, their keys, nearest key).

    Numbers and keys are the layer's own; `nodes` turns them into rows. `visited` is left clear.
    """
    beam = np.full((1, capacity), KEY_NONE, np.uint64)
    beam[0, 0] = seed
    visited[key_node(seed)] = True
    position = 0
    expanded, fresh = [np.int32(0) for _ in range(0)], [np.int32(0) for _ in range(0)]
    numbers, keys = [np.int32(0) for _ in range(0)], [np.uint64(0) for _ in range(0)]
    while position < size(beam, 0):
        if beam[0, position] & EXPANDED:
            position += 1
            continue
        node = key_node(beam[0, position])
        beam[0, position] |= EXPANDED
        before = len(numbers)
        for number in neighbors[node]:
            if number < 0:
                break
            if not visited[number]:
                visited[number] = True
                numbers.append(number)
        for number in numbers[before:]:
            key = make_key(distance(metric, queries, q, rows, np.int64(nodes[number])), number)
            keys.append(key)
            insert(beam, 0, capacity, key)
        position = 0
        expanded.append(np.int32(node))
        fresh.append(np.int32(len(numbers) - before))
    visited[key_node(seed)] = False
    for number in numbers:
        visited[number] = False
    return np.array(expanded), np.array(fresh), np.array(numbers), np.array(keys), beam[0, 0]
