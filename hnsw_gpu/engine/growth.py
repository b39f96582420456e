"""How what an index holds grows: room, encoding, copies, insertion, repair; and compaction.

Each function takes a State and gives the next one. What it writes meanwhile lies behind the nodes
of the old one, but for the links of layer 0, which searches must not read at the same time.
"""

import threading
from collections.abc import Callable, Iterator

import numpy as np

from hnsw_gpu.engine import copies
from hnsw_gpu.engine.alignment import copy_aligned, empty_aligned, taken_aligned
from hnsw_gpu.engine.build import empty_graph, insert_nodes, without_unfinished
from hnsw_gpu.engine.graph import Graph
from hnsw_gpu.engine.repair import repair
from hnsw_gpu.engine.rounding import Rounded, count_worn
from hnsw_gpu.engine.state import State, empty_state
from hnsw_gpu.engine.vectors import empty_rows, encode

REPAIR_SHARE = 2048  # new nodes a repair: it then takes about as long as adding them


def with_vectors(
    state: State, count: int, parts: Iterator[np.ndarray]
) -> tuple[State, np.ndarray, Rounded]:
    """The state with `count` vectors behind its nodes, the node of each, and what rounding did.

    parts: float32 (m, dim), valid. Nodes int64 (count,) that are new follow the old ones; they have
    no links yet.
    """
    first = state.node_count
    state = _with_room(state, first + count)
    kept, start, worn = state.parameters, first, 0
    finest = state.rows if state.refine_rows is None else state.refine_rows
    given = np.empty(0 if finest.dtype == np.float32 else count, np.uint64)
    for part in parts:
        place = slice(start, start + len(part))
        state.rows[place] = encode(part, kept.metric, kept.dtype)
        if state.refine_rows is not None:
            state.refine_rows[place] = encode(part, kept.metric, kept.refine)
        stored = state.rows[place]
        exact = stored if kept.dtype == "fp32" else encode(part, kept.metric, "fp32")
        worn += count_worn(exact, stored, kept.metric, kept.dim, kept.dtype)
        if len(given):
            given[place.start - first : place.stop - first] = copies.hash_rows(exact)
        start += len(part)
    nodes, sources = state.table.assign(finest, first, start)
    merged = state.table.count_unlike(nodes, sources, first, given) if len(given) else 0
    if len(sources) < count:
        for rows in (state.rows, state.refine_rows):
            if rows is not None:
                copies.move_together(rows, sources, first)
    return state, nodes, Rounded(worn, merged)


def insert(
    state: State,
    nodes: np.ndarray,
    labels: np.ndarray,
    keep: Callable[[State], None],
    *,
    threads: int,
    stop: threading.Event,
    advance: Callable[[int], object],
    relinked: np.ndarray | None,
) -> None:
    """Link the new ones of `nodes` (m,), which carry `labels` (m,), and `keep` what came of it.

    That is a whole state whatever happens: where `stop` was set or something was raised, without
    the labels from the first node on that is not in. `advance` is told how many nodes were linked.
    """
    graph, kept = state.graph, state.parameters
    count = max(int(nodes.max(initial=-1)) + 1, state.node_count)
    insertion = insert_nodes(
        graph, state.neighbors0[:count], state.rows[:count], kept.metric,
        ef_construction=kept.ef_construction, seed=kept.seed, threads=threads, relinked=relinked,
    )  # fmt: skip
    try:
        for grown in insertion:
            advance(len(grown.neighbors0) - len(graph.neighbors0))
            graph = grown
            if stop.is_set():
                break
    finally:  # whatever happened, labels and graph agree on the nodes there are
        if relinked is not None and len(graph.neighbors0) < count:
            relinked[:] = True  # links to what did not follow are taken back
        keep(_labelled(state, graph, nodes, labels))


def _labelled(state: State, graph: Graph, nodes: np.ndarray, labels: np.ndarray) -> State:
    """The state with a grown graph, and labels up to the first of `nodes` that it does not hold."""
    count = len(graph.neighbors0)
    unrepaired = state.unrepaired + count - state.node_count
    is_in = np.cumsum(nodes >= count) == 0
    if not is_in.all():
        graph, unrepaired = without_unfinished(graph), count
        state.table.clear()
    state = state._replace(
        graph=graph,
        labels=state.labels.with_added(labels[is_in], nodes[is_in], count),
        next_label=max(state.next_label, int(labels.max(initial=-1)) + 1),
        unrepaired=unrepaired,
    )
    if len(state.rows) <= 2 * count:
        return state
    cpu = state.cpu  # most of the vectors were copies
    neighbors0 = copy_aligned(graph.neighbors0)
    return state._replace(
        graph=graph._replace(neighbors0=neighbors0),
        neighbors0=neighbors0,
        rows=copy_aligned(cpu.rows),
        refine_rows=None if cpu.refine_rows is None else copy_aligned(cpu.refine_rows),
    )


def repaired(
    state: State, *, threads: int, relinked: np.ndarray | None, is_urgent: bool = True
) -> State:
    """The state with every node reachable; if not urgent, only where many nodes are new."""
    if state.unrepaired <= (0 if is_urgent else state.node_count // REPAIR_SHARE):
        return state
    cpu, kept = state.cpu, state.parameters
    repair(
        cpu.graph, cpu.rows, kept.metric,
        ef_construction=kept.ef_construction, threads=threads, relinked=relinked,
    )  # fmt: skip
    return state._replace(unrepaired=0)


def compacted(state: State, *, threads: int, advance: Callable[[int], object]) -> State:
    """A new state of the nodes that carry labels."""
    state.require_unchanged()
    kept = state.parameters
    live = np.flatnonzero(state.labels.live_nodes())
    rows, refine_rows = taken_aligned(state.rows, live), state.refine_rows
    if refine_rows is not None:
        refine_rows = taken_aligned(refine_rows, live)
    state.require_unchanged()
    graph = build_graph(
        rows, kept.metric, M=kept.M, ef_construction=kept.ef_construction, seed=kept.seed,
        threads=threads, advance=advance,
    )  # fmt: skip
    fresh = empty_state(kept)
    fresh.table.clear()
    return fresh._replace(
        graph=graph,
        neighbors0=graph.neighbors0,
        rows=rows,
        refine_rows=refine_rows,
        labels=state.labels.of_nodes(live),
        next_label=state.next_label,
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
) -> Graph:
    """The graph of distinct encoded rows (n, row). `advance` is told how many nodes were linked."""
    graph = empty_graph(M)
    insertion = insert_nodes(
        graph, empty_aligned((len(rows), 2 * M), np.int32), rows, metric,
        ef_construction=ef_construction, seed=seed, threads=threads,
    )  # fmt: skip
    for grown in insertion:
        advance(len(grown.neighbors0) - len(graph.neighbors0))
        graph = grown
    repair(graph, rows, metric, ef_construction=ef_construction, threads=threads)
    return graph


def _with_room(state: State, count: int) -> State:
    """The state with room for `count` nodes."""
    state.require_unchanged()
    used, kept = state.node_count, state.parameters
    rows = _with_rows(state.rows, used, count, kept.dim, kept.dtype)
    refine_rows, neighbors0 = state.refine_rows, state.neighbors0
    if refine_rows is not None:
        refine_rows = _with_rows(refine_rows, used, count, kept.dim, kept.refine)
    if len(neighbors0) < count:
        neighbors0 = empty_aligned((len(rows), 2 * kept.M), np.int32)
        neighbors0[:used] = state.graph.neighbors0
    state.require_unchanged()
    return state._replace(
        graph=state.graph._replace(neighbors0=neighbors0[:used]),
        neighbors0=neighbors0,
        rows=rows,
        refine_rows=refine_rows,
        source=state.source if rows is state.rows else None,
    )


def _with_rows(rows: np.ndarray, used: int, count: int, dim: int, dtype: str) -> np.ndarray:
    """`rows` with room for at least `count`: exactly at first, by a quarter more afterwards."""
    if len(rows) >= count:
        return rows
    grown: np.ndarray = empty_rows(max(count, used + used // 4), dim, dtype)
    grown[:used] = rows[:used]
    return grown
