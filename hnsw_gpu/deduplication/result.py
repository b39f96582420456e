"""The result of a deduplication: rows kept and dropped, and tables of them by their ids."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.deduplication import figures
from hnsw_gpu.deduplication.counting_sort import order_of_pairs
from hnsw_gpu.deduplication.decision import Decision, NearRows
from hnsw_gpu.deduplication.limit import distance_of_copies, limit_as_given, limit_of
from hnsw_gpu.deduplication.linkage import LINKAGES
from hnsw_gpu.files import taken
from hnsw_gpu.string_labels import NONE

if TYPE_CHECKING:
    import pyarrow


class DedupResult:
    """Rows kept and dropped, the pairs that decided it, and a report.

    keep: bool (n,), input order.
    duplicate_of: int64 (n,), row of the representative, -1 where there is none.
    similarity: float32 (n,) to it (cosine, ip), NaN where there is none.
    distance: likewise, of every metric.
    group: int64 (n,), the representative's row, which a kept row is itself.
    against: (n,), of rows that the other set has: its label, or row; else -1, or "" of strings.
    ids: the caller's, or the row numbers.
    report: counts, histogram of best similarity, sampled recall, seconds, parameters.
    """

    def __init__(
        self, near: NearRows, decision: Decision, keep: Any, ids: Any, report: dict[str, Any]
    ) -> None:
        self._near, self._keep = near, keep  # who is kept first, as it was asked for
        self.keep, self.duplicate_of, self.engine_distance, self.group = decision
        self.against = near.labels_in_other()
        self.ids = ids
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
    def distance(self) -> np.ndarray:
        """float32 (n,), as an Index of the metric returns them."""
        return self._near.reported(self.engine_distance)

    @property
    def similarity(self) -> np.ndarray:
        """float32 (n,): cosine, or dot product; ValueError for l2 and euclidean: none."""
        if not self._near.has_similarity:
            raise ValueError(f"metric {self._near.metric!r} has no similarity; see distance")
        return self._near.similarity(self.engine_distance)

    @property
    def pairs(self) -> "pyarrow.Table":
        """Every pair found: row_a < row_b, int64, and similarity (distance, for l2).

        With ids, also id_a and id_b. Of equal rows only the first is in pairs; each other one is in
        a pair with that first one. Needs pyarrow.
        """
        return next(self.pair_tables(2**62))

    def pair_tables(self, count: int) -> "Iterator[pyarrow.Table]":
        """`pairs` in tables of at most `count` rows; at least one."""
        import pyarrow

        every = self._pairs()
        for start in range(0, max(len(every[0]), 1), count):
            a, b, distance = (column[start : start + count] for column in every)
            columns = {"row_a": a, "row_b": b, **self.nearness(distance)}
            if self.ids is not None:
                columns |= {"id_a": self.names_array(a), "id_b": self.names_array(b)}
            yield pyarrow.table(columns)

    def row_pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 rows a < b, and distances, of all pairs found; copies with their first row."""
        a, b, distance = self._pairs()
        return a, b, self._near.reported(distance)

    def _pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`row_pairs`, of engines' distances."""
        rows, pairs = self._near.rows, self._near.pairs
        first = rows.first_row[rows.node_of]
        is_copy = first != rows.valid
        a = np.concatenate([rows.first_row[pairs.a], first[is_copy]])
        b = np.concatenate([rows.first_row[pairs.b], rows.valid[is_copy]])
        of_copies = np.full(rows.copies, distance_of_copies(self._near.metric))
        distance = np.concatenate([pairs.distances, of_copies])
        a, b = np.minimum(a, b), np.maximum(a, b)
        order = order_of_pairs(a, b)
        return a[order], b[order], distance[order]

    @property
    def duplicates(self) -> "pyarrow.Table":
        """Dropped rows: id, duplicate_of (an id), similarity (distance, for l2), group (an id).

        With `against`, also against, of the other set. Needs pyarrow.
        """
        import pyarrow

        rows = np.flatnonzero((self.duplicate_of >= 0) | _is_some(self.against))
        columns = {
            "id": self.names_array(rows),
            "duplicate_of": self.names_array(self.duplicate_of[rows]),
            **self.nearness(self.engine_distance[rows]),
            "group": self.names_array(self.group[rows]),
        }
        if self._near.other is not None:
            columns["against"] = _nullable(self.against[rows])
        return pyarrow.table(columns)

    def nearness(self, distance: np.ndarray) -> dict[str, np.ndarray]:
        """Similarity or distance, by its name, of engines' distances."""
        if self._near.has_similarity:
            return {"similarity": self._near.similarity(distance)}
        return {"distance": self._near.reported(distance)}

    def names_array(self, rows: np.ndarray) -> "pyarrow.Array":
        """The ids of rows (m,), or their numbers; null where the row is -1."""
        import pyarrow

        if self.ids is None:
            return _nullable(rows)
        ids = self.ids
        if not isinstance(ids, (pyarrow.Array, pyarrow.ChunkedArray)):
            ids = pyarrow.array(ids)
        return taken(ids, _nullable(rows))

    def regroup(
        self,
        threshold: float | None = None,
        *,
        max_distance: float | None = None,
        linkage: str | None = None,
        keep: Any = None,
    ) -> "DedupResult":
        """Decide again from the pairs that are there: another linkage, order, narrower limit."""
        near, limit = self._near, self._near.limit
        if threshold is not None or max_distance is not None:
            limit = limit_of(near.metric, threshold, max_distance)
        if limit > near.limit:
            raise ValueError("regroup: the limit is wider than the one that pairs were found with")
        parameters = self.report["parameters"]
        linkage = inputs.one_of("linkage", linkage or parameters["linkage"], LINKAGES)
        keep = self._keep if keep is None else keep
        start = time.perf_counter()
        decision = near.decide(limit, linkage, keep)
        report = {**self.report, **figures.counts(near, decision, limit)}
        report["parameters"] = parameters | decision_parameters(near, limit, linkage, keep)
        report["seconds"] = {"group": time.perf_counter() - start}
        return DedupResult(near, decision, self._keep, self.ids, report)


def decision_parameters(near: NearRows, limit: float, linkage: str, keep: Any) -> dict[str, Any]:
    """What a decision was made with, as the caller knows it."""
    who = keep if isinstance(keep, str) else keep[0]
    return {"linkage": linkage, "keep": who, **limit_as_given(near.metric, limit)}


def _nullable(labels: np.ndarray) -> "pyarrow.Array":
    """int64, or strings; null where there is none."""
    import pyarrow

    if labels.dtype.kind == "T":
        return pyarrow.array([label or None for label in labels.tolist()], pyarrow.string())
    return pyarrow.array(labels, mask=labels < 0)


def _is_some(labels: np.ndarray) -> np.ndarray:
    """bool (n,): where there is a label, or row."""
    return labels != NONE if labels.dtype.kind == "T" else labels >= 0
