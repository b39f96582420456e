"""A collection over HTTP: its answers, and swaps between it and an index."""

import weakref

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from collections_of import make
from served import running

import hnsw_gpu
from hnsw_gpu.files.folders import CACHE

RNG = np.random.default_rng(2)
ROWS = RNG.normal(size=(600, 8)).astype(np.float32)
QUERIES = RNG.normal(size=(30, 8)).astype(np.float32)
LABELS = RNG.permutation(900)[:600]


def test_answers_are_those_of_the_library(tmp_path):
    folder = tmp_path / "docs.collection"
    make(folder, ROWS, LABELS, metric="l2")
    opened = hnsw_gpu.load(folder)
    allowed = np.sort(LABELS)[::5]
    filters = folder.with_suffix(".filters")
    filters.mkdir()
    np.save(filters / "fifth.npy", allowed)
    with running(folder) as fresh:
        for target, expected in (
            ("/v1/search?k=7&ef=40", opened.search(QUERIES, 7, ef=40)),
            ("/v1/search?k=3&allow=fifth", opened.search(QUERIES, 3, allow=allowed)),
        ):
            answer = fresh.call.search(QUERIES, target, Accept="application/json").json
            assert answer["labels"] == expected.labels.tolist()
            assert np.float32(answer["distances"]).tolist() == expected.distances.tolist()
        near = fresh.call.as_json({"labels": LABELS[:4].tolist()}, "/v1/search?k=1").json
        assert near["labels"] == LABELS[:4, None].tolist()
        told = fresh.call("GET", "/v1/index").json
        assert (told["n"], told["metric"], told["path"]) == (600, "l2", "docs.collection")
        assert told["checksum"] == opened.manifest.checksum
        assert fresh.call.metric("canary_recall") == 1.0
        assert fresh.call.metric("index_vectors") == 600


def test_swaps_between_an_index_and_collections(tmp_path):
    index = make(tmp_path / "one.collection", ROWS, LABELS, shards=1)[0]
    make(tmp_path / "four.collection", ROWS, LABELS, shards=4)
    index.save(tmp_path / "docs.hnsw")
    (tmp_path / "folder").mkdir()
    with running(tmp_path / "docs.hnsw") as fresh:
        first = weakref.ref(fresh.live.served.index)
        for name in ("one.collection", "four.collection", "docs.hnsw"):
            told = fresh.call.as_json({"path": name}, "/v1/index:swap").json
            assert (told["path"], told["n"]) == (name, 600)
            expected = hnsw_gpu.load(tmp_path / name).search(QUERIES, 5, ef=20)
            answer = fresh.call.search(QUERIES, "/v1/search?k=5&ef=20", Accept="application/json")
            assert answer.json["labels"] == expected.labels.tolist()
            fresh.wait(lambda: first() is None)  # what a swap replaced is freed
        fresh.call.as_json({"path": "folder"}, "/v1/index:swap").refused(404, "no index at")
        (tmp_path / "four.collection" / "shard-0003.hnsw").unlink()
        refused = fresh.call.as_json({"path": "four.collection"}, "/v1/index:swap")
        refused.refused(422, "four.collection/shard-0003.hnsw: is missing")
        assert fresh.call("GET", "/v1/index").json["path"] == "docs.hnsw"


def test_a_collection_at_a_url(tmp_path, monkeypatch):
    """With what lies beside it; swaps stay in its folder, whatever a name says."""
    fsspec = pytest.importorskip("fsspec", reason="needs the extra `remote`")
    monkeypatch.setenv(CACHE, str(tmp_path / "copies"))
    make(tmp_path / "docs", ROWS, LABELS)
    make(tmp_path / "other", ROWS[::-1].copy(), LABELS, shards=1)
    make(tmp_path / "elsewhere", ROWS, LABELS, shards=1)
    (tmp_path / "docs.filters").mkdir()
    np.save(tmp_path / "docs.filters" / "fifth.npy", LABELS[::5])
    np.save(tmp_path / "docs.canary.npy", QUERIES[:3])
    memory = fsspec.filesystem("memory")
    for name in ("docs", "other", "docs.filters", "docs.canary.npy"):
        memory.put(str(tmp_path / name), f"/bucket/{name}", recursive=True)
    memory.put(str(tmp_path / "elsewhere"), "/elsewhere", recursive=True)
    try:
        with running("memory://bucket/docs") as fresh:
            for target, name, how in (
                ("/v1/search?k=7&ef=40", "docs", {"ef": 40}),
                ("/v1/search?k=7&allow=fifth", "docs", {"allow": LABELS[::5]}),
                ("/v1/search?k=7", "other", {}),
            ):
                if name == "other":
                    told = fresh.call.as_json({"path": name}, "/v1/index:swap").json
                    assert (told["path"], told["version"]) == (name, 2)
                answer = fresh.call.search(QUERIES, target, Accept="application/json").json
                expected = hnsw_gpu.load(tmp_path / name).search(QUERIES, 7, **how)
                assert answer["labels"] == expected.labels.tolist()
            assert fresh.call("GET", "/v1/index").json["path"] == "other"
            there = f"file://{tmp_path}/elsewhere"
            for name in (
                "../elsewhere", "/elsewhere", "docs/../../elsewhere", "docs/", "", ".", "none",
                f"docs::{there}", there, "docs?x", "docs.canary.npy", "docs\\x", "a\nb", "d*",
            ):  # fmt: skip
                reply = fresh.call.as_json({"path": name}, "/v1/index:swap")
                assert reply.status in (404, 422), name
            assert fresh.call("GET", "/v1/index").json["version"] == 2
        memory.pipe("/bucket/docs.canary.npy", b"no array")
        with running("memory://bucket/docs") as fresh:
            assert "memory://bucket/docs.canary.npy: " in str(fresh.live.error)
    finally:
        memory.rm("/bucket", recursive=True)
        memory.rm("/elsewhere", recursive=True)
