"""Exact search over vectors that are in no index."""

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs
from hnsw_gpu.engine import (
    KEY_NONE,
    block_rows,
    count_blurred,
    encode,
    encode_queries,
    exact_block,
    key_distances,
    key_nodes,
)
from hnsw_gpu.progress import bar
from hnsw_gpu.results import SearchResult, reported


def exact_search(
    vectors: ArrayLike,
    queries: ArrayLike,
    k: int = 10,
    metric: str = "cosine",
    *,
    threads: int | None = None,
    progress: bool = False,
) -> SearchResult:
    """The k nearest of `vectors` (n, dim) to each query (q, dim), by comparing all.

    Returns a SearchResult whose labels are row numbers; ties go to the smaller. Distances are
    fp32, as an fp32 Index returns them. Memory beyond the input: the queries once more, 16 MB, and
    some blocks of vectors of at most 32 MB.
    The matrix products use as many threads as numpy's BLAS likes.
    """
    metric = inputs.metric(metric)
    name = inputs.METRICS[metric]
    given = inputs.vectors("vectors", vectors)
    asked = inputs.vectors("queries", queries, given.shape[1])
    k, threads = inputs.integer("k", k, 1, inputs.MOST_NODES), inputs.threads(threads)
    encoded = encode_queries(inputs.float_vectors("queries", asked, name, ""), name, "fp32")
    keys = np.full((len(asked), min(k, len(given))), KEY_NONE, np.uint64)
    blurred = 0
    with bar(progress, len(given), "exact search", "vectors") as shown:
        block = block_rows(given.shape[1])
        for start in range(0, len(given), block):
            raw = given[start : start + block]
            part = inputs.float_vectors("vectors", raw, name, first=start)
            blurred += count_blurred(raw, part, name)
            exact_block(keys, encode(part, name, "fp32"), start, encoded, name, threads=threads)
            shown.update(len(part))
    inputs.tell_blurred(blurred, len(given))
    labels = np.full((len(asked), k), -1, np.int64)
    distances = np.full((len(asked), k), np.inf, np.float32)
    labels[:, : keys.shape[1]] = key_nodes(keys)
    distances[:, : keys.shape[1]] = key_distances(keys)
    return SearchResult(labels, reported(distances, metric))
