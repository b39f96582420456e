"""A collection answers as its shards do, together: against each shard, one index, brute force."""

import copy
import pickle

import numpy as np
import oracle
import pytest
from collections_of import in_turn, make

pytest.importorskip("hypothesis", reason="properties are tested with the extra `test`")

from hypothesis import given
from hypothesis import strategies as st

import hnsw_gpu
from hnsw_gpu import CorruptIndexError
from hnsw_gpu.engine import merged

METRICS = ("cosine", "l2", "euclidean", "ip")
RNG = np.random.default_rng(3)
ROWS = RNG.normal(size=(1200, 12)).astype(np.float32)
ROWS[700:760] = ROWS[20:80]  # copies, in another shard
QUERIES = np.concatenate([RNG.normal(size=(20, 12)), ROWS[20:40]]).astype(np.float32)
LABELS = RNG.permutation(5000)[: len(ROWS)]


def pairs(found):
    return [list(zip(far, labels, strict=True)) for labels, far in zip(*found, strict=True)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_answers_are_those_of_the_shards_merged(tmp_path, metric, shards):
    indexes = make(tmp_path / "c", ROWS, LABELS, shards=shards, metric=metric)
    opened = hnsw_gpu.load(tmp_path / "c")
    for ask in (
        lambda index, k: index.search(QUERIES, k, ef=30),
        lambda index, k: index.exact_search(QUERIES, k),
        lambda index, k: index.search(QUERIES, k, allow=LABELS[::7]),
        lambda index, k: index.search(QUERIES, k, allow=np.arange(5000) % 2 == 0, ef=20),
    ):
        found = ask(opened, 7)
        parts = [pairs(ask(index, 7)) for index in indexes]
        for q in range(len(QUERIES)):
            labels, far = in_turn([part[q] for part in parts], 7)
            assert (found.labels[q].tolist(), found.distances[q].tolist()) == (labels, far)


@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_is_that_of_one_index(tmp_path, metric):
    make(tmp_path / "c", ROWS, metric=metric, shards=4)
    opened = hnsw_gpu.load(tmp_path / "c")
    whole = hnsw_gpu.Index(12, metric)
    whole.add(ROWS)
    for k in (1, 10, 1300):
        found, expected = opened.exact_search(QUERIES, k), whole.exact_search(QUERIES, k)
        assert (found.distances == expected.distances).all()
        # at one distance an index tells the labels of a node first, and copies are in two shards
        orders = [np.lexsort((answer.labels, answer.distances)) for answer in (found, expected)]
        mine, its = (
            np.take_along_axis(answer.labels, order, 1)
            for answer, order in zip((found, expected), orders, strict=True)
        )
        assert (mine == its).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_one_shard_is_an_index(tmp_path, metric, dtype):
    """Also where labels at one distance do not ascend: integers, of which many are as far."""
    rows = RNG.integers(-2, 3, (600, 4)).astype(np.float32)
    rows[(rows == 0).all(axis=1)] = 1
    [index] = make(tmp_path / "c", rows, LABELS[:600], shards=1, metric=metric, dtype=dtype)
    opened = hnsw_gpu.load(tmp_path / "c")
    queries = np.ones((3, 4)) + np.arange(3)[:, None]
    for found, expected in (
        (opened.search(queries, 200), index.search(queries, 200)),
        (opened.exact_search(queries, 50), index.exact_search(queries, 50)),
        (opened.search_radius(queries, 0.9), index.search_radius(queries, 0.9)),
        (opened.search(queries, 9, allow=LABELS[:50]), index.search(queries, 9, allow=LABELS[:50])),
    ):
        for mine, its in zip(found, expected, strict=True):
            assert (mine.dtype, mine.tolist()) == (its.dtype, its.tolist())


@pytest.mark.parametrize("shards", [1, 3])
def test_no_answer_depends_on_its_batch_or_on_k(tmp_path, shards):
    rows = RNG.integers(-2, 3, (900, 4)).astype(np.float32)  # full of ties
    make(tmp_path / "c", rows, LABELS[:900], shards=shards, metric="l2")
    opened = hnsw_gpu.load(tmp_path / "c")
    queries = rows[:20]
    together = opened.search(queries, 16, ef=64)
    for k in (1, 3, 16):
        for q in range(20):
            alone = opened.search(queries[q], k, ef=64, threads=1)
            assert alone.labels[0].tolist() == together.labels[q, :k].tolist()
            assert alone.distances[0].tolist() == together.distances[q, :k].tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_search_radius(tmp_path, metric):
    indexes = make(tmp_path / "c", ROWS, LABELS, metric=metric)
    opened = hnsw_gpu.load(tmp_path / "c")
    radius = float(np.median(oracle.distances(QUERIES, ROWS, metric)[:, :200].min(axis=1)))
    for allow in (None, LABELS[::3]):
        offsets, labels, far = opened.search_radius(QUERIES, radius, ef=100, allow=allow)
        parts = [index.search_radius(QUERIES, radius, ef=100, allow=allow) for index in indexes]
        assert offsets[-1] == len(labels) == len(far) > 0
        for q in range(len(QUERIES)):
            lists = [
                list(zip(d[o[q] : o[q + 1]], n[o[q] : o[q + 1]], strict=True)) for o, n, d in parts
            ]
            expected = in_turn(lists, sum(map(len, lists)))
            mine = slice(offsets[q], offsets[q + 1])
            assert (labels[mine].tolist(), far[mine].tolist()) == expected


def test_inner_products_keep_their_order_however_small(tmp_path):
    """1 - dot is the same float32 for all of these: the shards' own distances decide."""
    rows = np.zeros((60, 4), np.float32)
    rows[:, 0] = RNG.permutation(60) + 1.0
    rows *= 1e-6
    make(tmp_path / "c", rows, metric="ip")
    query = np.array([1e-4, 0, 0, 0], np.float32)
    opened = hnsw_gpu.load(tmp_path / "c")
    expected = np.argsort(-rows[:, 0])[:9].tolist()
    assert opened.search(query, 9).labels[0].tolist() == expected
    assert opened.exact_search(query, 9).labels[0].tolist() == expected


def test_recall_is_not_below_that_of_one_index(tmp_path):
    rows = RNG.normal(size=(4000, 24)).astype(np.float32)
    queries = RNG.normal(size=(100, 24)).astype(np.float32)
    make(tmp_path / "c", rows, shards=4)
    whole = hnsw_gpu.Index(24)
    whole.add(rows)
    truth = oracle.distances(queries, rows, "cosine")
    opened = hnsw_gpu.load(tmp_path / "c")
    for ef in (10, 20, 40):
        of_shards = oracle.recall(opened.search(queries, 10, ef=ef).labels, truth, 10)
        assert of_shards >= oracle.recall(whole.search(queries, 10, ef=ef).labels, truth, 10)


def test_what_is_in_it(tmp_path):
    indexes = make(tmp_path / "c", ROWS, LABELS, dtype="int8", refine="fp16", M=8, seed=5)
    opened = hnsw_gpu.load(tmp_path / "c")
    assert (len(opened), opened.dim, opened.metric, opened.dtype) == (1200, 12, "cosine", "int8")
    assert (opened.refine, opened.M, opened.ef_construction, opened.seed) == ("fp16", 8, 200, 5)
    assert (opened.labels == np.sort(LABELS)).all()
    loaded = [hnsw_gpu.load(path) for path in shard_files(tmp_path)]
    assert sum(len(index.labels) for index in loaded) == 1200  # which keeps their order
    assert opened.nbytes == sum(index.nbytes for index in loaded)
    parts = [index.memory(50, ef=9) for index in indexes]
    told = opened.memory(50, ef=9)
    assert told.keys() == parts[0].keys()
    for name, size in told.items():
        each = [part[name] for part in parts]
        assert size == (max(each) if name == "queries" else sum(each))
    asked = RNG.permutation(LABELS)[:300]
    home = {int(label): index for index in indexes for label in index.labels}
    expected = np.concatenate([home[int(label)].vectors([label]) for label in asked])
    assert (opened.vectors(asked) == expected).all()
    assert opened.vectors([]).shape == (0, 12)
    assert int(LABELS[0]) in opened and 6000 not in opened and "x" not in opened
    with pytest.raises(KeyError, match="label 5001 and 1 more: not in the collection"):
        opened.vectors([LABELS[0], 5001, 5002])
    assert repr(opened).endswith("dtype='int8'): 1,200 vectors in 3 shards")
    assert not opened.has_deleted and opened.device == "cpu"
    assert opened.to("auto") is opened
    opened.check()


def shard_files(tmp_path):
    return sorted((tmp_path / "c").glob("*.hnsw"))


def test_vectors_are_mapped(tmp_path):
    make(tmp_path / "c", ROWS)
    opened = hnsw_gpu.load(tmp_path / "c")
    with open(shard_files(tmp_path)[1], "r+b") as file:  # in place
        file.seek(-64, 2)  # the last row, of 12 numbers in 64 bytes
        file.write(b"\x01" * 8)
    with pytest.raises(CorruptIndexError, match=r"shard-0001\.hnsw: was changed in place"):
        opened.search(QUERIES)
    with pytest.raises(CorruptIndexError, match=r"shard-0001\.hnsw: was changed in place"):
        pickle.dumps(opened)
    with pytest.raises(ValueError, match=r"shard-0001\.hnsw"):
        hnsw_gpu.load(tmp_path / "c").check()
    with pytest.raises(CorruptIndexError, match=r"shard-0001\.hnsw"):
        hnsw_gpu.load(tmp_path / "c", mmap=False)


def test_deleted_vectors_are_not_found(tmp_path):
    """Shards that were saved after a `delete`, which `build` never makes."""
    from collections_of import manifest_of

    from hnsw_gpu.collection.manifest import entry_of, write_manifest

    indexes = make(tmp_path / "c", ROWS)
    indexes[1].delete([400, 401])
    indexes[1].save(tmp_path / "c" / "shard-0001.hnsw")
    entries = [entry_of(path.parent, path.name) for path in shard_files(tmp_path)]
    write_manifest(tmp_path / "c", manifest_of(indexes[0], entries))
    opened = hnsw_gpu.load(tmp_path / "c")
    assert opened.has_deleted and len(opened) == 1198
    assert opened.search(ROWS[400:402], 1198).labels.max() == 1199
    assert not np.isin(opened.search(ROWS[400:402], 1198).labels, [400, 401]).any()


def test_a_relative_path_is_that_of_its_time(tmp_path, monkeypatch):
    make(tmp_path / "c", ROWS)
    monkeypatch.chdir(tmp_path)
    opened = hnsw_gpu.load("c")
    monkeypatch.chdir("/")
    opened.check()
    again = pickle.loads(pickle.dumps(opened))
    assert (again.search(QUERIES).labels == opened.search(QUERIES).labels).all()


def test_copies_and_pickles_answer_alike(tmp_path):
    make(tmp_path / "c", ROWS)
    opened = hnsw_gpu.load(tmp_path / "c")
    expected = opened.search(QUERIES)
    for other in (pickle.loads(pickle.dumps(opened)), copy.deepcopy(opened), copy.copy(opened)):
        assert (other.search(QUERIES).labels == expected.labels).all()
    assert len(pickle.dumps(opened)) < 4000  # paths and checksums, no vectors


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (((np.ones((2, 5)),), {}), ValueError),
        (((QUERIES, 0), {}), ValueError),
        (((QUERIES,), {"ef": 0}), ValueError),
        (((QUERIES,), {"allow": np.ones(10, bool)}), ValueError),
        (((np.full((1, 12), np.nan),), {}), ValueError),
        (((QUERIES,), {"stream": 1}), ValueError),
    ],
)
def test_bad_arguments_are_those_of_an_index(tmp_path, arguments, error):
    [index] = make(tmp_path / "c", ROWS, shards=1)
    positional, named = arguments
    said = []
    for asked in (index, hnsw_gpu.load(tmp_path / "c")):
        with pytest.raises(error) as caught:
            asked.search(*positional, **named)
        said.append(str(caught.value))
    assert said[0] == said[1]


LISTS = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=6), min_size=1, max_size=4
)


@given(LISTS, st.integers(1, 8))
def test_merged_takes_the_smallest_head(lists, k):
    """Parts that ascend by distance, whatever their labels; missing ones last."""
    used = iter(range(100, 200))
    lists = [sorted(part, key=lambda pair: pair[0]) for part in lists]
    lists = [[(far, label * 1000 + next(used)) for far, label in part] for part in lists]
    labels = np.full((len(lists), 1, 7), -1, np.int64)
    distances = np.full(labels.shape, np.inf, np.float32)
    for s, part in enumerate(lists):
        for i, (far, label) in enumerate(part):
            labels[s, 0, i], distances[s, 0, i] = label, far
    found, far = merged(labels, distances, k)
    assert (found[0].tolist(), far[0].tolist()) == in_turn(lists, k)
