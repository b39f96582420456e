"""The limit within which rows are near-duplicates: from the caller's words, and back to them.

Engines' distances (R1) decide. Under ip they are 0 - dot, where callers say dot or 1 - dot.
"""

import numpy as np

from hnsw_gpu import inputs

INFINITY = np.float32(np.inf)


def limit_of(metric: str, threshold: float | None, max_distance: float | None) -> float:
    """The largest float32 distance of near-duplicates, as engines have it."""
    if max_distance is not None:
        if threshold is not None:
            raise ValueError("threshold and max_distance: say one of them")
        given = inputs.number("max_distance", max_distance)
        if metric == "ip":
            return _limit_of_products(given)
        limit = np.float32(given)
        if metric != "euclidean":
            return float(limit)
        squared = limit * abs(limit)
        while squared < np.inf and np.sqrt(np.nextafter(squared, INFINITY)) <= limit:
            squared = np.nextafter(squared, INFINITY)  # the root is rounded
        return float(squared)
    if metric in ("l2", "euclidean"):
        raise ValueError(f"metric {metric!r}: say max_distance, there is no similarity")
    least = np.float32(inputs.number("threshold", 0.95 if threshold is None else threshold))
    if metric == "cosine" and not -1 <= least <= 1:
        raise ValueError(f"threshold={threshold}: expected a cosine similarity, -1 to 1")
    if metric == "ip":
        return float(0 - least)
    # 1 - distance is rounded: to `least` and more from the middle between it and the float before
    middle = (float(least) + float(np.nextafter(least, -INFINITY))) / 2
    largest = np.float32(1 - middle)
    while np.float32(1) - largest < least:
        largest = np.nextafter(largest, -INFINITY)
    return float(largest)


def _limit_of_products(max_distance: float) -> float:
    """The largest float32 of 0 - dot whose 1 - dot is within, or is told as this very distance."""
    limit, exact = np.float32(max_distance), np.float32(max_distance - 1)
    if float(limit) != max_distance or not np.isfinite(limit):
        is_within = float(exact) <= max_distance - 1
        return float(exact if is_within else np.nextafter(exact, -INFINITY))
    # 1 - dot is rounded: to `limit` and less up to the middle between it and the next float
    middle = (float(limit) + float(np.nextafter(limit, INFINITY))) / 2
    largest = np.float32(middle - 1)
    while np.float32(1) + largest > limit:
        largest = np.nextafter(largest, -INFINITY)
    return float(largest)


def distance_of_copies(metric: str) -> np.float32:
    """The engines' distance that callers are told as 0: that of copies, also under ip."""
    return np.float32(-1 if metric == "ip" else 0)


def limit_as_given(metric: str, limit: float) -> dict[str, float]:
    """threshold and max_distance as the caller knows them: 0.9, not the float32 next to it."""
    if metric in ("l2", "euclidean"):
        return {"max_distance": _shortest(limit if metric == "l2" else limit**0.5)}
    if metric == "ip":
        return {
            "threshold": _shortest(0 - limit),
            "max_distance": _shortest(float(np.float32(1) + np.float32(limit))),
        }
    return {
        "threshold": _shortest(float(np.float32(1) - np.float32(limit))),
        "max_distance": _shortest(limit),
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(value)))
