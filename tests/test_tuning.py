"""`tune`: the smallest ef that reaches a recall, which other queries then get."""

import asyncio
import pickle
from pathlib import Path

import click.testing
import numpy as np
import pytest

import hnsw_gpu
from hnsw_gpu.cli import main

DIM = 24


def clusters(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, DIM))
    rng = np.random.default_rng(seed)
    return (centers[rng.integers(0, 40, count)] + 0.7 * rng.normal(size=(count, DIM))).astype("f4")


def elsewhere(count: int) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(count, DIM)).astype(np.float32) * 2


@pytest.fixture(scope="module")
def index() -> hnsw_gpu.Index:
    made = hnsw_gpu.Index(DIM, "l2", M=6, ef_construction=40)
    made.add(clusters(8_000, 1))
    return made


def recall(index: hnsw_gpu.Index, queries: np.ndarray, k: int = 10, **how) -> float:
    found, truth = index.search(queries, k, **how), index.exact_search(queries, k)
    return float(np.mean(found.distances <= truth.distances[:, -1:]))


@pytest.mark.parametrize("target", [0.95, 0.99])
@pytest.mark.parametrize("where", ["stored", "elsewhere"])
def test_the_recall_is_delivered_to_other_queries(index, target, where):
    if where == "stored":
        found, held_out = index.tune(target), clusters(1_500, 2)
    else:
        found, held_out = index.tune(target, queries=elsewhere(3_000)[::2]), elsewhere(3_000)[1::2]
    assert found.low <= found.recall <= found.high and found.recall >= target
    assert abs(recall(index, held_out, ef=found.ef) - target) <= 0.01
    same = index.search(held_out, recall=target)
    np.testing.assert_array_equal(same.labels, index.search(held_out, ef=found.ef).labels)


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_words_that_are_held_out_get_it(dtype):
    """Every 34th word of GloVe (`benchmarks.datasets`), its numbers rounded to int8."""
    words = np.load(Path(__file__).parent / "data" / "glove.npy")
    index = hnsw_gpu.Index(words.shape[1], "cosine", dtype)
    index.add(words[1::4])
    index.add(words[2::4])
    index.add(words[3::4])
    found = index.tune(0.95, queries=words[::8])
    assert abs(recall(index, words[4::8], ef=found.ef) - 0.95) <= 0.01


def test_it_is_the_smallest(index):
    queries = clusters(700, 3)
    found = index.tune(0.9, k=5, queries=queries)
    assert found.recall == pytest.approx(recall(index, queries, 5, ef=found.ef))
    assert recall(index, queries, 5, ef=found.ef - 1) < 0.9 <= found.recall
    assert found.queries == 700 and found.low < found.recall < found.high


def test_the_interval_of_few_queries_is_wide(index):
    queries = clusters(1_000, 3)
    one, all_of_them = (index.tune(1.0, queries=queries[:count]) for count in (1, 1_000))
    assert one.recall == one.high == 1.0 and one.low == pytest.approx(0.7224672)  # of 10 hits
    assert all_of_them.low > 0.999
    found = index.tune(0.9, queries=queries)
    recalls = [recall(index, query[None], ef=found.ef) for query in queries]
    expected = 1.96 * np.std(recalls) / 1_000**0.5  # of a mean, where there are many
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.02)


def test_growth_is_told_once(caplog):
    grown = hnsw_gpu.Index(DIM, M=8, ef_construction=40)
    grown.add(clusters(400, 5))
    found = grown.tune(0.9, queries=clusters(50, 6))
    grown.add(clusters(200, 7))
    assert not caplog.text
    grown.add(clusters(1, 8))
    assert "recall=0.9, k=10 was tuned with 400 vectors, and there are 601" in caplog.text
    caplog.clear()
    grown.add(clusters(100, 9))
    assert not caplog.text
    again = pickle.loads(pickle.dumps(grown))
    assert again._tuned == {(0.9, 10): (found.ef, 400)}


@pytest.mark.parametrize("copies", [1, 2])
def test_own_vectors_are_left_out(copies):
    """The sample is searched for in what is left, copies of it too; nothing else is missing."""
    index = hnsw_gpu.Index(DIM, "l2")
    index.add(np.repeat(clusters(2_000, 4), copies, axis=0))
    asked = index.labels[::40]
    own, walked, compared = index._left_out(asked)
    assert set(asked) - set(own) <= {0}  # the entry point may be kept
    rows = index.vectors(own)
    found, truth = walked.search(rows, 5, ef=400), compared.exact_search(rows, 5)
    assert not np.isin(found.labels, own).any() and not np.isin(truth.labels, own).any()
    assert np.mean(found.labels == truth.labels) > 0.99
    expected = hnsw_gpu.Index(DIM, "l2")
    left = np.setdiff1d(index.labels, own)
    expected.add(index.vectors(left), left)
    np.testing.assert_array_equal(truth.labels, expected.exact_search(rows, 5).labels)
    if copies == 2:
        assert (truth.distances[:, 0] == 0).all()
    everything = index.search(rows, 5, ef=400)
    assert (everything.distances[:, 0] == 0).all()  # the index itself is as it was


@pytest.mark.parametrize("pieces", [[1500, 123], [100] * 15])
def test_an_index_that_grew_in_pieces_is_as_one_that_was_saved(pieces, tmp_path):
    """It has room for more, which holds nothing yet."""
    index = hnsw_gpu.Index(DIM, "l2", M=4, ef_construction=20)
    for seed, count in enumerate(pieces):
        index.add(clusters(count, seed))
    index.save(tmp_path / "docs.hnsw")
    assert index.tune(0.9) == hnsw_gpu.load(tmp_path / "docs.hnsw", device="cpu").tune(0.9)


def test_it_is_kept(index, tmp_path):
    index.tune(0.93, k=7)
    index.save(tmp_path / "docs.hnsw")
    queries = clusters(5, 5)
    expected = index.search(queries, 7, recall=0.93).labels
    same = index.search(queries, 7, recall=np.float32(0.93)).labels
    np.testing.assert_array_equal(same, expected)
    mapped = hnsw_gpu.load(tmp_path / "docs.hnsw", mmap=True)
    mapped.tune(0.5, k=3)
    for other in (
        hnsw_gpu.load(tmp_path / "docs.hnsw"),
        mapped,
        pickle.loads(pickle.dumps(mapped)),
    ):
        np.testing.assert_array_equal(other.search(queries, 7, recall=0.93).labels, expected)
    pickle.loads(pickle.dumps(mapped)).search(queries, 3, recall=0.5)


def test_a_batcher_takes_it(index):
    found, queries = index.tune(0.93, k=7), clusters(5, 5)
    expected = index.search(queries, 7, ef=found.ef)
    with hnsw_gpu.Batcher(index) as batcher:
        told = batcher.submit(queries, 7, recall=0.93).result()
        np.testing.assert_array_equal(told.labels, expected.labels)
        told = asyncio.run(batcher.search(queries, 7, recall=0.93))
        np.testing.assert_array_equal(told.labels, expected.labels)
        with pytest.raises(ValueError, match=r"ef=32, recall=0\.93: expected one of the two"):
            batcher.submit(queries, 7, ef=32, recall=0.93)


def test_what_is_wrong_is_said(index):
    with pytest.raises(
        ValueError, match=r"recall=0.123, k=10: call tune\(recall=0.123, k=10\) first"
    ):
        index.search(clusters(2, 0), recall=0.123)
    index.tune(0.5)
    with pytest.raises(ValueError, match=r"ef=32, recall=0\.5: expected one of the two"):
        index.search(clusters(2, 0), ef=32, recall=0.5)
    for bad, words in ((0, "above 0"), (1.5, "at most 1"), (float("nan"), "NaN")):
        with pytest.raises(ValueError, match=words):
            index.tune(bad)
    with pytest.raises(ValueError, match="0 queries, 8000 vectors: expected some of both"):
        index.tune(queries=np.empty((0, DIM), np.float32))
    with pytest.raises(ValueError, match="2 queries, 0 vectors"):
        hnsw_gpu.Index(DIM).tune(queries=clusters(2, 0))
    with pytest.raises(ValueError, match="0 vectors, 50 of which stand for one query"):
        hnsw_gpu.Index(DIM).tune()


def test_a_recall_out_of_reach(monkeypatch):
    """Where codes without finer rows hide what tells vectors apart nothing helps but other rows."""
    index = hnsw_gpu.Index(DIM, "l2", M=2, ef_construction=4)
    index.add(clusters(300, 6))
    lost = index.search
    monkeypatch.setattr(index, "search", lambda *a, **b: lost(*a, **b, allow=np.arange(150)))
    with pytest.raises(ValueError, match=r"recall 0.99: a beam that holds everything \(ef 300\)"):
        index.tune(0.99, queries=clusters(50, 8))


def test_the_command(tmp_path):
    index = hnsw_gpu.Index(DIM)
    index.add(clusters(500, 7))
    index.save(tmp_path / "docs.hnsw")
    np.save(tmp_path / "q.npy", clusters(50, 8))
    run = click.testing.CliRunner().invoke
    for asked in ([], [str(tmp_path / "q.npy")]):
        done = run(main, ["tune", str(tmp_path / "docs.hnsw"), *asked, "--recall", "0.9"])
        assert done.exit_code == 0 and "recall@10" in done.output, done.output
    tuned = hnsw_gpu.load(tmp_path / "docs.hnsw")
    expected = tuned.search(np.load(tmp_path / "q.npy"), recall=0.9)
    search = ["search", str(tmp_path / "docs.hnsw"), str(tmp_path / "q.npy")]
    search += ["-o", str(tmp_path / "found.npz"), "--recall"]
    done = run(main, [*search, "0.9"])
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(np.load(tmp_path / "found.npz")["labels"], expected.labels)
    assert "call tune(recall=0.8, k=10) first" in run(main, [*search, "0.8"]).output


def test_an_index_of_few_strings_is_told_so():
    index = hnsw_gpu.Index(DIM, "l2", M=6, ef_construction=40)
    index.add(clusters(7, 1), list("abcdefg"))
    index.update(["a"], clusters(1, 2))  # they no longer ascend
    with pytest.raises(ValueError, match="too few; give queries"):
        index.tune()
