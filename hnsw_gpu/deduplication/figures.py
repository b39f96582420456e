"""Figures of a result: counts, a histogram, sampled recall, rows that searches read."""

from typing import Any

import numpy as np

from hnsw_gpu.deduplication.decision import Decision, NearRows
from hnsw_gpu.deduplication.limit import distance_of_copies
from hnsw_gpu.deduplication.near_pairs import FIRST_K, united
from hnsw_gpu.deduplication.sharded_join import Shards
from hnsw_gpu.engine import key_distances, key_nodes, rows_as_queries, search_graph
from hnsw_gpu.tuning import wilson

SAMPLED = 300  # nodes by which recall and rows read are judged
BINS = 100  # of the histogram, from similarity 0 to 1


def counts(near: NearRows, decision: Decision, limit: float) -> dict[str, int]:
    """Rows by what became of them, groups and pairs."""
    rows, pairs = near.rows, near.pairs
    is_ours = ~near.is_known[rows.node_of]
    copies_dropped = int(is_ours.sum()) - int((~near.is_known).sum())
    kept, known = int(decision.keep.sum()), int((~is_ours).sum())
    counted = {
        "rows": rows.total,
        "invalid": rows.total - len(rows.valid),
        "kept": kept,
        "exact_copies": copies_dropped,
        "near_duplicates": len(rows.valid) - known - kept - copies_dropped,
        "groups": len(np.unique(decision.duplicate_of[decision.duplicate_of >= 0])),
        "pairs": int((pairs.distances <= np.float32(limit)).sum()) + rows.copies,
        "open_rows": int(pairs.is_open[rows.node_of].sum()),
    }
    return counted if near.other is None else counted | {"against_duplicates": known}


def histogram(near: NearRows) -> dict[str, list]:
    """Rows by the similarity (distance, for l2) of the most similar other row."""
    node_of = near.rows.node_of
    nearest = near.pairs.nearest[node_of]
    has_copy = np.bincount(node_of, minlength=near.rows.nodes)[node_of] > 1
    nearest[has_copy] = distance_of_copies(near.metric)
    values = nearest[np.isfinite(nearest)].astype(np.float64)
    if near.has_similarity:
        rows, edges = np.histogram(np.clip(near.similarity(values), 0, 1), BINS, (0, 1))
    else:
        rows, edges = np.histogram(near.reported(values), BINS)
    return {"edges": edges.tolist(), "rows": rows.tolist()}


def recall(near: NearRows, seed: int) -> dict[str, Any]:
    """The share of true pairs that were found, of a sample of nodes; 95 % interval (Wilson)."""
    closed = np.flatnonzero(~near.pairs.is_open)
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(closed, min(SAMPLED, len(closed)), replace=False))
    truth = near.shards.all_near(sample, near.limit, exactly=True)
    nodes = np.repeat(sample, [len(keys) for keys in truth])
    keys = np.concatenate([*truth, np.empty(0, np.uint64)])
    a, b, _ = united(nodes, key_nodes(keys), key_distances(keys))
    found = near.pairs.a.astype(np.int64) << 32 | near.pairs.b  # ascending
    wanted = a.astype(np.int64) << 32 | b
    place = np.searchsorted(found, wanted)
    is_there = place < len(found)
    hits = int((found[place[is_there]] == wanted[is_there]).sum())
    low, high = wilson(hits, len(a))
    return {
        "sampled_rows": len(sample),
        "true_pairs": len(a),
        "found_pairs": hits,
        "recall": hits / len(a) if len(a) else 1.0,
        "interval": [low, high],
    }


def row_reads(shards: Shards) -> dict[str, float] | None:
    """Rows that a search of the first shard reads: from the node itself (R10), and without."""
    part = shards.opened(0) if shards.numbers else None
    if part is None or part.graph is None or not len(part.rows):
        return None
    own = np.linspace(0, len(part.rows) - 1, min(SAMPLED, len(part.rows))).astype(np.int32)
    queries = rows_as_queries(part.rows[own])
    how = {"k": FIRST_K, "ef": shards.ef, "threads": shards.threads}
    from_own = search_graph(part.graph, part.rows, queries, part.metric, own=own, **how)
    entered = search_graph(part.graph, part.rows, queries, part.metric, **how)
    return {
        "sampled_rows": len(own),
        "from_own_node": float(from_own.distances.mean()),
        "from_entry_point": float(entered.distances.mean()),
    }
