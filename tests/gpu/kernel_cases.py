"""What the kernels are run on: a pairwise design over all that specialises or steers them.

Two stages, because a specialisation costs a compilation and a launch next to nothing: few
specialisations in which every two values of two factors meet; then launches of those in which
every two values of all factors meet.
"""

import functools
from typing import NamedTuple

import emulated
import numpy as np
import reference
from pairwise import Row, all_pairs, covering

from hnsw_gpu.engine import vectors as vectors_module
from hnsw_gpu.engine.bits import pack_bits
from hnsw_gpu.engine.graph import Graph

QUERIES = 4

SPECIALISATION = {
    "metric": ("l2", "ip", "cosine"),
    "dtype": ("fp32", "fp16", "int8", "int4"),
    "dim": (1, 3, 31, 32, 100, 127, 768, 1536),
    "warps": (1, 4, 8),
    "M": (4, 16),
    "tag_bits": (16, 32),
    "has_allowed_keys": (False, True),
}
STEERING = {
    "mode": ("plain", "shared", "per query", "self", "self per query"),
    "expand": (1, 2, 4, 8),
    "ef": (1, 31, 64, 200, 512),
    "ef_upper": (1, 4),
    "k": (1, 12, "beyond ef"),
    "layout": ((1, 1), (2, 2), (4, 3)),  # groups a block, blocks: fewer than queries, and more
    "buckets": (1, 32, 256),  # of the visited cache: from next to no memory of what was seen
}


# To search.cu rows of four bits are the same at all of these.
SAME_IN_INT4 = {(("dim", dim), ("dtype", "int4")) for dim in (1, 3, 32)}


@functools.cache
def specialisations() -> tuple[Row, ...]:
    rng = np.random.default_rng(1)

    def draw() -> Row:
        return {name: values[rng.integers(len(values))] for name, values in SPECIALISATION.items()}

    wanted = all_pairs(SPECIALISATION) - SAME_IN_INT4
    return tuple(covering(lambda: [draw() for _ in range(60)], wanted))


@functools.cache
def launches() -> tuple[Row, ...]:
    """Rows of both kinds of factors, ordered by specialisation; and one of 4096 dimensions."""
    rng = np.random.default_rng(2)
    both = SPECIALISATION | STEERING

    def draw() -> Row:
        row = dict(specialisations()[rng.integers(len(specialisations()))])
        row |= {name: values[rng.integers(len(values))] for name, values in STEERING.items()}
        if row["has_allowed_keys"]:
            row["mode"] = STEERING["mode"][rng.integers(1, 5)]
        else:
            row["mode"] = "plain"
        return row

    impossible = {
        pair
        for pair in all_pairs(both)
        if {name for name, _ in pair} == {"has_allowed_keys", "mode"}
        and dict(pair)["has_allowed_keys"] == (dict(pair)["mode"] == "plain")
    }
    rows = covering(
        lambda: [draw() for _ in range(150)], all_pairs(both) - impossible - SAME_IN_INT4
    )
    rows.sort(key=lambda row: specialisations().index({name: row[name] for name in SPECIALISATION}))
    wide = {"metric": "l2", "dtype": "fp32", "dim": 4096, "warps": 4, "M": 4, "tag_bits": 16}
    wide |= {
        "has_allowed_keys": False,
        "mode": "plain",
        "expand": 2,
        "ef": 31,
        "ef_upper": 4,
        "k": 12,
    }
    return (*rows, wide | {"layout": (1, 1), "buckets": 32})


def name_of(row: Row) -> str:
    groups, blocks = row["layout"]
    return (
        f"{row['metric']}-{row['dtype']}-{row['dim']}d-w{row['warps']}-M{row['M']}-"
        f"t{row['tag_bits']}-{row['mode']}-x{row['expand']}-ef{row['ef']}-u{row['ef_upper']}-"
        f"k{row['k']}-{blocks}x{groups}-b{row['buckets']}"
    ).replace(" ", "_")


def build_of(row: Row, **settings) -> emulated.Build:
    own = {name: row[name] for name in ("metric", "dtype", "dim", "M", "warps", "tag_bits")}
    return emulated.Build(**own, **settings)


class Data(NamedTuple):
    """Integer-valued vectors and queries, encoded, and the oracle's keys."""

    vectors: np.ndarray
    rows: np.ndarray
    queries: np.ndarray
    table: reference.KeyTable


@functools.cache
def data(metric: str, dtype: str, dim: int) -> Data:
    """Half of the queries are stored vectors. Where few vectors are distinct, copies fill up."""
    rng = np.random.default_rng([dim, 3])
    n = 600 if dim < 200 else 200
    distinct = {("cosine", 1): 2, ("cosine", 3): 6, ("l2", 1): 150, ("ip", 1): 150}
    largest = 100 if dim == 1 else 7 if dim == 3 else 1 if dtype == "int8" else 3
    most = min(n + QUERIES, distinct.get((metric, dim), n + QUERIES))
    pool = reference.integer_vectors(most, dim, metric, rng, largest)
    pool = pool[np.concatenate([np.arange(most), rng.integers(0, most, n + QUERIES - most)])]
    vectors, asked = pool[:n], np.concatenate([pool[: QUERIES // 2], pool[n + QUERIES // 2 :]])
    return Data(
        vectors,
        vectors_module.encode(vectors, metric, dtype),
        vectors_module.encode_queries(asked, metric, dtype),
        reference.key_table(vectors, asked, metric, dtype),
    )


@functools.cache
def graph(metric: str, dtype: str, dim: int, M: int) -> Graph:
    return reference.random_graph(data(metric, dtype, dim).vectors, M, seed=dim)


class Question(NamedTuple):
    """What one launch asks, and of what; `mask` is not packed."""

    graph: Graph
    data: Data
    settings: dict[str, int]  # k, ef, expand, ef_upper
    mask: np.ndarray | None
    own: np.ndarray | None

    def wanted(self) -> reference.Result:
        own = None if self.own is None else self.own.tolist()
        return reference.search(
            self.graph, self.data.table, **self.settings, allowed=self.mask, own=own
        )

    def ask(self, build: emulated.Build, **launch):
        """The same by search.cu."""
        bits = None if self.mask is None else pack_bits(self.mask)
        return emulated.search(
            build,
            self.graph,
            self.data.rows,
            self.data.queries,
            **self.settings,
            allowed=bits,
            own=self.own,
            **launch,
        )


def question(row: Row) -> Question:
    made = data(row["metric"], row["dtype"], row["dim"])
    rng = np.random.default_rng(5)
    n, mode = len(made.rows), row["mode"]
    mask = None
    if "per query" in mode:
        mask = rng.random((QUERIES, n)) < 0.125
        mask[0], mask[1] = False, True
    elif mode == "shared":
        mask = rng.random(n) < 0.125
    own = None
    if "self" in mode:  # the first two queries are their own nodes' vectors
        own = np.array([0, 1, *rng.integers(0, n, QUERIES - 2)], np.int32) % n
    k = row["ef"] + 7 if row["k"] == "beyond ef" else row["k"]
    settings = {"k": k} | {name: row[name] for name in ("ef", "expand", "ef_upper")}
    made_graph = graph(row["metric"], row["dtype"], row["dim"], row["M"])
    return Question(made_graph, made, settings, mask, own)


def launch_of(row: Row) -> dict[str, int]:
    groups, blocks = row["layout"]
    return {"groups": groups, "blocks": blocks, "visited_buckets": row["buckets"]}


# --- beyond 2**31 ---------------------------------------------------------------------------------

FAR_ID, FAR_QUERY, FAR_ROW = 2**30, 2**25, 2**31 + 8
FAR_WORDS = 128  # of a query's mask: FAR_QUERY of them pass 2**31


def before(array: np.ndarray, size: int) -> int:
    """The address `size` bytes before an array: a base of which only the far end is there."""
    return (array.ctypes.data - size) % 2**64


def ask_far(asked: Question, build: emulated.Build, seed: int | None = 0) -> reference.Result:
    """The same question where ids begin at FAR_ID, queries at FAR_QUERY, layer rows at FAR_ROW.

    Whatever is taken modulo 2**32 on its way to an address reads or writes elsewhere.
    """
    graph, count = asked.graph, len(asked.data.queries)
    width, M = graph.neighbors0.shape[1], graph.neighbors.shape[1]
    first = graph.layer_offsets[1] if graph.top else 0
    neighbors0 = np.where(graph.neighbors0 < 0, -1, graph.neighbors0 + FAR_ID).astype(np.int32)
    nodes, below = graph.nodes + np.int32(FAR_ID), graph.below.copy()
    below[:first] += np.int32(FAR_ID)
    offsets = graph.layer_offsets + FAR_ROW
    rows, queries = emulated.own_memory(asked.data.rows), emulated.own_memory(asked.data.queries)
    graph_struct, held = emulated.struct(
        "Graph",
        neighbors0=before(neighbors0, FAR_ID * width * 4),
        nodes=before(nodes, FAR_ROW * 4),
        neighbors=before(graph.neighbors, FAR_ROW * M * 4),
        below=before(below, FAR_ROW * 4),
        layer_offsets=offsets,
        rows=before(rows, FAR_ID * rows[0].nbytes),
        top=graph.top,
    )
    k, ef = asked.settings["k"], max(asked.settings["k"], asked.settings["ef"])
    keys, counts = np.zeros((count, k), np.uint64), np.zeros((count, 3), np.int32)
    own = None if asked.own is None else (asked.own + FAR_ID).astype(np.int32)
    bits, is_shared = None, asked.mask is not None and asked.mask.ndim == 1
    if asked.mask is not None:
        packed = np.atleast_2d(pack_bits(asked.mask))
        bits = np.zeros((len(packed), FAR_WORDS), np.uint32)
        bits[:, : packed.shape[1]] = packed
    queries_before = 0 if is_shared else FAR_QUERY
    mask_before = FAR_ID // 8 + queries_before * FAR_WORDS * 4
    task, held_too = emulated.struct(
        "Task",
        queries=before(queries, FAR_QUERY * queries[0].nbytes),
        allowed=None if bits is None else before(bits, mask_before),
        own=None if own is None else before(own, FAR_QUERY * 4),
        keys=before(keys, FAR_QUERY * k * 8),
        counts=before(counts, FAR_QUERY * 12),
        next_query=np.full(1, FAR_QUERY, np.uint32),
        allowed_stride=0 if is_shared or bits is None else FAR_WORDS,
        query_count=FAR_QUERY + count,
        ef=ef,
        ef_upper=asked.settings["ef_upper"],
        k=k,
        expand=asked.settings["expand"],
        visited_buckets=32,
    )
    has_allowed_keys = bits is not None or own is not None
    sizes = {"ef": ef, "ef_upper": asked.settings["ef_upper"], "k": k, "visited_buckets": 32}
    arrays = [neighbors0, nodes, graph.neighbors, below, rows, queries, bits, own, keys, counts]
    build.launch(
        "search",
        (1,),
        (emulated.LANES * build.warps,),
        (graph_struct, task),
        [*held, *held_too, *arrays],
        has_allowed_keys=has_allowed_keys,
        shared_mem=emulated.shared_bytes(build, **sizes, has_allowed_keys=has_allowed_keys),
        seed=seed,
    )
    near = np.where(keys == emulated.KEY_NONE, keys, keys - np.uint64(FAR_ID << 1))
    return reference.Result(near, *counts.T)
