"""What is asked of an engine: who asks, and how the graph is walked."""

from typing import NamedTuple

import numpy as np


class Queries(NamedTuple):
    """Who asks: vectors, or stored nodes, which are then left out of their own results (R10)."""

    vectors: np.ndarray | None = None  # (q, dim) float32, valid
    own: np.ndarray | None = None  # (q,) int ids
    # (q, ...) vectors as `rows_as_queries` has them, of rows that no others refine
    encoded: np.ndarray | None = None

    @property
    def size(self) -> int:
        """How many ask."""
        return next(len(given) for given in self if given is not None)

    def part(self, rows: "np.ndarray | slice") -> "Queries":
        """Some of them."""
        return Queries(*(given if given is None else given[rows] for given in self))


class Walked(NamedTuple):
    """What a walk of the graph found."""

    keys: np.ndarray  # (q, k) uint64, ascending
    blocked: np.ndarray  # (q,) int32 keys of the final beam that may not be returned (R8)


class Walk(NamedTuple):
    """How the graph is walked (R3-R10), by whatever engine."""

    k: int
    ef: int  # keys of the final beam that count
    expand: int = 1
    ef_upper: int = 1  # beam capacity above layer 0
    threads: int = 1  # of the CPU
    rerank: int = 0  # nearest keys that the refine rows re-rank, k or more; 0: all ef
    capacity: int = 0  # of the beam on layer 0, where a filter wants more than ef; 0: ef

    def within(self, nodes: int) -> "Walk":
        """With no number larger than that of the nodes, and ef of k or more."""
        most = max(nodes, 1)
        if self.k <= self.ef <= self.capacity <= most:
            return self
        k = min(self.k, most)
        ef = min(max(self.ef, k), most)
        return self._replace(k=k, ef=ef, capacity=min(self.capacity or ef, most))

    def kept(self, refine: str) -> int:
        """Keys of the final beam that are taken on, where the refine rows re-rank them or not."""
        if not refine:
            return self.k
        return min(max(self.rerank, self.k), self.ef) if self.rerank else self.ef
