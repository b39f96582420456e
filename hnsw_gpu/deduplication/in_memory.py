"""Near-duplicates: which rows to keep, which to drop, and for what row each is dropped.

Equal rows are one node. Pairs of near nodes come from an exact join or from the graph (`pairs.py`,
`shards.py`); a linkage (`linkage.py`) decides by them and by the order that `keep` states. What is
near is decided by fp32 distances (R1), whoever found it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs
from hnsw_gpu.deduplication import against as others
from hnsw_gpu.deduplication import linkage as linkages
from hnsw_gpu.deduplication import pairs
from hnsw_gpu.deduplication.shards import Pairs, Shards, no_pairs
from hnsw_gpu.engine import (
    NodeTable,
    empty_rows,
    encode,
    key_distances,
    key_nodes,
    move_together,
    thread_count,
)
from hnsw_gpu.index import Index
from hnsw_gpu.progress import bar

if TYPE_CHECKING:
    import os

    import pyarrow

EXACT_ROWS = 25_000  # up to here comparing all costs no more than building a graph
SAMPLED = 300  # nodes by which recall is judged
BINS = 100  # of the histogram, from similarity 0 to 1
ENCODE_ROWS = 16384
METHODS = ("auto", "exact", "hnsw")
KEEP = ("first", "last", "medoid")
LINKAGES = linkages.LINKAGES


class Dropped(NamedTuple):
    """What became of the rows; the arrays are (n,), in input order."""

    keep: np.ndarray  # bool
    duplicate_of: np.ndarray  # int64: the kept row that stands for it; -1 where there is none
    distance: np.ndarray  # float32, to what it is a duplicate of; NaN where it is none
    group: np.ndarray  # int64: the kept row, also of itself; -1 where invalid or of another set


class Against(NamedTuple):
    """Of each node its nearest in another set, where that is within the limit."""

    labels: np.ndarray  # int64 (nodes,): -1 where there is none
    distances: np.ndarray  # float32 (nodes,)


class DedupResult:
    """Rows kept and dropped, the pairs that decided it, and a report.

    keep: bool (n,), input order. duplicate_of: int64 (n,), row of the representative, -1 where
    there is none. similarity: float32 (n,) to it (cosine, ip), NaN where there is none;
    distance: likewise, of every metric. group: int64 (n,), the representative's row, which a kept
    row is itself. against: int64 (n,), of rows that the other set has: its label, or row; else -1.
    ids: the caller's, or the row numbers. report: counts, histogram of best similarity, sampled
    recall, seconds, parameters.
    """

    def __init__(self, join: "Join", dropped: Dropped, report: dict[str, Any]) -> None:
        self._join = join
        self.keep, self.duplicate_of, self.distance, self.group = dropped
        self.against = join.rows_against()
        self.ids = join.ids
        self.report = report

    def __repr__(self) -> str:
        also = ""
        if "against_duplicates" in self.report:
            also = f"{self.report['against_duplicates']:,} of the other set, "
        return (
            f"DedupResult: {self.report['kept']:,} of {self.report['rows']:,} rows kept, {also}"
            f"{self.report['exact_copies']:,} exact and {self.report['near_duplicates']:,} near "
            "duplicates dropped"
        )

    @property
    def similarity(self) -> np.ndarray:
        """float32 (n,): 1 - distance; ValueError for l2 and euclidean, which have none."""
        if self._join.metric == "l2":
            raise ValueError(f"metric {self._join.name!r} has no similarity; see distance")
        return np.float32(1) - self.distance

    @property
    def pairs(self) -> "pyarrow.Table":
        """Every pair found: row_a < row_b, int64, and similarity (distance, for l2).

        With ids, also id_a and id_b. Of equal rows only the first is in pairs; each other one is in
        a pair with that first one. Needs pyarrow.
        """
        return next(self.pair_tables(2**62))

    def pair_tables(self, count: int) -> "Iterator[pyarrow.Table]":
        """`pairs` in tables of at most `count` rows; at least one."""
        columns = self._join.row_pairs()
        for start in range(0, max(len(columns[0]), 1), count):
            yield self._join.pair_table(*(column[start : start + count] for column in columns))

    def names(self, rows: np.ndarray) -> list[Any]:
        """The ids of rows (m,), or their numbers."""
        return self.names_array(rows).to_pylist()

    def names_array(self, rows: np.ndarray) -> "pyarrow.Array":
        """`names` as an Arrow array."""
        return self._join.names(rows)

    @property
    def duplicates(self) -> "pyarrow.Table":
        """Dropped rows: id, duplicate_of (an id), similarity (distance, for l2), group (an id).

        With `against`, also against, of the other set. Needs pyarrow.
        """
        dropped = Dropped(self.keep, self.duplicate_of, self.distance, self.group)
        return self._join.duplicate_table(dropped)

    def regroup(
        self,
        threshold: float | None = None,
        *,
        max_distance: float | None = None,
        linkage: str | None = None,
        keep: Any = None,
    ) -> "DedupResult":
        """Decide again from the pairs that are there: another linkage, order, narrower limit."""
        join = self._join
        limit = join.limit
        if threshold is not None or max_distance is not None:
            limit = limit_of(join.name, threshold, max_distance)
        if limit > join.limit:
            raise ValueError("regroup: the limit is wider than the one that pairs were found with")
        parameters = dict(self.report["parameters"])
        linkage = inputs.one_of("linkage", linkage or parameters["linkage"], LINKAGES)
        keep = self._join.keep if keep is None else keep
        start = time.perf_counter()
        dropped = join.decide(limit, linkage, keep)
        report = {**self.report, **join.counts(dropped, limit)}
        report["parameters"] = parameters | named(join.name, limit, linkage, keep)
        report["seconds"] = {"group": time.perf_counter() - start}
        return DedupResult(join, dropped, report)


class Join:
    """The nodes of a set of rows, the pairs of them that are near, and what they decide."""

    def __init__(
        self,
        name: str,
        rows: int,
        valid: np.ndarray,
        node_of: np.ndarray,
        limit: float,
        nodes: Shards,
        found: Pairs,
        keep: Any,
        against: Against | None = None,
        ids: Any = None,
    ) -> None:
        self.name, self.metric = name, inputs.METRICS[name]  # the caller's, and the engines'
        self.rows, self.limit, self.keep, self.ids = rows, limit, keep, ids
        self.valid = valid  # int64 (m,): rows that are neither NaN nor infinite nor zero
        self.node_of = node_of  # int64 (m,), of those
        self.shards, self.found = nodes, found
        self.first_row = np.empty(nodes.nodes, np.int64)  # of each node
        self.first_row[node_of[::-1]] = valid[::-1]
        self.against = against
        self.is_other = np.zeros(nodes.nodes, bool)  # nodes that the other set has
        if against is not None:
            self.is_other = against.distances <= np.float32(limit)

    @property
    def nodes(self) -> int:
        return len(self.first_row)

    def rows_against(self) -> np.ndarray:
        labels = np.full(self.rows, -1, np.int64)
        if self.against is not None:
            labels[self.valid] = np.where(self.is_other, self.against.labels, -1)[self.node_of]
        return labels

    def row_pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 rows a < b, and distances, of all pairs found; copies with their first row."""
        first = self.first_row[self.node_of]
        is_copy = first != self.valid
        a = np.concatenate([self.first_row[self.found.a], first[is_copy]])
        b = np.concatenate([self.first_row[self.found.b], self.valid[is_copy]])
        distance = np.concatenate([self.found.distances, np.zeros(int(is_copy.sum()), np.float32)])
        a, b = np.minimum(a, b), np.maximum(a, b)
        order = np.lexsort((b, a))
        return a[order], b[order], self._as_asked(distance[order])

    def _as_asked(self, distances: np.ndarray) -> np.ndarray:
        return np.sqrt(distances) if self.name == "euclidean" else distances

    def pair_table(self, a: np.ndarray, b: np.ndarray, distance: np.ndarray) -> "pyarrow.Table":
        import pyarrow

        columns = {"row_a": a, "row_b": b, **self._nearness(distance)}
        if self.ids is not None:
            columns |= {"id_a": self.names(a), "id_b": self.names(b)}
        return pyarrow.table(columns)

    def duplicate_table(self, dropped: Dropped) -> "pyarrow.Table":
        import pyarrow

        labels = self.rows_against()
        rows = np.flatnonzero((dropped.duplicate_of >= 0) | (labels >= 0))
        columns = {
            "id": self.names(rows),
            "duplicate_of": self.names(dropped.duplicate_of[rows]),
            **self._nearness(dropped.distance[rows]),
            "group": self.names(dropped.group[rows]),
        }
        if self.against is not None:
            columns["against"] = _nullable(labels[rows])
        return pyarrow.table(columns)

    def _nearness(self, distance: np.ndarray) -> dict[str, np.ndarray]:
        if self.metric == "l2":
            return {"distance": distance}
        return {"similarity": np.float32(1) - distance}

    def names(self, rows: np.ndarray) -> Any:
        """Ids of rows as an Arrow array, null where the row is -1."""
        import pyarrow

        if self.ids is None:
            return _nullable(rows)
        ids = self.ids
        if not isinstance(ids, (pyarrow.Array, pyarrow.ChunkedArray)):
            ids = pyarrow.array(ids)
        return ids.take(_nullable(rows))

    def decide(self, limit: float, link: str, keep: Any) -> Dropped:
        a, b, distances = self._near(limit)
        offsets, neighbors, _ = linkages.adjacency(a, b, distances, self.nodes)
        rows = self._row_order(keep, offsets, neighbors)
        order, row_of = self._node_order(rows)
        position = np.empty(self.nodes, np.int64)
        position[order] = np.arange(self.nodes)
        is_open = self.found.is_open & ~self.is_other

        def near_of(ids: np.ndarray) -> list[np.ndarray]:
            every = self.shards.near_of(ids, limit)
            return [keys[~self.is_other[key_nodes(keys)]] for keys in every]

        root = np.empty(self.nodes, np.int64)
        if link == "components":
            return self._dropped(linkages.components(order, offsets, neighbors), row_of)
        decide = linkages.star if link == "star" else linkages.any_earlier
        state, told = decide(order, offsets, neighbors, is_open, near_of)
        if told:
            self._learn(told)
            offsets, neighbors, _ = linkages.adjacency(*self._near(limit), self.nodes)
        if link == "star":
            linkages.nearest_kept(offsets, neighbors, state, root)
        else:
            linkages.first_ancestor(order, position, offsets, neighbors, root)
        return self._dropped(root, row_of)

    def _near(self, limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs within a limit, of nodes that the other set lacks."""
        a, b, distances = self.found[:3]
        is_near = distances <= np.float32(limit)
        if self.against is not None:
            is_near &= ~self.is_other[a] & ~self.is_other[b]
        return a[is_near], b[is_near], distances[is_near]

    def _learn(self, told: dict[int, np.ndarray]) -> None:
        """Pairs of open nodes, of the keys of their near others."""
        ids = np.repeat(np.array(list(told)), [len(keys) for keys in told.values()])
        keys = np.concatenate(list(told.values()))
        known = self.found
        united = pairs.united(
            np.concatenate([known.a, ids]),
            np.concatenate([known.b, key_nodes(keys)]),
            np.concatenate([known.distances, key_distances(keys)]),
        )
        self.found = Pairs(*united, known.is_open, known.nearest)

    def _row_order(self, keep: Any, offsets: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
        """Places in `valid`, in the order of who is kept first; ties to the lower row."""
        count = len(self.valid)
        if isinstance(keep, str):
            inputs.one_of("keep", keep, KEEP)
            if keep == "first":
                return np.arange(count)
            if keep == "last":
                return np.arange(count)[::-1]
            copies_of = np.bincount(self.node_of, minlength=self.nodes)
            degree = copies_of + np.bincount(
                np.repeat(np.arange(self.nodes), np.diff(offsets)),
                weights=copies_of[neighbors],
                minlength=self.nodes,
            )
            return np.argsort(-degree[self.node_of], kind="stable")
        which, values = keep
        inputs.one_of("keep", which, ("max", "min"))
        values = np.asarray(values)
        if values.shape != (self.rows,) or values.dtype.kind not in "fiub":
            raise ValueError(
                f"keep: {values.dtype} {values.shape}, expected ({self.rows},) numbers"
            )
        values = values[self.valid].astype(np.float64)
        inputs.refuse("keep", np.isnan(values), "NaN")
        return np.argsort(-values if which == "max" else values, kind="stable")

    def _node_order(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nodes by their first row in that order; and that row, of each node."""
        nodes, first = np.unique(self.node_of[rows], return_index=True)
        row_of = np.empty(self.nodes, np.int64)
        row_of[nodes] = self.valid[rows[first]]
        return nodes[np.argsort(first, kind="stable")], row_of

    def _dropped(self, root: np.ndarray, row_of: np.ndarray) -> Dropped:
        keep, group = np.zeros(self.rows, bool), np.full(self.rows, -1, np.int64)
        duplicate_of = np.full(self.rows, -1, np.int64)
        distance = np.full(self.rows, np.nan, np.float32)
        is_ours = ~self.is_other[self.node_of]
        valid, node_of = self.valid[is_ours], self.node_of[is_ours]
        group[valid] = row_of[root[node_of]]
        is_kept = group[valid] == valid
        keep[valid] = is_kept
        dropped, nodes = valid[~is_kept], node_of[~is_kept]
        duplicate_of[dropped] = group[dropped]
        distance[dropped] = self._as_asked(self._distances(nodes, root[nodes]))
        if self.against is not None:
            theirs = self.against.distances[self.node_of[~is_ours]]
            distance[self.valid[~is_ours]] = self._as_asked(theirs)
        return Dropped(keep, duplicate_of, distance, group)

    def _distances(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """float32 (m,), between nodes; many rows share a pair of them."""
        wanted, place = np.unique(one << 32 | other, return_inverse=True)
        one, other = wanted >> 32, wanted & 0xFFFFFFFF
        return self.shards.distances(one, other)[place]

    def counts(self, dropped: Dropped, limit: float) -> dict[str, int]:
        """Of the report."""
        is_ours = ~self.is_other[self.node_of]
        copies_dropped = int(is_ours.sum()) - int((~self.is_other).sum())
        kept, theirs = int(dropped.keep.sum()), int((~is_ours).sum())
        counts = {
            "rows": self.rows,
            "invalid": self.rows - len(self.valid),
            "kept": kept,
            "exact_copies": copies_dropped,
            "near_duplicates": len(self.valid) - theirs - kept - copies_dropped,
            "groups": len(np.unique(dropped.duplicate_of[dropped.duplicate_of >= 0])),
            "pairs": int((self.found.distances <= np.float32(limit)).sum())
            + len(self.valid)
            - self.nodes,
            "open_rows": int(self.found.is_open[self.node_of].sum()),
        }
        return counts if self.against is None else counts | {"against_duplicates": theirs}

    def histogram(self) -> dict[str, list]:
        """Rows by the similarity (distance, for l2) of the most similar other row."""
        nearest = self.found.nearest[self.node_of]
        nearest[np.bincount(self.node_of, minlength=self.nodes)[self.node_of] > 1] = 0
        values = self._as_asked(nearest[np.isfinite(nearest)]).astype(np.float64)
        if self.metric == "l2":
            counts, edges = np.histogram(values, BINS)
        else:
            counts, edges = np.histogram(np.clip(1 - values, 0, 1), BINS, (0, 1))
        return {"edges": edges.tolist(), "rows": counts.tolist()}

    def recall(self, seed: int) -> dict[str, Any]:
        """The share of true pairs that were found, of a sample of nodes; 95 % interval (Wilson)."""
        closed = np.flatnonzero(~self.found.is_open)
        rng = np.random.default_rng(seed)
        sample = np.sort(rng.choice(closed, min(SAMPLED, len(closed)), replace=False))
        truth = self.shards.near_of(sample, self.limit, exactly=True)
        a = np.repeat(sample, [len(keys) for keys in truth])
        keys = np.concatenate([*truth, np.empty(0, np.uint64)])
        one, other, _ = pairs.united(a, key_nodes(keys), key_distances(keys))
        known = self.found.a.astype(np.int64) << 32 | self.found.b
        hits = int(np.isin(one.astype(np.int64) << 32 | other, known).sum())
        low, high = wilson(hits, len(one))
        return {
            "sampled_rows": len(sample),
            "true_pairs": len(one),
            "found_pairs": hits,
            "recall": hits / len(one) if len(one) else 1.0,
            "interval": [low, high],
        }


def dedup(
    vectors: ArrayLike,
    threshold: float | None = None,
    *,
    max_distance: float | None = None,
    metric: str = "cosine",
    ids: Any = None,
    keep: Any = "first",
    linkage: str = "star",
    against: "ArrayLike | Index | str | os.PathLike[str] | None" = None,
    itself: bool = True,
    method: str = "auto",
    on_invalid: str = "raise",
    M: int = 16,
    ef_construction: int = 80,
    ef: int = 48,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = False,
) -> DedupResult:
    """Find near-duplicates among vectors (n, dim), any array-like of real numbers.

    threshold: least cosine similarity of near-duplicates, or least dot product under ip (0.95 where
        nothing is said). max_distance: instead of it, the largest distance, as an Index of that
        metric returns it.
    ids: (n,) names of the rows for the tables of the result, numbers or texts.
    keep: who stays, "first", "last", "medoid" (who has most near ones), ("max", values) or
        ("min", values) with values (n,); ties go to the lower row.
    linkage: "star", "components" or "any-earlier", see linkage.py.
    against: another set, vectors (m, dim) or an Index or the path of a saved one: rows with a near
        one there are dropped first. itself=False: and no others are.
    method: "exact" compares all with all, "hnsw" searches a graph with M, ef_construction and ef;
        "auto" takes "exact" up to 25,000 distinct rows.
    on_invalid: "raise" or "drop" rows that are NaN, infinite, or zero under cosine.

    The same result for any `threads`. ValueError, TypeError on bad input, with the first rows.
    """
    name = inputs.metric(metric)
    limit = limit_of(name, threshold, max_distance)
    inputs.one_of("linkage", linkage, LINKAGES)
    inputs.one_of("method", method, METHODS)
    inputs.one_of("on_invalid", on_invalid, ("raise", "drop"))
    given = inputs.vectors("vectors", vectors)
    if ids is not None and len(ids) != len(given):
        raise ValueError(f"ids: {len(ids)} for {len(given)} vectors")
    if not itself and against is None:
        raise ValueError("itself=False, and against: nothing to compare with")
    threads = thread_count(None if threads is None else inputs.integer("threads", threads, 1))
    built = {"M": M, "ef_construction": ef_construction, "seed": seed, "threads": threads}
    seconds, clock = {}, Clock()

    def nodes_of(rows: np.ndarray) -> pairs.Nodes:
        if method == "exact" or (method == "auto" and len(rows) <= EXACT_ROWS):
            return pairs.Nodes(rows, None, inputs.METRICS[name])
        with bar(progress, len(rows), "build") as shown:
            return pairs.build_nodes(rows, inputs.METRICS[name], **built, advance=shown.update)

    rows, valid, node_of = distinct_rows("vectors", given, name, on_invalid)
    if not itself:  # copies are not looked for either
        rows, node_of = rows[node_of], np.arange(len(valid))
    seconds["copies"] = clock.lap()
    theirs = None
    if against is not None:
        theirs = _against(against, rows, name, given.shape[1], nodes_of, ef, threads)
        seconds["against"] = clock.lap()
    nodes = nodes_of(rows) if itself else pairs.Nodes(rows, None, inputs.METRICS[name])
    seconds["build"] = clock.lap()
    whole = Shards(
        [np.arange(len(rows))], lambda _: nodes, lambda _: nodes.rows, nodes.metric,
        ef=ef, threads=threads,
    )  # fmt: skip
    if theirs is not None and not itself:
        found = no_pairs(theirs.distances)
    else:
        with bar(progress, len(rows), "join") as shown:
            found = whole.pairs(lambda s, t: whole.join(s, t, limit, shown.update))
    seconds["join"] = clock.lap()
    join = Join(name, len(given), valid, node_of, limit, whole, found, keep, theirs, ids)
    dropped = join.decide(limit, linkage, keep)
    seconds["group"] = clock.lap()
    report = {**join.counts(dropped, limit), "histogram": join.histogram()}
    report["recall"] = join.recall(seed) if itself else None
    report["row_reads"] = whole.row_reads(SAMPLED)
    seconds["recall"] = clock.lap()
    report["seconds"] = seconds
    report["parameters"] = {
        "metric": name,
        "method": "exact" if nodes.graph is None else "hnsw",
        "seed": seed,
        **named(name, limit, linkage, keep),
        **({"M": M, "ef_construction": ef_construction, "ef": ef} if nodes.graph else {}),
    }
    return DedupResult(join, dropped, report)


def limit_of(metric: str, threshold: float | None, max_distance: float | None) -> float:
    """The largest float32 distance of near-duplicates, as engines have it."""
    if max_distance is not None:
        if threshold is not None:
            raise ValueError("threshold and max_distance: say one of them")
        limit = np.float32(inputs.number("max_distance", max_distance))
        if metric != "euclidean":
            return float(limit)
        squared = limit * abs(limit)
        while squared < np.inf and np.sqrt(np.nextafter(squared, np.float32(np.inf))) <= limit:
            squared = np.nextafter(squared, np.float32(np.inf))  # the root is rounded
        return float(squared)
    if metric in ("l2", "euclidean"):
        raise ValueError(f"metric {metric!r}: say max_distance, there is no similarity")
    least = np.float32(inputs.number("threshold", 0.95 if threshold is None else threshold))
    if metric == "cosine" and not -1 <= least <= 1:
        raise ValueError(f"threshold={threshold}: expected a cosine similarity, -1 to 1")
    # 1 - distance is rounded: to `least` and more from the middle between it and the float before
    middle = (float(least) + float(np.nextafter(least, np.float32(-np.inf)))) / 2
    largest = np.float32(1 - middle)
    while np.float32(1) - largest < least:
        largest = np.nextafter(largest, np.float32(-np.inf))
    return float(largest)


def named(metric: str, limit: float, link: str, keep: Any) -> dict[str, Any]:
    """The decision's parameters, as the caller knows them: 0.9, not the float32 next to it."""
    named: dict[str, Any] = {"linkage": link, "keep": keep if isinstance(keep, str) else keep[0]}
    if metric in ("l2", "euclidean"):
        return named | {"max_distance": _shortest(limit if metric == "l2" else limit**0.5)}
    return named | {
        "threshold": _shortest(float(np.float32(1) - np.float32(limit))),
        "max_distance": _shortest(limit),
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(value)))


def distinct_rows(
    name: str, vectors: np.ndarray, metric: str, on_invalid: str = "raise"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encoded fp32 rows (nodes, row) without repeats; int64 (m,) valid rows, and nodes of these."""
    parts = (
        (start, vectors[start : start + ENCODE_ROWS])
        for start in range(0, len(vectors), ENCODE_ROWS)
    )
    rows, valid = encoded(name, parts, vectors.shape, metric, on_invalid)
    node_of, sources = NodeTable().assign(rows, 0, len(rows))
    move_together(rows, sources)
    return rows[: len(sources)], valid, node_of


def encoded(
    name: str,
    parts: Iterable[tuple[int, np.ndarray]],
    shape: tuple[int, ...],
    metric: str,
    on_invalid: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Encoded fp32 rows (m, row) of those vectors that are valid, and their numbers int64 (m,).

    parts: (number of the first, vectors (p, dim)), of an array of that shape in all.
    """
    metric = inputs.METRICS[metric]
    rows = empty_rows(shape[0], shape[1], "fp32")
    valid, count = [np.empty(0, np.int64)], 0
    for first, part in parts:
        if on_invalid == "raise":
            part, numbers = (
                inputs.float_vectors(name, part, metric, first=first),
                np.arange(len(part)),
            )
        else:
            numbers = np.flatnonzero(inputs.are_valid(part, metric))
            part = np.ascontiguousarray(part[numbers], np.float32)
        rows[count : count + len(part)] = encode(part, metric, "fp32")
        valid.append(first + numbers)
        count += len(part)
    return rows[:count], np.concatenate(valid)


def _against(
    other: Any,
    rows: np.ndarray,
    metric: str,
    dim: int,
    nodes_of: Callable[[np.ndarray], pairs.Nodes],
    ef: int,
    threads: int,
) -> Against:
    """Of encoded rows (nodes, row) the nearest in the other set."""
    if isinstance(other, Index) or others.is_saved(other):
        index = others.opened(other, metric, dim)
        nearest = others.nearest_in_index(index, inputs.METRICS[metric], ef, threads)
    else:
        theirs, valid, node_of = distinct_rows(
            "against", inputs.vectors("against", other, dim), metric
        )
        first = np.empty(len(theirs), np.int64)
        first[node_of[::-1]] = valid[::-1]
        nearest = others.nearest_in_nodes(nodes_of(theirs), first, ef, threads)
    return Against(*others.nearest_of_all([nearest], rows.__getitem__, len(rows), lambda _: None))


def _nullable(rows: np.ndarray) -> "pyarrow.Array":
    """int64, null where -1."""
    import pyarrow

    return pyarrow.array(rows, mask=rows < 0)


class Clock:
    """Seconds of one stage after another."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def wilson(hits: int, of: int) -> tuple[float, float]:
    """95 % interval of a share, by Wilson's formula; (0, 1) of nothing."""
    if not of:
        return 0.0, 1.0
    z, share = 1.959964, hits / of
    middle, scale = share + z * z / (2 * of), 1 + z * z / of
    width = z * ((share * (1 - share) + z * z / (4 * of)) / of) ** 0.5
    return max((middle - width) / scale, 0.0), min((middle + width) / scale, 1.0)
