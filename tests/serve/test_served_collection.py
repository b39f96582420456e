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
