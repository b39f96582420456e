"""Building the graph: batches of points, no locks, the same bytes for any number of threads.

Nodes are inserted in order of their ids, in batches of 1 / BATCH_DIVISOR of the graph so far, at
least 1 and at most BATCH. For a batch:

1. Every point searches the graph as it was before the batch (R3-R6 with `ef_construction`), on each
   of its layers, and adds the points of the batch that come before it, compared one by one: a
   batch is never blind to itself, however clustered or sorted the data is, and yet the first
   point of a new cluster gets its links to the world outside, as if it had been inserted alone.
   The `ef_construction` smallest keys are the candidates; `_select` keeps at most M of them,
   nearest first, as the point's own links, on layer 0 half as many again.
2. The reverse links (target, source) are grouped by target.
3. Every target takes its new links: appended by (distance, source) where they fit, else selected
   again, at most M (M0 on layer 0), among old and new.

Each row is written by one iteration of one loop, so the threads need no locks and leave no trace.
Selection is algorithm 4 of Malkov & Yashunin in its strict form: a candidate is kept only if it is
nearer to the point than to every neighbour kept before it; a tie is rejected. On layer 0 a factor
relaxes that (the alpha of DiskANN, Subramanya et al. 2019), RELAXED_OWN for a point's own links and
RELAXED for a target's, whose free slots take the nearest that were rejected, unless they are near
copies of a neighbour. Under inner product hardly anything fills them, only what has a negative
product with the neighbour that rejects it: the others are often near to nearly all.
Afterwards `repair` sees to it that layer 0 leads from every node to every other.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine.alignment import empty_aligned, taken_aligned
from hnsw_gpu.engine.beam import TOGETHER, insert, insert_some, size
from hnsw_gpu.engine.candidates import RowCodes, codes_pay, find_candidates, layer_node
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import IP, as_query, distance
from hnsw_gpu.engine.exact import rerank
from hnsw_gpu.engine.graph import Graph
from hnsw_gpu.engine.keys import KEY_NONE, key_node, make_key
from hnsw_gpu.engine.vectors import METRICS, empty_queries, engine_view, rows_as_queries
from hnsw_gpu.engine.workers import run_chunks

BATCH = 2048  # comparing a batch with itself then costs a few percent of its searches
BATCH_DIVISOR = 50  # larger batches give their targets too many links at once, all chosen blindly
LINK_CHUNK = 64  # points or targets that a thread takes at a time
RELAXED = np.float32(1.05)  # what is nearer to a kept neighbour than this share of its distance
RELAXED_OWN = np.float32(1.2)  # to the point is rejected; the same for the point's own links
RELAXED_OWN_IP = np.float32(1.1)  # more finds more of hubs and less of what is short
NEAR_COPY = np.float32(4)  # times nearer to a kept neighbour than to the point
BITS_OF_DISTANCE = np.uint64(0xFFFFFFFF00000000)
SELECTED = np.uint64(1)  # in a candidate's key: the node's links were selected with this one
NOBODY = np.iinfo(np.int32).max  # in `nodes`, where a layer has room: behind every id


class GrowingGraph(NamedTuple):
    """The graph that grows, with room for every node, and what its links mean."""

    graph: Graph
    rows: np.ndarray  # (n, row) encoded
    metric: int
    # int16 (n,), or (0,) where few nodes are added: so many first links on layer 0 were selected
    # among each other for the node. When they are selected among again, none can reject another.
    selected: np.ndarray


class Selection(NamedTuple):
    """What one thread selects in."""

    kept: np.ndarray  # (M0, ...) the kept nodes as queries
    kept_keys: np.ndarray  # (M0,) uint64
    own: np.ndarray  # (1, ...) the target as query
    candidates: np.ndarray  # (1, M0 + sources of a target) uint64
    unsorted: np.ndarray  # (M0 + sources of a target + TOGETHER,) uint64, of the candidates
    rejected: np.ndarray  # (M0,) uint64, the nearest that may fill free slots


def empty_graph(M):
    """The graph of no nodes."""
    return Graph(
        neighbors0=np.empty((0, 2 * M), np.int32),
        layer_offsets=np.zeros(1, np.int64),
        nodes=np.empty(0, np.int32),
        neighbors=np.empty((0, M), np.int32),
        below=np.empty(0, np.int32),
    )


def draw_levels(seed, start, stop, M):
    """int32 levels of nodes start..stop: floor(-ln(u) / ln(M)), u from (seed, node) alone.

    The counter-based generator is splitmix64 (Steele, Lea, Flood 2014).
    """
    with np.errstate(over="ignore"):
        node = np.arange(start, stop, dtype=np.uint64)
        x = _mix(np.uint64(seed)) + (node + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        u = ((_mix(x) >> np.uint64(11)) + np.float64(0.5)) / np.float64(1 << 53)
    return np.floor(-np.log(u) / np.log(M)).astype(np.int32)


def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Rewritten(NamedTuple):
    """Rows of links that an insertion wrote, in arrays of row numbers; some come twice."""

    neighbors0: list[np.ndarray]
    neighbors: list[np.ndarray]


def insert_nodes(
    graph,
    room,
    rows,
    levels,
    metric,
    *,
    ef_construction,
    threads,
    rewritten=None,
    by_codes=None,
):
    """Insert rows[n:] of `levels` (m,) into a graph of n nodes.

    Yields it, grown, after each batch, and before as it is, while codes are made of the rows.
    `rows` (n + m, row) are encoded. `room` is what `with_room` gave for the graph and the levels:
    its links are written, and no search may read them meanwhile. `rewritten` is told which.
    `by_codes` says whether walks read int8 codes of rows of floats, None: where that is quicker.
    After a stop in the middle, `without_unfinished` gives the last graph again, mended.
    """
    start, stop = len(graph.neighbors0), len(rows)
    room = room._replace(neighbors0=room.neighbors0[:stop])
    own_rows = _enter(room, start, levels)
    if rewritten is not None:
        rewritten.neighbors0.append(np.arange(start, stop))
        rewritten.neighbors.append(own_rows)
    has_many = (stop - start) * BATCH_DIVISOR > stop  # else few nodes are linked to twice
    selected = np.zeros(stop if has_many else 0, np.int16)
    if by_codes is None:
        by_codes = codes_pay(rows, start)
    codes = RowCodes(rows) if by_codes else None
    growth = GrowingGraph(room, engine_view(rows), METRICS[metric], selected)
    if codes is not None:
        for _ in codes.encode(rows, threads):
            yield graph
    while start < stop:
        end = min(stop, start + max(1, min(start // BATCH_DIVISOR, BATCH)))
        batch_levels = levels[: end - start]
        levels = levels[end - start :]
        targets = _insert_batch(graph, growth, codes, batch_levels, ef_construction, threads)
        if rewritten is not None:
            split = np.searchsorted(targets, stop)
            rewritten.neighbors0.append(targets[:split])
            rewritten.neighbors.append(targets[split:] - stop)
        start = end
        graph = _first_nodes(room, start, max(graph.top, batch_levels.max()))
        yield graph


def with_room(room, count, levels):
    """`room`, a graph of `count` nodes, or one of more rows above, for nodes of these levels too.

    Rows of a layer that are not used lie at its end; layers of none lie behind the others. There
    are as many as are needed at first, a quarter more afterwards, so that growing costs little.
    """
    top = max(room.top, levels.max(initial=0))
    used = _used(room, count) + [0] * (top - room.top)
    needed = [used[i] + np.count_nonzero(levels > i) for i in range(top)]
    sizes = np.diff(room.layer_offsets).tolist() + [0] * (top - room.top)
    if all(needed[i] <= sizes[i] for i in range(top)):
        return room
    sizes = [max(needed[i], sizes[i], used[i] + used[i] // 4) for i in range(top)]
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    grown = room._replace(
        layer_offsets=offsets,
        nodes=np.full(offsets[-1], NOBODY, np.int32),
        neighbors=empty_aligned((int(offsets[-1]), room.neighbors.shape[1]), np.int32),
        below=np.zeros(offsets[-1], np.int32),
    )
    for layer in range(room.top):
        old = slice(room.layer_offsets[layer], room.layer_offsets[layer] + used[layer])
        new = slice(offsets[layer], offsets[layer] + used[layer])
        for name in ("nodes", "neighbors", "below"):
            getattr(grown, name)[new] = getattr(room, name)[old]
    return grown


def _used(room, count):
    """Rows of each layer above that the first `count` nodes take."""
    starts = room.layer_offsets
    return [int(np.searchsorted(room.nodes[a:b], count)) for a, b in pairwise(starts)]


def _enter(room, count, levels):
    """Give nodes from `count` on their rows, without links, on all of their layers: the rows."""
    room.neighbors0[count : count + len(levels)] = -1
    rows, nodes = [np.empty(0, np.int64)], room.nodes[:0]
    for layer in range(1, levels.max(initial=0) + 1):
        start, end = room.layer_offsets[layer - 1 : layer + 1]
        below, nodes = nodes, room.nodes[start:end]
        new = (count + np.flatnonzero(levels >= layer)).astype(np.int32)
        first = start + np.searchsorted(nodes, count)
        place = slice(first, first + len(new))
        room.nodes[place] = new
        room.neighbors[place] = -1
        room.below[place] = new if layer == 1 else np.searchsorted(below, new)
        rows.append(np.arange(place.start, place.stop))
    return np.concatenate(rows)


def _first_nodes(room, count, top):
    """The graph as its first `count` nodes, of which the highest level is `top`, left it."""
    return room._replace(
        neighbors0=room.neighbors0[:count], layer_offsets=room.layer_offsets[: top + 1]
    )


def packed(graph):
    """The graph without rows of layers above that it does not use, as it is checked and saved."""
    used = _used(graph, len(graph.neighbors0))
    if sum(used) == len(graph.nodes):
        return graph
    rows = [
        np.arange(start, start + size)
        for start, size in zip(graph.layer_offsets, used, strict=False)
    ]
    taken = np.concatenate([np.empty(0, np.int64), *rows])
    return graph._replace(
        layer_offsets=np.cumsum([0, *used], dtype=np.int64),
        nodes=graph.nodes[taken],
        neighbors=taken_aligned(graph.neighbors, taken),
        below=graph.below[taken],
    )


def without_unfinished(room, count, top):
    """The graph of the first `count` nodes of a room, without links to what did not follow."""
    graph = _first_nodes(room, count, top)
    _drop_links_from(graph.neighbors0, count)
    for start, used in zip(graph.layer_offsets, _used(graph, count), strict=False):
        _drop_links_from(graph.neighbors[start : start + used], used)
    return graph


@jit
def _drop_links_from(neighbors, count):
    """Remove links to numbers `count` and above, in place; rows stay filled from the left."""
    for i in range(neighbors.shape[0]):
        kept = 0
        for j in range(neighbors.shape[1]):
            link = neighbors[i, j]
            neighbors[i, j] = -1
            if 0 <= link < count:
                neighbors[i, kept] = link
                kept += 1


def _insert_batch(graph, growth, codes, levels, ef_construction, threads):
    """Steps 1 to 3 for the nodes that follow `graph`'s, one level each; returns the targets."""
    first, count = len(graph.neighbors0), len(levels)
    M = graph.neighbors.shape[1]
    task = find_candidates(
        graph, growth.rows, codes, growth.metric, levels,
        ef_construction=ef_construction, threads=threads,
    )  # fmt: skip
    # One row a point and layer. Targets are numbered through all layers: first the rows of
    # `neighbors0`, then those of `neighbors`.
    own_links = M + M // 2
    targets = np.full((len(task.keys), own_links), -1, np.int64)
    sources = np.empty((len(task.keys), own_links), np.uint64)

    def link(start, stop):
        selection = _new_selection(growth, 0)
        _link_points(growth, task, selection, first, start, stop, targets, sources)

    run_chunks(link, count, LINK_CHUNK, threads)
    return _give_links(growth, targets.ravel(), sources.ravel(), threads)


def _give_links(growth, targets, sources, threads):
    """Step 3 for pairs of a target (-1: none) and a source's key; returns the targets."""
    targets, sources, group_start = _group(targets, sources)
    most = np.diff(group_start).max(initial=0)

    def relink(start, stop):
        selection = _new_selection(growth, most)
        _relink_targets(growth, selection, targets, sources, group_start[start : stop + 1])

    run_chunks(relink, len(group_start) - 1, LINK_CHUNK, threads)
    return targets[group_start[:-1]]


def give_links(graph, rows, metric, links, first, *, threads):
    """Offer nodes first.. links (m, width) on layer 0, -1 = none, beside those that they have.

    Writes `graph.neighbors0`. Links to the node itself, and those that come twice, are left out.
    """
    own = rows_as_queries(rows[first : first + len(links)])
    nodes = np.arange(first, first + len(links))
    links = np.sort(np.where(links == nodes[:, None], -1, links), axis=1)
    links[:, 1:][links[:, 1:] == links[:, :-1]] = -1
    links = -np.sort(-links, axis=1)
    keys = np.where(links < 0, KEY_NONE, links.astype(np.uint64) << np.uint64(1))
    keys = rerank(keys, rows, own, metric, k=links.shape[1], threads=threads)
    targets = np.where(keys == KEY_NONE, -1, nodes[:, None])
    growth = GrowingGraph(graph, engine_view(rows), METRICS[metric], np.empty(0, np.int16))
    _give_links(growth, targets.ravel(), keys.ravel(), threads)


def _new_selection(growth, most_sources):
    M0 = growth.graph.neighbors0.shape[1]
    queries = empty_queries(M0 + 1, growth.rows)
    return Selection(
        kept=queries[:M0],
        kept_keys=np.empty(M0, np.uint64),
        own=queries[M0:],
        candidates=np.empty((1, M0 + most_sources), np.uint64),
        unsorted=np.empty(M0 + most_sources + TOGETHER, np.uint64),
        rejected=np.empty(M0, np.uint64),
    )


def _group(targets, sources):
    """The pairs that exist, by target, and where each target's begin and end.

    A target's are in no order: to order them too, with `lexsort`, takes many times as long.
    """
    pairs = np.flatnonzero(targets >= 0)
    order = pairs[np.argsort(targets[pairs])]
    targets, sources = targets[order], sources[order]
    changes = np.flatnonzero(targets[1:] != targets[:-1]) + 1
    ends = [len(targets)] if len(targets) else []
    return targets, sources, np.concatenate([[0], changes, ends]).astype(np.int64)


@jit(is_inlined=True)
def _number(graph, layer, node):
    """Number on a layer of the first node that is not smaller than `node`."""
    if layer == 0:
        return np.int64(node)
    start, end = graph.layer_offsets[layer - 1], graph.layer_offsets[layer]
    first, last = start, end
    while first < last:
        middle = (first + last) >> 1
        if graph.nodes[middle] < node:
            first = middle + 1
        else:
            last = middle
    return first - start


@jit
def _link_points(growth, task, selection, first, start, stop, targets, sources):
    """Step 1 after the search, for points start..stop of the batch that begins at id `first`."""
    graph = growth.graph
    for q in range(start, stop):
        for layer in range(task.levels[q] + 1):
            row = task.keys_start[q] + layer
            own = _number(graph, layer, first + q)
            _add_batch_mates(growth, task, first, q, layer)
            candidates = size(task.keys, row)
            limit = graph.neighbors.shape[1] if layer else targets.shape[1]
            relaxed = RELAXED_OWN_IP if growth.metric == IP else RELAXED_OWN
            factor = _factor(layer, relaxed)
            count = _select(
                growth, layer, task.keys, row, candidates, limit, factor, np.uint64(0), selection
            )
            layer_start = graph.layer_offsets[layer - 1] if layer else np.int64(0)
            first_target = graph.neighbors0.shape[0] + layer_start if layer else np.int64(0)
            for j in range(count):
                key = selection.kept_keys[j]
                number = key_node(key)
                if layer:
                    graph.neighbors[layer_start + own, j] = number
                else:
                    graph.neighbors0[own, j] = number
                targets[row, j] = first_target + number
                sources[row, j] = key & BITS_OF_DISTANCE | np.uint64(own) << np.uint64(1)


@jit(is_inlined=True)
def _add_batch_mates(growth, task, first, q, layer):
    """Merge the points of the batch before this one that are on the layer into the candidates."""
    keys, row = task.keys, task.keys_start[q] + layer
    capacity = keys.shape[1]
    number = _number(growth.graph, layer, first)
    for mate in range(q):
        if task.levels[mate] < layer:
            continue
        key = make_key(distance(task.metric, task.queries, q, growth.rows, first + mate), number)
        if key < keys[row, capacity - 1]:  # KEY_NONE until the row is full
            insert(keys, row, capacity, key)
        number += 1


@jit(is_inlined=True)
def _factor(layer, relaxed):
    """How many times farther a kept neighbour counts as than it is."""
    return relaxed if layer == 0 else np.float32(1)


@jit(is_inner=True)
def _select(growth, layer, keys, row, candidates, limit, factor, mark, selection):
    """Algorithm 4, strict but for the factor: writes the kept keys, nearest first; how many.

    The candidates are keys[row, :candidates], ascending by distance to the point; at most `limit`
    are kept. None that has the bit `mark` rejects another that has it. `rejected` gets the nearest
    others that are no near copies, then KEY_NONE.
    """
    count, rejected, share = np.int64(0), np.int64(0), np.float32(1) / factor
    for i in range(candidates):
        key = keys[row, i]
        node = layer_node(growth.graph, layer, key_node(key))
        is_kept = True
        for j in range(count):
            if key & selection.kept_keys[j] & mark:
                continue
            between = distance(growth.metric, selection.kept, j, growth.rows, node)
            farther = between * (factor if between > 0 else share)  # it is negative under ip
            if make_key(farther, np.int64(0)) <= key & BITS_OF_DISTANCE:
                is_kept = False
                if make_key(NEAR_COPY * between, np.int64(0)) > key and rejected < limit:
                    selection.rejected[rejected] = key
                    rejected += 1
                break
        if is_kept:
            selection.kept_keys[count] = key
            as_query(growth.rows, node, selection.kept, count)
            count += 1
            if count == limit:
                break
    if rejected < limit:
        selection.rejected[rejected] = KEY_NONE
    return count


@jit(is_inlined=True)
def _fill(selection, count, limit):
    """Add the nearest rejected keys to `count` kept ones, up to `limit`; how many there are."""
    for i in range(limit - count):
        if selection.rejected[i] == KEY_NONE:
            break
        selection.kept_keys[count] = selection.rejected[i]
        count += 1
    return count


@jit
def _relink_targets(growth, selection, targets, sources, group_start):
    """Step 3 for a run of groups of pairs."""
    graph = growth.graph
    count = graph.neighbors0.shape[0]
    for g in range(len(group_start) - 1):
        target = targets[group_start[g]]
        new = sources[group_start[g] : group_start[g + 1]]
        layer, neighbors, row = np.int64(0), graph.neighbors0, target
        if target >= count:
            neighbors, row = graph.neighbors, target - count
            while row >= graph.layer_offsets[layer]:
                layer += 1
        _relink(growth, layer, neighbors, row, new, selection)


@jit(is_inlined=True)
def _relink(growth, layer, neighbors, row, sources, selection):
    """Give one target its new links: append them, or select among old and new."""
    graph, candidates, unsorted = growth.graph, selection.candidates, selection.unsorted
    width = neighbors.shape[1]
    count = 0
    while count < width and neighbors[row, count] >= 0:
        count += 1
    new = 0
    for i in range(len(sources)):
        if not _has(neighbors, row, count, key_node(sources[i])):
            unsorted[new] = sources[i]
            new += 1
    if count + new <= width:
        candidates[0, :new] = KEY_NONE
        insert_some(candidates, np.int64(0), np.int64(new), unsorted, np.int64(new))
        for i in range(new):
            neighbors[row, count + i] = key_node(candidates[0, i])
        return
    number = row - graph.layer_offsets[layer - 1] if layer else row
    as_query(growth.rows, layer_node(graph, layer, number), selection.own, np.int64(0))
    is_told = layer == 0 and len(growth.selected) > 0
    selected = np.int64(growth.selected[row]) if is_told else np.int64(0)  # nearest first
    # Distances that were kept, 4 bytes a link, would save no time: the rows are read all the same.
    for j in range(count):
        link = np.int64(neighbors[row, j])
        node = layer_node(graph, layer, link)
        key = make_key(distance(growth.metric, selection.own, np.int64(0), growth.rows, node), link)
        if j < selected:
            candidates[0, j] = key | SELECTED
        else:
            unsorted[new + j - selected] = key
    candidates[0, selected : new + count] = KEY_NONE
    insert_some(candidates, np.int64(0), new + count, unsorted, new + count - selected)
    factor = _factor(layer, RELAXED)
    count = _select(
        growth, layer, candidates, np.int64(0), new + count, width, factor, SELECTED, selection
    )
    if is_told:
        growth.selected[row] = count
    if factor != 1:
        count = _fill(selection, count, width)
    for j in range(width):
        neighbors[row, j] = key_node(selection.kept_keys[j]) if j < count else -1


@jit(is_inlined=True)
def _has(neighbors, row, count, number):
    for j in range(count):
        if neighbors[row, j] == number:
            return True
    return False
