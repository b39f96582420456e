"""What searches return."""

from typing import Any, NamedTuple

import numpy as np


class SearchResult(NamedTuple):
    """Nearest first. Too few: label -1 (of strings ""), distance +inf.

    labels: int64 (q, k), or strings (numpy's StringDType).
    distances: float32 (q, k).
    """

    labels: np.ndarray
    distances: np.ndarray


class PartialResult(SearchResult):
    """A SearchResult, of what was searched: `missing` names the files of the shards that were not.

    It has two fields, as any: `labels, distances = result`.
    """

    missing: tuple[str, ...] = ()  # none: it is whole

    def __new__(
        cls, labels: np.ndarray, distances: np.ndarray, missing: tuple[str, ...] = ()
    ) -> "PartialResult":
        self = super().__new__(cls, labels, distances)
        self.missing = missing
        return self

    def _replace(self, **fields: Any) -> "PartialResult":
        return PartialResult(*super()._replace(**fields), missing=self.missing)


class RadiusResult(NamedTuple):
    """All within a radius, nearest first: query i has results offsets[i]:offsets[i + 1].

    offsets: int64 (q + 1,).
    labels: int64 (results,), or strings.
    distances: float32 (results,).
    """

    offsets: np.ndarray
    labels: np.ndarray
    distances: np.ndarray


def reported(distances: np.ndarray, metric: str) -> np.ndarray:
    """An engine's float32 distances (R1) as a metric, by the caller's name, means them."""
    if metric == "euclidean":
        return np.sqrt(distances)
    return np.float32(1) + distances if metric == "ip" else distances


def into(out: tuple[Any, Any] | None, result: SearchResult) -> SearchResult:
    """The result, in the caller's arrays if there are some."""
    if out is None:
        return result
    for given, found in zip(out, result, strict=True):
        if not isinstance(given, np.ndarray) or (given.shape, given.dtype) != (
            found.shape,
            found.dtype,
        ):
            what = f"{given.dtype} {given.shape}" if hasattr(given, "dtype") else type(given)
            raise ValueError(f"out: {what}, expected {found.dtype} {found.shape}")
    for given, found in zip(out, result, strict=True):
        given[...] = found
    return result._replace(labels=out[0], distances=out[1])
