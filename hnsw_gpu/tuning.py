"""The smallest ef that reaches a recall, found on a sample; exact search is the judge."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.progress import bar
from hnsw_gpu.results import SearchResult

SAMPLE = 1000  # stored vectors that are asked for, where no queries are given: at most,
SAMPLE_SHARE = 50  # and one in so many, or the others would miss their links
DEVIATIONS = 1.959964  # of a mean: 95 % of samples lie within
EPSILON = 1e-6  # of a distance, or of 1: what rounding may take on another device
GROWN = 1.5  # times as many vectors as it was tuned with: it no longer holds

logger = logging.getLogger("hnsw_gpu")


class Tuning(NamedTuple):
    """What an index keeps for a recall and a k."""

    ef: int
    vectors: int = 0  # that it held then; 0: nobody knows


Tunings = Mapping[tuple[float, int], Tuning]  # by recall and k
Written = Sequence[Sequence[float]]  # of each in a file: recall, k, ef, vectors


def written(tunings: Tunings) -> Written:
    """Tunings as a file holds them."""
    return [[*asked, *kept] for asked, kept in sorted(tunings.items())]


def read(given: Written) -> dict[tuple[float, int], Tuning]:
    """Tunings of a file. TypeError, ValueError say what is wrong."""
    found = {}
    for recall, k, *kept in given:
        asked = inputs.share("recall", recall), inputs.integer("k", k, 1, inputs.MOST_NODES)
        ef, *vectors = (inputs.integer("tuned", number, 0, inputs.MOST_NODES) for number in kept)
        found[asked] = Tuning(max(ef, 1), *vectors)
    return found


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
    return Tuned(k, ef, mean, *_interval(found, k), len(found))


def _interval(recalls: np.ndarray, k: int) -> tuple[float, float]:
    """95 % interval of the mean of recalls@k (q,): fewer hits tell less where they come together.

    So many hits, each by itself, would spread the recalls as they are spread.
    """
    mean, spread, hits = float(recalls.mean()), float(recalls.var()), len(recalls) * k
    if spread > 0:
        hits = min(hits, round(len(recalls) * mean * (1 - mean) / spread))
    low, high = wilson(mean * hits, hits)
    return min(low, mean), max(high, mean)  # rounded


def wilson(hits: float, of: int) -> tuple[float, float]:
    """95 % interval of a share, by Wilson's formula; (0, 1) of nothing."""
    if not of:
        return 0.0, 1.0
    z, share = DEVIATIONS, hits / of
    middle, scale = share + z * z / (2 * of), 1 + z * z / of
    width = z * ((share * (1 - share) + z * z / (4 * of)) / of) ** 0.5
    return max((middle - width) / scale, 0.0), min((middle + width) / scale, 1.0)


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


def tell_of_growth(tunings: Tunings, before: int, now: int) -> None:
    """On the logger, which recalls an index that has grown may no longer reach; once for each."""
    for (recall, k), (_, vectors) in tunings.items():
        if before <= GROWN * vectors < now:
            logger.warning(
                "recall=%s, k=%d was tuned with %s vectors, and there are %s: tune again, or "
                "searches find less", recall, k, f"{vectors:,}", f"{now:,}",
            )  # fmt: skip


def required(tunings: Tunings, recall: float, k: int) -> int:
    """The ef that was found for this recall and k; ValueError says what there is."""
    k = inputs.integer("k", k, 1, inputs.MOST_NODES)
    kept = tunings.get((recall, k))
    if kept is None:
        known = ", ".join(f"{r} at k={n}" for r, n in sorted(tunings)) or "nothing"
        raise ValueError(
            f"recall={recall}, k={k}: call tune(recall={recall}, k={k}) first; so far: {known}"
        )
    return kept.ef
