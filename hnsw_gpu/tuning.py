"""The smallest ef that reaches a recall, found on a sample; exact search is the judge."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.progress import bar
from hnsw_gpu.results import SearchResult

SAMPLE = 1000  # stored vectors that are asked for, where no queries are given: at most,
SAMPLE_SHARE = 50  # and one in so many, or the others would miss their links
DEVIATIONS = 1.96  # of a mean: 95 % of samples lie within
EPSILON = 1e-6  # of a distance, or of 1: what rounding may take on another device


class Tuned(NamedTuple):
    """What `tune` found: with `ef`, the sample's mean recall@k is `recall`.

    `low` to `high` is the 95 % interval of the mean over all queries like those of the sample.
    """

    k: int
    ef: int
    recall: float
    low: float
    high: float
    queries: int  # in the sample


def tuned(
    search: Callable[[int], SearchResult],
    truth: SearchResult,
    target: float,
    metric: str,
    *,
    most: int,
    progress: bool,
) -> Tuned:
    """The smallest ef with which the mean recall of search(ef) is `target` at least.

    Results and `truth` are (q, k), of one sample. most: an ef that holds everything.
    """
    k = truth.labels.shape[1]

    def recalls(ef: int) -> np.ndarray:
        """float64 (q,): recall@k of each query."""
        shown.update(1)
        return _recalls(search(ef), truth, metric)

    with bar(progress, None, "tune", "beams") as shown:
        below, ef = k - 1, k  # below is too small
        while (found := recalls(ef)).mean() < target:
            if ef >= most:
                raise ValueError(
                    f"recall {target}: a beam that holds everything (ef {ef:,}) reaches "
                    f"{found.mean():.4f}; a finer dtype, refine or a larger M may reach more"
                )
            below, ef = ef, min(2 * ef, max(most, k))
        while ef - below > 1:
            middle = (below + ef) // 2
            tried = recalls(middle)
            if tried.mean() < target:
                below = middle
            else:
                ef, found = middle, tried
    mean = float(found.mean())
    error = DEVIATIONS * float(found.std()) / len(found) ** 0.5
    return Tuned(k, ef, mean, max(0.0, mean - error), min(1.0, mean + error), len(found))


def _recalls(found: SearchResult, truth: SearchResult, metric: str) -> np.ndarray:
    """float64 (q,): the share of results as near as the true k-th: ties are not errors."""
    is_there = np.isfinite(truth.distances)
    limit = truth.distances.max(axis=1, initial=-np.inf, where=is_there)
    limit[~is_there.any(axis=1)] = 0
    scale = np.abs(limit) if metric in ("l2", "euclidean") else 1 + np.abs(limit)
    is_near = found.distances <= (limit + EPSILON * scale)[:, None]
    hits = np.count_nonzero(np.isfinite(found.distances) & is_near, axis=1)
    possible = np.count_nonzero(is_there, axis=1)
    return np.where(possible > 0, hits / np.maximum(possible, 1), 1.0)


def required(tunings: dict[tuple[float, int], int], recall: float, k: int) -> int:
    """The ef that was found for this recall and k; ValueError says what there is."""
    k = inputs.integer("k", k, 1, inputs.MOST_NODES)
    ef = tunings.get((recall, k))
    if ef is None:
        known = ", ".join(f"{r} at k={n}" for r, n in sorted(tunings)) or "nothing"
        raise ValueError(
            f"recall={recall}, k={k}: call tune(recall={recall}, k={k}) first; so far: {known}"
        )
    return ef
