"""Recall@k: how much of the truth a search finds; and its plot against speed.

A result counts when its true distance is at most the true k-th distance plus a small epsilon:
ties are not errors. All distances are taken here, in float64, so that neither a storage dtype nor
an order of summation decides. Scaling all vectors changes no recall.
"""

import io
from pathlib import Path

import numpy as np

from hnsw_gpu.files import atomic_file

EPSILON = 1e-6  # of the k-th squared distance (l2), of |query| |vector| (ip, cosine)
BLOCK_VALUES = 1 << 22  # float64 values gathered at a time


def recall(
    vectors: np.ndarray, queries: np.ndarray, metric: str, found: np.ndarray, truth: np.ndarray
) -> float:
    """Share of the results that are as near as the true ones; 1.0 when nothing can be found.

    vectors (n, dim), queries (q, dim); `found` and `truth` (q, k) are row numbers of `vectors`,
    -1 where there was no result; `truth` from exact search.
    """
    queries = np.asarray(queries)
    block = max(1, BLOCK_VALUES // max(1, truth.shape[1] * vectors.shape[1]))
    hits = 0
    for start in range(0, len(truth), block):
        part = slice(start, start + block)
        wanted = _distances(vectors, queries[part], metric, truth[part])
        limit = wanted.max(axis=1, initial=-np.inf, where=truth[part] >= 0)
        limit = limit + EPSILON * _scale(vectors, queries[part], metric, truth[part], limit)
        reached = _distances(vectors, queries[part], metric, found[part])
        hits += int(np.sum((found[part] >= 0) & (reached <= limit[:, None])))
    possible = np.count_nonzero(truth >= 0)
    return hits / possible if possible else 1.0


def _distances(
    vectors: np.ndarray, queries: np.ndarray, metric: str, rows: np.ndarray
) -> np.ndarray:
    """float64 (q, k): from each query to the rows numbered in its row of `rows`; R1's order."""
    near = vectors[np.maximum(rows, 0)].astype(np.float64)
    queries = queries.astype(np.float64)[:, None, :]
    if metric in ("l2", "euclidean"):  # both order alike
        return np.square(near - queries).sum(axis=2)
    if metric == "cosine":
        near = near / np.linalg.norm(near, axis=2, keepdims=True)
        queries = queries / np.linalg.norm(queries, axis=2, keepdims=True)
    return -(near * queries).sum(axis=2)


def _scale(
    vectors: np.ndarray, queries: np.ndarray, metric: str, truth: np.ndarray, limit: np.ndarray
) -> np.ndarray:
    """float64 (q,): what rounding is relative to."""
    if metric in ("l2", "euclidean"):
        return np.where(np.isfinite(limit), np.abs(limit), 0.0)
    if metric == "cosine":
        return np.ones(len(queries))
    lengths = np.linalg.norm(vectors[np.maximum(truth, 0)].astype(np.float64), axis=2)
    longest = lengths.max(axis=1, initial=0, where=truth >= 0)
    return np.linalg.norm(queries.astype(np.float64), axis=1) * longest


def require_plotting() -> None:
    """Raises ImportError, saying what to install, where `plot` could not draw."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("a plot needs matplotlib: pip install matplotlib") from None


def plot(points: list[dict[str, float]], k: int, path: str | Path) -> None:
    """Draw recall against queries/s, a dot for every ef: `points` have ef, recall, queries_per_s.

    `path` ends in .png, .pdf or .svg. Needs matplotlib; no window is opened.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    points = sorted(points, key=lambda point: point["recall"])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    recalls = [point["recall"] for point in points]
    rates = [point["queries_per_s"] for point in points]
    axes.plot(recalls, rates, marker="o")
    for point, place in zip(points, zip(recalls, rates, strict=True), strict=True):
        text = f"ef {point['ef']}"
        axes.annotate(text, place, textcoords="offset points", xytext=(6, 6))
    axes.set(xlabel=f"recall@{k}", ylabel="queries/s", yscale="log")
    axes.set_title("up and to the right is better", fontsize=9, color="0.4", loc="right")
    axes.margins(x=0.12, y=0.12)  # room for the labels of the outer points
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    drawing = io.BytesIO()
    figure.savefig(drawing, dpi=150, format=Path(path).suffix[1:].lower())
    with atomic_file(path) as file:
        file.write(drawing.getbuffer())
