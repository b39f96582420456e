"""Filters that bar just what a query is near to: recall, what it costs, and the same bits."""

import numpy as np
import oracle
import pytest

from hnsw_gpu import Index
from hnsw_gpu.engine import filtered_search

N, DIM, Q, K = 12_000, 24, 60, 10


class Walks:
    """An index, and how many queries each walk of it took."""

    def __init__(self, rows: np.ndarray, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.index = Index(rows.shape[1], metric, M=8, ef_construction=60)
        self.index.add(rows)
        self.sizes: list[int] = []
        engine = type(self.index._state.cpu)
        walk = engine.walk

        def counted(itself, queries, *how):
            self.sizes.append(queries.size)
            return walk(itself, queries, *how)

        monkeypatch.setattr(engine, "walk", counted)


@pytest.mark.parametrize("share", (0.5, 0.9))
def test_the_longest_barred_under_inner_product(share, monkeypatch):
    """They fill the beam of every query, whatever it is."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(N, DIM)) * np.exp(0.5 * rng.normal(size=(N, 1)))
    rows, queries = np.float32(rows), np.float32(rng.normal(size=(Q, DIM)))
    walks = Walks(rows, "ip", monkeypatch)
    lengths = np.linalg.norm(rows, axis=1)
    allowed = lengths < np.quantile(lengths, share)
    truth = oracle.distances(queries, rows, "ip")
    kept = Index(DIM, "ip", M=8, ef_construction=60)  # of what is allowed alone
    kept.add(rows[allowed])
    for ef in (16, 64):
        alone = oracle.recall(kept.search(queries, K, ef=ef).labels, truth[:, allowed], K)
        walks.sizes.clear()
        found = walks.index.search(queries, K, ef=ef, allow=allowed)
        assert oracle.recall(found.labels, truth, K, allowed) >= 0.75 * alone
        assert len(walks.sizes) > 1 or allowed.sum() < 64 * ef / share  # walked again


@pytest.mark.parametrize("ef", (16, 64))
@pytest.mark.parametrize("metric", ("l2", "cosine"))
def test_the_own_cluster_barred(metric, ef, monkeypatch):
    rng = np.random.default_rng(2)
    centres, own = rng.normal(size=(30, DIM)), np.arange(Q) % 30
    clusters = np.arange(N) % 30
    rows = np.float32(centres[clusters] + 0.35 * rng.normal(size=(N, DIM)))
    queries = np.float32(centres[own] + 0.35 * rng.normal(size=(Q, DIM)))
    walks = Walks(rows, metric, monkeypatch)
    allowed = clusters != own[:, None]
    truth = oracle.distances(queries, rows, metric)
    together = walks.index.search(queries, K, ef=ef, allow=allowed)
    assert oracle.recall(together.labels, truth, K, allowed) >= 0.97
    for i in (0, Q - 1):  # a batch decides nothing (R11)
        alone = walks.index.search(queries[i], K, ef=ef, allow=allowed[i])
        np.testing.assert_array_equal(alone.labels[0], together.labels[i])
        np.testing.assert_array_equal(alone.distances[0], together.distances[i])
    assert len(walks.sizes) > 3


def test_a_random_filter_seldom_walks_again(monkeypatch):
    """Half of all beams hold less than their mean: that is chance, and let be."""
    monkeypatch.setattr(filtered_search, "FEW", 1)  # so that all are walked
    rows, queries = oracle.gaussian(N, DIM, seed=3), oracle.gaussian(400, DIM, seed=4)
    walks = Walks(rows, "l2", monkeypatch)
    for share in (0.9, 0.5, 0.1):
        allowed = np.random.default_rng(5).random(N) < share
        walks.sizes.clear()
        walks.index.search(queries, K, ef=32, allow=allowed)
        assert walks.sizes[0] == 400
        assert sum(walks.sizes) <= 1.06 * 400
