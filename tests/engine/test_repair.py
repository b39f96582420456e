"""Repair equals `reference.py` array for array, says which nodes it linked, and leaves none lost.

Vectors are small integers, so that every summation order gives the same float and ties abound.
"""

import numpy as np
import pytest
import reference
from test_build import DTYPES, METRICS, integer_vectors

from hnsw_gpu.engine import build, graph, repair
from hnsw_gpu.engine.graph import Graph
from hnsw_gpu.engine.vectors import encode

pytestmark = pytest.mark.slow


def cut_off(made: Graph, cut: np.ndarray, is_alone: bool) -> Graph:
    """`made` without the layer-0 links from other nodes to nodes of `cut`, or without any to them.

    So nodes of `cut` lie on islands, or each alone.
    """
    rows = np.full_like(made.neighbors0, -1)
    for node, row in reference.links(made, 0).items():
        kept = [other for other in row if not cut[other] or (cut[node] and not is_alone)]
        rows[node, : len(kept)] = kept
    return made._replace(neighbors0=rows)


def filled(made: Graph) -> Graph:
    """`made` with its rows filled up with links to reachable nodes."""
    rows = made.neighbors0.copy()
    reachable = np.setdiff1d(np.arange(len(rows)), graph.unreachable(made))
    for node, row in enumerate(rows):
        degree = int((row >= 0).sum())
        others = [other for other in reachable if other != node and other not in row]
        added = others[: len(row) - degree]
        row[degree : degree + len(added)] = added
    return made._replace(neighbors0=rows)


def assert_repairs_alike(
    made: Graph, vectors: np.ndarray, metric: str, dtype: str, ef_construction: int
) -> None:
    rows = encode(vectors, metric, dtype)
    wanted = reference.repair(
        made, reference.node_table(vectors, metric, dtype), metric, ef_construction
    )
    missing = len(graph.unreachable(made))
    assert missing
    for threads in (1, 2):
        repaired = made._replace(neighbors0=made.neighbors0.copy())
        relinked = np.zeros(len(rows), bool)
        settings = {
            "ef_construction": ef_construction, "threads": threads, "relinked": relinked,
        }  # fmt: skip
        assert repair.repair(repaired, rows, metric, **settings) == missing
        np.testing.assert_array_equal(repaired.neighbors0, wanted)
        changed = (repaired.neighbors0 != made.neighbors0).any(axis=1)
        np.testing.assert_array_equal(relinked, changed)
        assert graph.check_graph(repaired) == []
        assert repair.repair(repaired, rows, metric, **settings) == 0
        np.testing.assert_array_equal(repaired.neighbors0, wanted)


@pytest.mark.parametrize("is_full", [False, True], ids=["with room", "full rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_repair_equals_the_oracle(metric: str, dtype: str, is_full: bool) -> None:
    shapes = [(0.05, False, 1), (0.3, True, 30), (0.6, False, 2), (0.6, True, 9), (0.9, False, 9)]
    for seed, (share, is_alone, ef_construction) in enumerate(shapes):
        rng = np.random.default_rng(seed)
        vectors = integer_vectors(60, 8, metric, dtype, seed)
        made = reference.random_graph(vectors, M=4, seed=seed)
        cut = rng.random(60) < share
        cut[made.entry_point] = False
        made = cut_off(made, cut, is_alone)
        if is_full:
            made = filled(made)
        assert_repairs_alike(made, vectors, metric, dtype, ef_construction)


def test_repair_where_no_node_that_was_found_can_give() -> None:
    # A binary tree: every inner row is full of links that the tree needs. The search of capacity 1
    # ends at the root, beside which the missing nodes lie: a leaf, far off, must give.
    count, missing = 31, 6
    rows = np.full((count + missing, 2), -1, dtype=np.int32)
    rows[: count // 2] = 1 + np.arange(count - 1).reshape(-1, 2)
    flat = build.empty_graph(1)._replace(neighbors0=rows)
    vectors = np.zeros((count + missing, 2), dtype=np.float32)
    vectors[1:count] = 10 + reference.integer_vectors(count - 1, 2, "l2", np.random.default_rng(3))
    vectors[count:, 0] = np.arange(1, missing + 1) / 8
    assert_repairs_alike(flat, vectors, "l2", "fp32", ef_construction=1)


def test_nothing_to_repair() -> None:
    assert (
        repair.repair(
            build.empty_graph(4), np.empty((0, 8), np.float32), "l2", ef_construction=5, threads=1
        )
        == 0
    )
