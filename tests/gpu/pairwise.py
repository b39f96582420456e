"""Pairwise designs: few rows, a value for each factor, in which every two values meet."""

import functools
import itertools
from collections.abc import Callable, Iterable

Row = dict[str, object]


def covering(draw: Callable[[], Iterable[Row]], wanted: set) -> list[Row]:
    """Of each draw() the row with the most pairs that are still wanted, until all are met."""
    rows: list[Row] = []
    left = set(wanted)
    while left:
        best = max(draw(), key=lambda row: len(pairs(row) & left))
        if pairs(best) & left:
            rows.append(best)
            left -= pairs(best)
    return rows


def all_pairs(factors: dict[str, tuple]) -> set:
    """Every two (factor, value) that may meet."""
    return {
        ((one, a), (other, b))
        for one, other in itertools.combinations(sorted(factors), 2)
        for a in factors[one]
        for b in factors[other]
    }


def every_row(factors: dict[str, tuple]) -> list[Row]:
    """All combinations of values."""
    names, values = factors.keys(), itertools.product(*factors.values())
    return [dict(zip(names, row, strict=True)) for row in values]


def pairs(row: Row) -> frozenset:
    """Every two (factor, value) of a row."""
    return _pairs(tuple(sorted(row.items(), key=lambda item: item[0])))


@functools.cache
def _pairs(items: tuple) -> frozenset:
    return frozenset(itertools.combinations(items, 2))
