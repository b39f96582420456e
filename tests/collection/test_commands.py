"""The commands take a collection where they take an index, and say the same."""

import json
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from click.testing import CliRunner
from collections_of import make

import hnsw_gpu
from hnsw_gpu import cli
from hnsw_gpu.collection.manifest import write_manifest

RNG = np.random.default_rng(2)
ROWS = RNG.normal(size=(600, 8)).astype(np.float32)
QUERIES = RNG.normal(size=(30, 8)).astype(np.float32)
LABELS = RNG.permutation(900)[:600]


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A collection, its shards, and queries."""
    folder = tmp_path_factory.mktemp("saved")
    indexes = make(folder / "docs.collection", ROWS, LABELS, shards=3, metric="l2", M=8)
    np.save(folder / "queries.npy", QUERIES)
    return SimpleNamespace(
        folder=folder / "docs.collection", queries=folder / "queries.npy", indexes=indexes
    )


def test_search(saved, tmp_path):
    output = tmp_path / "answers.npz"
    assert "30 queries" in run("search", saved.folder, saved.queries, "-k", 5, "-o", output)
    expected = hnsw_gpu.load(saved.folder).search(QUERIES, 5)
    with np.load(output) as found:
        assert (found["labels"] == expected.labels).all()
        assert (found["distances"] == expected.distances).all()
    truth = oracle.distances(QUERIES, ROWS, "l2")
    assert (LABELS[oracle.nearest(truth, 5)[0]] == expected.labels).mean() > 0.99


def test_tune(tmp_path):
    """What was found is there for whoever loads it, and changes nothing else."""
    folder = tmp_path / "docs.collection"
    make(folder, ROWS, LABELS, shards=3, metric="l2", M=4)
    untuned, before = hnsw_gpu.load(folder), (folder / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"recall=0\.9, k=5: call tune"):
        untuned.search(QUERIES, 5, recall=0.9)
    told = run("tune", folder, "--recall", 0.9, "-k", 5)
    np.save(tmp_path / "queries.npy", QUERIES)
    run("tune", folder, tmp_path / "queries.npy", "--recall", 0.99, "-k", 5)
    opened = hnsw_gpu.load(folder)
    (asked, kept), (_, other) = sorted(opened._tuned.items())
    assert asked == (0.9, 5) and told.startswith(f"ef={kept.ef}: recall@5 0.9")
    oracle.assert_same(
        opened.search(QUERIES, 5, recall=0.99), untuned.search(QUERIES, 5, ef=other.ef)
    )
    untuned.save_tuned()
    assert (folder / "manifest.json").read_bytes() == before
    write_manifest(folder, untuned.manifest._replace(seed=1))
    with pytest.raises(hnsw_gpu.CorruptIndexError, match="has changed since it was read"):
        opened.save_tuned()


def test_info(saved):
    facts = json.loads(run("info", saved.folder, "--json"))
    sizes = [path.stat().st_size for path in saved.folder.glob("*.hnsw")]
    expected = {"vectors": 600, "metric": "l2", "dtype": "fp32", "refine": "", "dim": 8, "M": 8}
    expected |= {"ef_construction": 200, "seed": 0, "file_bytes": sum(sizes), "shards": 3}
    expected |= {"labels": "integers"}
    assert facts.pop("memory_bytes") == hnsw_gpu.load(saved.folder).nbytes
    assert facts == expected


def test_check(saved, tmp_path):
    assert run("check", saved.folder).endswith("sound, 600 vectors of 8\n")
    make(tmp_path / "bad", ROWS, LABELS)
    path = tmp_path / "bad" / "shard-0002.hnsw"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4  # in the vectors, which are mapped
    path.write_bytes(content)
    assert "shard-0002.hnsw: array 'vectors' is damaged" in run("check", path.parent, code=1)
    path.unlink()
    assert "shard-0002.hnsw: is missing" in run("check", path.parent, code=1)
    (path.parent / "manifest.json").unlink()
    assert "without manifest.json: no collection" in run("check", path.parent, code=1)


def test_recall(saved):
    points = json.loads(
        run("recall", saved.folder, saved.queries, "-k", 5, "--ef", "5,9", "--json")
    )
    exact = oracle.distances(QUERIES, ROWS, "l2")
    opened, row_of = hnsw_gpu.load(saved.folder), np.argsort(LABELS)
    for point, ef in zip(points, (5, 9), strict=True):
        found = opened.search(QUERIES, 5, ef=ef).labels
        rows = row_of[np.searchsorted(np.sort(LABELS), found)]
        assert point["recall"] == pytest.approx(oracle.recall(rows, exact, 5))


def test_it_is_not_taken_where_an_index_is_meant(saved, tmp_path):
    np.save(tmp_path / "rows.npy", ROWS)
    told = run("build", tmp_path / "rows.npy", "-o", saved.folder, code=2)
    assert "is a directory" in told


def test_a_batcher_gives_its_answers(saved):
    opened = hnsw_gpu.load(saved.folder)
    with hnsw_gpu.Batcher(opened) as batcher:
        futures = [batcher.submit(query, k) for query in QUERIES for k in (1, 3, 9)]
        answers = [future.result() for future in futures]
    asked = [(query, k) for query in QUERIES for k in (1, 3, 9)]
    for (query, k), found in zip(asked, answers, strict=True):
        expected = opened.search(query, k)
        assert found.labels.tolist() == expected.labels.tolist()
        assert found.distances.tolist() == expected.distances.tolist()
