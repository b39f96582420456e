"""The model of clusters, where its answers are known."""

import numpy as np
import pytest

from benchmarks import cluster


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(cluster, "ARRIVALS", 2000)


def test_nobody_waits_where_nobody_else_asks():
    rng = np.random.default_rng(0)
    alone = cluster.latencies(np.array([0.01]), 8, 1, 1e-3, rng)
    np.testing.assert_allclose(alone, 0.01, atol=1e-6)


def test_one_server_is_the_queue_of_the_books():
    """M/D/1: the mean wait is rho / (2 mu (1 - rho)); a second server shortens it."""
    waits = []
    for replicas in (1, 2):
        means = [
            cluster.latencies(np.array([1.0]), 1, replicas, 0.5, np.random.default_rng(s)).mean()
            for s in range(10)
        ]
        waits.append(np.mean(means) - 1)
    np.testing.assert_allclose(waits[0], 0.5 / (2 * (1 - 0.5)), rtol=0.05)
    assert waits[1] < waits[0] / 5


def test_the_last_shard_decides():
    service = np.array([1.0] * 9 + [10.0])
    for shards in (1, 4):
        found = cluster.latencies(service, shards, 50, 0.01, np.random.default_rng(1))
        share = (found > 9).mean()
        np.testing.assert_allclose(share, 1 - 0.9**shards, atol=0.02)


def test_bytes():
    measured = {
        "rows": 1000, "bytes_a_row": 400.0, "call_s": [0.001], "call_in_process_s": [0.0006],
        "merge_s": {str(shards): 0.256 for shards in cluster.SHARDS},
    }  # fmt: skip
    points = cluster.model(measured, dim=64)
    assert len(points) == len(cluster.SHARD_ROWS) * len(cluster.SHARDS) * len(cluster.REPLICAS)
    [point] = [p for p in points if (p["shard_rows"], p["shards"], p["replicas"]) == (10**8, 64, 2)]
    assert point["shard_bytes"] == 400 * 10**8
    assert point["sent_bytes_a_query"] == 64 * (64 * 4 + 10 * 12)
    grown = 0.0006 * (8 / 3 - 1)  # the search alone takes longer, by the logarithm
    assert point["p50_s"] >= 0.001 + grown + 0.001 - 1e-9  # a call, a merge
    assert point["queries_per_s"] == pytest.approx(cluster.LOAD / (0.001 + grown))
