"""Near-duplicates of rows in memory: `dedup`."""

from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs
from hnsw_gpu.deduplication import other_set
from hnsw_gpu.deduplication.conclusion import conclude
from hnsw_gpu.deduplication.decision import NearRows
from hnsw_gpu.deduplication.distinct_rows import distinct_rows
from hnsw_gpu.deduplication.near_pairs import Nodes
from hnsw_gpu.deduplication.other_set import NearestOther
from hnsw_gpu.deduplication.result import DedupResult
from hnsw_gpu.deduplication.settings import Settings
from hnsw_gpu.deduplication.sharded_join import Pairs, Shards, no_pairs
from hnsw_gpu.deduplication.stage_clock import StageClock
from hnsw_gpu.engine import build_graph, thread_count
from hnsw_gpu.index import Index
from hnsw_gpu.progress import bar

if TYPE_CHECKING:
    import os


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
    device: str = "cpu",
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
    device: where rows are joined with each other, as of an Index: "cpu", "cuda", "cuda:1", "auto".
        The CPU measures what a GPU finds, so distances are the same.

    The same result for any `threads`. ValueError, TypeError on bad input, with the first rows.
    """
    settings = Settings(
        threshold, max_distance, metric, keep, linkage, method, on_invalid,
        M, ef_construction, ef, seed,
    )  # fmt: skip
    settings.check()
    inputs.device(device)
    given = inputs.vectors("vectors", vectors)
    if ids is not None and len(ids) != len(given):
        raise ValueError(f"ids: {len(ids)} for {len(given)} vectors")
    if not itself and against is None:
        raise ValueError("itself=False, and against: nothing to compare with")
    threads = thread_count(None if threads is None else inputs.integer("threads", threads, 1))
    clock = StageClock()
    near = _InMemory(settings, threads, device, progress).near_rows(given, against, itself, clock)
    result = conclude(near, settings, ids, itself, clock)
    of_graph = {"M": M, "ef_construction": ef_construction, "ef": ef}
    is_exact = result.report["parameters"]["method"] == "exact"
    result.report["parameters"] |= {"seed": seed} | ({} if is_exact else of_graph)
    result.report["seconds"] = clock.seconds
    return result


class _InMemory:
    """Finds near rows, all of them in one shard."""

    def __init__(self, settings: Settings, threads: int, device: str, progress: bool) -> None:
        self._settings, self._threads, self._progress = settings, threads, progress
        self._device = device

    def near_rows(
        self, vectors: np.ndarray, against: Any, itself: bool, clock: StageClock
    ) -> NearRows:
        settings, metric = self._settings, self._settings.metric_name
        encoded, rows = distinct_rows(
            "vectors", vectors, metric, settings.on_invalid, are_copies_one=itself
        )
        clock.ends("copies")
        other = None
        if against is not None:
            other = self._nearest_other(against, encoded, vectors.shape[1])
            clock.ends("against")
        nodes = self._nodes(encoded) if itself else Nodes(encoded, None, settings.engine_metric)
        clock.ends("build")
        shards = Shards(
            [np.arange(rows.nodes)], [nodes].__getitem__, [nodes.rows].__getitem__, nodes.metric,
            ef=settings.ef, threads=self._threads, device=self._device,
        )  # fmt: skip
        if other is not None and not itself:
            pairs = no_pairs(other.distances)
        else:
            pairs = self._pairs(shards)
        clock.ends("join")
        return NearRows(metric, settings.limit, rows, shards, pairs, other)

    def _nodes(self, encoded: np.ndarray) -> Nodes:
        settings = self._settings
        if settings.compares_all(len(encoded)):
            return Nodes(encoded, None, settings.engine_metric)
        with bar(self._progress, len(encoded), "build") as progress_bar:
            graph = build_graph(
                encoded, settings.engine_metric, M=settings.M,
                ef_construction=settings.ef_construction, seed=settings.seed,
                threads=self._threads, advance=progress_bar.update,
            )  # fmt: skip
        return Nodes(encoded, graph, settings.engine_metric)

    def _nearest_other(self, against: Any, encoded: np.ndarray, dim: int) -> NearestOther:
        """The nearest of each encoded row (nodes, row) in an index, a saved one, or vectors."""
        settings, threads = self._settings, self._threads
        if isinstance(against, Index) or other_set.is_path(against):
            index = other_set.open_index(against, settings.metric_name, dim)
            find = other_set.nearest_in_index(index, settings.engine_metric, settings.ef, threads)
        else:
            given = inputs.vectors("against", against, dim)
            theirs, rows = distinct_rows("against", given, settings.metric_name)
            nodes = self._nodes(theirs)
            find = other_set.nearest_in_nodes(nodes, rows.first_row, settings.ef, threads)
        return other_set.nearest_of_all([find], encoded.__getitem__, len(encoded), lambda _: None)

    def _pairs(self, shards: Shards) -> Pairs:
        with bar(self._progress, shards.nodes, "join") as progress_bar, closing(shards.join):
            return shards.unite(
                lambda s, t: shards.join_block(s, t, self._settings.limit, progress_bar.update)
            )
