"""Every raced library finds the true neighbours, and its knobs are what the race takes them for."""

import numpy as np
import pytest

from benchmarks import datasets, peers, race, record
from benchmarks.peers import PEERS, Maker, Setting, reason_to_skip


@pytest.fixture(scope="module")
def tiny():
    base, queries = datasets.tiny()
    return datasets.Dataset("tiny", base, queries, datasets.nearest(base, queries, 10)[0])


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_answers_like_exact_search(name, tiny):
    if reason := reason_to_skip(name):
        pytest.skip(reason)
    peer = PEERS[name].make()
    peer.build(tiny.base, Setting(), 1)  # two threads, and usearch may lose rows of so few
    first, last = peer.ladders[-1][0], peer.ladders[-1][-1]
    for threads in (1, 2):
        labels = peer.search(tiny.queries, 10, last, threads)
        assert labels.dtype == np.int64
        hits = [len({*found} & {*true}) for found, true in zip(labels, tiny.truth, strict=True)]
        assert np.mean(hits) >= 9.97  # codes of four bits lose a few
    for ladder in peer.ladders:  # other values of the second knob are no way down
        low = datasets.recall(tiny, peer.search(tiny.queries, 10, ladder[0], 1))
        high = datasets.recall(tiny, peer.search(tiny.queries, 10, ladder[-1], 1))
        assert low <= high, (ladder[0], ladder[-1])
    # set back, a knob forgets what it was
    again = datasets.recall(tiny, peer.search(tiny.queries, 10, first, 2))
    assert again == datasets.recall(tiny, peer.search(tiny.queries, 10, first, 1))


@pytest.mark.parametrize("name", PEERS)
def test_rungs_are_distinct_and_close(name):
    for ladder in PEERS[name].make().ladders:
        numbers = [rung if isinstance(rung, int) else rung[0] for rung in ladder]
        steps = np.diff(numbers)
        assert (steps >= 1).all()
        assert (steps <= np.maximum(1.5, 0.11 * np.array(numbers[:-1]) + 1)).all()


def test_an_absent_library_is_skipped_with_its_reason(monkeypatch):
    maker = Maker(peers.Hnswlib, "no_such_library", "no-such-distribution")
    monkeypatch.setitem(PEERS, "absent", maker)
    reason = reason_to_skip("absent")
    assert "no-such-distribution" in reason and "No module named 'no_such_library'" in reason
    assert reason_to_skip("ours-fp32") == ""


class Told:
    """Knows the answers, and gives as many of each ten as its rung says."""

    nbytes = None

    def __init__(self, truth, ladders):
        self.truth = truth
        self.ladders = ladders

    def build(self, base, setting, threads):
        pass

    def search(self, queries, k, rung, threads):
        labels = np.full((len(queries), k), -1, np.int64)
        labels[:, : rung[0]] = self.truth[: len(queries), : rung[0]]
        return labels


def test_every_ladder_that_reaches_the_target_is_bracketed(tiny):
    short = [(count, "short") for count in range(2, 7)]
    long = [(count, "long") for count in range(1, 11)]
    side = race.Side("told", Told(tiny.truth, (short, long)), tiny)
    assert side.recall((7, "long")) == pytest.approx(0.7)
    assert side.brackets(0.45) == [((4, "short"), (5, "short")), ((4, "long"), (5, "long"))]
    assert side.brackets(0.75) == [((7, "long"), (8, "long"))]  # short ends before
    # short begins after
    assert side.brackets(0.15) == [((2, "short"), (2, "short")), ((1, "long"), (2, "long"))]
    assert side.brackets(1.05) == []
    assert side.fastest(side.brackets(0.75), 0.75, 1) == ((7, "long"), (8, "long"))


def test_of_two_ladders_the_faster_is_raced(tiny, monkeypatch):
    side = race.Side("told", Told(tiny.truth, ()), tiny)
    spent = {(4, "a"): 1.0, (5, "a"): 2.0, (4, "b"): 1.1, (6, "b"): 2.0}
    monkeypatch.setattr(side, "seconds", lambda queries, rung, threads: (0.0, spent[rung]))
    a, b = ((4, "a"), (5, "a")), ((4, "b"), (6, "b"))
    assert side.fastest([a, b], 0.41, 1) == a  # 1.07 seconds against 1.13
    assert side.fastest([a, b], 0.49, 1) == b  # 1.87 seconds against 1.44
    assert side.fastest([b, a], 0.49, 1) == b


def test_a_processor_is_named_with_its_family(monkeypatch):
    text = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD X\nflags\t\t: fma avx2\n\n"
    monkeypatch.setattr(record.Path, "read_text", lambda path: text + text.replace("17", "18"))
    assert record.cpuinfo() == ("AMD X, family 25, model 17", ["fma", "avx2"])
    monkeypatch.setattr(record.Path, "read_text", lambda path: "Features\t: asimd\n")
    assert record.cpuinfo() == (record.platform.machine(), [])


@pytest.mark.parametrize(
    "model, flags, allowed, kind, file",
    [
        ("Intel(R) X", ["avx2", "avx512f", "avx512_vnni"], None, "AVX-512 VNNI, Intel",
         "cpu-avx512-vnni-intel.json"),
        ("AMD X", ["avx2", "avx512f"], None, "AVX-512, AMD", "cpu-avx512-amd.json"),
        ("Some model", ["avx2", "fma"], None, "AVX2", "cpu-avx2.json"),
        ("AMD X", ["avx2", "avx512f"], "+sse3,+avx2", "AVX2, AMD", "cpu-avx2-amd.json"),
    ],
)  # fmt: skip
def test_results_of_a_kind_of_processor_have_a_file_of_their_own(
    monkeypatch, model, flags, allowed, kind, file
):
    monkeypatch.setattr(record, "cpuinfo", lambda: (model, flags))
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    if allowed:
        monkeypatch.setenv("NUMBA_CPU_FEATURES", allowed)
        assert record.processor() == "AMD X (avx2; without its avx512f)"
    assert record.kind() == kind
    assert record.about([])["kind"] == kind
    assert record.file_of_kind("cpu") == record.RESULTS / file
