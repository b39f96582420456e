"""How what an index holds grows: room, encoding, copies, insertion, repair; and compaction.

Each function takes a State and gives the next one, and writes nothing that searches of the old one
read: rows and labels behind the old ones, and links in a second copy. One thread at a time calls
them.
"""

from collections.abc import Callable, Iterator

import numpy as np

from hnsw_gpu.engine import copies
from hnsw_gpu.engine.alignment import copy_aligned, empty_aligned, taken_aligned
from hnsw_gpu.engine.build import (
    Rewritten,
    draw_levels,
    empty_graph,
    give_links,
    insert_nodes,
    packed,
    with_room,
    without_unfinished,
)
from hnsw_gpu.engine.graph import Graph
from hnsw_gpu.engine.labels import Labels
from hnsw_gpu.engine.repair import repair
from hnsw_gpu.engine.rounding import Rounded, count_blurred, count_worn
from hnsw_gpu.engine.state import State, empty_state
from hnsw_gpu.engine.vectors import ENCODED, empty_rows, encode_scaled, scaled
from hnsw_gpu.engine.workers import run_chunks

# Of the beam of a build, where halves are joined, which so costs less than a third of its
# distances; 0.2 loses recall under ip. A smaller part is inserted with a larger beam.
JOIN_SHARE = 0.25
REPAIR_SHARE = 2048  # new nodes a repair: it then takes about as long as adding them


def with_vectors(
    state: State, count: int, parts: Iterator[tuple[np.ndarray, np.ndarray]], *, threads: int
) -> tuple[State, np.ndarray, Rounded]:
    """The state with `count` vectors behind its nodes, the node of each, and what rounding did.

    parts: (m, dim) as they were given, and as float32, valid. Nodes int64 (count,) that are new
    follow the old ones; they have no links yet.
    """
    first = state.node_count
    state = _with_rows_for(state, first + count)
    kept, start, worn, blurred = state.parameters, first, 0, 0
    finest = state.rows if state.refine_rows is None else state.refine_rows
    given = np.empty(0 if finest.dtype == np.float32 else count, np.uint64)
    for raw, part in parts:
        blurred += count_blurred(raw, part, kept.metric)
        place = slice(start, start + len(part))
        exact = _write_rows(state, place, part, given[place.start - first :], threads)
        worn += count_worn(exact, state.rows[place], kept.metric, kept.dtype, threads=threads)
        start += len(part)
    nodes, sources = state.table.assign(finest, first, start)
    merged = state.table.count_unlike(nodes, sources, first, given) if len(given) else 0
    if len(sources) < count:
        for rows in (state.rows, state.refine_rows):
            if rows is not None:
                copies.move_together(rows, sources, first)
    return state, nodes, Rounded(worn, merged, blurred)


def _write_rows(
    state: State, place: slice, vectors: np.ndarray, hashes: np.ndarray, threads: int
) -> np.ndarray:
    """Encode vectors (m, dim) into a place of the state's rows; the vectors, scaled.

    hashes: what gets those of fp32 rows, where the rows kept are others, else empty.
    """
    kept, exact = state.parameters, np.empty(vectors.shape, np.float32)

    def write(begin: int, end: int) -> None:
        some = exact[begin:end]
        some[:] = scaled(vectors[begin:end], kept.metric)
        rows = slice(place.start + begin, place.start + end)
        state.rows[rows] = encode_scaled(some, kept.dtype)
        if state.refine_rows is not None:
            state.refine_rows[rows] = encode_scaled(some, kept.refine)
        if len(hashes):
            hashes[begin:end] = copies.hash_rows(encode_scaled(some, "fp32"))

    run_chunks(write, len(vectors), ENCODED, threads)
    return exact


def insert(
    state: State,
    nodes: np.ndarray,
    labels: np.ndarray,
    keep: Callable[[State, np.ndarray | None], None],
    *,
    all_or_none: bool,
    threads: int,
    is_stopped: Callable[[], bool],
    advance: Callable[[int], object],
) -> None:
    """Link the new ones of `nodes` (m,), which carry `labels` (m,), and `keep` what came of it.

    That is a whole state whatever happens: when `is_stopped()`, or where something was raised,
    without the labels from the first node on that is not in; with `all_or_none` nothing is kept
    then. `keep` is told too which nodes have other links on layer 0 (None: any may), and `advance`
    how many nodes were linked.
    """
    graph, kept = state.graph, state.parameters
    first = state.node_count
    count = max(int(nodes.max(initial=-1)) + 1, first)
    if count == first:  # copies of what is there
        keep(_labelled(state, nodes, labels), np.empty(0, np.int64))
        return
    levels = draw_levels(kept.seed, first, count, kept.M)
    room = _room_to_write(state, levels)
    rewritten = Rewritten([], [])
    insertion = insert_nodes(
        graph, room, state.rows[:count], levels, kept.metric,
        ef_construction=kept.ef_construction, threads=threads, rewritten=rewritten,
    )  # fmt: skip
    is_whole = is_known = False  # are all nodes in, and all rows that were written told?
    unrepaired = state.unrepaired + count - first
    try:
        for grown in insertion:
            advance(len(grown.neighbors0) - len(graph.neighbors0))
            graph = grown
            if is_stopped():
                break
        is_whole = len(graph.neighbors0) == count
        if is_whole and unrepaired > count // REPAIR_SHARE:
            rewritten.neighbors0.append(_repair(state, graph, threads))
            unrepaired = 0
        is_known = is_whole
    finally:  # whatever happened, labels and graph agree on the nodes there are
        if all_or_none and (not is_known or is_stopped()):
            state.table.clear()
        else:
            changed = None
            if is_known:
                changed = np.concatenate(rewritten.neighbors0)
                if 2 * len(changed) < count:  # else copying all costs no more than this `add` did
                    state.spare_neighbors0.give(state.room.neighbors0, rewritten.neighbors0)
                    if room.nodes is state.room.nodes:
                        state.spare_neighbors.give(state.room.neighbors, rewritten.neighbors)
            if not is_whole:
                graph = without_unfinished(room, len(graph.neighbors0), graph.top)
                unrepaired = len(graph.neighbors0)
                state.table.clear()
            state = state._replace(
                graph=graph, room=room, version=state.version + 1, unrepaired=unrepaired
            )
            keep(_labelled(state, nodes, labels), changed)


def _repair(state: State, graph: Graph, threads: int) -> np.ndarray:
    """Make every node of a graph that nobody reads reachable; the nodes that have other links."""
    kept, relinked = state.parameters, np.zeros(len(graph.neighbors0), bool)
    repair(
        graph, state.rows[: len(relinked)], kept.metric,
        ef_construction=kept.ef_construction, threads=threads, relinked=relinked,
    )  # fmt: skip
    return np.flatnonzero(relinked)


def _room_to_write(state: State, levels: np.ndarray) -> Graph:
    """Room for nodes of these levels, equal to the state's and read by no search."""
    room: Graph = with_room(state.room, state.node_count, levels)
    neighbors0 = state.spare_neighbors0.take(
        state.room.neighbors0, state.node_count, len(state.rows)
    )
    neighbors = room.neighbors
    if neighbors is state.room.neighbors:
        neighbors = state.spare_neighbors.take(neighbors, len(neighbors), len(neighbors))
    return room._replace(neighbors0=neighbors0, neighbors=neighbors)


def _labelled(state: State, nodes: np.ndarray, labels: np.ndarray) -> State:
    """The state with labels up to the first of `nodes` that its graph does not hold.

    Labels that other nodes carry are taken from those.
    """
    count = state.node_count
    is_in = np.cumsum(nodes >= count) == 0
    held, given = state.labels, labels[is_in]
    if (given < state.next_label).any():
        known = held.find(given)
        held = held.without(known[known >= 0])
    state = state._replace(
        labels=held.with_added(given, nodes[is_in], count),
        next_label=max(state.next_label, int(labels.max(initial=-1)) + 1),
    )
    if len(state.rows) <= 2 * count:
        return state
    cpu = state.cpu  # most of the vectors were copies
    graph = packed(state.graph)._replace(neighbors0=copy_aligned(state.graph.neighbors0))
    state.spare_neighbors0.forget()
    state.spare_neighbors.forget()
    return state._replace(
        graph=graph,
        room=graph,
        rows=copy_aligned(cpu.rows),
        refine_rows=None if cpu.refine_rows is None else copy_aligned(cpu.refine_rows),
    )


def repaired(state: State, *, threads: int) -> tuple[State, np.ndarray]:
    """The state with every node reachable, and which nodes have other links for it."""
    if not state.unrepaired:
        return state, np.empty(0, np.int64)
    state.require_unchanged()
    count, room = state.node_count, state.room
    neighbors0 = state.spare_neighbors0.take(room.neighbors0, count, len(room.neighbors0))
    graph = state.graph._replace(neighbors0=neighbors0[:count])
    changed = _repair(state, graph, threads)
    state.spare_neighbors0.give(room.neighbors0, [changed])
    room = room._replace(neighbors0=neighbors0)
    return state._replace(graph=graph, room=room, version=state.version + 1, unrepaired=0), changed


def compacted(
    state: State, *, threads: int, advance: Callable[[int], object], keep_deleted: bool = False
) -> State:
    """A new state of the nodes that carry labels, or of those too that `undelete` brings back.

    Nodes that are equal, as those of other libraries may be, become one.
    """
    state.require_unchanged()
    kept, is_kept = state.parameters, state.labels.live_nodes()
    if keep_deleted:
        is_kept[state.labels.deleted.nodes] = True
    live = np.flatnonzero(is_kept)
    rows, refine_rows = taken_aligned(state.rows, live), state.refine_rows
    if refine_rows is not None:
        refine_rows = taken_aligned(refine_rows, live)
    state.require_unchanged()
    nodes, sources = copies.NodeTable().assign(
        rows if refine_rows is None else refine_rows, 0, len(live)
    )
    node_of = np.full(state.node_count, -1)  # of each node of before
    node_of[live] = nodes
    if len(sources) < len(live):
        rows = taken_aligned(rows, sources)
        refine_rows = None if refine_rows is None else taken_aligned(refine_rows, sources)
    graph = build_graph(
        rows, kept.metric, M=kept.M, ef_construction=kept.ef_construction, seed=kept.seed,
        threads=threads, advance=advance,
    )  # fmt: skip
    fresh = empty_state(kept)
    fresh.table.clear()
    return fresh._replace(
        graph=graph,
        room=graph,
        version=state.version + 1,
        rows=rows,
        refine_rows=refine_rows,
        labels=state.labels.moved(node_of, len(sources), keep_deleted=keep_deleted),
        next_label=state.next_label,
        names=state.names,
    )


def joined(state: State, other: State, *, threads: int, advance: Callable[[int], object]) -> State:
    """A new state of the nodes of two that are kept alike; no label is in both.

    The nodes of the smaller are inserted into the larger, with a smaller beam than that of a build:
    the links that they had among each other are offered to them afterwards.
    """
    state.require_unchanged()
    other.require_unchanged()
    kept = state.parameters
    large, small = (state, other) if state.node_count >= other.node_count else (other, state)
    live = np.flatnonzero(small.labels.live_nodes())
    first, count = large.node_count, len(live)
    rows = empty_rows(first + count, kept.dim, kept.dtype)
    rows[:first], rows[first:] = large.rows[:first], small.rows[live]
    refine_rows = None
    if large.refine_rows is not None and small.refine_rows is not None:
        refine_rows = empty_rows(first + count, kept.dim, kept.refine)
        refine_rows[:first], refine_rows[first:] = (
            large.refine_rows[:first],
            small.refine_rows[live],
        )
    state.require_unchanged()
    other.require_unchanged()
    nodes, sources = copies.NodeTable().assign(
        rows if refine_rows is None else refine_rows, first, first + count
    )
    for encoded in (rows, refine_rows):
        if encoded is not None:
            copies.move_together(encoded, sources, first)
    stop = first + len(sources)
    rows = rows[:stop]
    graph = packed(large.graph)
    levels = draw_levels(kept.seed, first, stop, kept.M)
    room = with_room(graph, first, levels)
    neighbors0 = empty_aligned((stop, 2 * kept.M), np.int32)
    neighbors0[:first] = graph.neighbors0
    room = room._replace(neighbors0=neighbors0, neighbors=copy_aligned(room.neighbors))
    graph = graph._replace(neighbors0=neighbors0[:first])
    share = min(1, JOIN_SHARE * stop / (2 * max(stop - first, 1)))
    insertion = insert_nodes(
        graph, room, rows, levels, kept.metric,
        ef_construction=max(kept.M, int(kept.ef_construction * share)), threads=threads,
    )  # fmt: skip
    for grown in insertion:
        advance(len(grown.neighbors0) - len(graph.neighbors0))
        graph = grown
    node_of = np.full(small.node_count, -1)  # of each node of the smaller
    node_of[live] = nodes
    theirs = small.graph.neighbors0[live[sources - first]]
    links = np.where(theirs < 0, -1, node_of[theirs])
    give_links(graph, rows, kept.metric, links, first, threads=threads)
    repair(graph, rows, kept.metric, ef_construction=kept.ef_construction, threads=threads)
    held_labels, held_nodes = large.labels.pairs()
    held = Labels.of_nodes(held_labels, held_nodes, first)
    labels, nodes_of = small.labels.pairs()
    fresh = empty_state(kept)
    fresh.table.clear()
    return fresh._replace(
        graph=graph,
        room=room._replace(neighbors0=graph.neighbors0),
        version=state.version + 1,
        rows=rows,
        refine_rows=None if refine_rows is None else refine_rows[:stop],
        labels=held.with_added(labels, node_of[nodes_of], stop),
        next_label=max(state.next_label, other.next_label),
        names=state.names,
    )


def build_graph(
    rows: np.ndarray,
    metric: str,
    *,
    M: int,
    ef_construction: int,
    seed: int,
    threads: int,
    advance: Callable[[int], object],
    by_codes: bool | None = None,
) -> Graph:
    """The graph of distinct encoded rows (n, row). `advance` is told how many nodes were linked.

    by_codes: whether walks read int8 codes of rows of floats; None: where that is quicker.
    """
    graph, levels = empty_graph(M), draw_levels(seed, 0, len(rows), M)
    room = with_room(graph, 0, levels)
    room = room._replace(neighbors0=empty_aligned((len(rows), 2 * M), np.int32))
    insertion = insert_nodes(
        graph, room, rows, levels, metric,
        ef_construction=ef_construction, threads=threads, by_codes=by_codes,
    )  # fmt: skip
    for grown in insertion:
        advance(len(grown.neighbors0) - len(graph.neighbors0))
        graph = grown
    repair(graph, rows, metric, ef_construction=ef_construction, threads=threads)
    return graph


def _with_rows_for(state: State, count: int) -> State:
    """The state with room for the rows of `count` nodes."""
    state.require_unchanged()
    used, kept = state.node_count, state.parameters
    rows = _with_room(state.rows, used, count, kept.dim, kept.dtype)
    refine_rows = state.refine_rows
    if refine_rows is not None:
        refine_rows = _with_room(refine_rows, used, count, kept.dim, kept.refine)
    state.require_unchanged()
    source = state.source if rows is state.rows else None
    return state._replace(rows=rows, refine_rows=refine_rows, source=source)


def _with_room(rows: np.ndarray, used: int, count: int, dim: int, dtype: str) -> np.ndarray:
    """`rows` with room for at least `count`: exactly at first, by a quarter more afterwards."""
    if len(rows) >= count:
        return rows
    grown: np.ndarray = empty_rows(max(count, used + used // 4), dim, dtype)
    grown[:used] = rows[:used]
    return grown
