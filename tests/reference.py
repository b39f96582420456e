"""The rules of `hnsw_gpu/engine/search.py` in slow, obvious Python: what every engine must equal.

Numbers like R5 name the rule a line follows. Vectors are plain float32 arrays, not encoded rows, so
an engine's encoding is held against the oracle too. Keys are Python integers.

On fp32 and fp16 the sums are taken in float64 and rounded once: an engine gives the same float only
where every summation order is exact, which `integer_vectors` sees to. The int8 distance is a fixed
chain of float32 operations and is the same on any data, and so is the int4 one: a dot product of
whole numbers, and a multiply-add that rounds once.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine.graph import Graph

KEY_NONE = 2**64 - 1  # an empty slot

KeyTable = list[list[int]]  # [query][id], expanded bit clear


# --- R1: distance ---------------------------------------------------------------------------------


class Codes(NamedTuple):
    """An int8 vector: value = scale * code."""

    codes: list[int]
    scale: np.float32
    norm: np.float32  # squared length


def unit(vector: np.ndarray) -> np.ndarray:
    """`vector` scaled to length 1, its length taken in float64."""
    values = [float(x) for x in vector]
    length = math.sqrt(sum(x * x for x in values))
    return np.array([x / length for x in values], dtype=np.float32)


def quantise(vector: np.ndarray) -> Codes:
    """Symmetric int8 codes; a zero vector has scale 0 and codes 0."""
    largest = max(abs(np.float32(x)) for x in vector)
    scale = np.float32(largest) / np.float32(127)
    if scale == 0:
        codes = [0] * len(vector)
    else:
        codes = [max(-127, min(127, int(np.rint(np.float32(x) / scale)))) for x in vector]
    return Codes(codes, scale, (scale * scale) * np.float32(sum(c * c for c in codes)))


class Int4(NamedTuple):
    """An int4 vector, rotated: value = scale * code; codes are odd, -15..15, but for a query's."""

    codes: list[int]
    scale: np.float32
    square: np.float32  # squared length of what was given


def sign(place: int) -> int:
    """-1 or 1, by the place alone."""
    return -1 if mix((place + 1) * 0x9E3779B97F4A7C15) >> 63 else 1


def rotated(vector: np.ndarray, rounds: int = 4) -> np.ndarray:
    """Signs, then butterflies of the first or the last 2**p; after both, of halves, if more."""
    values = vector.astype(np.float32)
    dim = len(values)
    power = 2 ** (dim.bit_length() - 1)
    half_root = np.float32(math.sqrt(0.5))
    for turn in range(rounds):
        values = values * np.array([sign(turn * dim + j) for j in range(dim)], np.float32)
        first = dim - power if turn % 2 else 0
        part, factor, step = values[first : first + power], np.float32(1), 1
        while step < power:
            pairs = part.reshape(-1, 2, step)
            part = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).ravel()
            factor = factor * half_root
            step *= 2
        values = np.concatenate([values[:first], part * factor, values[first + power :]])
        if turn % 2 and power < dim:
            left, right = values[: dim // 2].copy(), values[dim - dim // 2 :].copy()
            values[: dim // 2] = (left + right) * half_root
            values[dim - dim // 2 :] = (left - right) * half_root
    return values


def whole(values: np.ndarray, most: int) -> tuple[list[int], np.float32]:
    """Values as whole numbers of a unit, at most `most` of it, and the unit; zeros have unit 0."""
    unit = np.float32(max(abs(x) for x in values)) / np.float32(most)
    if unit == 0:
        return [0] * len(values), unit
    return [math.floor(x / unit + np.float32(most + 0.5)) - most for x in values], unit


def int4_row(vector: np.ndarray) -> Int4:
    """Coordinates in 12 bits, of which codes are made in nine steps; the best cosine stays."""
    values = rotated(vector)
    numbers, unit = whole(values, 2047)
    square = math.fsum(float(x) ** 2 for x in values)
    if unit == 0:
        return Int4([-15] * len(values), np.float32(0), np.float32(0))
    best_cosine, best_dot, best = -1.0, 0, [0]
    coordinates = np.array(numbers)
    for step in range(9):
        factor = round(2**16 * 7.5 / (2047 * (0.6 + 0.05 * step)))
        codes = 2 * np.clip((coordinates * factor >> 16) + 8, 0, 15) - 15
        dot = int((coordinates * codes).sum())
        cosine = dot / math.sqrt(int((codes * codes).sum()))
        if cosine > best_cosine:
            best_cosine, best_dot, best = cosine, dot, codes.tolist()
    return Int4(best, np.float32(square / (float(unit) * best_dot)), np.float32(square))


def int4_query(vector: np.ndarray) -> Int4:
    """The same rotated vector in 8 bits."""
    values = rotated(vector)
    codes, scale = whole(values, 127)
    return Int4(codes, scale, np.float32(math.fsum(float(x) ** 2 for x in values)))


def int4_value(row: Int4) -> np.ndarray:
    """float64 (dim,) that a row stands for, still rotated."""
    return float(row.scale) * np.array(row.codes, np.float64)


def rounded(exact: Fraction) -> np.float32:
    """The nearest float32; of two as near, the even one."""
    near = np.float32(float(exact))
    around = (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf)))
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


def int4_distance(query: Int4, row: Int4, metric: str) -> np.float32:
    """R1 for int4: a whole number, rounded to float32, and one multiply-add, rounded once."""
    dot = np.float32(sum(q * x for q, x in zip(query.codes, row.codes, strict=True)))
    factor, start = query.scale * row.scale, np.float32(metric == "cosine")
    if metric == "l2":
        factor, start = np.float32(2) * factor, query.square + row.square
    return rounded(Fraction(float(start)) - Fraction(float(factor)) * Fraction(float(dot)))


def stored(vector: np.ndarray, metric: str, dtype: str) -> Codes | Int4 | list[float]:
    """What an index keeps of `vector`."""
    if metric == "cosine":
        vector = unit(vector)
    if dtype == "int8":
        return quantise(vector)
    if dtype == "int4":
        return int4_row(vector)
    return [float(x) for x in vector.astype({"fp32": np.float32, "fp16": np.float16}[dtype])]


def asked(query: np.ndarray, metric: str, dtype: str) -> Codes | Int4 | list[float]:
    """What a search makes of `query`: int8 is quantised like a row, fp16 stays float32."""
    if dtype == "int4":
        return int4_query(unit(query) if metric == "cosine" else query)
    return stored(query, metric, "fp32" if dtype == "fp16" else dtype)


def distance(
    query: Codes | Int4 | list[float], row: Codes | Int4 | list[float], metric: str
) -> np.float32:
    """R1: float32, smaller is nearer."""
    if isinstance(query, Int4) and isinstance(row, Int4):
        return int4_distance(query, row, metric)
    if isinstance(query, Codes) and isinstance(row, Codes):
        return int8_distance(query, row, metric)
    assert isinstance(query, list)
    assert isinstance(row, list)
    if metric == "l2":
        return np.float32(sum((q - x) ** 2 for q, x in zip(query, row, strict=True)))
    return np.float32((metric == "cosine") - sum(q * x for q, x in zip(query, row, strict=True)))


def int8_dot(query: Codes, row: Codes) -> np.float32:
    """Each operation rounds to float32, in this order."""
    dot = np.float32(sum(q * x for q, x in zip(query.codes, row.codes, strict=True)))
    return (query.scale * row.scale) * dot


def int8_distance(query: Codes, row: Codes, metric: str) -> np.float32:
    """R1 for int8: each operation rounds to float32, in this order."""
    if metric != "l2":
        return np.float32(metric == "cosine") - int8_dot(query, row)
    squared = (query.norm + row.norm) - np.float32(2) * int8_dot(query, row)
    return max(np.float32(0), squared)


# --- R2: keys -------------------------------------------------------------------------------------


def ordered(distance: np.float32) -> int:
    """A uint32 that sorts as the float32 does (-0.0 before 0.0)."""
    bits = int(np.float32(distance).view(np.uint32))
    return bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)


def key(distance: np.float32, node: int) -> int:
    return ordered(distance) << 32 | node << 1


def distance_of(key: int) -> np.float32:
    bits = key >> 32
    bits ^= 0x80000000 if bits >> 31 else 0xFFFFFFFF
    return np.uint32(bits).view(np.float32)


def node_of(key: int) -> int:
    return (key & 0xFFFFFFFF) >> 1


def key_table(vectors: np.ndarray, queries: np.ndarray, metric: str, dtype: str) -> KeyTable:
    """The key of every node for every query: computed once, looked up by many searches."""
    rows = [stored(vector, metric, dtype) for vector in vectors]
    return [
        [key(distance(query, row, metric), node) for node, row in enumerate(rows)]
        for query in (asked(query, metric, dtype) for query in queries)
    ]


# --- R3-R10: search -------------------------------------------------------------------------------


class Layer(NamedTuple):
    """What a beam search of one layer leaves."""

    beam: list[int]  # ascending keys, every one expanded
    seen: set[int]  # every key that was computed, the seeds' included
    hops: int


def links(graph: Graph, layer: int) -> dict[int, list[int]]:
    """The neighbours of every node of a layer, all as ids."""
    if layer == 0:
        nodes, rows = range(len(graph.neighbors0)), graph.neighbors0
    else:
        part = slice(graph.layer_offsets[layer - 1], graph.layer_offsets[layer])
        nodes = graph.nodes[part].tolist()
        rows = graph.neighbors[part]
    return {
        node: [nodes[local] for local in row if local >= 0]
        for node, row in zip(nodes, rows.tolist(), strict=True)
    }


def all_links(graph: Graph) -> list[dict[int, list[int]]]:
    return [links(graph, layer) for layer in range(len(graph.layer_offsets))]


def search_layer(
    links: dict[int, list[int]], keys: list[int], seeds: Iterable[int], capacity: int, expand: int
) -> Layer:
    """R4-R6 on one layer, from the keys `seeds`; `keys[id]` is the key of a node."""
    seen = set(seeds)
    beam = sorted(seen)[:capacity]  # R4
    expanded: set[int] = set()
    hops = 0
    while True:
        step = [key for key in beam if key not in expanded][:expand]  # R5
        if not step:
            return Layer(beam, seen, hops)  # R6
        expanded.update(step)
        hops += len(step)
        reached = {keys[neighbor] for key in step for neighbor in links[node_of(key)]}
        # R7: the oracle forgets nothing.
        beam = sorted(set(beam) | (reached - seen))[:capacity]
        seen |= reached


class Found(NamedTuple):
    """The answer to one query, and what it cost."""

    keys: list[int]  # at most k, ascending
    hops: int
    distances: int  # distances computed, where nothing is forgotten (R7)
    blocked: int  # keys of the final beam that may not be returned (R8)


def search_query(
    links: Sequence[dict[int, list[int]]],
    keys: list[int],
    k: int,
    ef: int,
    expand: int,
    ef_upper: int,
    is_allowed: Callable[[int], bool] | None,
    own: int | None,
) -> Found:
    """`links[layer]` is made by `links()`."""
    hops, distances = 0, 1
    if own is not None:
        seeds = [keys[own]]  # R10
    else:
        seeds = [keys[min(links[-1])]]  # the entry point: the smallest id of the top layer
        for layer in reversed(links[1:]):  # R3
            walked = search_layer(layer, keys, seeds, ef_upper, expand)
            hops += walked.hops
            distances += len(walked.seen) - len(seeds)
            seeds = walked.beam
    walked = search_layer(links[0], keys, seeds, max(ef, k), expand)
    hops += walked.hops
    distances += len(walked.seen) - len(seeds)
    if is_allowed is None and own is None:
        return Found(walked.beam[:k], hops, distances, 0)  # R9
    allowed = [  # R8: whatever was seen counts, also what never entered the beam
        key
        for key in walked.seen
        if node_of(key) != own and (is_allowed is None or is_allowed(node_of(key)))
    ]
    return Found(sorted(allowed)[:k], hops, distances, len(set(walked.beam) - set(allowed)))


class Result(NamedTuple):
    """As `Result` in engine/search.py."""

    keys: np.ndarray  # (q, k) uint64
    hops: np.ndarray  # (q,) int32
    distances: np.ndarray  # (q,) int32
    blocked: np.ndarray  # (q,) int32


def search(
    graph: Graph,
    table: KeyTable,
    *,
    k: int,
    ef: int,
    expand: int = 1,
    ef_upper: int = 1,
    allowed: np.ndarray | None = None,
    own: Sequence[int] | None = None,
) -> Result:
    """What `search_graph` returns. `allowed` is bool (n,) or (q, n), not packed."""
    layers = all_links(graph)
    count = len(table)
    result = Result(
        np.full((count, k), KEY_NONE, dtype=np.uint64),
        *np.zeros((3, count), dtype=np.int32),
    )
    for i, keys in enumerate(table):
        mask = None if allowed is None else allowed if allowed.ndim == 1 else allowed[i]
        found = search_query(
            layers,
            keys,
            k,
            ef,
            expand,
            ef_upper,
            None if mask is None else mask.__getitem__,
            None if own is None else int(own[i]),
        )
        result.keys[i, : len(found.keys)] = found.keys
        result.hops[i], result.distances[i] = found.hops, found.distances
        result.blocked[i] = found.blocked
    return result


# --- building -------------------------------------------------------------------------------------


def select(
    candidates: Iterable[int],
    table: KeyTable,
    limit: int,
    factor: float = 1.0,
    is_filled: bool = False,
) -> list[int]:
    """The paper's algorithm 4, strict: ids of the neighbours kept, nearest first.

    candidates: keys of nodes by their distance to the point; `table[a][b]` is the key of b for a.
    One is kept only if it is strictly nearer to the point than `factor` times its distance to
    every neighbour kept before it (see `farther`). Where `is_filled`, those follow, up to `limit`,
    whom the first neighbour that rejects them is nearer than the point, but not four times or more.
    """
    kept: list[int] = []
    rejected: list[int] = []
    for candidate in sorted(candidates):
        if len(kept) == limit:
            break
        node = node_of(candidate)
        between = [distance_of(table[other][node]) for other in kept]
        near = [d for d in between if candidate >> 32 >= ordered(farther(d, np.float32(factor)))]
        if not near:
            kept.append(node)
        elif candidate >> 32 < ordered(4 * near[0]):
            rejected.append(node)
    return (kept + rejected * is_filled)[:limit]


def farther(distance: np.float32, factor: np.float32) -> np.float32:
    """A distance times a factor of 1 or more; one of inner products may be negative."""
    return distance * factor if distance > 0 else distance * (np.float32(1) / factor)


def node_table(vectors: np.ndarray, metric: str, dtype: str) -> KeyTable:
    """`table[a][b]` is the key of node b for stored vector a."""
    rows = [stored(vector, metric, dtype) for vector in vectors]
    return [
        [key(distance(own, row, metric), node) for node, row in enumerate(rows)] for own in rows
    ]


def draw_level(seed: int, node: int, M: int) -> int:
    """floor(-ln(u) / ln(M)), u in (0, 1) from splitmix64 of (seed, node)."""
    u = ((mix(mix(seed) + (node + 1) * 0x9E3779B97F4A7C15) >> 11) + 0.5) / 2**53
    return math.floor(-math.log(u) / math.log(M))


def mix(x: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014)."""
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def insert_nodes(
    graph: Graph,
    table: KeyTable,
    stop: int,
    *,
    ef_construction: int,
    seed: int,
    growth: int = 50,
    largest_batch: int = 2048,
    own_factor: float = 1.2,
    codes: KeyTable | None = None,
) -> Graph:
    """The graph of nodes ..stop, grown from a graph of fewer, in batches of 1/growth of it.

    codes: the keys by which points walk first, where they walk on codes.
    """
    M = graph.neighbors.shape[1]
    layers = all_links(graph)
    start = len(graph.neighbors0)
    while start < stop:
        batch = range(start, min(stop, start + max(1, min(start // growth, largest_batch))))
        levels = {point: draw_level(seed, point, M) for point in batch}
        insert_batch(layers, table, levels, M, ef_construction, own_factor, codes)
        start = batch.stop
    return graph_of(layers, M)


def insert_batch(
    layers: list[dict[int, list[int]]],
    table: KeyTable,
    levels: dict[int, int],
    M: int,
    ef_construction: int,
    own_factor: float,
    codes: KeyTable | None,
) -> None:
    """Insert the points `levels` names, one level each, into `layers`."""
    own_links: dict[tuple[int, int], list[int]] = {}
    for point, level in levels.items():  # all see the graph as it was
        beams = point_beams(layers, (codes or table)[point], level, ef_construction)
        if codes:
            again = {
                layer: [table[point][node_of(key)] for key in beam] for layer, beam in beams.items()
            }
            if is_rough(again.get(0, [])):
                again = point_beams(layers, table[point], level, ef_construction)
            beams = again
        for layer in range(level + 1):
            mates = [mate for mate in levels if mate < point and levels[mate] >= layer]
            candidates = beams.get(layer, []) + [table[point][mate] for mate in mates]
            nearest = sorted(candidates)[:ef_construction]
            limit = M if layer else M + M // 2
            factor = 1.0 if layer else own_factor
            own_links[layer, point] = select(nearest, table, limit, factor)

    layers += [{} for _ in range(len(layers), max(levels.values()) + 1)]
    sources: dict[tuple[int, int], list[int]] = {}
    for (layer, point), targets in own_links.items():
        layers[layer][point] = list(targets)
        for target in targets:
            sources.setdefault((layer, target), []).append(point)
    for (layer, target), points in sources.items():
        width = M if layer else 2 * M
        relink(layers[layer], target, points, table, width, 1.0 if layer else 1.05)


def is_rough(keys: list[int]) -> bool:
    """Are keys, in the order by codes, in a wrong one: over a fifth of pairs, one of each half?"""
    half = len(keys) // 2
    pairs = zip(keys[:half], keys[half:], strict=False)
    return sum(near > far for near, far in pairs) > 0.2 * half


def point_beams(
    layers: list[dict[int, list[int]]], keys: list[int], level: int, ef_construction: int
) -> dict[int, list[int]]:
    """R3-R6: the beam of each layer that a point of this level is on, those that exist."""
    beams: dict[int, list[int]] = {}
    if not layers[0]:
        return beams
    seeds = [keys[min(layers[-1])]]
    for layer in reversed(range(len(layers))):
        capacity = ef_construction if layer <= level else 1
        seeds = beams[layer] = search_layer(layers[layer], keys, seeds, capacity, expand=1).beam
    return beams


def relink(
    links: dict[int, list[int]],
    target: int,
    sources: list[int],
    table: KeyTable,
    width: int,
    factor: float,
) -> None:
    """Give a target its reverse links: nearest first where they fit, else selected with the old."""
    old = links[target]
    new = sorted(table[target][source] for source in sources if source not in old)
    if len(old) + len(new) <= width:
        links[target] = old + [node_of(key) for key in new]
    else:
        candidates = [table[target][node] for node in old] + new
        links[target] = select(candidates, table, width, factor, is_filled=factor > 1)


def empty_graph(M: int) -> Graph:
    return graph_of([{}], M)


def graph_of(layers: list[dict[int, list[int]]], M: int) -> Graph:
    """The arrays of a graph; layer 0 first, each layer's links as ids."""
    numbers = [{node: i for i, node in enumerate(sorted(layer))} for layer in layers]
    rows = []
    for layer, links in enumerate(layers):
        part = np.full((len(links), M if layer else 2 * M), -1, dtype=np.int32)
        for node, neighbors in links.items():
            part[numbers[layer][node], : len(neighbors)] = [numbers[layer][i] for i in neighbors]
        rows.append(part)
    nodes = [node for upper in numbers[1:] for node in upper]
    below = [lower[node] for lower, upper in pairwise(numbers) for node in upper]
    return Graph(
        neighbors0=rows[0],
        layer_offsets=np.cumsum([0] + [len(part) for part in rows[1:]], dtype=np.int64),
        nodes=np.array(nodes, dtype=np.int32),
        neighbors=np.concatenate([np.zeros((0, M), dtype=np.int32), *rows[1:]]),
        below=np.array(below, dtype=np.int32),
    )


def repair(graph: Graph, table: KeyTable, metric: str, ef_construction: int) -> np.ndarray:
    """`neighbors0` with a way from the entry point to every node, and from every node to it.

    A node that cannot be reached, smallest id first, gets a link from the nearest reachable node
    that a search finds and that has an empty slot, under ip from the one of those that has the
    fewest links, the nearest of equals; else from the first, breadth first from the
    nearest reachable one found, that has an empty slot, or at least a spare one: a link that the
    tree of shortest paths does not use (the last such). Where the search finds no reachable node,
    the nearest of all that has either gives it.
    Then a node that leads to no entry point gets a link to the nearest that does, of those that a
    search finds or else of all; the first, breadth first from that node, with an empty slot, or at
    least a spare one, gives it.
    """
    layers = all_links(graph)
    links = {node: list(neighbors) for node, neighbors in layers[0].items()}
    width = graph.neighbors0.shape[1]
    entry_point = min(layers[-1])
    parents = {entry_point: entry_point}
    reach(links, parents, entry_point)

    def found_near(node: int, layers: list[dict[int, list[int]]]) -> list[int]:
        found = search_query(
            layers, table[node], ef_construction, ef_construction, 1, 1, None, None
        )
        return [node_of(key) for key in found.keys]

    def near_of_all(node: int) -> list[int]:
        return [node_of(key) for key in sorted(table[node])]

    def is_empty(giver: int) -> bool:
        return len(links[giver]) < width

    def spare(giver: int) -> list[int]:
        return [i for i, link in enumerate(links[giver]) if parents[link] != giver]

    def first_with_room(start: int) -> int:
        met = reached(links, start)
        return next(filter(is_empty, met), next(filter(spare, met), -1))

    def give(giver: int, target: int) -> None:
        if is_empty(giver):
            links[giver].append(target)
        else:
            links[giver][spare(giver)[-1]] = target

    for node in [node for node in links if node not in parents]:
        if node in parents:  # a node repaired before leads to it
            continue
        near = [other for other in found_near(node, layers) if other in parents]
        givers = [other for other in near if is_empty(other)]
        if metric == "ip":
            givers.sort(key=lambda other: len(links[other]))
        if not near:
            reachable = [other for other in near_of_all(node) if other in parents]
            givers = [other for other in reachable if is_empty(other) or spare(other)]
        giver = givers[0] if givers else first_with_room(near[0])
        give(giver, node)
        parents[node] = giver
        reach(links, parents, node)
    between = [{node: list(neighbors) for node, neighbors in links.items()}, *layers[1:]]
    for node in links:
        back = {other for other in links if entry_point in reached(links, other)}
        if node not in back:
            near = found_near(node, between) + near_of_all(node)
            give(first_with_room(node), next(target for target in near if target in back))
    return graph_of([links], width // 2).neighbors0


def reached(links: dict[int, list[int]], start: int) -> list[int]:
    """All nodes that `start` leads to, itself first, breadth first."""
    parents = {start: start}
    reach(links, parents, start)
    return list(parents)


def reach(links: dict[int, list[int]], parents: dict[int, int], start: int) -> None:
    """Breadth-first from `start`, writing the parents of nodes that have none."""
    queue = [start]
    for node in queue:
        for link in links[node]:
            if link not in parents:
                parents[link] = node
                queue.append(link)


# --- data on which every summation order is exact -------------------------------------------------


def integer_vectors(
    n: int, dim: int, metric: str, rng: np.random.Generator, largest: int = 3
) -> np.ndarray:
    """n distinct float32 (n, dim) vectors whose distances are exact floats, with many ties.

    Values are at most `largest`; under cosine a row is +-1 in 4**j places and 0 elsewhere, so that
    its length is a power of two.
    """
    rows: dict[bytes, np.ndarray] = {}
    while len(rows) < n:
        if metric == "cosine":
            row = np.zeros(dim, dtype=np.float32)
            places = rng.choice([4**j for j in range(6) if 4**j <= dim])
            row[rng.choice(dim, places, replace=False)] = rng.choice([-1, 1], places)
        else:
            row = rng.integers(-largest, largest + 1, dim).astype(np.float32)
        rows[row.tobytes()] = row
    return np.array(list(rows.values()))


def random_graph(vectors: np.ndarray, M: int, seed: int) -> Graph:
    """A sound graph that no builder made: a few near and a few random links a node, rows not full.

    A ring through each layer makes every node reachable.
    """
    rng = np.random.default_rng(seed)
    n = len(vectors)
    levels = np.floor(-np.log(1 - rng.random(n)) / math.log(M))
    layers = []
    for layer in range(int(levels.max()) + 1):
        nodes = np.flatnonzero(levels >= layer)
        links = random_links(vectors[nodes], M if layer else 2 * M, rng)
        layers.append({int(nodes[i]): nodes[links[i]].tolist() for i in range(len(nodes))})
    return graph_of(layers, M)


def random_links(vectors: np.ndarray, width: int, rng: np.random.Generator) -> list[list[int]]:
    """Up to `width` links of each vector: the next of a ring, near ones and random ones."""
    n = len(vectors)
    ring = rng.permutation(n)
    follower = np.empty(n, dtype=np.int64)
    follower[ring] = np.roll(ring, -1)
    links = []
    for node in range(n):
        near = np.argsort(((vectors - vectors[node]) ** 2).sum(axis=1), kind="stable")
        wanted = [follower[node], *near[1 : 1 + width // 2], *rng.integers(0, n, width)]
        chosen = [other for other in dict.fromkeys(map(int, wanted)) if other != node]
        degree = int(rng.integers(width // 2, width + 1))
        links.append(rng.permutation(chosen[:degree]).astype(np.int64).tolist())
    return links
