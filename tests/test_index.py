"""Index against brute force: inputs of every kind, labels, sizes, metrics, every query method."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest

import hnsw_gpu
from hnsw_gpu.engine import encode_queries, key_nodes, search_graph

METRICS = ("l2", "euclidean", "ip", "cosine")
ALIASES = {
    "sqeuclidean": "l2",
    "inner_product": "ip",
    "dot": "ip",
    "cos": "cosine",
    "angular": "cosine",
}
STORED = (
    ("fp32", False),
    ("fp16", False),
    ("int8", False),
    ("int8", True),
    ("int8", "fp16"),
    ("int4", True),
    ("int4", "fp16"),
)
DIMS = (1, 3, 31, 100, 127, 769, 1536, 4096)


def built(rows, metric="l2", dtype="fp32", **settings):
    labels = settings.pop("labels", None)
    index = hnsw_gpu.Index(rows.shape[1], metric, dtype, **settings)
    index.add(rows, labels)
    return index


class ThroughArray:
    """What a torch CPU tensor offers, less DLPack."""

    def __init__(self, rows):
        self.rows = rows

    def __array__(self, dtype=None, copy=None):
        return np.array(self.rows, dtype=dtype)


class ThroughDLPack:
    """An array of another library that numpy knows nothing of."""

    def __init__(self, rows):
        self.rows = rows

    def __dlpack__(self, **options):
        return self.rows.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.rows.__dlpack_device__()


def read_only(rows):
    rows = rows.copy()
    rows.flags.writeable = False
    return rows


def strided(rows):
    wide = np.full((2 * len(rows), 3 * rows.shape[1]), np.nan, rows.dtype)
    wide[::2, 1::3] = rows
    return wide[::2, 1::3]


def misaligned(rows):
    raw = np.zeros(rows.nbytes + 1, np.uint8)
    view = raw[1:].view(rows.dtype).reshape(rows.shape)
    view[:] = rows
    return view


FORMS: dict[str, Callable[..., Any]] = {
    "fortran": np.asfortranarray,
    "strided": strided,
    "reversed": lambda rows: rows[::-1].copy()[::-1],
    "misaligned": misaligned,
    "read-only": read_only,
    "big-endian": lambda rows: rows.astype(">f4"),
    "float64": lambda rows: rows.astype(np.float64),
    "float16": lambda rows: rows.astype(np.float16),
    "int8": lambda rows: rows.astype(np.int8),
    "int16": lambda rows: rows.astype(np.int16),
    "int32": lambda rows: rows.astype(np.int32),
    "int64": lambda rows: rows.astype(np.int64),
    "lists": lambda rows: rows.tolist(),
    "tuples": lambda rows: tuple(map(tuple, rows.tolist())),
    "list of arrays": list,
    "subclass": lambda rows: rows.view(np.ma.MaskedArray).view(np.matrix),
    "__array__": ThroughArray,
    "__dlpack__": ThroughDLPack,
}


@pytest.fixture(scope="module")
def rows():
    return oracle.integers(300, 24, seed=1)


@pytest.fixture(scope="module")
def queries():
    return oracle.integers(20, 24, seed=2)


@pytest.fixture(scope="module")
def plain(rows):
    return built(rows)


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_array_gives_the_same_answer(form, rows, queries, plain):
    index = hnsw_gpu.Index(24, "l2")
    index.add(FORMS[form](rows))
    expected = plain.search(queries, 7)
    oracle.assert_same(index.search(FORMS[form](queries), 7), expected)
    oracle.assert_nearest(expected, queries, rows, 7, "l2")
    oracle.assert_same(
        hnsw_gpu.exact_search(FORMS[form](rows), FORMS[form](queries), 7, "l2"), expected
    )


def test_memory_mapped_rows(tmp_path, rows, queries, plain):
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    oracle.assert_same(built(mapped).search(queries, 7), plain.search(queries, 7))


def test_the_caller_s_arrays_are_neither_kept_nor_changed(rows, queries):
    own, own_labels, own_queries = rows.copy(), np.arange(300), queries.copy()
    index = hnsw_gpu.Index(24, "cosine")
    index.add(own, own_labels)
    before = index.search(own_queries, 5)
    np.testing.assert_array_equal(own, rows)
    np.testing.assert_array_equal(own_queries, queries)
    own[:] = np.nan
    own_labels[:] = 7
    oracle.assert_same(index.search(queries, 5), before)
    np.testing.assert_array_equal(index.labels, np.arange(300))


def test_what_an_index_gives_out_cannot_harm_it(rows, queries):
    index = built(rows)
    before = index.search(queries, 5)
    for given in (index.labels, index.vectors([3]), index.search(queries, 5).labels):
        if given.flags.writeable:
            given[:] = 0
    oracle.assert_same(index.search(queries, 5), before)
    np.testing.assert_array_equal(index.labels, np.arange(300))
    np.testing.assert_array_equal(index.vectors([3]), rows[[3]])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("dtype", "refine"), STORED)
def test_every_dim_metric_and_dtype(dim, metric, dtype, refine):
    vectors, queries = oracle.gaussian(40, dim, seed=dim), oracle.gaussian(5, dim, seed=dim + 1)
    index = built(vectors, metric, dtype, refine=refine)
    precise = {False: dtype, True: "fp32", "fp16": "fp16"}[refine]
    # k = n: nothing can be lost to a rounded beam, so distances are those of the kept rows
    result = index.search(queries, 40)
    oracle.assert_nearest(result, queries, vectors, 40, metric, precise)
    oracle.assert_nearest(index.search(queries[0], 40), queries[:1], vectors, 40, metric, precise)


@pytest.mark.parametrize("dim", [d for d in DIMS if 1 < d < 1000])
@pytest.mark.parametrize("metric", ("l2", "ip"))
@pytest.mark.parametrize(("dtype", "refine"), STORED)
def test_integers_are_exact(dim, metric, dtype, refine):
    """Integer distances have no rounding anywhere: labels and distances to the last bit."""
    vectors, queries = oracle.integers(150, dim, seed=dim), oracle.integers(9, dim, seed=dim + 1)
    assert len(np.unique(vectors, axis=0)) == 150 or dim == 3
    index = built(np.unique(vectors, axis=0), metric, dtype, refine=refine)
    labels, distances = index.search(queries, 12, ef=200, rerank=None)
    truth = oracle.distances(queries, np.unique(vectors, axis=0), metric)
    expected_labels, expected = oracle.nearest(truth, 12)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_array_equal(distances, expected.astype(np.float32))


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias, rows, queries):
    one, other = built(rows, alias), built(rows, ALIASES[alias])
    assert one.metric == other.metric == ALIASES[alias]
    oracle.assert_same(one.search(queries, 5), other.search(queries, 5))
    oracle.assert_same(
        hnsw_gpu.exact_search(rows, queries, 5, alias),
        hnsw_gpu.exact_search(rows, queries, 5, ALIASES[alias]),
    )


def test_euclidean_is_the_square_root_everywhere(tmp_path, rows, queries):
    squared, index = built(rows, "l2"), built(rows, "euclidean")
    index.save(tmp_path / "index.hnsw")
    far = squared.search(queries, 9)
    for one in (index, hnsw_gpu.load(tmp_path / "index.hnsw")):
        labels, distances = one.search(queries, 9)
        np.testing.assert_array_equal(labels, far.labels)
        np.testing.assert_array_equal(distances, np.sqrt(far.distances))
        np.testing.assert_array_equal(
            one.neighbor_graph(4).distances, np.sqrt(squared.neighbor_graph(4).distances)
        )
        radius = float(np.sqrt(far.distances[0, 4]))
        _, _, distances = one.search_radius(queries[:1], radius + 0.01)
        assert distances.max() <= radius + 0.01
        np.testing.assert_array_equal(distances, np.sqrt(far.distances[0, : len(distances)]))


@pytest.mark.parametrize("n", (0, 1, 2, 3, 33, 100))
@pytest.mark.parametrize("metric", ("l2", "cosine"))
def test_few_rows_and_large_k(n, metric):
    vectors, queries = oracle.gaussian(n, 6, seed=n), oracle.gaussian(4, 6, seed=77)
    index = hnsw_gpu.Index(6, metric)
    given = index.add(vectors)
    np.testing.assert_array_equal(given, np.arange(n))
    assert given.dtype == np.int64
    assert len(index) == n
    for k in (1, 2, max(n, 1), n + 1, 150):
        for ef in (1, 64, 200):
            if max(k, ef) < n:
                continue
            oracle.assert_nearest(index.search(queries, k, ef=ef), queries, vectors, k, metric)
        oracle.assert_nearest(
            hnsw_gpu.exact_search(vectors, queries, k, metric), queries, vectors, k, metric
        )
    assert index.search(queries[:0], 3).labels.shape == (0, 3)
    assert index.search(np.empty((0, 6)), 3).distances.shape == (0, 3)


def test_an_index_never_added_to(tmp_path):
    index = hnsw_gpu.Index(6, "cosine", "int8", refine=True)
    queries = oracle.gaussian(4, 6, seed=1)
    index.save(tmp_path / "empty.hnsw")
    for one in (index, hnsw_gpu.load(tmp_path / "empty.hnsw")):
        assert len(one) == 0
        assert one.labels.shape == (0,)
        labels, distances = one.search(queries, 3)
        np.testing.assert_array_equal(labels, np.full((4, 3), -1))
        np.testing.assert_array_equal(distances, np.full((4, 3), np.inf, np.float32))
        offsets, labels, distances = one.search_radius(queries, 0.5)
        np.testing.assert_array_equal(offsets, np.zeros(5))
        assert len(labels) == len(distances) == 0
        assert one.neighbor_graph(3).labels.shape == (0, 3)
        one.delete([])
        one.compact()
        one.check()
        np.testing.assert_array_equal(one.add(queries), np.arange(4))
        oracle.assert_nearest(one.search(queries, 4), queries, queries, 4, "cosine")


@pytest.mark.parametrize("dtype, refine", STORED, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_of_an_index_compares_what_it_keeps(metric, dtype, refine, rows, queries):
    index = built(rows, metric, dtype, refine=refine, M=4, ef_construction=10)
    gone = index.labels[::3]
    index.delete(gone)
    found = index.exact_search(queries, 7, threads=1)
    # a walk that meets all, and re-ranks them
    oracle.assert_same(found, index.search(queries, 7, ef=len(rows), rerank=None))
    if dtype == "fp32":
        truth = hnsw_gpu.exact_search(index.vectors(index.labels), queries, 7, metric)
        np.testing.assert_allclose(found.distances, truth.distances, rtol=1e-5, atol=1e-5)
    assert not np.isin(found.labels, gone).any()
    none = built(rows[:0], metric).exact_search(queries, 3)
    assert (none.labels == -1).all() and np.isinf(none.distances).all()


def test_k_larger_than_ef(rows, queries):
    """The beam holds max(ef, k): all 300 come back at ef=1 when 300 are wanted."""
    index = built(rows)
    oracle.assert_nearest(index.search(queries, 300, ef=1), queries, rows, 300, "l2")
    oracle.assert_nearest(index.search(queries, 301, ef=1), queries, rows, 301, "l2")


@pytest.mark.parametrize("expand", (1, 2, 4, 8))
@pytest.mark.parametrize("ef_upper", (1, 4))
def test_expand_and_ef_upper(expand, ef_upper, rows, queries, plain):
    result = plain.search(queries, 10, ef=300, expand=expand, ef_upper=ef_upper)
    oracle.assert_nearest(result, queries, rows, 10, "l2")


@pytest.mark.parametrize("pieces", (1, 2, 7, 300))
def test_one_call_or_many(pieces, rows, queries):
    index = hnsw_gpu.Index(24, "ip", M=4, ef_construction=40)
    given = [index.add(piece) for piece in np.array_split(rows, pieces)]
    np.testing.assert_array_equal(np.concatenate(given), np.arange(300))
    oracle.assert_nearest(index.search(queries, 10, ef=300), queries, rows, 10, "ip")
    index.check()


LABELS = {
    "shuffled": np.random.default_rng(3).permutation(300),
    "far apart": np.random.default_rng(4).permutation(300) * 30_000_000_000_000_000,
    "descending": np.arange(300)[::-1],
    "int32": np.arange(5, 305, dtype=np.int32),
    "uint64": np.arange(2**62, 2**62 + 300, dtype=np.uint64),
    "up to 2**63 - 1": 2**63 - 1 - np.arange(300),
    "list": list(range(1000, 1300)),
    "range": range(7, 2107, 7),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_the_caller(kind, rows, queries, tmp_path):
    labels = LABELS[kind]
    names = np.asarray(labels).astype(np.int64)
    index = built(rows, labels=labels)
    index.save(tmp_path / "index.hnsw")
    for one in (index, hnsw_gpu.load(tmp_path / "index.hnsw")):
        result = one.search(queries, 10, ef=300)
        oracle.assert_nearest(result, queries, rows, 10, "l2", labels=names)
        np.testing.assert_array_equal(one.labels, np.sort(names))
        assert one.labels.dtype == np.int64
        np.testing.assert_array_equal(one.vectors(names[[5, 9, 5]]), rows[[5, 9, 5]])
        assert int(names[17]) in one
        assert names[17] in one
        assert int(names.max()) - 1 not in one or int(names.max()) - 1 in set(names.tolist())


def test_numbers_continue_after_the_largest_label_ever_given(rows):
    index = hnsw_gpu.Index(24, "l2")
    np.testing.assert_array_equal(index.add(rows[:3]), [0, 1, 2])
    np.testing.assert_array_equal(index.add(rows[3:5], [40, 7]), [40, 7])
    np.testing.assert_array_equal(index.add(rows[5:7]), [41, 42])
    index.delete([41, 42, 40])
    np.testing.assert_array_equal(index.add(rows[5:7]), [43, 44])
    index.delete([43, 44])
    index.compact()
    np.testing.assert_array_equal(index.add(rows[5:6]), [45])
    np.testing.assert_array_equal(index.labels, [0, 1, 2, 7, 45])


def test_the_largest_label_survives_a_file(rows, tmp_path):
    index = built(rows[:10])
    index.delete([8, 9])
    index.compact()
    index.save(tmp_path / "index.hnsw")
    np.testing.assert_array_equal(hnsw_gpu.load(tmp_path / "index.hnsw").add(rows[20:21]), [10])


def test_one_row_may_be_given_flat_as_a_query(rows, plain):
    oracle.assert_same(plain.search(rows[5], 3), plain.search(rows[5:6], 3))
    oracle.assert_same(plain.search(rows[5].tolist(), 3), plain.search(rows[5:6], 3))
    oracle.assert_same(plain.search_radius(rows[5], 50.0), plain.search_radius(rows[5:6], 50.0))


def test_len_in_repr_and_facts(rows):
    index = hnsw_gpu.Index(24, "dot", "int8", M=8, ef_construction=50, refine="fp16", seed=9)
    assert (index.dim, index.metric, index.dtype) == (24, "ip", "int8")
    assert (index.M, index.ef_construction, index.seed, index.refine) == (8, 50, 9, "fp16")
    index.add(rows[:100], np.arange(100) * 3)
    assert len(index) == 100
    assert 297 in index and np.int64(297) in index
    for absent in (298, -1, 10**30, "297", 297.5, None, (1, 2)):
        assert absent not in index
    index.delete([297])
    assert 297 not in index
    assert len(index) == 99
    text = repr(index)
    assert "\n" not in text
    for fact in ("24", "ip", "int8", "99"):
        assert re.search(rf"\b{fact}\b", text), (fact, text)


def test_refine_true_means_fp32():
    assert hnsw_gpu.Index(4, dtype="int8", refine=True).refine == "fp32"
    assert not hnsw_gpu.Index(4, dtype="int8").refine
    assert hnsw_gpu.Index(4, dtype="fp16", refine="fp32").refine == "fp32"
    assert hnsw_gpu.Index(4, dtype="int4", refine=True).refine == "fp32"


def test_int4_keeps_finer_rows():
    assert hnsw_gpu.Index(4, dtype="int4").refine == "fp16"
    assert hnsw_gpu.Index(4, dtype="int4", refine="fp16").refine == "fp16"
    for none in (False, ""):
        with pytest.raises(ValueError, match=r"refine=.*'int4' are estimates, expected 'fp16'"):
            hnsw_gpu.Index(4, dtype="int4", refine=none)


@pytest.mark.parametrize(("dtype", "refine"), [("int8", True), ("int4", None)])
def test_rerank_says_how_many_the_finer_rows_compare(dtype, refine):
    """By hand: the nearest by the rows walked on, and of these the nearest by the finer ones."""
    rows, queries = oracle.gaussian(300, 24, seed=5), oracle.gaussian(20, 24, seed=6)
    rows[:, 0] += 30  # coarse codes
    queries[:, 0] += 30
    index = built(rows, "l2", dtype, refine=refine)
    state = index._state
    coarse = encode_queries(queries, "l2", dtype)
    walked = search_graph(state.graph, state.rows[:300], coarse, "l2", k=300, ef=300)
    walked = key_nodes(walked.keys)
    fine = np.square(queries[:, None] - index.vectors(np.arange(300))[walked]).sum(axis=2)
    differ = set()
    for rerank, count in ((1, 5), (5, 5), (12, 12), ("auto", 75), (100, 100), (None, 300)):
        best = fine[:, :count].argsort(axis=1, kind="stable")[:, :5]
        expected = np.take_along_axis(walked, best, axis=1)
        found = index.search(queries, 5, ef=300, rerank=rerank)
        np.testing.assert_array_equal(found.labels, expected)
        differ.add(found.labels.tobytes())
    assert len(differ) > 1, "it makes no difference"


@pytest.mark.parametrize(
    ("dtype", "refine", "row_bytes"),
    [
        ("fp32", False, 512),
        ("fp16", False, 256),
        ("int8", False, 160),
        ("int8", True, 672),
        ("int4", "fp16", 96 + 256),
        ("int4", True, 96 + 512),
    ],
)
def test_nbytes_counts_rows_links_and_labels(dtype, refine, row_bytes):
    vectors = oracle.gaussian(2000, 128, seed=5)
    index = built(vectors, "l2", dtype, M=8, ef_construction=30, refine=refine)
    layer0 = 2000 * 2 * 8 * 4
    expected = 2000 * row_bytes + layer0
    assert expected <= index.nbytes <= 1.15 * expected + 2000 * 64


@pytest.mark.parametrize(("dtype", "refine"), STORED)
@pytest.mark.parametrize("metric", METRICS)
def test_vectors_gives_the_stored_rows(dtype, refine, metric):
    rows = oracle.gaussian(50, 33, seed=8) * 3
    index = built(rows, metric, dtype, refine=refine)
    back = index.vectors(np.arange(49, -1, -1))[::-1]
    assert back.dtype == np.float32
    expected = oracle.unit(rows) if metric == "cosine" else np.float64(rows)
    precise = {False: dtype, True: "fp32", "fp16": "fp16"}[refine]
    step = {
        "fp32": 2.0**-23 * np.abs(expected),
        "fp16": 2.0**-10 * np.abs(expected) + 2.0**-24,
        "int8": np.broadcast_to(
            np.abs(expected).max(axis=1, keepdims=True) / 127 * 0.501, expected.shape
        ),
    }[precise]
    assert (np.abs(back - expected) <= step).all()
    assert index.vectors([]).shape == (0, 33)
    np.testing.assert_array_equal(index.vectors([4])[0], back[4])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ("fp32", "int8"))
def test_search_radius(metric, dtype):
    """All rows within the radius, as far as the rounding of the dtype can tell."""
    vectors, queries = oracle.gaussian(400, 12, seed=3), oracle.gaussian(30, 12, seed=4)
    index = built(vectors, metric, dtype)
    truth = oracle.distances(queries, vectors, metric)
    bound = oracle.error_bound(queries, vectors, metric, dtype)
    for share in (0.0, 0.003, 0.05, 0.5, 1.0):
        radius = float(np.quantile(truth, share)) if share else float(truth.min()) - 1
        if radius < 0 and metric in ("l2", "euclidean", "cosine"):
            radius = 0.0
        offsets, labels, distances = index.search_radius(queries, radius, ef=400)
        assert (offsets.dtype, labels.dtype) == (np.int64, np.int64)
        assert distances.dtype == np.float32
        assert offsets[0] == 0 and offsets[-1] == len(labels) == len(distances)
        for query in range(len(queries)):
            part = slice(offsets[query], offsets[query + 1])
            got, far = labels[part], np.float64(distances[part])
            assert (np.diff(far) >= 0).all()
            assert len(np.unique(got)) == len(got)
            assert (far <= np.float32(radius)).all()
            assert (np.abs(far - truth[query, got]) <= bound[query, got]).all()
            surely = np.flatnonzero(truth[query] + bound[query] < radius)
            assert np.isin(surely, got).all(), np.setdiff1d(surely, got)


@pytest.mark.parametrize("metric", METRICS)
def test_search_radius_is_closed(metric):
    """A row exactly at the radius belongs to the result: the distances given are radii."""
    rows, queries = oracle.gaussian(300, 24, seed=1), oracle.gaussian(60, 24, seed=2)
    index = built(rows, metric)
    nearest = index.search(queries, 5, ef=300).distances
    for query, far in zip(queries, nearest, strict=True):
        offsets, _, distances = index.search_radius(query, float(far[4]), ef=300)
        assert distances[-1] == far[4]
        np.testing.assert_array_equal(distances[:5], far)
        assert offsets[1] >= 5


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("radius", (10**9, 1e30, 1e300, np.inf, np.float32(1e9)))
def test_search_radius_finds_far_more_than_ef(metric, radius, rows):
    """A ball with every row in it comes back whole, whatever ef."""
    offsets, labels, _ = built(rows, metric).search_radius(rows[:3], radius, ef=10)
    np.testing.assert_array_equal(offsets, [0, 300, 600, 900])
    for part in labels.reshape(3, 300):
        np.testing.assert_array_equal(np.sort(part), np.arange(300))


@pytest.mark.parametrize("radius", (-1e-9, -1.0, -1e300, -np.inf))
def test_nothing_lies_within_a_negative_radius(radius, rows):
    for metric in ("l2", "euclidean"):
        offsets, labels, _ = built(rows, metric).search_radius(rows[:3], radius)
        np.testing.assert_array_equal(offsets, np.zeros(4))
        assert len(labels) == 0


def test_search_radius_with_copies_deleted_and_allowed(rows):
    index = built(np.concatenate([rows, rows[:5], rows[:5]]))
    index.delete([0, 301])
    offsets, labels, distances = index.search_radius(rows[:3], 0.0)
    np.testing.assert_array_equal(offsets, [0, 2, 4, 7])
    np.testing.assert_array_equal(labels, [300, 305, 1, 306, 2, 302, 307])
    np.testing.assert_array_equal(distances, np.zeros(7))
    _, labels, _ = index.search_radius(rows[:3], 0.0, allow=[305, 2, 5])
    np.testing.assert_array_equal(labels, [305, 2])


@pytest.mark.parametrize("metric", METRICS)
def test_neighbor_graph(metric):
    vectors = oracle.gaussian(500, 10, seed=6)
    index = built(vectors, metric)
    labels, distances = index.neighbor_graph(8, ef=500)
    truth = oracle.distances(vectors, vectors, metric)
    np.fill_diagonal(truth, np.inf)
    expected_labels, expected = oracle.nearest(truth, 8)
    bound = oracle.error_bound(vectors, vectors, metric, "fp32").max()
    np.testing.assert_allclose(distances, expected, rtol=0, atol=bound)
    assert (labels == expected_labels).mean() > 0.999
    assert (labels != np.arange(500)[:, None]).all()
    # a walk from its own node may end beside it where "nearest" is not a neighbourhood
    assert oracle.recall(index.neighbor_graph(8).labels, truth, 8) > (
        0.8 if metric == "ip" else 0.99
    )


def test_neighbor_graph_with_labels_copies_and_deleted():
    """Row i belongs to labels[i]; a copy is a neighbour at distance 0, oneself never."""
    vectors = oracle.integers(60, 8, seed=6)
    vectors[40:50] = vectors[:10]
    vectors[50:60] = vectors[:10]
    names = np.random.default_rng(1).permutation(1000)[:60]
    index = built(vectors, "l2", labels=names)
    index.delete(names[[3, 45, 59]])
    alive = np.setdiff1d(np.arange(60), [3, 45, 59])
    by_label = alive[np.argsort(names[alive])]
    np.testing.assert_array_equal(index.labels, names[by_label])
    truth = oracle.distances(vectors[by_label], vectors[by_label], "l2")
    np.fill_diagonal(truth, np.inf)
    for k in (1, 2, 5, 56, 70):
        labels, distances = index.neighbor_graph(k)
        assert labels.shape == (57, k)
        _, expected = oracle.nearest(truth, k)
        np.testing.assert_array_equal(distances, expected.astype(np.float32))
        number = {int(name): row for row, name in enumerate(index.labels)}
        for row, (got, far) in enumerate(zip(labels, distances, strict=True)):
            got = [number[int(label)] for label in got if label >= 0]
            assert len(set(got)) == len(got) == min(k, 56)
            assert row not in got
            np.testing.assert_array_equal(truth[row, got], far[: len(got)])


@pytest.mark.parametrize("metric", ("l2", "ip", "cosine"))
def test_exact_search_finds_the_exact_answer(metric):
    vectors, queries = oracle.gaussian(3000, 48, seed=1), oracle.gaussian(70, 48, seed=2)
    for k in (1, 10, 3000):
        result = hnsw_gpu.exact_search(vectors, queries, k, metric)
        oracle.assert_nearest(result, queries, vectors, k, metric)


@pytest.mark.parametrize("metric", ("l2", "ip"))
def test_exact_search_on_integers_to_the_last_bit(metric):
    """Many ties: the smaller row number first."""
    vectors, queries = oracle.integers(2000, 5, 1, largest=1), oracle.integers(40, 5, 2, largest=1)
    labels, distances = hnsw_gpu.exact_search(vectors, queries, 100, metric)
    expected_labels, expected = oracle.nearest(oracle.distances(queries, vectors, metric), 100)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_array_equal(distances, expected.astype(np.float32))


def test_exact_search_far_from_the_origin():
    """Near rows under a large offset: |q|^2 + |x|^2 - 2 q.x alone would lose every digit."""
    vectors = oracle.gaussian(2000, 16, seed=3) + np.float32(3000)
    queries = vectors[:50] + oracle.gaussian(50, 16, seed=4) * np.float32(0.01)
    labels, distances = hnsw_gpu.exact_search(vectors, queries, 5, "l2")
    truth = oracle.distances(queries, vectors, "l2")
    expected_labels, expected = oracle.nearest(truth, 5)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected, rtol=1e-4)


def test_signed_zeros_and_tiny_and_huge_rows():
    vectors = np.array(
        [[0.0, 1], [-0.0, 1], [1e-13, 0], [-1e-13, 0], [0, 0], [1e15, 1], [1e15, -1e15]], np.float32
    )
    for dtype in ("fp32", "int8", "int4"):
        refine = True if dtype == "int4" else None
        index = built(vectors, "l2", dtype, refine=refine)
        labels, distances = index.search(vectors, 7)
        assert np.isfinite(distances).all()
        np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.arange(7), (7, 1)))
        np.testing.assert_array_equal(distances[:, 0], np.zeros(7))
    tiny = np.array([[1e-30, 0], [0, 1e-30], [-3e-30, 0], [1e15, 1e15]], np.float32)
    for dtype in ("fp32", "fp16", "int8", "int4"):
        index = built(tiny, "cosine", dtype)
        precise = index.refine or dtype
        oracle.assert_nearest(index.search(tiny, 4), tiny, tiny, 4, "cosine", precise)


def test_all_zero_rows_are_fine_where_a_length_is_not_needed():
    vectors = np.zeros((5, 3), np.float32)
    vectors[4, 1] = 2
    for metric, expected in (("l2", [0, 0, 0, 0, 4]), ("ip", [1, 1, 1, 1, 1])):
        for dtype, refine in STORED:
            labels, distances = built(vectors, metric, dtype, refine=refine).search(vectors[:1], 5)
            np.testing.assert_array_equal(labels, [[0, 1, 2, 3, 4]])
            np.testing.assert_array_equal(distances, np.array([expected], np.float32))


def test_seed_is_used_and_defaults_to_zero(tmp_path, rows):
    def bytes_of(**settings):
        built(rows, **settings).save(tmp_path / "index.hnsw")
        return (tmp_path / "index.hnsw").read_bytes()

    assert bytes_of() == bytes_of(seed=0)
    assert bytes_of(seed=1) != bytes_of(seed=0)


def test_auto_device_answers_like_the_cpu(rows, queries, plain):
    index = built(rows, device="auto")
    oracle.assert_same(index.search(queries, 5), plain.search(queries, 5))
    oracle.assert_same(plain.to("cpu").search(queries, 5), plain.search(queries, 5))


def test_replacing_the_same_vectors_again_and_again():
    """Neither memory nor the work of a search grows: `add` leaves out what was deleted."""
    rng = np.random.default_rng(0)
    index = hnsw_gpu.Index(8, "l2", M=4, ef_construction=20)
    index.add(rng.normal(size=(300, 8)))
    largest = 0
    for _ in range(30):
        labels = index.labels[:100]
        rows = rng.normal(size=(100, 8)).astype(np.float32)
        index.delete(labels)
        index.add(rows, labels=labels)
        np.testing.assert_array_equal(index.vectors(labels), rows)
        np.testing.assert_array_equal(index.search(rows, 1, ef=100).labels[:, 0], labels)
        largest = max(largest, index._state.node_count)
    assert len(index) == 300 and largest <= 700, largest
    index.check()


def test_labels_in_any_order_are_found():
    """A table by label, which grows with single adds, deletes and copies: beside a dict."""
    rng = np.random.default_rng(1)
    index, known = hnsw_gpu.Index(4, "l2", M=4, ef_construction=10), {}
    numbers = iter(rng.permutation(2**40 + np.arange(0, 60_000, 7)).tolist())
    held = []
    for turn in range(120):
        count = int(rng.integers(1, 9)) if turn % 20 else 300
        labels = [next(numbers) for _ in range(count)]
        rows = rng.normal(size=(count, 4)).astype(np.float32)
        if known and turn % 3 == 0:
            rows[0] = next(iter(known.values()))  # a copy of what is there
        index.add(rows, labels)
        known |= dict(zip(labels, rows, strict=True))
        with pytest.raises(ValueError, match=rf"label {labels[-1]} is already in the index"):
            index.add(rows[:1], labels[-1:])
        if turn % 10 == 9:
            gone = rng.permutation(list(known))[:5].tolist()
            index.delete(gone)
            known = {label: row for label, row in known.items() if label not in gone}
            assert not any(label in index for label in gone)
        held.append((index._state.labels, list(known)[-1], sorted(known)))
        np.testing.assert_array_equal(index.vectors(list(known)), list(known.values()))
    np.testing.assert_array_equal(index.labels, sorted(known))
    for labels, last, every in held:  # states of before know no label of after
        assert labels.sorted.tolist() == every
        assert (labels.find(np.array(every)) >= 0).all() and labels.find(np.array([last]))[0] >= 0
        later = np.setdiff1d(sorted(known), every)
        assert (labels.find(later) == -1).all()
