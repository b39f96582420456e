"""Beam search over the graph on the CPU, for many queries at once.

The rules, which every engine follows and code, kernels and tests cite by number:

R1  Distance. float32, smaller is nearer. l2: squared; ip: 0 - dot (callers are told 1 - dot, whose
    float32 forgets the order of small products); cosine: 1 - dot of unit vectors.
R2  Key. ordered(distance) << 32 | id << 1 | expanded, one uint64. "Smaller", "nearest" and "k best"
    mean keys: ties go to the smaller id.
R3  Descent. From the entry point, on each layer top..1, a beam search (R4-R6) of capacity
    `ef_upper`; its beam is the seed of the layer below.
R4  Beam. At most max(ef, k) smallest keys seen on the layer.
R5  Step. Take the `expand` smallest unexpanded keys of the beam (fewer if there are fewer), mark
    them; compute the key of every neighbour not known to be visited; merge them all at once.
R6  Stop. When no key in the beam is unexpanded.
R7  Visited. An engine may forget what it visited; the answer cannot depend on it. Once the beam is
    full its worst key never grows: a forgotten id that was rejected is rejected again, and one
    still in the beam comes back as an equal key and is dropped. This engine forgets nothing.
R8  Allowed. Ids that are not allowed are traversed like any other and never returned: beside the
    beam a second list keeps the k smallest allowed keys seen. Those that the final beam holds of
    ids that are not allowed are counted as blocked: where they leave too little room, or allowed
    ids are few, another search answers instead (`filtered_search.py` says where, and which).
R9  Result. The k smallest allowed keys, ascending; too few: empty slots.
R10 Self. A query that is a stored vector starts from its own node, skips R3, and the node itself is
    left out of the result.
R11 Same bits. The summation order of one distance depends only on (metric, dtype, dim).

One thread walks SLOTS queries in turn. Each step of a query ends by asking for the memory that its
next step needs (first the links of the node to expand, then the rows of the unvisited neighbours),
and while that is on its way the other queries take theirs.

The slow version is `tests/reference.py`.
"""

from typing import NamedTuple

import numpy as np

from hnsw_gpu.engine.beam import (
    LANES,
    TOGETHER,
    first_unexpanded,
    insert,
    insert_some,
    set_bytes,
)
from hnsw_gpu.engine.block import EIGHT, write_keys
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import distance, prefetch_row
from hnsw_gpu.engine.keys import EXPANDED, KEY_NONE, key_node, make_key
from hnsw_gpu.engine.vectors import METRICS, engine_view
from hnsw_gpu.engine.workers import run_chunks

SLOTS = 4  # queries that one thread walks in turn
CHUNK = 256  # queries that a thread takes at a time
LEAST_CHUNK = 8  # fewer are not worth another thread
KEPT_BYTES = 1 << 22  # of a Scratch, in visited bits and keys, that waits for the next search
# Words of the visited set for each visit that is remembered: a query that visits more has all of
# the set cleared, in place of what it visited.
WORDS_A_VISIT = 32
# int64 fields of a slot; all keys before PICKED_AT, where the last was picked, are expanded
QUERY, LAYER, PHASE, CAPACITY, PICKED, PENDING = range(6)
VISITS, HAS_WRAPPED, HOPS, READ, PICKED_AT = range(6, 11)
IDLE, FREE, GATHER, COMPUTE = range(4)
EMPTY = 255  # each byte of KEY_NONE


class Task(NamedTuple):
    """What to search for, and where the answer goes."""

    metric: int
    queries: np.ndarray  # (q, ...) encoded
    levels: np.ndarray  # (q,) int32: the beams of layers level..0 are wanted; 0 in a search
    own: np.ndarray  # (q,) int32 ids for R10, or (0,)
    allowed: np.ndarray  # (0, 0), (1, words) or (q, words) uint32, bit id & 31 of word id >> 5
    ef: int  # beam capacity on layers level..0: max(ef, k)
    ef_upper: int  # beam capacity above
    keys_start: np.ndarray  # (q,) int64 row of layer 0 in `keys`; layer l is l rows further
    keys: np.ndarray  # (rows, k or ef) uint64
    counts: np.ndarray  # (q, 3) int32: hops, distances, blocked (R8)


class Scratch(NamedTuple):
    """What one thread works in; the visited bits are all zero between calls."""

    slots: np.ndarray  # (SLOTS, fields) int64
    beam: np.ndarray  # (SLOTS, ef or ef_upper, rounded up to LANES) uint64
    allowed_keys: np.ndarray  # (SLOTS, k) uint64, the k smallest (R8); (SLOTS, 0): all are
    visited: np.ndarray  # (SLOTS, words) uint32
    # (SLOTS, words / WORDS_A_VISIT, expand * M0 and EIGHT more) int32, the last are pending
    visits: np.ndarray
    picked: np.ndarray  # (SLOTS, expand) int32
    keys: np.ndarray  # (expand * M0 and EIGHT more,) uint64 of the pending nodes
    entering: np.ndarray  # (expand * M0 and TOGETHER more,) uint64, those of them that enter


class Result(NamedTuple):
    """Keys ascending, KEY_NONE where too few, and what they cost."""

    keys: np.ndarray  # (q, k) uint64
    hops: np.ndarray  # (q,) int32 expansions, all layers
    distances: np.ndarray  # (q,) int32 distances computed, all layers
    blocked: np.ndarray  # (q,) int32 keys of the final beam that may not be returned (R8)


def search_graph(
    graph,
    rows,
    queries,
    metric,
    *,
    k,
    ef,
    expand=1,
    ef_upper=1,
    allowed=None,
    own=None,
    threads=1,
):
    """The k nearest nodes of each encoded query (rules R1-R11).

    `rows` (n, row) and `queries` (q, ...) are encoded (`vectors.py`); `allowed` is None or packed
    uint32 bits, (words,) or (q, words); `own` int32 (q,) makes it a self search (R10).
    """
    count = len(queries)
    keys = np.full((count, k), KEY_NONE, np.uint64)
    task = Task(
        metric=METRICS[metric],
        queries=queries,
        levels=np.zeros(count, np.int32),
        own=np.empty(0, np.int32) if own is None else own,
        allowed=np.empty((0, 0), np.uint32) if allowed is None else np.atleast_2d(allowed),
        ef=max(ef, k),
        ef_upper=ef_upper,
        keys_start=np.arange(count, dtype=np.int64),
        keys=keys,
        counts=np.zeros((count, 3), np.int32),
    )
    if len(rows):
        walk(graph, rows, task, expand, threads)
    return Result(keys, *task.counts.T)


def walk(graph, rows, task, expand=1, threads=1):
    """Run a task over all of its queries."""
    rows = engine_view(rows)
    count = len(task.queries)
    share = max(LEAST_CHUNK, -(-count // threads))  # of each thread
    chunk = -(-share // -(-share // CHUNK))  # so that all threads have as many
    has_allowed_keys = len(task.own) or len(task.allowed)
    shape = Shape(
        slots=min(SLOTS, chunk, count),
        nodes=len(graph.neighbors0),
        width=expand * graph.neighbors0.shape[1],
        expand=expand,
        capacity=max(task.ef, task.ef_upper),
        allowed=task.keys.shape[1] if has_allowed_keys else 0,
    )

    def run(start, stop):
        scratch = _scratch(shape)
        _walk_chunk(graph, rows, task, scratch, start, stop)
        _spare.append((shape, scratch))

    run_chunks(run, count, chunk, threads)
    if shape.slots * (shape.nodes // 8 + 8 * (shape.capacity + shape.allowed)) > KEPT_BYTES:
        _spare.clear()


class Shape(NamedTuple):
    """What a Scratch is made for."""

    slots: int
    nodes: int
    width: int  # links of the nodes that are expanded in one step
    expand: int
    capacity: int
    allowed: int  # keys that may be returned


_spare: list[tuple[Shape, Scratch]] = []  # of chunks that have ended: a query is soon walked


def _scratch(shape):
    """One that is spare, if it fits, or a new one."""
    try:
        made_for, scratch = _spare.pop()
    except IndexError:
        made_for = None
    return scratch if made_for == shape else _new_scratch(shape)


def _new_scratch(shape):
    slots, width, words = shape.slots, shape.width, (shape.nodes + 31) >> 5
    return Scratch(
        slots=np.zeros((slots, 11), np.int64),
        beam=np.empty((slots, -(-shape.capacity // LANES) * LANES), np.uint64),
        allowed_keys=np.empty((slots, shape.allowed), np.uint64),
        visited=np.zeros((slots, words), np.uint32),
        visits=np.zeros((slots, words // WORDS_A_VISIT + width + EIGHT), np.int32),
        picked=np.empty((slots, shape.expand), np.int32),
        keys=np.empty(width + EIGHT, np.uint64),
        entering=np.empty(width + TOGETHER, np.uint64),
    )


@jit
def _walk_chunk(graph, rows, task, scratch, start, stop):
    """Walk queries start..stop, some at a time, each in its slot."""
    # The paper's algorithm 2, SEARCH-LAYER: ep is the seed, W the beam, C its unexpanded keys,
    # v the visited bits, c a picked key, e a pending neighbour, f the beam's worst key.
    slots = scratch.slots
    following = start
    active = slots.shape[0]
    for s in range(active):
        slots[s, PHASE] = FREE
    while active:
        for s in range(slots.shape[0]):
            if slots[s, PHASE] == GATHER:
                _gather(graph, rows, scratch, s)
                continue
            if slots[s, PHASE] == IDLE:
                continue
            if slots[s, PHASE] == COMPUTE:
                _compute(graph, rows, task, scratch, s)
                if _next_step(graph, task, scratch, s):
                    continue
            if following < stop:
                _begin(graph, task, scratch, s, following)
                following += 1
            else:
                slots[s, PHASE] = IDLE
                active -= 1


@jit(is_inlined=True)
def _visit(scratch, s, node):
    """Mark a node visited, known to be new."""
    count = _room_for_visits(scratch, s)
    scratch.visited[s, node >> 5] |= np.uint32(1) << np.uint32(node & 31)
    scratch.visits[s, count] = node
    scratch.slots[s, VISITS] = count + 1


@jit(is_inlined=True)
def _room_for_visits(scratch, s):
    """Where the next visits are written: at the beginning again when there is no more room."""
    slots = scratch.slots
    if slots[s, VISITS] + scratch.keys.shape[0] > scratch.visits.shape[1]:
        slots[s, VISITS] = 0
        slots[s, HAS_WRAPPED] = 1
    return slots[s, VISITS]


@jit(is_inlined=True)
def _clear_visited(scratch, s):
    """Clear the visited set."""
    if scratch.slots[s, HAS_WRAPPED]:
        set_bytes(scratch.visited, s, 0, 0)
    else:
        for i in range(scratch.slots[s, VISITS]):
            scratch.visited[s, np.uintp(scratch.visits[s, i]) >> np.uintp(5)] = 0
    scratch.slots[s, VISITS] = 0
    scratch.slots[s, HAS_WRAPPED] = 0


@jit(is_inlined=True)
def _is_allowed(own, allowed, q, node):
    if len(own) and own[q] == node:
        return False
    if allowed.shape[0] == 0:
        return True
    row = q if allowed.shape[0] > 1 else 0
    return allowed[row, node >> 5] >> np.uint32(node & 31) & np.uint32(1) != 0


@jit(is_inlined=True)
def _offer(task, scratch, s, count):
    """Merge `count` keys of the layer into the beam (R4, R5) and the allowed list (R8)."""
    keys, entering = scratch.keys, scratch.entering
    capacity = scratch.slots[s, CAPACITY]
    worst, enter = scratch.beam[s, capacity - 1], 0
    for j in range(count):  # few enter, at random: counted, not branched on
        entering[enter] = keys[j]
        enter += keys[j] < worst
    whole_lanes = (capacity + LANES - 1) & -LANES
    last_picked = scratch.beam[s, scratch.slots[s, PICKED_AT]]
    for j in range(enter):
        if entering[j] < last_picked:
            scratch.slots[s, PICKED_AT] = 0
    insert_some(scratch.beam, s, whole_lanes, entering, enter)
    if scratch.slots[s, LAYER] == 0 and scratch.allowed_keys.shape[1]:
        q = scratch.slots[s, QUERY]
        for j in range(count):
            _offer_allowed(task, scratch.allowed_keys, s, q, keys[j])


@jit(is_inlined=True)
def _offer_allowed(task, allowed_keys, s, q, key):
    """Merge one key of layer 0 into the allowed list (R8), if it may be returned."""
    k = allowed_keys.shape[1]
    is_near = key < allowed_keys[s, k - 1]
    if is_near and _is_allowed(task.own, task.allowed, q, key_node(key)):
        insert(allowed_keys, s, k, key)


@jit(is_inlined=True)
def _enter_layer(task, slots, s, layer):
    """Start a layer; the beam is to be filled."""
    slots[s, LAYER] = layer
    slots[s, PICKED] = 0
    slots[s, PENDING] = 0
    slots[s, PICKED_AT] = 0
    is_wanted = layer <= task.levels[slots[s, QUERY]]
    slots[s, CAPACITY] = task.ef if is_wanted else task.ef_upper


@jit(is_inlined=True)
def _begin(graph, task, scratch, s, q):
    """Let a query begin with the entry point, or its own node, as what it has listed (R3, R10)."""
    slots = scratch.slots
    slots[s, QUERY] = q
    slots[s, PHASE] = COMPUTE
    set_bytes(scratch.beam, s, 0, EMPTY)
    set_bytes(scratch.allowed_keys, s, 0, EMPTY)
    slots[s, HOPS] = 0
    slots[s, READ] = 0
    layer = len(graph.layer_offsets) - 1
    number = np.int64(0)
    if len(task.own):
        layer = 0
        number = np.int64(task.own[q])
    _enter_layer(task, slots, s, layer)
    _visit(scratch, s, number)
    slots[s, PENDING] = 1


@jit(is_inlined=True)
def _list_unvisited(links, row, visited, visits, s, count):
    """Append the unvisited links of a row to the visits, mark them; returns how many there are.

    Whether a link was visited is close to random, so it is counted, not branched on.
    """
    for j in range(links.shape[1]):
        link = links[row, j]
        if link < 0:
            break
        word, bit = np.uintp(link) >> np.uintp(5), np.uint32(1) << np.uint32(link & 31)
        old = visited[s, word]
        visited[s, word] = old | bit
        visits[s, np.uintp(count)] = link
        count += (old & bit) == 0
    return count


@jit(is_inlined=True)
def _gather(graph, rows, scratch, s):
    """Second half of a step: list the unvisited neighbours and ask for their rows (R5, R7)."""
    slots, visits, visited = scratch.slots, scratch.visits, scratch.visited
    layer, first = slots[s, LAYER], _room_for_visits(scratch, s)
    count = first
    if layer == 0:
        for p in range(slots[s, PICKED]):
            row = np.int64(scratch.picked[s, p])
            count = _list_unvisited(graph.neighbors0, row, visited, visits, s, count)
        for j in range(first, count):
            prefetch_row(rows, visits[s, np.uintp(j)])
    else:
        start = graph.layer_offsets[layer - 1]
        for p in range(slots[s, PICKED]):
            row = start + scratch.picked[s, p]
            count = _list_unvisited(graph.neighbors, row, visited, visits, s, count)
        for j in range(first, count):
            prefetch_row(rows, graph.nodes[start + visits[s, j]])
    slots[s, VISITS] = count
    slots[s, PENDING] = count - first
    slots[s, PHASE] = COMPUTE


@jit(is_inlined=True)
def _compute(graph, rows, task, scratch, s):
    """End of a step: the pending nodes' keys, merged (R5)."""
    slots, visits = scratch.slots, scratch.visits
    q, layer, count = slots[s, QUERY], slots[s, LAYER], slots[s, PENDING]
    first = slots[s, VISITS] - count
    if layer == 0:
        write_keys(task.metric, task.queries, q, rows, visits, s, first, count, scratch.keys)
    else:
        start = graph.layer_offsets[layer - 1]
        for j in range(count):
            number = np.int64(visits[s, first + j])
            node = np.int64(graph.nodes[start + number])
            scratch.keys[j] = make_key(distance(task.metric, task.queries, q, rows, node), number)
    _offer(task, scratch, s, count)
    slots[s, READ] += count
    slots[s, PENDING] = 0


@jit(is_inlined=True)
def _pick(scratch, s):
    """Mark the `expand` smallest unexpanded keys (R5); False if there is none (R6)."""
    slots = scratch.slots
    capacity, position, picked = slots[s, CAPACITY], slots[s, PICKED_AT], 0
    while picked < scratch.picked.shape[1]:
        position = first_unexpanded(scratch.beam, s, position & -LANES, capacity)
        if position >= capacity:
            break
        key = scratch.beam[s, position]
        scratch.beam[s, position] = key | EXPANDED
        scratch.picked[s, picked] = key_node(key)
        slots[s, PICKED_AT] = position
        picked += 1
    slots[s, PICKED] = picked
    slots[s, HOPS] += picked
    return picked > 0


@jit(is_inlined=True)
def _next_step(graph, task, scratch, s):
    """First half of a step: pick, on this layer or one below; False when the query has ended."""
    slots = scratch.slots
    while not _pick(scratch, s):
        _write_keys(task, scratch, s)
        _clear_visited(scratch, s)
        if slots[s, LAYER] == 0:
            task.counts[slots[s, QUERY], 0] = slots[s, HOPS]
            task.counts[slots[s, QUERY], 1] = slots[s, READ]
            return False
        _descend(graph, task, scratch, s)
    start = graph.layer_offsets[slots[s, LAYER] - 1] if slots[s, LAYER] else 0
    for p in range(slots[s, PICKED]):
        if slots[s, LAYER]:
            prefetch_row(graph.neighbors, start + scratch.picked[s, p])
        else:
            prefetch_row(graph.neighbors0, scratch.picked[s, p])
    slots[s, PHASE] = GATHER
    return True


@jit(is_inlined=True)
def _descend(graph, task, scratch, s):
    """Make the beam the seed of the layer below (R3)."""
    slots, beam = scratch.slots, scratch.beam
    start, capacity = graph.layer_offsets[slots[s, LAYER] - 1], slots[s, CAPACITY]
    _enter_layer(task, slots, s, slots[s, LAYER] - 1)
    for i in range(capacity):  # ascending keys stay ascending: `below` keeps the order of ids
        if beam[s, i] == KEY_NONE:
            break
        distance_bits = beam[s, i] >> np.uint64(32) << np.uint64(32)
        number = np.int64(graph.below[start + key_node(beam[s, i])])
        beam[s, i] = distance_bits | np.uint64(number) << np.uint64(1)
        _visit(scratch, s, number)
        if slots[s, LAYER] == 0 and scratch.allowed_keys.shape[1]:
            _offer_allowed(task, scratch.allowed_keys, s, slots[s, QUERY], beam[s, i])
    set_bytes(beam, s, capacity, EMPTY)


@jit(is_inlined=True)
def _write_keys(task, scratch, s):
    """Hand over a wanted layer's beam, or the allowed list in its place (R8, R9)."""
    slots, beam = scratch.slots, scratch.beam
    q, layer = slots[s, QUERY], slots[s, LAYER]
    if layer > task.levels[q]:
        return
    row, count = task.keys_start[q] + layer, task.keys.shape[1]
    if layer == 0 and scratch.allowed_keys.shape[1]:
        for i in range(count):
            task.keys[row, i] = scratch.allowed_keys[s, i]
        task.counts[q, 2] = _blocked(task, scratch, s)
        return
    for i in range(min(slots[s, CAPACITY], count)):
        if beam[s, i] == KEY_NONE:
            break
        task.keys[row, i] = beam[s, i] & ~EXPANDED


@jit(is_inlined=True)
def _blocked(task, scratch, s):
    """How many keys of the beam may not be returned (R8)."""
    count = 0
    for i in range(scratch.slots[s, CAPACITY]):
        key = scratch.beam[s, i]
        if key == KEY_NONE:
            break
        count += not _is_allowed(task.own, task.allowed, scratch.slots[s, QUERY], key_node(key))
    return count
