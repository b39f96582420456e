"""Numbers of every magnitude: the right answer, or a refusal that names the rows, or a warning."""

import logging

import numpy as np
import oracle
import pytest

import hnsw_gpu
from hnsw_gpu.engine import vectors as vectors_module
from hnsw_gpu.recall import recall

N, DIM, K = 400, 16, 10
STORED = [
    ("fp32", False),
    ("fp16", False),
    ("int8", False),
    ("int8", True),
    ("fp16", True),
    ("int4", True),
]
LEAST_RECALL = {"fp32": 0.995, "fp16": 0.98, "int8": 0.95}


def drawn(scale=1.0, seed=0, rows=N):
    """float32 vectors, and queries, of about `scale` a number."""
    random = np.random.default_rng(seed)
    vectors, queries = (random.standard_normal((n, DIM)) * scale for n in (rows, 50))
    return vectors.astype(np.float32), queries.astype(np.float32)


def truth(vectors, queries, metric):
    """float64 (q, n), smaller is nearer, without the 1 - dot that forgets small products."""
    vectors, queries = vectors.astype(np.float64), queries.astype(np.float64)
    if metric in ("l2", "euclidean"):
        return np.square(vectors[None] - queries[:, None]).sum(axis=2)
    if metric == "cosine":
        vectors, queries = oracle.unit(vectors), oracle.unit(queries)
    return -queries @ vectors.T


def share_found(labels, distances):
    """Share of the K nearest by float64 distances (q, n) among labels (q, K)."""
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :K]
    return np.mean([len(set(a) & set(b)) / K for a, b in zip(labels, nearest, strict=True)])


def built(vectors, metric, dtype="fp32", refine=False):
    index = hnsw_gpu.Index(vectors.shape[1], metric, dtype, refine=refine)
    index.add(vectors)
    return index


def refused(pieces, call, *args, **kwargs):
    with pytest.raises(ValueError) as raised:
        call(*args, **kwargs)
    for piece in pieces:
        assert piece in str(raised.value)


@pytest.fixture
def warned(caplog):
    """What was said on the logger since the last call."""

    def said():
        text = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return text

    caplog.set_level(logging.WARNING, "hnsw_gpu")
    return said


# ---------------------------------------------------------------- every magnitude


@pytest.mark.parametrize("scale", (1e-13, 1e-10, 1e-6, 1e-4, 1.0, 1e4, 1e10, 1e18))
@pytest.mark.parametrize("metric", ("l2", "euclidean", "ip", "cosine"))
def test_order_at_every_magnitude(metric, scale, warned):
    vectors, queries = drawn(scale)
    distances = truth(vectors, queries, metric)
    for dtype, refine in STORED:
        if "fp16" in dtype and metric != "cosine" and not 1e-5 < scale < 1e4 + 1:
            refused(["fp16", "rows 0, 1"], built, vectors, metric, dtype, refine)
            continue
        index = built(vectors, metric, dtype, refine)
        least = LEAST_RECALL["fp32" if refine else dtype]
        assert share_found(index.search(queries, K, ef=N).labels, distances) >= least
        assert share_found(index.exact_search(queries, K).labels, distances) >= least
    free = hnsw_gpu.exact_search(vectors, queries, K, metric)
    assert share_found(free.labels, distances) >= LEAST_RECALL["fp32"]
    assert warned() == []


@pytest.mark.parametrize("scale", (1e-45, 1e-30, 1e-22, 1e19, 3e38 / 5))
def test_cosine_knows_no_scale(scale):
    vectors, queries = drawn()
    plain = built(vectors, "cosine").search(queries, K, ef=N)
    vectors, queries = (rows.astype(np.float64) * scale for rows in (vectors, queries))
    vectors, queries = vectors.astype(np.float32), queries.astype(np.float32)
    is_zero = (vectors == 0).all(axis=1)
    asked = queries[(queries != 0).any(axis=1)]
    index = built(vectors[~is_zero], "cosine")
    distances = truth(vectors[~is_zero], asked, "cosine")
    if scale < 1e-40:  # numbers of two bits: many vectors are of one direction
        found = np.take_along_axis(distances, index.search(asked, K, ef=N).labels, axis=1)
        np.testing.assert_allclose(found, np.sort(distances, axis=1)[:, :K], atol=1e-6)
        return
    assert share_found(index.search(asked, K, ef=N).labels, distances) >= 0.995
    assert (index.search(asked, K, ef=N).labels == plain.labels).mean() >= 0.99


@pytest.mark.parametrize("metric", ("l2", "euclidean", "ip"))
@pytest.mark.parametrize("scale", (1e-42, 1e-38, 1e-30, 1e-22, 1e-17))
@pytest.mark.parametrize(("dtype", "refine"), STORED)
def test_rows_too_small_are_refused(metric, scale, dtype, refine):
    vectors, _ = drawn()
    vectors[[7, 30]] = scale
    pieces = ["vectors", "too small", "rows 7, 30", "multiply all vectors"]
    index = hnsw_gpu.Index(DIM, metric, dtype, refine=refine)
    refused(pieces, index.add, vectors)
    assert len(index) == 0
    refused(pieces, hnsw_gpu.exact_search, vectors, vectors[:1], 1, metric)
    limit = {"threshold": 1.0} if metric == "ip" else {"max_distance": 1.0}
    refused(pieces, hnsw_gpu.dedup, vectors, metric=metric, **limit)
    found = hnsw_gpu.dedup(vectors, metric=metric, on_invalid="drop", **limit)
    assert found.report["invalid"] == 2


@pytest.mark.parametrize("metric", ("l2", "ip"))
def test_float64_below_float32_is_not_zero(metric):
    vectors = drawn()[0].astype(np.float64)
    vectors[5] = 1e-60
    refused(["too small", "row 5"], built, vectors, metric)
    vectors[5] = 0
    assert len(built(vectors, metric)) == N


@pytest.mark.parametrize("metric", ("l2", "euclidean", "ip"))
def test_rows_too_large_are_refused(metric):
    vectors, _ = drawn()
    vectors[11, 3] = 1e19
    refused(["too large", "row 11", "multiply all vectors"], built, vectors, metric)


@pytest.mark.parametrize("metric", ("l2", "ip"))
def test_fp16_refuses_what_it_flushes_to_zero(metric):
    """Spacing of the smallest fp16 numbers: 6e-8."""
    vectors, queries = drawn(1e-5)
    vectors[[3, 4]] *= np.float32(0.05)
    for dtype, refine in (("fp16", False), ("fp16", True), ("int8", "fp16")):
        refused(["fp16", "rows 3, 4", "multiply"], built, vectors, metric, dtype, refine)
    vectors[[3, 4]] = 1e-5
    distances = truth(vectors, queries, metric)
    found = built(vectors, metric, "fp16").search(queries, K, ef=N)
    assert share_found(found.labels, distances) > 0.95
    vectors[9, 0] = 7e4
    refused(["too large for fp16", "row 9"], built, vectors, metric, "fp16")


def test_small_queries():
    """Under l2 a tiny query is answered like zero; under ip it would tie with everything."""
    vectors, _ = drawn()
    tiny = np.full((1, DIM), 1e-25, np.float32)
    distances = truth(vectors, tiny, "l2")
    for found in (
        built(vectors, "l2").search(tiny, K, ef=N),
        hnsw_gpu.exact_search(vectors, tiny, K, "l2"),
    ):
        assert share_found(found.labels, distances) == 1
    refused(["queries", "too small", "row 0"], built(vectors, "ip").search, tiny)
    refused(["queries", "too small", "row 0"], hnsw_gpu.exact_search, vectors, tiny, 1, "ip")
    assert built(vectors, "ip").search(0 * tiny, 3, ef=N).labels.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("metric", ("l2", "ip"))
@pytest.mark.parametrize(("dtype", "refine"), STORED)
def test_zeros_of_either_sign_are_copies(metric, dtype, refine, warned):
    vectors, _ = drawn()
    vectors[7], vectors[8] = 0, -0.0
    vectors[9] = vectors[10]
    vectors[9, 2], vectors[10, 2] = 0.0, -0.0
    index = built(vectors, metric, dtype, refine)
    asked = np.zeros((2, DIM), np.float32)
    asked[1] *= -1
    labels, distances = index.search(asked, N, ef=N)
    np.testing.assert_array_equal(labels[0], labels[1])
    np.testing.assert_array_equal(distances[0], distances[1])
    if metric == "l2":
        assert labels[0, :2].tolist() == [7, 8]
    else:  # all products are 0: in order of their numbers, zero or minus zero
        np.testing.assert_array_equal(distances, 1)
        np.testing.assert_array_equal(labels[0], np.arange(N))
    assert warned() == []


@pytest.mark.parametrize("metric", ("l2", "ip", "cosine"))
def test_mixed_magnitudes(metric):
    vectors, queries = drawn()
    factors = 10.0 ** np.random.default_rng(1).uniform(-6, 6, (N, 1))
    vectors = (vectors * factors).astype(np.float32)
    distances = truth(vectors, queries, metric)
    for dtype, refine in STORED[2:4] + STORED[:1]:
        least = LEAST_RECALL["fp32" if refine else dtype]
        found = built(vectors, metric, dtype, refine).search(queries, K, ef=N)
        assert share_found(found.labels, distances) >= least


# ---------------------------------------------------------------- inner products


def test_distances_of_ip_are_one_less_the_product():
    vectors, queries = drawn(0.3)
    index = built(vectors, "ip")
    for found in (
        index.search(queries, K, ef=N),
        index.exact_search(queries, K),
        hnsw_gpu.exact_search(vectors, queries, K, "ip"),
    ):
        products = np.take_along_axis(-truth(vectors, queries, "ip"), found.labels, axis=1)
        np.testing.assert_allclose(found.distances, 1 - products, atol=1e-6)
        assert (np.diff(products, axis=1) <= 1e-6).all()
    graph = index.neighbor_graph(3, ef=N)
    products = np.take_along_axis(-truth(vectors, vectors, "ip"), graph.labels, axis=1)
    np.testing.assert_allclose(graph.distances, 1 - products, atol=2e-6)


@pytest.mark.parametrize("scale", (1e-4, 1e-6))
def test_radius_of_small_products(scale):
    """The radius is compared in float64, not as the rounded distance that is returned."""
    vectors, queries = drawn(scale)
    index, products = built(vectors, "ip"), truth(vectors, queries, "ip")
    for query, row in zip(queries, products, strict=True):
        far = np.sort(row)
        offsets, labels, _ = index.search_radius(query, 1 + (far[19] + far[20]) / 2, ef=50)
        assert offsets.tolist() == [0, 20]
        assert set(labels) == set(np.argsort(row)[:20])


@pytest.mark.parametrize("metric", ("l2", "euclidean", "ip", "cosine"))
@pytest.mark.parametrize("scale", (1e-8, 1.0))
def test_recall_knows_no_scale(metric, scale):
    vectors, queries = drawn(scale)
    order = np.argsort(truth(vectors, queries, metric), axis=1, kind="stable")
    assert recall(vectors, queries, metric, order[:, :K], order[:, :K]) == 1
    assert recall(vectors, queries, metric, order[:, 5 : 5 + K], order[:, :K]) == 0.5
    assert recall(vectors, queries, metric, order[:, K : 2 * K], order[:, :K]) == 0


# ---------------------------------------------------------------- what float32 can resolve


def test_cosine_of_near_copies():
    """Distances are right to 2e-7: as much as float32 vectors of unit length can tell."""
    random = np.random.default_rng(3)
    for dim in (16, 768):
        query = random.standard_normal((1, dim))
        steps = np.logspace(-8, -0.5, 300)[:, None] * np.linalg.norm(query)
        away = oracle.unit(random.standard_normal((300, dim)))
        vectors = (query + steps * away).astype(np.float32)
        query = query.astype(np.float32)
        exact = 1 + truth(vectors, query, "cosine")[0]
        for found in (
            built(vectors, "cosine").search(query, 300, ef=300),
            hnsw_gpu.exact_search(vectors, query, 300, "cosine"),
        ):
            far = exact[found.labels[0]]
            np.testing.assert_allclose(found.distances[0], far, atol=2e-7)
            assert (np.maximum.accumulate(far) - far).max() <= 4e-7


@pytest.mark.parametrize("step", (1e-2, 1.0))
def test_an_offset_of_a_thousand_with_small_differences(step, warned):
    vectors, queries = (rows * np.float32(step) + np.float32(1000) for rows in drawn())
    distances = truth(vectors, queries, "l2")
    assert share_found(built(vectors, "l2").search(queries, K, ef=N).labels, distances) >= 0.999
    assert warned() == []
    for dtype, refine in STORED[1:]:
        found = built(vectors, "l2", dtype, refine).search(queries, K, ef=N, rerank=None)
        found = share_found(found.labels, distances)
        if refine:
            assert found >= 0.999
        assert found >= 0.8 or f"{N} of {N}" in " ".join(warned())
        warned()
    found = built(vectors, "cosine").search(queries, K, ef=N)  # of distances of 1e-10, and of 1e-6
    found = share_found(found.labels, truth(vectors, queries, "cosine"))
    assert found >= 0.95 or "fp32" in " ".join(warned())


# ---------------------------------------------------------------- int8, and vectors it merges


def with_outlier():
    vectors, queries = drawn()
    vectors[:, 0] = queries[:, 0] = 1000
    return vectors, queries


@pytest.mark.parametrize("metric", ("l2", "ip", "cosine"))
def test_outliers_are_told(metric, warned):
    vectors, queries = with_outlier()
    index = built(vectors, metric, "int8")
    worn, merged = warned()
    assert f"{N} of {N} vectors" in worn
    count = int(merged.split(" of ")[0].removeprefix("int8: "))
    nodes = len(np.unique(index.vectors(np.arange(N)), axis=0))
    assert count == N - nodes > N // 2
    refined = built(vectors, metric, "int8", True)
    (worn,) = warned()
    assert f"{N} of {N} vectors" in worn
    distances = truth(vectors, queries, metric)
    least = 0.999 if metric == "l2" else 0.9  # float32 rounds 1e6 and more to 0.06
    found = refined.search(queries, K, ef=N, rerank=None)
    assert share_found(found.labels, distances) >= least
    labels, _ = refined.search(queries, N, ef=N)
    assert (np.sort(labels, axis=1) == np.arange(N)).all()
    refined.check()


def beside(shared, scale):
    """Rows, float64, that share one number, beside which the others are small."""
    vectors, _ = drawn()
    vectors = vectors.astype(np.float64) * scale
    vectors[:, 0] = shared
    return vectors


@pytest.mark.parametrize("dtype", ("fp32", "int8"))
@pytest.mark.parametrize(
    ("metric", "vectors"),
    [
        ("l2", beside(1, 1e-23)),  # squares of differences vanish
        ("ip", beside(1, 1e-5)),  # products differ by less than float32 resolves
        *((metric, drawn()[0].astype(np.float64) + 1e8) for metric in ("l2", "ip", "cosine")),
        ("l2", (1e12 + 1e3 * drawn()[0].astype(np.float64)).astype(np.int64)),
        ("l2", 2**52 + (1e2 * drawn()[0].astype(np.float64)).astype(np.int64)),
    ],
)
def test_what_float32_cannot_tell_apart_is_told(metric, vectors, dtype, warned):
    built(vectors, metric, dtype)
    told = [text for text in warned() if text.startswith("float32 takes over 25 %")]
    assert len(told) == 1 and f"from {N} of {N} vectors" in told[0]
    hnsw_gpu.exact_search(vectors, vectors[:1], 3, metric)
    assert told[0] in warned()
    if metric != "ip":
        hnsw_gpu.dedup(vectors, max_distance=1e-6, metric=metric)
        assert told[0] in warned()
    moved = vectors - vectors.mean(axis=0)
    built(moved / moved.std(), metric, dtype)
    assert not any(text.startswith("float32") for text in warned())


@pytest.mark.parametrize("refine", (False, True))
def test_a_thousand_rows_of_one_code(refine):
    """Scales that differ keep the nodes apart: all are reached, though their distances tie."""
    vectors, queries = drawn(rows=1000)
    vectors[:, 0] += 1000
    queries[:, 0] += 1000
    index = built(vectors, "l2", "int8", refine)
    index.check()
    assert index._state.node_count >= 980
    labels, distances = index.search(queries, 1000, ef=1000)
    assert (np.sort(labels, axis=1) == np.arange(1000)).all()
    exact = index.exact_search(queries, 1000)
    np.testing.assert_array_equal(distances, exact.distances)
    if refine:
        assert share_found(labels[:, :K], truth(vectors, queries, "l2")) >= 0.999


@pytest.mark.parametrize("refine", (True, "fp16"))
@pytest.mark.parametrize("metric", ("l2", "cosine"))
def test_a_mean_too_large_for_int4_is_told(metric, refine, warned):
    """The finer rows keep the vectors apart; the walk on codes does not lead to all of them."""
    vectors, queries = drawn(rows=3000)
    built(vectors, metric, "int4", refine)
    assert warned() == []
    index = built(vectors + 10, metric, "int4", refine)
    (worn,) = warned()
    assert "3,000 of 3,000 vectors" in worn and "rerank=None does" in worn
    distances = truth(vectors + 10, queries + 10, metric)
    few = share_found(index.search(queries + 10, K).labels, distances)
    all_ = share_found(index.search(queries + 10, K, ef=3000, rerank=None).labels, distances)
    assert few < 0.9 < all_


def test_some_rows_with_an_outlier(warned):
    vectors, _ = drawn()
    vectors[[4, 9, 200], [0, 5, 3]] = 1e4
    built(vectors, "l2", "int8")
    (worn,) = warned()
    assert f"3 of {N} vectors" in worn
    built(vectors, "l2", "fp32")
    assert warned() == []


@pytest.mark.parametrize(("dtype", "refine"), [("int8", False), ("fp16", False), ("int8", "fp16")])
def test_merged_vectors_are_counted_over_all_adds(dtype, refine, warned, tmp_path):
    vectors, _ = drawn()
    unlike = vectors[:5] * np.float32(1 + 1e-6)
    unlike = np.where(unlike == vectors[:5], np.nextafter(unlike, np.float32(9)), unlike)
    index = hnsw_gpu.Index(DIM, "l2", dtype, refine=refine)
    index.add(vectors)
    index.add(vectors[:50])  # true copies
    assert warned() == []
    before = index._state.node_count
    index.add(unlike)
    said = warned()
    merged = before + 5 - index._state.node_count
    assert (said == []) if not merged else (f" {merged} of 5 vectors" in said[0])
    assert merged or dtype == "int8"
    labels, _ = index.search(unlike, 1, ef=N)
    assert set(labels[:, 0]) <= set(range(5))
    index.save(tmp_path / "index.hnsw")
    loaded = hnsw_gpu.load(tmp_path / "index.hnsw", device="cpu")
    loaded.add(unlike)  # what these nodes were made of is not in the file: unknown is not unlike
    assert warned() == []
    loaded.compact()
    loaded.add(vectors)
    assert warned() == []


@pytest.mark.parametrize(("dtype", "refine"), STORED)
@pytest.mark.parametrize("metric", ("l2", "ip", "cosine"))
def test_ordinary_vectors_are_added_in_silence(metric, dtype, refine, warned):
    kinds = [
        drawn()[0],
        oracle.gaussian(N, DIM, seed=1, clusters=20, spread=0.1),
        np.abs(drawn()[0]),
        np.repeat(drawn()[0][:3], 100, axis=0),
        np.eye(DIM, dtype=np.float32),
        (np.random.default_rng(2).random((N, DIM)) < 0.3).astype(np.float32) + np.eye(1, DIM),
    ]
    for vectors in kinds:
        built(vectors, metric, dtype, refine)
        built(vectors[:1], metric, dtype, refine)
        assert warned() == []


@pytest.mark.parametrize("dim", [1, 20, 33])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_no_byte_of_an_encoded_query_is_left_to_chance(dtype, dim, monkeypatch):
    def encoded(before):
        def filled(shape, dtype):
            made = np.empty(shape, dtype)
            made.view(np.uint8)[...] = before
            return made

        monkeypatch.setattr(vectors_module, "empty_aligned", filled)
        rows = vectors_module.encode(drawn()[0][:5, :1].repeat(dim, axis=1), "l2", dtype)
        asked = vectors_module.encode_queries(drawn()[1][:, :1].repeat(dim, axis=1), "l2", dtype)
        return rows.tobytes(), vectors_module.rows_as_queries(rows).tobytes(), asked.tobytes()

    assert encoded(0xAB) == encoded(0xCD)
