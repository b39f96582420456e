"""What decides the result of a deduplication, of rows in memory and in files alike."""

from typing import Any, NamedTuple

from hnsw_gpu import inputs
from hnsw_gpu.deduplication.limit import limit_of
from hnsw_gpu.deduplication.linkage import LINKAGES

METHODS = ("auto", "exact", "hnsw")
EXACT_ROWS = 25_000  # up to here comparing all costs no more than building a graph


class Settings(NamedTuple):
    """The arguments of `dedup` that have these names."""

    threshold: float | None = None
    max_distance: float | None = None
    metric: str = "cosine"
    keep: Any = "first"  # of files also "max:COLUMN", "min:COLUMN"
    linkage: str = "star"
    method: str = "auto"
    on_invalid: str = "raise"
    M: int = 16
    ef_construction: int = 80
    ef: int = 48
    seed: int = 0

    def check(self) -> None:
        """ValueError, TypeError that say what is wrong; of values of `keep`, `keep_order` does."""
        inputs.one_of("linkage", self.linkage, LINKAGES)
        inputs.one_of("method", self.method, METHODS)
        inputs.one_of("on_invalid", self.on_invalid, ("raise", "drop"))
        inputs.integer("M", self.M, 2, 128)
        inputs.integer("ef_construction", self.ef_construction, 1, 65536)
        inputs.integer("ef", self.ef, 1)
        inputs.integer("seed", self.seed, 0, 2**64 - 1)
        _ = self.limit

    @property
    def metric_name(self) -> str:
        """The metric by its own name; "euclidean" is one."""
        return inputs.metric(self.metric)

    @property
    def engine_metric(self) -> str:
        """By the name that engines know."""
        return inputs.METRICS[self.metric_name]

    @property
    def limit(self) -> float:
        """The largest float32 distance of near-duplicates, as engines have it."""
        return limit_of(self.metric_name, self.threshold, self.max_distance)

    def compares_all(self, rows: int) -> bool:
        """Are so many rows compared all with all, rather than by a graph?"""
        return self.method == "exact" or (self.method == "auto" and rows <= EXACT_ROWS)
