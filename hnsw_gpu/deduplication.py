"""Near-duplicates: which rows to keep, which to drop, and for what row each is dropped.

Equal rows are one node. Pairs of near nodes come from an exact join or from the graph
(`pairs.py`); a linkage (`linkage.py`) decides by them and by the order that `keep` states. What is
near is decided by fp32 distances (R1), whoever found it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from hnsw_gpu import beam, copies, exact, inputs, pairs
from hnsw_gpu import linkage as linkages
from hnsw_gpu.index import Index
from hnsw_gpu.pairs import Pairs
from hnsw_gpu.vectors import empty_rows, encode
from hnsw_gpu.workers import thread_count

if TYPE_CHECKING:
    import pyarrow

EXACT_ROWS = 25_000  # up to here comparing all costs no more than building a graph
PAIRS_A_ROW = 64  # that may be kept, of all rows together; and at least LEAST_PAIRS
LEAST_PAIRS = 10_000_000
SAMPLED = 500  # nodes by which recall is judged
BINS = 100  # of the histogram, from similarity 0 to 1
ENCODE_ROWS = 16384
METHODS = ("auto", "exact", "hnsw")
KEEP = ("first", "last", "medoid")
LINKAGES = linkages.LINKAGES


class Dropped(NamedTuple):
    """What became of the rows; the arrays are (n,), in input order."""

    keep: np.ndarray  # bool
    duplicate_of: np.ndarray  # int64: the kept row that stands for it; -1 where kept
    distance: np.ndarray  # float32, to that row; NaN where kept
    group: np.ndarray  # int64: the kept row, also of itself; -1 where invalid


class DedupResult:
    """Rows kept and dropped, the pairs that decided it, and a report.

    keep: bool (n,), input order. duplicate_of: int64 (n,), row of the representative, -1 where kept
    or invalid. similarity: float32 (n,) to that representative (cosine, ip), NaN where kept;
    distance: likewise, of every metric. group: int64 (n,), the representative's row, which a kept
    row is itself. report: counts, histogram of best similarity, sampled recall, seconds,
    parameters.
    """

    def __init__(self, join: "Join", dropped: Dropped, report: dict[str, Any]) -> None:
        self._join = join
        self.keep, self.duplicate_of, self.distance, self.group = dropped
        self.report = report

    def __repr__(self) -> str:
        return (
            f"DedupResult: {self.report['kept']:,} of {self.report['rows']:,} rows kept, "
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

        Of equal rows only the first is in pairs; each other one is in a pair with that first one.
        Needs pyarrow.
        """
        import pyarrow

        a, b, distance = self._join.row_pairs()
        last = ("distance", distance)
        if self._join.metric != "l2":
            last = ("similarity", np.float32(1) - distance)
        return pyarrow.table({"row_a": a, "row_b": b, last[0]: last[1]})

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
            limit = _limit(join.name, threshold, max_distance)
        if limit > join.limit:
            raise ValueError("regroup: the limit is wider than the one that pairs were found with")
        parameters = dict(self.report["parameters"])
        linkage = inputs.one_of("linkage", linkage or parameters["linkage"], LINKAGES)
        keep = self._join.keep if keep is None else keep
        start = time.perf_counter()
        dropped = join.decide(limit, linkage, keep)
        report = {**self.report, **join.counts(dropped, limit)}
        report["parameters"] = parameters | _named(join.name, limit, linkage, keep)
        report["seconds"] = {"group": time.perf_counter() - start}
        return DedupResult(join, dropped, report)


class Join:
    """The nodes of a set of rows, and the pairs of them that are near."""

    def __init__(
        self,
        vectors: np.ndarray,
        name: str,
        valid: np.ndarray,
        node_of: np.ndarray,
        first_row: np.ndarray,
        limit: float,
        found: Pairs,
        lists: pairs.Lists,
        keep: Any,
    ) -> None:
        self.vectors, self.limit, self.keep = vectors, limit, keep
        self.name, self.metric = name, inputs.METRICS[name]  # the caller's, and the engines'
        self.valid = valid  # int64 (m,): rows that are neither NaN nor infinite nor zero
        self.node_of = node_of  # int64 (m,), of those
        self.first_row = first_row  # int64 (nodes,)
        self.found, self.lists = found, lists

    @property
    def nodes(self) -> int:
        return len(self.first_row)

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

    def decide(self, limit: float, link: str, keep: Any) -> Dropped:
        is_near = self.found.distances <= np.float32(limit)
        a, b, distances = (array[is_near] for array in self.found[:3])
        offsets, neighbors, _ = linkages.adjacency(a, b, distances, self.nodes)
        rows = self._row_order(keep, offsets, neighbors)
        order, row_of = self._node_order(rows)
        position = np.empty(self.nodes, np.int64)
        position[order] = np.arange(self.nodes)

        def near_of(ids: np.ndarray) -> list[np.ndarray]:
            return pairs.within(self.lists, ids, limit, self.nodes)

        root = np.empty(self.nodes, np.int64)
        if link == "components":
            return self._dropped(linkages.components(order, offsets, neighbors), row_of)
        decide = linkages.star if link == "star" else linkages.any_earlier
        state, told = decide(order, offsets, neighbors, self.found.is_open, near_of)
        if told:
            self._learn(told)
            is_near = self.found.distances <= np.float32(limit)
            a, b, distances = (array[is_near] for array in self.found[:3])
            offsets, neighbors, _ = linkages.adjacency(a, b, distances, self.nodes)
        if link == "star":
            linkages.nearest_kept(offsets, neighbors, state, root)
        else:
            linkages.first_ancestor(order, position, offsets, neighbors, root)
        return self._dropped(root, row_of)

    def _learn(self, told: dict[int, np.ndarray]) -> None:
        """Pairs of open nodes, of the keys of their near others."""
        ids = np.repeat(np.array(list(told)), [len(keys) for keys in told.values()])
        keys = np.concatenate(list(told.values()))
        known = self.found
        united = pairs.united(
            np.concatenate([known.a, ids]),
            np.concatenate([known.b, beam.nodes(keys)]),
            np.concatenate([known.distances, beam.distances(keys)]),
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
        if values.shape != (len(self.vectors),) or values.dtype.kind not in "fiub":
            raise ValueError(
                f"keep: {values.dtype} {values.shape}, expected ({len(self.vectors)},) numbers"
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
        count = len(self.vectors)
        keep, group = np.zeros(count, bool), np.full(count, -1, np.int64)
        duplicate_of, distance = np.full(count, -1, np.int64), np.full(count, np.nan, np.float32)
        group[self.valid] = row_of[root[self.node_of]]
        is_kept = group[self.valid] == self.valid
        keep[self.valid] = is_kept
        dropped = self.valid[~is_kept]
        duplicate_of[dropped] = group[dropped]
        nodes = self.node_of[~is_kept]
        distance[dropped] = self._as_asked(self._distances(nodes, root[nodes]))
        return Dropped(keep, duplicate_of, distance, group)

    def _distances(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """float32 (m,), between nodes: 0 of one node to itself."""
        found = np.zeros(len(one), np.float32)
        for start in range(0, len(one), ENCODE_ROWS):
            place = slice(start, start + ENCODE_ROWS)
            a = encode(self._floats(self.first_row[one[place]]), self.metric, "fp32")
            b = encode(self._floats(self.first_row[other[place]]), self.metric, "fp32")
            keys = np.arange(len(a), dtype=np.uint64)[:, None] << np.uint64(1)
            exactly = exact.rerank(keys, b, a, self.metric, k=1, threads=1)
            found[place] = beam.distances(exactly[:, 0])
        found[one == other] = 0
        return found

    def _floats(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.vectors[rows], np.float32)

    def counts(self, dropped: Dropped, limit: float) -> dict[str, int]:
        """Of the report."""
        copies_dropped = len(self.valid) - self.nodes
        kept = int(dropped.keep.sum())
        return {
            "rows": len(self.vectors),
            "invalid": len(self.vectors) - len(self.valid),
            "kept": kept,
            "exact_copies": copies_dropped,
            "near_duplicates": len(self.valid) - kept - copies_dropped,
            "pairs": int((self.found.distances <= np.float32(limit)).sum()) + copies_dropped,
            "open_rows": int(self.found.is_open[self.node_of].sum()),
        }

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

    def recall(self, seed: int, threads: int) -> dict[str, Any]:
        """The share of true pairs that were found, of a sample of nodes; 95 % interval (Wilson)."""
        closed = np.flatnonzero(~self.found.is_open)
        rng = np.random.default_rng(seed)
        sample = np.sort(rng.choice(closed, min(SAMPLED, len(closed)), replace=False))
        rows = encode(self._floats(self.first_row), self.metric, "fp32")
        every = pairs.lists_of_all(rows, self.metric, threads)
        truth = pairs.within(every, sample, self.limit, self.nodes)
        a = np.repeat(sample, [len(keys) for keys in truth])
        keys = np.concatenate([*truth, np.empty(0, np.uint64)])
        one, other, _ = pairs.united(a, beam.nodes(keys), beam.distances(keys))
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
    keep: Any = "first",
    linkage: str = "star",
    method: str = "auto",
    on_invalid: str = "raise",
    M: int = 16,
    ef_construction: int = 100,
    ef: int = 64,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = False,
) -> DedupResult:
    """Find near-duplicates among vectors (n, dim), any array-like of real numbers.

    threshold: least cosine similarity of near-duplicates, or least dot product under ip (0.95 where
    nothing is said).
    max_distance: instead of it, the largest distance, as an Index of that metric returns it. keep:
    who stays,
    "first", "last", "medoid" (who has most near ones), ("max", values) or ("min", values) with
    values (n,); ties go to the lower row. linkage: "star", "components" or "any-earlier", see
    linkage.py. method: "exact" compares all with all, "hnsw" searches a graph with M,
    ef_construction and ef; "auto" takes "exact" up to 25,000 distinct rows. on_invalid: "raise" or
    "drop" rows that are NaN, infinite, or zero under cosine. The same result for any `threads`.
    """
    name = inputs.metric(metric)
    engine_metric = inputs.METRICS[name]
    limit = _limit(name, threshold, max_distance)
    inputs.one_of("linkage", linkage, LINKAGES)
    inputs.one_of("method", method, METHODS)
    inputs.one_of("on_invalid", on_invalid, ("raise", "drop"))
    given = inputs.vectors("vectors", vectors)
    threads = thread_count(None if threads is None else inputs.integer("threads", threads, 1))
    seconds, clock = {}, _Clock()
    valid = _valid_rows(given, engine_metric, on_invalid)
    node_of, sources = _nodes(given, valid, engine_metric)
    first_row = valid[sources]
    seconds["copies"] = clock.lap()
    if method == "auto":
        method = "exact" if len(first_row) <= EXACT_ROWS else "hnsw"
    distinct = given if len(first_row) == len(given) else given[first_row]
    with _bar(progress, len(first_row)) as bar:
        if method == "exact":
            rows = encode(np.ascontiguousarray(distinct, np.float32), engine_metric, "fp32")
            lists = pairs.lists_of_all(rows, engine_metric, threads)
        else:
            index = Index(
                given.shape[1], engine_metric, M=M, ef_construction=ef_construction, seed=seed
            )
            index.add(distinct, threads=threads, progress=progress)
            lists = pairs.lists_of_graph(index._engine, ef, threads)
        seconds["build"] = clock.lap()
        most = max(LEAST_PAIRS, PAIRS_A_ROW * len(first_row))
        found = pairs.find_pairs(lists, len(first_row), limit, most, bar.update)
    seconds["join"] = clock.lap()
    join = Join(given, name, valid, node_of, first_row, limit, found, lists, keep)
    dropped = join.decide(limit, linkage, keep)
    seconds["group"] = clock.lap()
    report = {**join.counts(dropped, limit), "histogram": join.histogram()}
    report["recall"] = join.recall(seed, threads)
    seconds["recall"] = clock.lap()
    report["seconds"] = seconds
    report["parameters"] = {
        "metric": name,
        "method": method,
        "seed": seed,
        **_named(name, limit, linkage, keep),
        **({"M": M, "ef_construction": ef_construction, "ef": ef} if method == "hnsw" else {}),
    }
    return DedupResult(join, dropped, report)


def _limit(metric: str, threshold: float | None, max_distance: float | None) -> float:
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


def _named(metric: str, limit: float, link: str, keep: Any) -> dict[str, Any]:
    """The decision's parameters, as the caller knows them."""
    named: dict[str, Any] = {"linkage": link, "keep": keep if isinstance(keep, str) else keep[0]}
    if metric in ("l2", "euclidean"):
        return named | {"max_distance": limit if metric == "l2" else limit**0.5}
    return named | {"threshold": float(np.float32(1) - np.float32(limit)), "max_distance": limit}


def _valid_rows(vectors: np.ndarray, metric: str, on_invalid: str) -> np.ndarray:
    """int64 (m,) rows that have a place among vectors of this metric."""
    is_valid = np.ones(len(vectors), bool)
    for start in range(0, len(vectors), ENCODE_ROWS):
        part = vectors[start : start + ENCODE_ROWS]
        if on_invalid == "raise":
            inputs.float_vectors("vectors", part, metric, first=start)
        else:
            is_valid[start : start + len(part)] = inputs.are_valid(part, metric)
    return np.flatnonzero(is_valid)


def _nodes(vectors: np.ndarray, valid: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Node of each valid row, equal ones together; and the first of `valid` of each node."""
    rows = empty_rows(len(valid), vectors.shape[1], "fp32")
    for start in range(0, len(valid), ENCODE_ROWS):
        part = np.ascontiguousarray(vectors[valid[start : start + ENCODE_ROWS]], np.float32)
        rows[start : start + len(part)] = encode(part, metric, "fp32")
    return copies.NodeTable().assign(rows, 0, len(valid))


@contextmanager
def _bar(progress: bool, total: int) -> Iterator[tqdm]:
    hidden = None if progress else True  # None: hidden where there is no terminal
    with tqdm(total=total, desc="pairs", unit=" vectors", unit_scale=True, disable=hidden) as bar:
        yield bar


class _Clock:
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
