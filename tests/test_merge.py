"""Index.merge: all that both hold, sound, as good as built at once, and cheaper by count."""

import copy

import numpy as np
import oracle
import pytest

import hnsw_gpu
from hnsw_gpu.engine import candidates

DIM = 24
ROWS = oracle.gaussian(1200, DIM, seed=1)


def built(rows, labels, metric="l2", dtype="fp32", **how):
    index = hnsw_gpu.Index(rows.shape[1], metric, dtype, M=8, ef_construction=60, **how)
    index.add(rows, labels)
    return index


def halves(split=700, **how):
    labels = np.random.default_rng(2).permutation(9999)[: len(ROWS)]
    return (
        built(ROWS[:split], labels[:split], **how),
        built(ROWS[split:], labels[split:], **how),
        (labels),
    )


@pytest.mark.parametrize("split", [2500, 800])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_as_good_as_built_at_once_for_a_third_of_the_distances(metric, split, monkeypatch):
    counted = []
    walk = candidates.walk

    def counting(graph, rows, task, *rest, **how):
        walk(graph, rows, task, *rest, **how)
        counted.append(int(task.counts[:, 1].sum()))

    monkeypatch.setattr(candidates, "walk", counting)
    rows, queries = oracle.gaussian(5000, 24, seed=3), oracle.gaussian(500, 24, seed=4)

    def made(first, stop):
        index = hnsw_gpu.Index(24, metric)
        index.add(rows[first:stop], np.arange(first, stop))
        return index

    whole = made(0, 5000)
    cost = sum(counted)
    index, other = made(0, split), made(split, 5000)
    counted.clear()
    index.merge(other)
    assert 3 * sum(counted) <= cost
    truth = oracle.distances(queries, rows, metric)
    for ef in (32, 64):
        one, two = (
            oracle.recall(found.search(queries, 10, ef=ef).labels, truth, 10)
            for found in (index, whole)
        )
        assert one >= two - 0.002, ef


@pytest.mark.parametrize("split", [700, 300])
@pytest.mark.parametrize(
    ("metric", "dtype", "refine"),
    [("l2", "fp32", None), ("cosine", "int8", "fp32"), ("ip", "fp16", None)],
)
def test_all_is_found(metric, dtype, refine, split, tmp_path):
    index, other, labels = halves(split, metric=metric, dtype=dtype, refine=refine)
    index.merge(other)
    index.check()
    assert index.labels.tolist() == sorted(labels)
    whole = built(ROWS, labels, metric, dtype, refine=refine)
    np.testing.assert_array_equal(index.vectors(labels), whole.vectors(labels))
    one, two = (found.search(ROWS[::5], 10, ef=300) for found in (index, whole))
    assert (one.labels == two.labels).mean() > 0.99
    index.save(tmp_path / "index.hnsw")
    index = hnsw_gpu.load(tmp_path / "index.hnsw", device="cpu")
    assert index.add(ROWS[:1] + 3).tolist() == [max(labels) + 1]


def test_the_other_one_stays_and_threads_make_no_difference(tmp_path):
    index, other, _ = halves()
    other.save(tmp_path / "before")
    again = copy.copy(index)
    index.merge(other, threads=1), again.merge(other, threads=3)
    for name, one in (("other", other), ("one", index), ("three", again)):
        one.save(tmp_path / name)
    assert (tmp_path / "before").read_bytes() == (tmp_path / "other").read_bytes()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()
    small, large, _ = halves(300)
    before = large.search(ROWS, 5)
    small.merge(large)  # into what was the other's graph
    small.add(ROWS[:50] + 9)
    oracle.assert_same(large.search(ROWS, 5), before)
    large.check(), small.check()


def test_copies_and_deleted_vectors():
    one, other = built(ROWS[:600], np.arange(600)), built(ROWS[500:900], np.arange(1000, 1400))
    one.delete(np.arange(50))
    other.delete(np.arange(1350, 1400))
    one.merge(other)
    one.check()
    assert len(one) == 900 and not len(one.deleted)
    assert one.search(ROWS[550:551], 2).labels.tolist() == [[550, 1050]]  # one node
    assert one._state.node_count == 600 + 250
    found = one.search(ROWS[:50], 1, ef=100)
    assert (found.distances > 0).all()


@pytest.mark.parametrize("counts", [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_few_and_none(counts):
    first, second = counts
    one = built(ROWS[:first], np.arange(first))
    one.merge(built(ROWS[10 : 10 + second], 10 + np.arange(second)))
    one.check()
    assert len(one) == first + second
    assert (one.search(ROWS[10:11], 1).labels == (10 if second else 0 if first else -1)).all()


def test_what_does_not_fit_is_refused():
    index, other, labels = halves()
    other.add(ROWS[:1], labels[:1])
    with pytest.raises(ValueError, match=rf"label {labels[0]} is in both \(1 are\)"):
        index.merge(other)
    assert len(index) == 700
    with pytest.raises(ValueError, match="is in both"):
        index.merge(index)
    with pytest.raises(TypeError, match="other: NoneType, expected an Index"):
        index.merge(None)
    for how, told in (
        ({"metric": "ip"}, "merge: metric is '.*' here, 'ip' there"),
        ({"dtype": "int8"}, "merge: dtype is 'fp32' here, 'int8' there"),
    ):
        with pytest.raises(ValueError, match=told):
            index.merge(built(ROWS[:3], [10000, 10001, 10002], **how))
