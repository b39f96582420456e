"""What is asked of an engine: who asks, and how the graph is walked."""

from typing import NamedTuple

import numpy as np


class Queries(NamedTuple):
    """Who asks: vectors, or stored nodes, which are then left out of their own results (R10)."""

    vectors: np.ndarray | None = None  # (q, dim) float32, valid
    own: np.ndarray | None = None  # (q,) int ids
    encoded: np.ndarray | None = None  # (q, ...) vectors as `rows_as_queries` has them

    @property
    def size(self) -> int:
        """How many ask."""
        return next(len(given) for given in self if given is not None)

    def part(self, rows: "np.ndarray | slice") -> "Queries":
        """Some of them."""
        return Queries(*(given if given is None else given[rows] for given in self))


class Walk(NamedTuple):
    """How the graph is walked (R3-R10), by whatever engine."""

    k: int
    ef: int  # keys of the final beam that count: the refine rows re-rank these
    expand: int = 1
    ef_upper: int = 1  # beam capacity above layer 0
    threads: int = 1  # of the CPU
    capacity: int = 0  # of the beam on layer 0, where a filter wants more than ef; 0: ef

    def within(self, nodes: int) -> "Walk":
        """With no number larger than that of the nodes, and ef of k or more."""
        most = max(nodes, 1)
        k = min(self.k, most)
        ef = min(max(self.ef, k), most)
        return self._replace(k=k, ef=ef, capacity=min(self.capacity or ef, most))
