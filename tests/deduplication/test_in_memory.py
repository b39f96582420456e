"""dedup beside slow, obvious Python that compares all with all in float64."""

import itertools

import numpy as np
import oracle
import pytest

from hnsw_gpu import Index, dedup
from hnsw_gpu.deduplication import figures, near_pairs, sharded_join
from hnsw_gpu.deduplication.decision import NearRows
from hnsw_gpu.deduplication.distinct_rows import distinct_rows, rows_of
from hnsw_gpu.engine import build_graph
from hnsw_gpu.tuning import wilson

LINKAGES = ("star", "components", "any-earlier")


def made(n: int = 600, dim: int = 12, seed: int = 0) -> np.ndarray:
    """Rows in tight clusters, some of them copies, shuffled."""
    rows = oracle.gaussian(n, dim, seed=seed, clusters=n // 8, spread=0.12)
    rng = np.random.default_rng(seed + 1)
    rows[rng.integers(n, size=n // 6)] = rows[rng.integers(n, size=n // 6)]
    return rows


def near_table(rows: np.ndarray, metric: str, limit: float) -> np.ndarray:
    """bool (n, n), float64; no distance may be so near to the limit that rounding decides.

    Copies are near, also where a metric does not say so.
    """
    distances = oracle.distances(rows, rows, metric)
    assert np.abs(distances - limit).min() > 1e-7
    table = (distances <= limit) | (rows[:, None] == rows).all(axis=2)
    np.fill_diagonal(table, False)
    return table


def expected(near: np.ndarray, order: list[int], linkage: str) -> list[int]:
    """The row that stands for each row, by the words of the definitions. Copies are near rows."""
    position = {row: place for place, row in enumerate(order)}
    others = [np.flatnonzero(row) for row in near]
    if linkage == "star":
        kept: set[int] = set()
        for row in order:
            if not kept & set(others[row]):
                kept.add(row)
        return [row if row in kept else -1 for row in range(len(near))]
    if linkage == "any-earlier":
        return [
            -1 if any(position[other] < position[row] for other in others[row]) else row
            for row in range(len(near))
        ]
    first = list(range(len(near)))
    changed = True
    while changed:
        changed = False
        for row, other in itertools.product(range(len(near)), repeat=2):
            if near[row, other] and position[first[other]] < position[first[row]]:
                first[row], changed = first[other], True
    return first


def order_of(keep, near: np.ndarray) -> list[int]:
    rows = range(len(near))
    if keep == "first":
        return list(rows)
    if keep == "last":
        return list(rows)[::-1]
    if keep == "medoid":
        return sorted(rows, key=lambda row: (-int(near[row].sum()), row))
    which, values = keep
    return sorted(rows, key=lambda row: ((-1 if which == "max" else 1) * values[row], row))


VALUES = np.random.default_rng(9).integers(0, 50, 600)
KEEPS = ["first", "last", "medoid", ("max", VALUES), ("min", VALUES)]


@pytest.mark.parametrize("method", ["exact", "hnsw"])
@pytest.mark.parametrize("keep", KEEPS, ids=lambda keep: keep if keep in KEEPS[:3] else keep[0])
@pytest.mark.parametrize("linkage", LINKAGES)
def test_who_is_kept(linkage, keep, method) -> None:
    rows = made()
    near = near_table(rows, "cosine", 0.02)
    found = dedup(rows, 0.98, keep=keep, linkage=linkage, method=method, threads=2)
    wanted = expected(near, order_of(keep, near), linkage)
    np.testing.assert_array_equal(found.keep, [wanted[i] == i for i in range(600)])
    assert 0 < found.keep.sum() < 500
    dropped = np.flatnonzero(~found.keep)
    assert found.keep[found.duplicate_of[dropped]].all()
    assert (found.duplicate_of[found.keep] == -1).all()
    np.testing.assert_array_equal(
        found.group, np.where(found.keep, np.arange(600), found.duplicate_of)
    )
    truth = 1 - oracle.distances(rows, rows, "cosine")
    error = found.similarity[dropped] - truth[dropped, found.duplicate_of[dropped]]
    assert np.abs(error).max() < 1e-6
    assert np.isnan(found.similarity[found.keep]).all()
    if linkage == "components":
        np.testing.assert_array_equal(found.group, wanted)
    if linkage == "star":  # of the kept ones within the threshold, the nearest
        assert (found.similarity[dropped] >= np.float32(0.98)).all()
        for row in dropped:
            kept = np.flatnonzero(near[row] & found.keep)
            assert truth[row, found.duplicate_of[row]] >= truth[row, kept].max() - 1e-6


@pytest.mark.parametrize("method", ["exact", "hnsw"])
@pytest.mark.parametrize(("metric", "limit"), [("l2", 0.3), ("euclidean", 0.5), ("ip", -1.5)])
def test_other_metrics(metric, limit, method) -> None:
    rows = made()
    base = "l2" if metric == "euclidean" else metric
    near = near_table(rows, base, limit**2 if metric == "euclidean" else limit)
    found = dedup(rows, max_distance=limit, metric=metric, method=method, ef=200)
    wanted = expected(near, list(range(600)), "star")
    dropped = np.flatnonzero(~found.keep)
    is_copy = (rows[dropped] == rows[found.duplicate_of[dropped]]).all(axis=1)
    truth = oracle.distances(rows, rows, base)[dropped, found.duplicate_of[dropped]]
    truth = np.where(is_copy, 0, np.sqrt(np.maximum(truth, 0)) if metric == "euclidean" else truth)
    np.testing.assert_allclose(found.distance[dropped], truth, atol=1e-5)
    assert found.report["parameters"]["max_distance"] == pytest.approx(limit)
    again = found.regroup(max_distance=limit * (0.9 if limit > 0 else 1.1), linkage="components")
    once = dedup(
        rows, max_distance=limit * (0.9 if limit > 0 else 1.1), metric=metric,
        method="exact", linkage="components",
    )  # fmt: skip
    np.testing.assert_array_equal(again.group, once.group)
    assert again.report["pairs"] == once.report["pairs"] < found.report["pairs"]
    if metric != "ip":
        with pytest.raises(ValueError, match=f"'{metric}' has no similarity"):
            _ = found.similarity
    np.testing.assert_array_equal(found.keep, [wanted[i] == i for i in range(600)])


@pytest.mark.parametrize("method", ["exact", "hnsw"])
@pytest.mark.parametrize("linkage", LINKAGES)
def test_the_order_of_the_rows_does_not_matter(linkage, method) -> None:
    """Where values say who stays: the same rows stay and the same pairs are found, in any order."""
    rows, values = made(), np.random.default_rng(4).permutation(600)
    first = dedup(rows, 0.98, keep=("max", values), linkage=linkage, method=method)
    order = np.random.default_rng(5).permutation(600)
    keep = ("max", values[order])
    again = dedup(rows[order], 0.98, keep=keep, linkage=linkage, method=method)
    np.testing.assert_array_equal(again.keep, first.keep[order])
    stands = np.where(first.duplicate_of < 0, -1, np.argsort(order)[first.duplicate_of])[order]
    np.testing.assert_array_equal(again.duplicate_of, stands)
    assert again.report["pairs"] == first.report["pairs"]
    assert not first.keep.all()


def test_pairs_and_their_regrouping() -> None:
    pytest.importorskip("pyarrow")
    rows = made()
    found = dedup(rows, 0.96)
    table = found.pairs
    a, b = table["row_a"].to_numpy(), table["row_b"].to_numpy()
    similarity = table["similarity"].to_numpy()
    assert (a < b).all() and (similarity >= np.float32(0.96)).all()
    near = near_table(rows, "cosine", 0.04)
    first = {row.tobytes(): i for i, row in reversed(list(enumerate(rows)))}
    of = [first[row.tobytes()] for row in rows]
    wanted = {
        (i, j)
        for i, j in itertools.combinations(range(600), 2)
        if (of[i] == i and of[j] == j and near[i, j]) or (of[i] == of[j] and i == of[i])
    }
    assert set(zip(a.tolist(), b.tolist(), strict=True)) == wanted
    assert found.report["pairs"] == len(wanted)
    for linkage, keep in itertools.product(LINKAGES, ("first", "medoid")):
        again = found.regroup(0.98, linkage=linkage, keep=keep)
        once = dedup(rows, 0.98, linkage=linkage, keep=keep)
        np.testing.assert_array_equal(again.duplicate_of, once.duplicate_of)
        np.testing.assert_array_equal(again.similarity, once.similarity)
        assert again.report["kept"] == once.report["kept"]
    with pytest.raises(ValueError, match="the limit is wider"):
        found.regroup(0.95)


@pytest.mark.parametrize("method", ["exact", "hnsw"])
@pytest.mark.parametrize("linkage", ["star", "any-earlier"])
def test_a_heap_is_decided_though_its_pairs_are_too_many(monkeypatch, linkage, method) -> None:
    """300 rows all near each other beside others: k stops growing, the decision is the same."""
    rng = np.random.default_rng(3)
    rows = made()
    rows[:300] = rows[0] + 0.01 * rng.normal(size=(300, 12))
    rows = rows[rng.permutation(600)]
    wanted = dedup(rows, 0.98, linkage=linkage, method="exact")
    assert wanted.report["open_rows"] == 0
    monkeypatch.setattr(sharded_join, "LEAST_PAIRS", 0)
    monkeypatch.setattr(sharded_join, "PAIRS_A_NODE", 8)
    found = dedup(rows, 0.98, linkage=linkage, method=method)
    assert found.report["open_rows"] >= 200
    assert found.report["pairs"] < wanted.report["pairs"] / 2
    np.testing.assert_array_equal(found.keep, wanted.keep)
    assert found.keep[found.duplicate_of[~found.keep]].all()


def test_threads_and_methods_agree_bit_for_bit() -> None:
    rows = made(2000, 24)
    wanted = dedup(rows, 0.97, method="exact", threads=1)
    for method, threads in (("exact", 2), ("hnsw", 1), ("hnsw", 2), ("hnsw", 4)):
        found = dedup(rows, 0.97, method=method, threads=threads)
        for name in ("keep", "duplicate_of", "distance", "group"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
        assert found.report["recall"]["recall"] == 1
        assert found.report["histogram"] == wanted.report["histogram"]


@pytest.mark.slow
def test_the_threshold_is_met_by_what_is_reported() -> None:
    """A pair whose similarity, rounded to float32, is the threshold is within it."""
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(400, 6))
    every = dedup(rows, -1.0)
    similarity = np.sort(every.row_pairs()[2])
    for place in range(0, len(similarity), 1997):
        threshold = np.float32(1) - similarity[place]
        count = int((np.float32(1) - similarity >= threshold).sum())
        assert dedup(rows, float(threshold)).report["pairs"] == count


@pytest.mark.slow
def test_the_largest_distance_is_met_by_what_is_reported() -> None:
    rows = np.random.default_rng(5).normal(size=(300, 6))
    every = dedup(rows, metric="euclidean", max_distance=99)
    distance = np.sort(every.row_pairs()[2])
    for place in range(0, len(distance), 997):
        count = int((distance <= distance[place]).sum())
        found = dedup(rows, metric="euclidean", max_distance=float(distance[place]))
        assert found.report["pairs"] == count


@pytest.mark.parametrize(
    "rows",
    [np.zeros((0, 4)), np.ones((1, 4)), np.ones((50, 4)), np.eye(7), np.repeat(np.eye(5), 9, 0)],
    ids=["none", "one", "all equal", "none equal", "each nine times"],
)
@pytest.mark.parametrize("method", ["exact", "hnsw"])
def test_extremes(rows, method) -> None:
    distinct = len(np.unique(rows, axis=0))
    for linkage in LINKAGES:
        found = dedup(rows, method=method, linkage=linkage)
        assert found.keep.sum() == distinct == found.report["kept"]
        assert found.report["exact_copies"] == len(rows) - distinct
        assert found.report["near_duplicates"] == 0
        assert (found.similarity[~found.keep] == 1).all()


def test_invalid_rows() -> None:
    rows = made()
    rows[5], rows[7] = np.nan, np.inf
    rows[9] = 0
    with pytest.raises(ValueError, match="NaN or infinite values in rows 5, 7") as raised:
        dedup(rows)
    assert raised.value.rows.tolist() == [5, 7]
    assert raised.value.what == "NaN or infinite values"
    found = dedup(rows, 0.98, on_invalid="drop")
    assert found.report["invalid"] == 3
    assert not found.keep[[5, 7, 9]].any()
    assert (found.duplicate_of[[5, 7, 9]] == -1).all() and (found.group[[5, 7, 9]] == -1).all()
    left = np.delete(np.arange(600), [5, 7, 9])
    alone = dedup(rows[left], 0.98)
    np.testing.assert_array_equal(found.keep[left], alone.keep)
    rows[9] = 1
    with pytest.raises(ValueError, match="rows 5, 7"):
        dedup(rows, metric="l2", max_distance=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5: expected a cosine similarity"),
        ({"threshold": float("nan")}, "threshold: NaN"),
        ({"threshold": 0.9, "max_distance": 0.1}, "say one of them"),
        ({"metric": "l2"}, "say max_distance"),
        ({"linkage": "average"}, "expected one of 'star', 'components', 'any-earlier'"),
        ({"keep": "best"}, "expected one of 'first', 'last', 'medoid'"),
        ({"keep": ("max", np.ones(3))}, r"keep: float64 \(3,\), expected \(600,\) numbers"),
        ({"keep": ("max", np.full(600, np.nan))}, "keep: NaN in rows 0, 1"),
        ({"method": "fast"}, "expected one of 'auto', 'exact', 'hnsw'"),
        ({"on_invalid": "skip"}, "expected one of 'raise', 'drop'"),
    ],
)
def test_bad_input(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        dedup(made(), **given)


def test_sampled_recall_counts_what_is_missing(monkeypatch) -> None:
    rows = made(1500)
    found = dedup(rows, 0.98)
    told = found.report["recall"]
    assert told["sampled_rows"] == 300 and told["recall"] == 1 and told["true_pairs"] > 60
    near = found._near
    half = near.pairs._replace(**{name: getattr(near.pairs, name)[::2] for name in ("a", "b")})
    monkeypatch.setattr(near, "pairs", half)
    told = figures.recall(near, 0)
    assert 0.4 < told["recall"] < 0.6
    assert told["interval"] == list(wilson(told["found_pairs"], told["true_pairs"]))


def test_wilson() -> None:
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson(50, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)
    assert wilson(0, 0) == (0, 1)


def test_ids_name_the_rows_of_the_tables() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    rows = made()
    names = [f"text {i}" for i in range(600)]
    found = dedup(rows, 0.98, ids=names)
    for ids in (
        np.array(names),
        pyarrow.array(names),
        pyarrow.chunked_array([names[:9], names[9:]]),
    ):
        assert dedup(rows, 0.98, ids=ids).duplicates.equals(found.duplicates)
    dropped = np.flatnonzero(~found.keep)
    told = found.duplicates.to_pydict()
    assert told["id"] == [names[i] for i in dropped]
    assert told["duplicate_of"] == told["group"] == [names[i] for i in found.duplicate_of[dropped]]
    assert told["similarity"] == found.similarity[dropped].tolist()
    pairs = found.pairs.to_pydict()
    assert pairs["id_a"] == [names[i] for i in pairs["row_a"]]
    assert pairs["id_b"] == [names[i] for i in pairs["row_b"]]
    assert dedup(rows, 0.98).duplicates["id"].to_pylist() == dropped.tolist()
    with pytest.raises(ValueError, match="ids: 3 for 600 vectors"):
        dedup(rows, ids=[1, 2, 3])


@pytest.mark.parametrize("method", ["exact", "hnsw"])
@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_against_another_set(metric, method) -> None:
    rows = made()
    other = rows[50:550] + 0.12 * np.random.default_rng(2).normal(size=(500, 12))
    other[:40] = rows[100:140]
    limit = {"cosine": 0.02, "l2": 0.3, "ip": -9.0}[metric]
    distances = oracle.distances(rows, other, metric)
    is_equal = (rows[:, None] == other).all(axis=2) & (metric != "ip")
    near_other = (distances <= limit) | is_equal
    how = {"max_distance": limit, "metric": metric, "method": method}
    alone = dedup(rows, against=other, itself=False, **how)
    np.testing.assert_array_equal(alone.keep, ~near_other.any(axis=1))
    assert 100 < (~alone.keep).sum() == alone.report["against_duplicates"] <= 600 - 9
    assert (alone.duplicate_of == -1).all() and alone.report["recall"] is None
    for row in np.flatnonzero(~alone.keep):
        best = 0 if is_equal[row].any() else distances[row].min()
        assert alone.distance[row] == pytest.approx(best, abs=1e-5)
        chosen = 0 if is_equal[row, alone.against[row]] else distances[row, alone.against[row]]
        assert chosen == pytest.approx(best, abs=1e-5)
    assert (alone.against[alone.keep] == -1).all()

    both = dedup(rows, against=other, **how)
    left = np.flatnonzero(alone.keep)
    inside = dedup(rows[left], **how)
    np.testing.assert_array_equal(both.keep[left], inside.keep)
    wanted = np.where(inside.duplicate_of >= 0, left[inside.duplicate_of], -1)
    np.testing.assert_array_equal(both.duplicate_of[left], wanted)
    np.testing.assert_array_equal(both.against, alone.against)
    assert not both.keep[~alone.keep].any() and (both.group[~alone.keep] == -1).all()
    for name in ("exact_copies", "near_duplicates", "kept"):
        assert both.report[name] == inside.report[name]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_against_an_index(tmp_path, dtype) -> None:
    rows = made()
    other = rows[200:500] + 0.12 * np.random.default_rng(2).normal(size=(300, 12))
    other[100:150] = rows[:50]
    labels = np.arange(300) * 7
    index = Index(12, dtype=dtype)
    index.add(other, labels)
    index.delete(labels[:50])
    other, labels = other[50:], labels[50:]
    found = dedup(rows, 0.98, against=index, itself=False)
    index.save(tmp_path / "other.hnsw")
    again = dedup(rows, 0.98, against=tmp_path / "other.hnsw", itself=False)
    np.testing.assert_array_equal(found.against, again.against)
    kept = index.vectors(labels) if dtype != "fp32" else other
    distances = oracle.distances(rows, kept, "cosine")
    error = 1e-6
    certain = np.abs(distances.min(axis=1) - 0.02) > error
    np.testing.assert_array_equal((~found.keep)[certain], (distances.min(axis=1) <= 0.02)[certain])
    dropped = np.flatnonzero(~found.keep)
    assert 20 < len(dropped) < 580
    place = np.searchsorted(labels, found.against[dropped])
    np.testing.assert_allclose(found.distance[dropped], distances[dropped, place], atol=error)
    assert (distances[dropped, place] <= distances[dropped].min(axis=1) + error).all()
    if dtype == "fp32":  # an equal row is at distance 0, so that a threshold of 1 finds it
        is_copy = (rows[:, None] == other).all(axis=2).any(axis=1)
        assert is_copy.any()
        np.testing.assert_array_equal(
            dedup(rows, 1.0, against=index, itself=False).keep[is_copy], False
        )
    with pytest.raises(
        ValueError, match="an index of cosine and 12 dimensions, expected ip and 12"
    ):
        dedup(rows, 0.9, metric="ip", against=index)
    with pytest.raises(ValueError, match="nothing to compare with"):
        dedup(rows, itself=False)


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("is_full", [False, True], ids=["all pairs", "open nodes"])
@pytest.mark.parametrize("method", ["exact", "hnsw"])
def test_shards_change_nothing(monkeypatch, method, is_full, linkage) -> None:
    """The same nodes in parts, some in several: the same pairs, and the same decision."""
    rng = np.random.default_rng(3)
    rows = made()
    rows[:200] = rows[0] + 0.01 * rng.normal(size=(200, 12))
    rows = rows[rng.permutation(600)]
    wanted = dedup(rows, 0.98, linkage=linkage, method="exact")
    if is_full:
        monkeypatch.setattr(sharded_join, "LEAST_PAIRS", 0)
        monkeypatch.setattr(sharded_join, "PAIRS_A_NODE", 8)
    for cuts in ([600], [250, 600], [100, 101, 400, 600]):
        parts, own, place = [], [], 0
        for cut in cuts:
            encoded, about = distinct_rows("", rows[place:cut], "cosine")
            graph = None
            if method == "hnsw":
                graph = build_graph(
                    encoded, "cosine", M=8, ef_construction=50, seed=0, threads=2,
                    advance=lambda _: None,
                )  # fmt: skip
            parts.append(near_pairs.Nodes(encoded, graph, "cosine"))
            own.append(about.node_of)
            place = cut
        digests = [
            np.ascontiguousarray(part.rows).view(np.uint64).reshape(len(part.rows), -1)
            for part in parts
        ]
        numbers = sharded_join.numbers_of_nodes(digests)
        node_of = np.concatenate([number[of] for number, of in zip(numbers, own, strict=True)])
        whole = sharded_join.Shards(
            numbers, parts.__getitem__, lambda s, parts=parts: parts[s].rows, "cosine",
            ef=64, threads=2,
        )  # fmt: skip
        blocks = {place: whole.join_block(*place, wanted._near.limit) for place in whole.blocks}
        found = whole.unite(lambda s, t, blocks=blocks: blocks[s, t])
        assert found.is_open.any() == is_full
        if not is_full:
            for name in ("a", "b", "distances"):
                expected = getattr(wanted._near.pairs, name)
                np.testing.assert_array_equal(getattr(found, name), expected)
        if is_full and linkage == "components":
            continue  # which is decided by the pairs that are listed
        about = rows_of(600, np.arange(600), node_of)
        near = NearRows("cosine", wanted._near.limit, about, whole, found)
        dropped = near.decide(near.limit, linkage, "first")
        np.testing.assert_array_equal(dropped.keep, wanted.keep)
        if not is_full:
            np.testing.assert_array_equal(dropped.duplicate_of, wanted.duplicate_of)
            np.testing.assert_array_equal(dropped.distance, wanted.distance)


@pytest.mark.slow
def test_a_large_heap_of_near_copies() -> None:
    """12,000 rows near each other among 4,000 others: pairs are not listed, the decision is."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(16_000, 16)).astype(np.float32)
    rows[:12_000] = rows[0] + 1e-2 * rng.normal(size=(12_000, 16))
    order = rng.permutation(16_000)
    found = dedup(rows[order], 0.98, method="hnsw")
    assert found.keep.sum() == 4_001 and found.report["near_duplicates"] == 11_999
    head = np.flatnonzero(order < 12_000)[0]  # the heap's first row stays, for all of it
    assert (found.group[order < 12_000] == head).all()


def test_many_copies_of_few_rows() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.normal(size=(6_000, 16)).astype(np.float32), 10, axis=0)
    order = rng.permutation(60_000)
    found = dedup(rows[order], 0.999, method="hnsw")
    assert found.keep.sum() == 6_000 and found.report["exact_copies"] == 54_000
    _, first = np.unique(order // 10, return_index=True)
    np.testing.assert_array_equal(np.flatnonzero(found.keep), np.sort(first))


def test_near_copies_finer_than_float32_resolves() -> None:
    """Groups of 50 that differ by rounding errors: one row of each stays."""
    rng = np.random.default_rng(0)
    centers = np.repeat(rng.normal(size=(100, 32)), 50, axis=0)
    for noise in (1e-3, 1e-5, 1e-6):
        rows = (centers + noise * rng.normal(size=centers.shape)).astype(np.float32)
        assert dedup(rows, 0.95, method="hnsw").keep.sum() == 100


@pytest.mark.slow
def test_on_real_text() -> None:
    """The same verses in five translations: the graph drops what comparing all drops, no more."""
    from hnsw_gpu.demo import verses

    try:
        translations = np.array_split(verses.load_verses().vectors, 5)
    except ImportError as error:
        pytest.skip(str(error))
    vectors = np.concatenate([each[:1600] for each in translations])
    every = dedup(vectors, 0.8, method="exact")
    for threshold in (0.8, 0.9, 0.95):
        found = dedup(vectors, threshold, method="hnsw")
        dropped = ~every.regroup(threshold).keep
        assert dropped.sum() > 2000
        assert (found.keep & dropped).sum() <= 0.005 * dropped.sum()
        assert (found.similarity[~found.keep] >= np.float32(threshold)).all()
        reads = found.report["row_reads"]
        assert reads["from_own_node"] < reads["from_entry_point"]


@pytest.mark.parametrize("method", ("exact", "hnsw"))
@pytest.mark.parametrize("scale", (1e-12, 1e-5, 1.0))
def test_inner_products_of_every_size(method: str, scale: float) -> None:
    """Thresholds of ip are compared as products, of which 1 - product would know seven digits."""
    vectors = np.float32(scale) * oracle.gaussian(200, 16, seed=0)
    vectors[50] = vectors[3]
    products = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    a, b = np.triu_indices(200, 1)
    far = np.sort(products[a, b])
    least = np.float32((far[-40] + far[-41]) / 2)
    near = {(i, j) for i, j in zip(a, b, strict=True) if products[i, j] >= least}
    ways = [{"threshold": float(least)}, {"max_distance": 1 - float(least)}]
    for way in ways if scale > 1e-7 else ways[:1]:  # float64 has 1 - 1e-14, and not 1 - 1e-24
        found = dedup(vectors, metric="ip", method=method, ef=200, linkage="components", **way)
        i, j, _ = found.row_pairs()
        is_copy = np.array([50 in pair for pair in zip(i, j, strict=True)])
        wanted = {pair for pair in near if 50 not in pair}
        assert set(zip(i[~is_copy].tolist(), j[~is_copy].tolist(), strict=True)) == wanted
        dropped = np.flatnonzero(~found.keep)
        of_copy = dropped == 50
        expected = products[dropped, found.duplicate_of[dropped]]
        told = found.similarity[dropped]
        np.testing.assert_allclose(told[~of_copy], expected[~of_copy], rtol=1e-4)
        np.testing.assert_array_equal(found.distance[dropped][found.similarity[dropped] == 1], 0)
        parameters = found.report["parameters"]
        assert parameters["threshold"] == pytest.approx(float(least), rel=1e-5)
        again = found.regroup(parameters["threshold"])
        np.testing.assert_array_equal(again.keep, found.keep)
