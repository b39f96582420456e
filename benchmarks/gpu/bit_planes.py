"""Would the first bit planes of int4 rows save reading the others? Counted on the CPU, not timed.

    python -m benchmarks.gpu.bit_planes

writes `results/bit-planes.json`: of the rows that walks score on layer 0, the share that is worse
than the worst key of the full beam at the step's start, the share that a gate can tell so from one
or two of the four planes of its codes, and the bytes that this saves. README.md has the outcome.

In a row's first planes (and its tail) lie its values' middles: 8 or -8 where the first bit is all
that is known of -15, -13, ..., 15. A gate that is certain changes no answer:

    interval  no value is further from its middle than RADIUS
    angle     no row is nearer to the query than its middles' angle to the query less its own to its
              middles, which is kept beside them

and one that may be wrong does: SIGMAS standard deviations of RaBitQ's estimate (Gao and Long 2024).
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

import hnsw_gpu
from benchmarks import datasets
from benchmarks.cpu import counting
from benchmarks.record import RESULTS, SETTING, about, rounded
from hnsw_gpu import inputs
from hnsw_gpu.engine import search_graph
from hnsw_gpu.engine.beam import insert
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import COSINE, TAIL_BYTES, distance
from hnsw_gpu.engine.keys import EXPANDED, KEY_NONE, key_distance, key_node, make_key
from hnsw_gpu.engine.vectors import encode_queries

K, EXPAND = 10, 4  # as a GPU walks
EFS = (64, 128, 256)
RADIUS = {1: 7, 2: 3}  # of the values that share their first planes, by how many these are
SIGMAS = (3, 4)
GATES = ("interval", "angle", *(f"{sigmas} sigma" for sigmas in SIGMAS))
INTERVAL, ANGLE, NO_GATE = 0, 1, -1
SECTOR = 32  # bytes, the least that a GPU reads


class Rows(NamedTuple):
    """int4 rows as a gate has them."""

    values: np.ndarray  # int8 (n, dim): -15, -13, ..., 15
    middles: np.ndarray  # int8 (n, dim): of the values that share the first planes
    lengths: np.ndarray  # float64 (n, 2): of values, and of middles
    cosines: np.ndarray  # float64 (n,): between the two
    scales: np.ndarray  # float32 (n,)


def rows_of(encoded: np.ndarray, dim: int, planes: int) -> Rows:
    held = encoded[:, :-TAIL_BYTES]
    codes = np.hstack([held & 15, held >> 4])[:, :dim].astype(np.int8)
    values = 2 * codes - 15
    lost = 4 - planes
    middles = 2 * (codes >> lost << lost) - 15 + RADIUS[planes]
    lengths = np.stack(
        [np.linalg.norm(part.astype(np.float32), axis=1) for part in (values, middles)], 1
    )
    dots = np.einsum("nd,nd->n", values, middles, dtype=np.int32)
    return Rows(
        values, middles, lengths.astype(np.float64), dots / lengths.prod(axis=1), scales_of(encoded)
    )


def scales_of(encoded: np.ndarray) -> np.ndarray:
    tail = np.ascontiguousarray(encoded[:, -TAIL_BYTES:]).view(np.float32)
    return tail[:, 0].copy()


def query_values(encoded: np.ndarray, row_bytes: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 (q, dim) codes of encoded queries, and float32 (q,) scales."""
    held = row_bytes - TAIL_BYTES
    codes = np.hstack([encoded[:, :held], encoded[:, row_bytes : row_bytes + held]])[:, :dim]
    return np.ascontiguousarray(codes), scales_of(encoded)


@jit(is_inner=True)
def dot(a, b):
    total = np.int32(0)
    for j in range(len(a)):
        total += np.int32(a[j]) * np.int32(b[j])
    return total


@jit(is_inner=True)
def judge(query, scale, length, slack, rows, node, worst, rejects):
    """rejects[g] = gate g says that the node's distance is above `worst`, by its first planes."""
    size = length * rows.lengths[node, 0]  # of the dot product, if the two are parallel
    needed = (1.0 - worst) / (np.float64(scale) * rows.scales[node] * size)  # cosine
    known = np.float64(dot(query, rows.middles[node]))
    rejects[INTERVAL] = (known + slack) / size < needed
    to_middles = known / (length * rows.lengths[node, 1])
    kept = rows.cosines[node]
    between = math.acos(min(max(to_middles, -1.0), 1.0)) - math.acos(min(kept, 1.0))
    rejects[ANGLE] = math.cos(max(between, 0.0)) < needed
    deviation = math.sqrt(max(1 - needed * needed, 0.0) * (1 - kept * kept) / (len(query) - 1))
    for g in range(len(SIGMAS)):
        rejects[ANGLE + 1 + g] = to_middles < kept * needed - SIGMAS[g] * deviation


@jit(allocates=True)
def walk(links, encoded, queries, q, query, scale, seed, ef, rows, radius, gate, visited, counts):
    """Keys (ef,) of layer 0, R4-R6, where `gate` decides whether a row is read to its end.

    counts: rows scored, of these beside a full beam, of these worse than it, wrongly rejected by a
    gate that is certain, and rejected by each gate.
    """
    beam = np.full((1, ef), KEY_NONE, np.uint64)
    beam[0, 0] = seed
    rejects = np.zeros(len(GATES), np.bool_)
    length, slack = math.sqrt(np.float64(dot(query, query))), np.int32(0)
    for code in query:
        slack += np.int32(radius) * abs(np.int32(code))
    seen, fresh = [key_node(seed)], [np.int64(0) for _ in range(0)]
    visited[key_node(seed)] = True
    while True:
        fresh.clear()
        picked = 0
        for i in range(ef):
            if picked == EXPAND or beam[0, i] == KEY_NONE:
                break
            if beam[0, i] & EXPANDED:
                continue
            picked += 1
            for node in links[key_node(beam[0, i])]:
                if node >= 0 and not visited[node]:
                    visited[node] = True
                    fresh.append(np.int64(node))
            beam[0, i] |= EXPANDED
        if picked == 0:
            break
        last = beam[0, ef - 1]
        worst = np.float64(key_distance(last))
        for node in fresh:
            seen.append(node)
            key = make_key(distance(COSINE, queries, q, encoded, node), node)
            counts[0] += 1
            rejects[:] = False
            if last != KEY_NONE:
                judge(query, scale, length, slack, rows, node, worst, rejects)
                counts[1] += 1
                counts[2] += key > last
                counts[3] += key < last and (rejects[INTERVAL] or rejects[ANGLE])
                for g in range(len(GATES)):
                    counts[4 + g] += rejects[g]
            if gate == NO_GATE or not rejects[gate]:
                insert(beam, 0, ef, key)
    for node in seen:
        visited[node] = False
    return beam[0] & ~EXPANDED


class Asked(NamedTuple):
    """A data set, and its queries as they are asked."""

    dataset: datasets.Dataset
    index: hnsw_gpu.Index
    encoded: np.ndarray
    seeds: np.ndarray  # uint64 (q,)


def ask(dataset: datasets.Dataset) -> Asked:
    index = hnsw_gpu.Index(
        dataset.base.shape[1], "cosine", "int4", device="cpu", **SETTING._asdict()
    )
    index.add(dataset.base)
    encoded = encode_queries(dataset.queries, "cosine", "int4")
    rows = index._state.rows[: index._state.node_count]
    return Asked(
        dataset, index, encoded, counting.trace(index._state.graph, rows, encoded, COSINE, 1).seeds
    )


def walks(asked: Asked, rows: Rows, radius: int, ef: int, gate: int) -> tuple[np.ndarray, dict]:
    """Keys (q, ef), and counts."""
    state = asked.index._state
    encoded = state.rows[: state.node_count]
    codes, scales = query_values(asked.encoded, encoded.shape[1], asked.index.dim)
    visited, counts = np.zeros(len(encoded), np.bool_), np.zeros(4 + len(GATES), np.int64)
    keys = np.stack(
        [
            walk(
                state.graph.neighbors0, encoded, asked.encoded, q, codes[q], scales[q],
                asked.seeds[q], ef, rows, radius, gate, visited, counts,
            )
            for q in range(len(codes))
        ]
    )  # fmt: skip
    assert counts[3] == 0, "a gate that is certain was wrong"
    names = ("scored", "full", "worse", "wrong", *GATES)
    return keys, dict(zip(names, counts.tolist(), strict=True))


def recall(asked: Asked, keys: np.ndarray) -> float:
    """Of the nearest that the finer rows decide among, as an int4 index has it."""
    kept = inputs.reranked("auto", K, keys.shape[1], "int4")
    labels, _ = asked.index._state.labels.keys_to_labels(keys[:, :kept], kept)
    exact = np.einsum("qd,qkd->qk", asked.dataset.queries, asked.dataset.base[labels])
    best = np.take_along_axis(labels, np.argsort(-exact, axis=1)[:, :K], axis=1)
    return datasets.recall(asked.dataset, best, K)


def sizes(dim: int, planes: int) -> tuple[int, int]:
    """Bytes of the first planes with a row's tail, and of the others, in whole sectors."""
    first, others = planes * dim / 8 + TAIL_BYTES, (4 - planes) * dim / 8
    return tuple(math.ceil(size / SECTOR) * SECTOR for size in (first, others))


def measure(asked: Asked, planes: int, ef: int) -> dict:
    """Shares of the rows scored, recall, and bytes a query of rows on layer 0, by gate."""
    state, queries = asked.index._state, len(asked.encoded)
    encoded = state.rows[: state.node_count]
    rows = rows_of(encoded, asked.index.dim, planes)
    keys, counts = walks(asked, rows, RADIUS[planes], ef, NO_GATE)
    engine = search_graph(state.graph, encoded, asked.encoded, "cosine", k=ef, ef=ef, expand=EXPAND)
    assert (keys == engine.keys).all(), "the walk is not the engine's"
    first, others = sizes(asked.index.dim, planes)
    plain, plain_bytes = recall(asked, keys), counts["scored"] * encoded.shape[1]
    gates = {}
    for gate, name in enumerate(GATES):
        found, own = plain, counts
        if gate > ANGLE:
            gated, own = walks(asked, rows, RADIUS[planes], ef, gate)
            found = recall(asked, gated)
        read = own["scored"] * first + (own["scored"] - own[name]) * others
        gates[name] = {
            "rejected": own[name] / own["scored"],
            "bytes": read / queries,
            "saved": 1 - read / plain_bytes,
            "recall": found,
        }
    most = counts["worse"] * others - counts["scored"] * (first + others - encoded.shape[1])
    return {
        "ef": ef,
        "planes": planes,
        "first_bytes": first,
        "other_bytes": others,
        "recall": plain,
        "scored": counts["scored"] / queries,
        "bytes": plain_bytes / queries,
        "beside_full_beam": counts["full"] / counts["scored"],
        "worse": counts["worse"] / counts["scored"],
        "most_saved": most / plain_bytes,
        "gates": gates,
    }


@click.command()
@click.option("--rows", default=50_000, show_default=True, help="Of each data set.")
@click.option("--queries", default=1000, show_default=True, help="Of each data set.")
@click.option("--datasets", "names", default="verses,verses768", show_default=True)
@click.option("--out", type=Path, default=RESULTS / "bit-planes.json", show_default=True)
def main(rows: int, queries: int, names: str, out: Path) -> None:
    """What a gate of the first bit planes would save."""
    results = {**about([]), "k": K, "expand": EXPAND, "queries": queries, "sets": {}}
    for name in names.split(","):
        asked = ask(datasets.load(name, rows, queries))
        points = [measure(asked, planes, ef) for planes in RADIUS for ef in EFS]
        n, dim = asked.dataset.base.shape
        row_bytes = asked.index._state.rows.shape[1]
        results["sets"][name] = {"rows": n, "dim": dim, "row_bytes": row_bytes, "points": points}
        for one in points:
            click.echo(f"{name}: {rounded(one)}")
    out.write_text(json.dumps(rounded(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
