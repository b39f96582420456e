"""Same input, same bits: graphs, files and answers, for any threads, batch, run or process."""

import hashlib
import subprocess
import sys

import numpy as np
import oracle
import pytest

import hnsw_gpu

N, DIM = 3000, 40
STORED = (
    ("l2", "fp32", False),
    ("ip", "fp32", False),
    ("cosine", "fp32", False),
    ("cosine", "fp16", False),
    ("l2", "int8", False),
    ("cosine", "int8", "fp16"),
    ("cosine", "int4", "fp16"),
    ("l2", "int4", "fp32"),
)


def built(metric="cosine", dtype="fp32", refine=False, threads=None, pieces=1):
    rows = oracle.gaussian(N, DIM, seed=3, clusters=30, spread=0.5)
    rows[1000:1200] = rows[:200]
    index = hnsw_gpu.Index(DIM, metric, dtype, M=8, ef_construction=60, refine=refine, seed=4)
    for piece in np.array_split(rows, pieces):
        index.add(piece, threads=threads)
    return index


def saved(index, folder):
    index.save(folder / "index.hnsw")
    return hashlib.sha256((folder / "index.hnsw").read_bytes()).hexdigest()


@pytest.fixture(scope="module", params=STORED, ids=lambda stored: "-".join(map(str, stored)))
def index(request):
    return built(*request.param)


@pytest.fixture(scope="module")
def queries():
    return oracle.gaussian(10_000, DIM, seed=5, clusters=30, spread=0.6)


def test_the_same_file_for_any_number_of_threads(index, tmp_path):
    expected = saved(index, tmp_path)
    for threads in (1, 2, 4, 1):
        again = built(index.metric, index.dtype, index.refine, threads)
        assert saved(again, tmp_path) == expected, threads
    assert saved(index, tmp_path) == expected


def test_the_same_file_from_another_process(tmp_path):
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]);"
        "from test_determinism import built, saved;"
        "print(saved(built(threads=3), pathlib.Path(sys.argv[2])))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(__file__).rpartition("/")[0], str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert answer.stdout.split() == [saved(built(threads=1), tmp_path)]


def test_the_same_file_after_pieces_deletes_and_compact(tmp_path):
    digests = set()
    for threads in (1, 2, 4):
        index = built(threads=threads, pieces=7)
        index.delete(np.arange(0, N, 4))
        first = saved(index, tmp_path)
        index.compact(threads=threads)
        digests.add((first, saved(index, tmp_path)))
    assert len(digests) == 1


def test_a_loaded_index_grows_like_the_one_saved(tmp_path):
    """Adding after a load gives the bytes that adding without it gives."""
    index = built()
    index.save(tmp_path / "first.hnsw")
    more = oracle.gaussian(500, DIM, seed=9)
    index.add(more)
    expected = saved(index, tmp_path)
    for mmap in (False, True):
        other = hnsw_gpu.load(tmp_path / "first.hnsw", mmap=mmap)
        other.add(more)
        assert saved(other, tmp_path) == expected


def test_save_load_save(index, tmp_path, queries):
    expected = saved(index, tmp_path)
    for mmap in (False, True):
        other = hnsw_gpu.load(tmp_path / "index.hnsw", mmap=mmap)
        other.save(tmp_path / "again.hnsw")
        assert (tmp_path / "again.hnsw").read_bytes() == (tmp_path / "index.hnsw").read_bytes()
        oracle.assert_same(other.search(queries[:500], 10), index.search(queries[:500], 10))
        oracle.assert_same(
            other.search_radius(queries[:100], 0.3), index.search_radius(queries[:100], 0.3)
        )
        oracle.assert_same(other.neighbor_graph(7, ef=30), index.neighbor_graph(7, ef=30))
        np.testing.assert_array_equal(other.labels, index.labels)
        np.testing.assert_array_equal(other.vectors([5, 1100]), index.vectors([5, 1100]))
        assert repr(other) == repr(index)
        for fact in ("dim", "metric", "dtype", "M", "ef_construction", "seed", "refine"):
            assert getattr(other, fact) == getattr(index, fact)
    assert expected == saved(index, tmp_path)


def in_batches(search, queries, size):
    parts = [search(queries[start : start + size]) for start in range(0, len(queries), size)]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("allowed", (None, 0.004, 0.3), ids=("all", "few", "many"))
def test_the_same_answer_in_every_batch(index, queries, allowed):
    allow = None
    if allowed is not None:
        allow = np.random.default_rng(1).random(N) < allowed

    def search(part):
        return index.search(part, 10, allow=allow)

    together = search(queries)
    for size, count in ((1, 150), (7, 700), (512, 3000)):
        part = in_batches(search, queries[:count], size)
        oracle.assert_same(part, [answer[:count] for answer in together])
    backwards = search(queries[2999::-1])
    oracle.assert_same([answer[::-1] for answer in backwards], [part[:3000] for part in together])


def test_the_same_answer_for_any_number_of_threads(index, queries):
    queries = queries[:1500]
    expected = index.search(queries, 10, threads=1)
    within = index.search_radius(queries[:100], 0.3, threads=1)
    graph = index.neighbor_graph(6, ef=30, threads=1)
    for threads in (2, 4, 16, None):
        oracle.assert_same(index.search(queries, 10, threads=threads), expected)
        oracle.assert_same(index.search_radius(queries[:100], 0.3, threads=threads), within)
        oracle.assert_same(index.neighbor_graph(6, ef=30, threads=threads), graph)


def test_search_radius_in_every_batch(index, queries):
    offsets, labels, distances = index.search_radius(queries[:200], 0.3)
    for start, stop in ((0, 1), (1, 8), (8, 170), (199, 200)):
        part = index.search_radius(queries[start:stop], 0.3)
        rows = slice(offsets[start], offsets[stop])
        oracle.assert_same(
            part, (offsets[start : stop + 1] - offsets[start], labels[rows], distances[rows])
        )


@pytest.mark.parametrize("metric", ("l2", "ip", "cosine"))
def test_exact_search_in_every_batch(metric, queries):
    rows = oracle.gaussian(2500, DIM, seed=3)
    together = hnsw_gpu.exact_search(rows, queries[:2000], 10, metric, threads=1)
    for threads in (2, 4, None):
        other = hnsw_gpu.exact_search(rows, queries[:2000], 10, metric, threads=threads)
        oracle.assert_same(other, together)
    for size, count in ((1, 40), (7, 140), (512, 2000)):
        part = in_batches(
            lambda part: hnsw_gpu.exact_search(rows, part, 10, metric), queries[:count], size
        )
        oracle.assert_same(part, [answer[:count] for answer in together])


def test_exact_search_gives_the_distances_of_the_index(queries):
    """One meaning of a distance: where both find a row, the bits agree."""
    rows = oracle.gaussian(1500, DIM, seed=3)
    for metric in ("l2", "ip", "cosine"):
        index = hnsw_gpu.Index(DIM, metric)
        index.add(rows)
        found = index.search(queries[:200], 10, ef=1500)
        oracle.assert_same(found, hnsw_gpu.exact_search(rows, queries[:200], 10, metric))


def test_a_search_leaves_nothing_behind(index, queries):
    """Scratch state is reset: after large, filtered and failed searches, the same bits."""
    expected = index.search(queries[:200], 10)
    index.search(queries[200:900], 500, ef=700)
    index.search(queries[:5], 10, allow=[1, 2, 3])
    with pytest.raises(ValueError, match="k"):
        index.search(queries, -1)
    index.search_radius(queries[:50], 1.0)
    oracle.assert_same(index.search(queries[:200], 10), expected)
