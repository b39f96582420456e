"""Rows, encoded, and their nodes: equal rows are one node."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.engine import NodeTable, count_blurred, empty_rows, encode, move_together

ROWS_AT_ONCE = 16384  # encoded, searched and gathered: bounds what a step holds beside its result


class Rows(NamedTuple):
    """A set of rows, and the node of each."""

    total: int  # of all, the invalid ones too
    valid: np.ndarray  # int64 (m,): rows that are neither NaN nor infinite nor zero
    node_of: np.ndarray  # int64 (m,), of those
    first_row: np.ndarray  # int64 (nodes,): of each node

    @property
    def nodes(self) -> int:
        return len(self.first_row)

    @property
    def copies(self) -> int:
        """Valid rows that are equal to one before them."""
        return len(self.valid) - self.nodes


def rows_of(total: int, valid: np.ndarray, node_of: np.ndarray) -> Rows:
    """The set of `total` rows of which int64 `valid` (m,) have these nodes; none is without row."""
    first_row = np.empty(node_of.max(initial=-1) + 1, np.int64)
    first_row[node_of[::-1]] = valid[::-1]
    return Rows(total, valid, node_of, first_row)


def distinct_rows(
    name: str,
    vectors: np.ndarray,
    metric: str,
    on_invalid: str = "raise",
    *,
    are_copies_one: bool = True,
) -> tuple[np.ndarray, Rows]:
    """Encoded fp32 rows (nodes, row), and what they are of; without repeats, if copies are one."""
    parts = (
        (start, vectors[start : start + ROWS_AT_ONCE])
        for start in range(0, len(vectors), ROWS_AT_ONCE)
    )
    encoded, valid = encoded_rows(name, parts, vectors.shape, metric, on_invalid)
    encoded, node_of = (
        without_copies(encoded) if are_copies_one else (encoded, np.arange(len(valid)))
    )
    return encoded, rows_of(len(vectors), valid, node_of)


def encoded_rows(
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
    encoded = empty_rows(shape[0], shape[1], "fp32")
    valid, count, blurred = [np.empty(0, np.int64)], 0, 0
    for first, raw in parts:
        numbers = np.arange(len(raw))
        if on_invalid == "raise":
            part = inputs.float_vectors(name, raw, metric, first=first)
        else:
            numbers = np.flatnonzero(inputs.are_valid(raw, metric))
            raw = raw[numbers]
            part = np.ascontiguousarray(raw, np.float32)
        blurred += count_blurred(raw, part, metric)
        encoded[count : count + len(part)] = encode(part, metric, "fp32")
        valid.append(first + numbers)
        count += len(part)
    inputs.tell_blurred(blurred, count)
    return encoded[:count], np.concatenate(valid)


def without_copies(encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows (nodes, row), moved to the front of the array; int64 (n,) node of each."""
    node_of, firsts = NodeTable().assign(encoded, 0, len(encoded))
    move_together(encoded, firsts)
    return encoded[: len(firsts)], node_of


def digest(encoded: np.ndarray) -> np.ndarray:
    """uint64 (n, 2) BLAKE2b of each row: equal rows, and no others, have equal ones."""
    rows = np.ascontiguousarray(encoded)
    parts = (hashlib.blake2b(row, digest_size=16).digest() for row in rows)
    return np.frombuffer(b"".join(parts), np.uint64).reshape(-1, 2)
