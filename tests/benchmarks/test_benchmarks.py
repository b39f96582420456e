"""The benchmarks tell the truth: their recall, exact answers and interpolation, recomputed."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib", reason="the benchmarks draw, which comes with the extra `bench`")

import hnsw_gpu
from benchmarks import datasets, race
from benchmarks.cpu import anatomy, knobs
from benchmarks.cpu.run import OURS, main
from benchmarks.peers import PEERS, Maker
from benchmarks.record import SETTING, kind

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HNSW_GPU_CACHE", str(tmp_path / "cache"))


def plain_recall(base, queries, labels, k):
    """Share of the k answers within the true k-th distance, by looking at every row."""
    hits = 0
    for query, found in zip(queries.astype(np.float64), labels, strict=True):
        distances = 1 - base.astype(np.float64) @ query
        limit = np.sort(distances)[k - 1] + 1e-6
        hits += sum(distances[label] <= limit for label in {*found[:k].tolist()} - {-1})
    return hits / (len(queries) * k)


def test_quick_run_reports_the_recall_of_the_same_index(tmp_path):
    out = tmp_path / "cpu.json"
    done = CliRunner().invoke(main, ["--quick", "--only", "race", "--out", str(out)])
    assert done.exit_code == 0, done.output
    reported = json.loads(out.read_text())["race"]["results"]["tiny"]
    base, queries = datasets.tiny()
    assert (reported["rows"], reported["dim"], reported["queries"]) == (2000, 32, 200)
    index = hnsw_gpu.Index(32, "cosine", **SETTING._asdict())
    index.add(base)
    recalls = {
        ef: plain_recall(base, queries, index.search(queries, 10, ef=int(ef)).labels, 10)
        for ef in reported["recall_at_ef"]["ours-fp32"]
    }
    assert recalls["16"] < recalls["256"]  # the sweep tells ef apart
    assert reported["recall_at_ef"]["ours-fp32"] == pytest.approx(recalls, abs=1e-9)


def test_knobs_report_the_recall_and_bytes_of_the_same_index(tmp_path):
    out = tmp_path / "knobs.json"
    options = ["--datasets", "tiny", "--rows", "800", "--queries", "100", "--out", str(out)]
    done = CliRunner().invoke(knobs.main, options)
    assert done.exit_code == 0, done.output
    reported = json.loads(out.read_text())["sets"]["tiny"]
    data = datasets.load("tiny", 800, 100)
    index = hnsw_gpu.Index(32, "cosine", M=8, ef_construction=200)
    index.add(data.base)
    found = index.search(data.queries, 10, ef=16).labels
    own = plain_recall(data.base, data.queries, found, 10)
    key = "M 8, ef_construction 200"
    assert reported["recall"][key][0] == pytest.approx(own, abs=1e-6)
    assert reported["bytes_a_row"][key] == pytest.approx(index.nbytes / 800, rel=1e-5)
    distances = reported["distances"][key]
    assert distances == sorted(distances) and 16 < distances[0] < distances[-1] <= 800 + 200


def test_recall_of_ties_repeats_and_gaps():
    rng = np.random.default_rng(1)
    base = datasets.unit(rng.integers(-1, 2, (60, 4)) + np.float32(0.5))  # many equal rows
    queries = datasets.unit(rng.integers(-1, 2, (20, 4)) + np.float32(0.5))
    ids, _ = datasets.nearest(base, queries, 8)
    dataset = datasets.Dataset("ties", base, queries, ids)
    for labels in (ids, rng.integers(-1, 60, ids.shape), np.repeat(ids[:, ::2], 2, axis=1)):
        expected = plain_recall(base, queries, labels, 8)
        assert datasets.recall(dataset, labels, 8) == pytest.approx(expected, abs=1e-12)


def test_exact_answers():
    rng = np.random.default_rng(2)
    base = datasets.unit(np.repeat(rng.standard_normal((150, 9)), 2, axis=0))
    queries = datasets.unit(rng.standard_normal((70, 9)))
    ids, distances = datasets.nearest(base, queries, 20)
    every = 1 - queries.astype(np.float64) @ base.astype(np.float64).T
    # equal rows stand side by side; a product of matrices may not round them alike
    order = np.argsort(np.repeat(every[:, ::2], 2, axis=1), axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(distances, np.take_along_axis(every, order, 1), atol=1e-12)


def test_a_cached_truth_is_not_used_for_other_rows(monkeypatch):
    first = datasets.load("tiny")
    changed = (first.base[::-1].copy(), first.queries)
    monkeypatch.setitem(datasets.SOURCES, "tiny", lambda: changed)
    np.testing.assert_array_equal(
        datasets.load("tiny").truth, datasets.nearest(*changed, datasets.TRUTH_K)[0]
    )


def test_interpolation_is_logarithmic():
    assert race.interpolate(0.925, [0.90, 0.95], [4000.0, 1000.0]) == pytest.approx(2000.0)
    assert race.interpolate(0.90, [0.90, 0.95], [4000.0, 1000.0]) == pytest.approx(4000.0)
    assert race.interpolate(0.90, [0.93, 0.93], [4000.0, 4000.0]) == 4000.0  # past it at once


def test_ratios_are_of_the_same_turn():
    seconds = {"ours-fp32": [1.0, 8.0, 3.0], "hnswlib": [2.0, 8.0, 4.0]}
    assert race.ratios(seconds) == {"ours-fp32/hnswlib": {"median": 0.75, "low": 0.5, "high": 1.0}}


def test_kinds_of_processor_are_not_mixed_in_a_file(tmp_path):
    out = tmp_path / "cpu.json"
    before = json.dumps({"race": {"about": {"kind": "another kind"}, "results": {}}})
    out.write_text(before)
    done = CliRunner().invoke(main, ["--quick", "--only", "race", "--out", str(out)])
    assert done.exit_code == 2
    assert "holds results of another kind" in done.output and kind() in done.output
    assert out.read_text() == before


def test_a_peer_on_a_pinned_blas_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.delenv("OPENBLAS_L2_SIZE", raising=False)
    options = ["--only", "", "--out", str(tmp_path / "cpu.json"), "--peers"]
    done = CliRunner().invoke(main, [*options, "hnswlib,faiss-ivf"])
    assert done.exit_code == 2
    assert "faiss-ivf leans on BLAS" in done.output and "-u OPENBLAS_CORETYPE" in done.output
    assert CliRunner().invoke(main, [*options, "hnswlib"]).exit_code == 0


def test_an_absent_peer_is_named_in_the_results(monkeypatch, tmp_path):
    absent = Maker(lambda: None, "no_such_library", "no-such-distribution")
    monkeypatch.setitem(PEERS, "absent", absent)
    out = tmp_path / "cpu.json"
    options = ["--quick", "--only", "race", "--peers", "absent", "--out", str(out)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    race = json.loads(out.read_text())["race"]
    assert list(race["about"]["left_out"]) == ["absent"]
    assert "no_such_library" in race["about"]["left_out"]["absent"]
    assert list(race["results"]["tiny"]["build"]["seconds"]) == OURS


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_the_recorded_walk_is_the_engines(dtype):
    """`shares` raises unless hops and distances agree; the replay must sum up all of them."""
    base, queries = datasets.tiny()
    index = hnsw_gpu.Index(32, "cosine", dtype, **SETTING._asdict())
    index.add(base)
    found = anatomy.shares(
        index._state.graph, index._state.rows, queries[:20], dtype, ef=32, rounds=1
    )
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["hops_per_query"] >= 32
