"""Where a search spends its time, and how far it is from what memory could deliver.

The layer-0 walks of some queries are recorded (`counting.py`) and replayed from the record, the
queries taken in turn as the engine takes them, each time with one more part of the work: links,
visited, arithmetic (distances, but to a few rows that stay in the cache), memory (the true rows),
beam. What a part adds is its share. The last replay does everything the engine does on layer 0, so
its time beside the engine's own says how far the shares can be trusted.

Beside it, what the machine can do: read in order; and compute distances to rows of this length, the
rows drawn at random with prefetching, or so few that they never leave the first cache.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from benchmarks.cpu.counting import trace
from hnsw_gpu.engine.beam import LANES, TOGETHER, first_unexpanded, insert_some
from hnsw_gpu.engine.block import EIGHT, write_keys
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import distance, prefetch_row
from hnsw_gpu.engine.keys import EXPANDED, KEY_NONE
from hnsw_gpu.engine.search import SLOTS, search_graph
from hnsw_gpu.engine.vectors import METRICS, encode_queries, engine_view

LINKS, VISITED, ARITHMETIC, MEMORY, BEAM = range(1, 6)
PARTS = {
    "links": LINKS,
    "visited": VISITED,
    "arithmetic": ARITHMETIC,
    "memory": MEMORY,
    "beam": BEAM,
}
AHEAD = 16  # rows asked for before they are needed, in the gather at random


def shares(graph, rows, vectors: np.ndarray, dtype: str, ef: int, rounds: int) -> dict:
    """Nanoseconds per distance that each part adds, under cosine, one thread.

    `rows` are encoded, `vectors` are the queries as float32 (q, dim).
    """
    queries = encode_queries(vectors, "cosine", dtype)
    metric, view = METRICS["cosine"], engine_view(rows)
    found = trace(graph, view, queries, metric, ef)
    times: dict[str, list[float]] = {name: [] for name in (*PARTS, "search")}
    for _ in range(rounds):
        for name, stage in PARTS.items():
            start = time.perf_counter()
            replay(stage, graph.neighbors0, view, queries, metric, ef, found)
            times[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        result = search_graph(graph, rows, queries, "cosine", k=10, ef=ef)
        times["search"].append(time.perf_counter() - start)
    if not (
        np.array_equal(result.hops, found.hops)
        and np.array_equal(result.distances, found.distances)
    ):
        raise AssertionError("the recorded walk is not the engine's")
    count = int(found.distances.sum())
    nanoseconds = {name: median(values) / count * 1e9 for name, values in times.items()}
    steps = [0.0, *(nanoseconds[name] for name in PARTS)]
    parts = {name: high - low for name, low, high in zip(PARTS, steps, steps[1:], strict=False)}
    return {
        "ef": ef,
        "queries": len(vectors),
        "distances_per_query": count / len(vectors),
        "hops_per_query": float(found.hops.mean()),
        "ns_per_distance": nanoseconds["search"],
        "replay_ns_per_distance": nanoseconds["beam"],
        "parts_ns_per_distance": parts,
        "shares": {name: value / nanoseconds["beam"] for name, value in parts.items()},
        "row_gigabytes_per_s": rows.strides[0] / nanoseconds["search"],
    }


@jit(allocates=True)
def replay(parts, neighbors0, rows, queries, metric, ef, found):
    """Repeat the recorded walks, doing `parts` of the work; the sum keeps it from being skipped."""
    walks = len(found.seeds)
    links_ready = np.zeros(SLOTS, np.bool_)
    query = np.full(SLOTS, -1, np.int64)
    hop, row = np.zeros(SLOTS, np.int64), np.zeros(SLOTS, np.int64)
    picked_at = np.zeros(SLOTS, np.int64)
    capacity = (ef + LANES - 1) & -LANES
    beam = np.empty((SLOTS, capacity), np.uint64)
    keys = np.empty(neighbors0.shape[1] + max(EIGHT, TOGETHER), np.uint64)
    ids = np.zeros((1, len(found.nodes) + EIGHT), np.int32)
    for i in range(len(found.nodes)):
        ids[0, i] = found.nodes[i] if parts >= MEMORY else found.nodes[i] & 15
    visited = np.zeros((SLOTS, (len(neighbors0) + 31) >> 5), np.uint32)
    following, ended, total = 0, 0, np.int64(0)
    while ended < walks:
        for s in range(SLOTS):
            q = query[s]
            if q < 0 or hop[s] == found.query_hops[q + 1]:
                if q >= 0:
                    forget(parts, found, q, visited[s])
                    ended += 1
                query[s] = -1
                if following < walks:
                    q = query[s] = following
                    following += 1
                    hop[s], row[s] = found.query_hops[q], found.query_nodes[q]
                    beam[s] = KEY_NONE
                    beam[s, 0] = found.seeds[q] | EXPANDED
                    picked_at[s] = 0
                    node = np.int64(found.seeds[q] & np.uint64(0xFFFFFFFF)) >> 1
                    visited[s, node >> 5] |= np.uint32(1) << np.uint32(node & 31)
                    prefetch_row(neighbors0, found.expanded[hop[s]])
                    links_ready[s] = True
                continue
            end = row[s] + found.fresh[hop[s]]
            if links_ready[s]:
                total += gather(parts, neighbors0, found.expanded[hop[s]], visited[s])
                if parts >= MEMORY:
                    for i in range(row[s], end):
                        prefetch_row(rows, found.nodes[i])
                links_ready[s] = False
                continue
            count = end - row[s]
            if parts >= ARITHMETIC:
                write_keys(metric, queries, q, rows, ids, 0, row[s], count, keys)
                total += keys[0] > keys[1]
            if parts == BEAM:
                merge(beam, s, ef, capacity, keys, count, picked_at)
            row[s] = end
            hop[s] += 1
            if hop[s] < found.query_hops[q + 1]:
                prefetch_row(neighbors0, found.expanded[hop[s]])
            links_ready[s] = True
    return total


@jit(allocates=True)
def merge(beam, s, ef, capacity, keys, count, picked_at):
    """Merge keys into a beam as a search does, and mark the next one to be expanded."""
    worst, last_picked, enter = beam[s, ef - 1], beam[s, picked_at[s]], 0
    for i in range(count):
        key = keys[i]
        keys[enter] = key
        enter += key < worst
    for i in range(enter):
        if keys[i] < last_picked:
            picked_at[s] = 0
    insert_some(beam, s, capacity, keys, enter)
    first = first_unexpanded(beam, s, picked_at[s] & -LANES, ef)
    if first < ef:
        beam[s, first] |= EXPANDED
        picked_at[s] = first


@jit(allocates=True)
def gather(parts, neighbors0, node, visited):
    """Read a node's links and, from VISITED on, mark the new ones."""
    total = np.int64(0)
    for j in range(neighbors0.shape[1]):
        link = neighbors0[node, j]
        if link < 0:
            break
        if parts >= VISITED:
            word, bit = link >> 5, np.uint32(1) << np.uint32(link & 31)
            if not visited[word] & bit:
                visited[word] |= bit
                total += 1
        else:
            total += link
    return total


@jit(allocates=True)
def forget(parts, found, q, visited):
    """Clear what query `q` marked."""
    if parts >= VISITED:
        for i in range(found.query_nodes[q], found.query_nodes[q + 1]):
            visited[found.nodes[i] >> 5] = 0
    node = np.int64(found.seeds[q] & np.uint64(0xFFFFFFFF)) >> 1
    visited[node >> 5] = 0


def limits(rows, vectors: np.ndarray, dtype: str, threads: int, rounds: int) -> dict:
    """What the machine does with encoded `rows`, all threads together; ns are a row and thread."""
    queries = encode_queries(vectors[:1], "cosine", dtype)
    rows = engine_view(rows)
    n = len(rows)
    random = np.random.default_rng(0).integers(0, n, n).astype(np.int64)
    large = np.ones(1 << 28, np.uint8).view(np.int64)  # far larger than any cache
    work = {
        "stream": lambda: read_in_order(large),
        "random_rows": lambda: distances_at(METRICS["cosine"], queries, rows, random),
        "cached_rows": lambda: distances_at(METRICS["cosine"], queries, rows, random % 16),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds + 1):
            for name, run in work.items():
                start = time.perf_counter()
                for job in [pool.submit(run) for _ in range(threads)]:
                    job.result()
                times[name].append(time.perf_counter() - start)
    seconds = {name: median(values[1:]) for name, values in times.items()}  # the first compiles
    rate = {name: threads * n * rows.strides[0] / s / 1e9 for name, s in seconds.items()}
    rate["stream"] = threads * large.nbytes / seconds["stream"] / 1e9
    return {
        "threads": threads,
        "row_bytes": rows.strides[0],
        "gigabytes_per_s": rate,
        "ns_per_row": {name: s / n * 1e9 for name, s in seconds.items() if name != "stream"},
    }


@jit(allocates=True)
def read_in_order(array):
    total = np.int64(0)
    for value in array:
        total += value
    return total


@jit(allocates=True)
def distances_at(metric, queries, rows, order):
    total = np.float32(0)
    for i in range(len(order)):
        if i + AHEAD < len(order):
            prefetch_row(rows, order[i + AHEAD])
        total += distance(metric, queries, np.int64(0), rows, order[i])
    return total
