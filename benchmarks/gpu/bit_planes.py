"""Would the first bit planes of int4 rows save reading the others? Counted on the CPU, not timed.

    python -m benchmarks.gpu.bit_planes

writes `results/bit-planes.json`: of the rows that walks compare on layer 0, the share that is worse
than the worst key of the full beam at the step's start, the share that a gate can tell so from one
or two of the four planes of its codes, and the bytes that this saves. README.md has the outcome.

The first planes tell the middle of the values that share them: 8 or -8, of -15, -13, ..., 15, where
only the first bit is known. A gate is the least distance that a row can have. Two are certain:

    interval  no value is further from its middle than RADIUS
    angle     the query is not nearer to a row than to its middles, less the angle between the row
              and its middles, which is kept beside them

and SIGMAS standard deviations of RaBitQ's estimate (Gao and Long 2024) are not: recall with these
is that of walks that believe them.
"""

import json
import math
from collections.abc import Iterator
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
RADIUS = {1: 7, 2: 3}  # by the number of first planes
SIGMAS = (3, 4)
CERTAIN = ("interval", "angle")
GATES = (*CERTAIN, *(f"{sigmas} sigma" for sigmas in SIGMAS))
SECTOR = 32  # bytes, the least that a GPU reads
BATCH = 50  # queries


class Planes(NamedTuple):
    """The first bit planes of int4 rows, and what is kept of the others."""

    middles: np.ndarray  # float32 (n, dim)
    middle_lengths: np.ndarray  # (n,)
    lengths: np.ndarray  # (n,) of all the values
    cosines: np.ndarray  # (n,) between the values and their middles
    scales: np.ndarray  # (n,)
    radius: int


def planes_of(rows: np.ndarray, dim: int, count: int) -> Planes:
    held = rows[:, :-TAIL_BYTES]
    codes = np.hstack([held & 15, held >> 4])[:, :dim].astype(np.int32)
    values, lost, radius = (2 * codes - 15).astype(np.float32), 4 - count, RADIUS[count]
    middles = (2 * (codes >> lost << lost) - 15 + radius).astype(np.float32)
    lengths, middle_lengths = (
        np.sqrt(np.einsum("nd,nd->n", part, part).astype(np.float64)) for part in (values, middles)
    )
    cosines = np.einsum("nd,nd->n", values, middles) / (lengths * middle_lengths)
    return Planes(middles, middle_lengths, lengths, np.minimum(cosines, 1), scales_of(rows), radius)


def scales_of(encoded: np.ndarray) -> np.ndarray:
    tail = np.ascontiguousarray(encoded[:, -TAIL_BYTES:]).view(np.float32)
    return tail[:, 0].astype(np.float64)


def least_distances(
    planes: Planes, products: np.ndarray, codes: np.ndarray, scale: float
) -> np.ndarray:
    """(GATES, n): of a query's codes (dim,), whose dot products with the middles are given."""
    length, (dim,) = np.linalg.norm(codes.astype(np.float64)), codes.shape
    size, kept = length * planes.lengths, planes.cosines
    to_middles = np.clip(products / (length * planes.middle_lengths), -1, 1)
    most = [(products + planes.radius * np.abs(codes.astype(np.int32)).sum()) / size]  # cosines
    angles = [np.arccos(to_middles) - np.arccos(kept)]
    for sigmas in SIGMAS:  # to_middles = kept * cosine +- deviation * sqrt(1 - cosine^2)
        deviation = sigmas * np.sqrt((1 - kept**2) / (dim - 1))
        largest = np.minimum(to_middles / np.hypot(kept, deviation), 1)
        angles.append(np.arccos(largest) - np.arctan2(deviation, kept))
    most += [np.cos(np.maximum(angle, 0)) for angle in angles]
    return 1 - scale * planes.scales * size * np.stack(most)


@jit(allocates=True)
def walk(links, rows, queries, q, seed, ef, least, believed, visited, compared, rejected):
    """Keys (ef,) of layer 0, R4-R6; rows that gate `believed` rejects stay unread, -1 for none.

    Added to: `compared` (3,), rows compared, of these beside a full beam, of these worse than it;
    `rejected` (GATES, 2), by each gate, of these wrongly.
    """
    beam = np.full((1, ef), KEY_NONE, np.uint64)
    beam[0, 0] = seed
    seen, fresh = [key_node(seed)], [np.int64(0) for _ in range(0)]
    visited[key_node(seed)] = True
    picked = 1
    while picked:
        picked = 0
        fresh.clear()
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
        last = beam[0, ef - 1]
        is_full, worst = last != KEY_NONE, key_distance(last)
        for node in fresh:
            seen.append(node)
            key = make_key(distance(COSINE, queries, q, rows, node), node)
            compared[0] += 1
            compared[1] += is_full
            compared[2] += is_full and key > last
            for g in range(len(least)):
                is_rejected = is_full and least[g, node] > worst
                rejected[g, 0] += is_rejected
                rejected[g, 1] += is_rejected and key < last
            if believed < 0 or not (is_full and least[believed, node] > worst):
                insert(beam, 0, ef, key)
    for node in seen:
        visited[node] = False
    return beam[0] & ~EXPANDED


class Walked(NamedTuple):
    """With one gate believed, or none."""

    keys: np.ndarray  # (q, ef)
    compared: np.ndarray  # and
    rejected: np.ndarray  # as `walk` has them


class Asked:
    """A data set in an index, and queries."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset, self.dim = dataset, dataset.base.shape[1]
        index = hnsw_gpu.Index(self.dim, "cosine", "int4", device="cpu", **SETTING._asdict())
        index.add(dataset.base)
        self.state = index._state
        self.rows = self.state.rows[: self.state.node_count]
        self.queries = encode_queries(dataset.queries, "cosine", "int4")
        held, row_bytes = self.rows.shape[1] - TAIL_BYTES, self.rows.shape[1]
        halves = self.queries[:, :held], self.queries[:, row_bytes : row_bytes + held]
        self.codes = np.hstack(halves)[:, : self.dim]
        self.seeds = counting.trace(self.state.graph, self.rows, self.queries, COSINE, 1).seeds

    def gates(self, planes: Planes) -> Iterator[np.ndarray]:
        """`least_distances` of each query."""
        scales = scales_of(self.queries)
        for start in range(0, len(self.codes), BATCH):
            part = self.codes[start : start + BATCH]
            products = part.astype(np.float32) @ planes.middles.T  # whole numbers: exact
            for i, own in enumerate(products):
                yield least_distances(planes, own.astype(np.float64), part[i], scales[start + i])

    def walks(self, planes: Planes) -> dict[tuple[int, int], Walked]:
        """By ef and the gate believed."""
        believed = [-1, *range(len(CERTAIN), len(GATES))]
        walks = [(ef, gate) for ef in EFS for gate in believed]
        found = {
            (ef, gate): Walked(
                np.empty((len(self.codes), ef), np.uint64),
                np.zeros(3, np.int64),
                np.zeros((len(GATES), 2), np.int64),
            )
            for ef, gate in walks
        }
        visited = np.zeros(len(self.rows), np.bool_)
        for q, least in enumerate(self.gates(planes)):
            for ef, gate in walks:
                keys, *counts = found[ef, gate]
                keys[q] = walk(
                    self.state.graph.neighbors0, self.rows, self.queries, q, self.seeds[q],
                    ef, least, gate, visited, *counts,
                )  # fmt: skip
        return found

    def recall(self, keys: np.ndarray) -> float:
        """Of the nearest, among which finer rows decide as an int4 index has it."""
        kept = inputs.reranked("auto", K, keys.shape[1], "int4")
        labels, _ = self.state.labels.keys_to_labels(keys[:, :kept], kept)
        cosines = np.einsum("qd,qkd->qk", self.dataset.queries, self.dataset.base[labels])
        best = np.argsort(-cosines, axis=1)[:, :K]
        return datasets.recall(self.dataset, np.take_along_axis(labels, best, axis=1), K)


def in_sectors(size: float) -> int:
    return math.ceil(size / SECTOR) * SECTOR


def measure(asked: Asked, count: int) -> list[dict]:
    """By ef: shares of the rows compared, their bytes a query, recall. `count` planes are first."""
    found, points = asked.walks(planes_of(asked.rows, asked.dim, count)), []
    first = in_sectors(count * asked.dim / 8 + TAIL_BYTES)  # their tail is there too
    others = in_sectors((4 - count) * asked.dim / 8)
    how = {"expand": EXPAND, "threads": 2}
    for ef in EFS:
        keys, plain, _ = found[ef, -1]
        graph = asked.state.graph
        engine = search_graph(graph, asked.rows, asked.queries, "cosine", k=ef, ef=ef, **how)
        assert (keys == engine.keys).all(), "the walk is not the engine's"
        compared, full, worse = plain.tolist()
        size, gates = compared * asked.rows.shape[1], {}
        for g, name in enumerate(GATES):
            gated = found.get((ef, g), found[ef, -1])
            asked_about, (rejected, wrong) = int(gated.compared[0]), gated.rejected[g].tolist()
            assert name not in CERTAIN or wrong == 0
            read = asked_about * first + (asked_about - rejected) * others
            gates[name] = {
                "rejected": rejected / asked_about,
                "wrong": wrong / max(rejected, 1),
                "bytes": read / len(keys),
                "saved": 1 - read / size,
                "recall": asked.recall(gated.keys),
            }
        points.append({
            "planes": count,
            "ef": ef,
            "first_bytes": first,
            "other_bytes": others,
            "recall": asked.recall(keys),
            "compared": compared / len(keys),
            "bytes": size / len(keys),
            "beside_full_beam": full / compared,
            "worse": worse / compared,
            "saved_if_all_worse": 1 - (compared * first + (compared - worse) * others) / size,
            "gates": gates,
        })  # fmt: skip
    return points


@click.command()
@click.option("--rows", default=50_000, show_default=True, help="Of each data set.")
@click.option("--queries", default=1000, show_default=True, help="Of each data set.")
@click.option("--datasets", "names", default="verses,verses768", show_default=True)
@click.option("--out", type=Path, default=RESULTS / "bit-planes.json", show_default=True)
def main(rows: int, queries: int, names: str, out: Path) -> None:
    """What a gate of the first bit planes would save."""
    results = {**about([]), "k": K, "expand": EXPAND, "queries": queries, "sets": {}}
    for name in names.split(","):
        asked = Asked(datasets.load(name, rows, queries))
        points = [one for count in RADIUS for one in measure(asked, count)]
        n, row_bytes = asked.rows.shape
        own = {"rows": n, "dim": asked.dim, "row_bytes": row_bytes, "points": points}
        results["sets"][name] = rounded(own)
        click.echo(json.dumps(results["sets"][name]))
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
