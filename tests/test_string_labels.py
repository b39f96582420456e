"""Labels that are strings: the same index with integers, and a mapping beside it, is the oracle."""

import copy
import pickle
import threading

import numpy as np
import oracle
import pytest
from collections_of import make

import hnsw_gpu
from hnsw_gpu import Batcher, CorruptIndexError, Index, RadiusResult
from hnsw_gpu.files import read_arrays, write_arrays
from hnsw_gpu.inputs import RowsError
from hnsw_gpu.string_labels import to_file

DIM, COUNT = 8, 300
ROWS = np.random.default_rng(1).integers(-3, 4, (COUNT, DIM)).astype(np.float32)
ROWS[250:] = ROWS[:50]  # copies share nodes
QUERIES = ROWS[::7] + 0.25
ORDER = np.random.default_rng(2).permutation(COUNT)
NAMES = [f"dök {i}" if i % 3 else f"doc-{i:036d}" for i in ORDER]  # in no order, short and long
STRINGS = np.dtypes.StringDType()


def built(labels=None, rows=ROWS, **how) -> Index:
    index = Index(DIM, "l2", M=4, ef_construction=20, seed=5, **how)
    index.add(rows, labels)
    return index


def named(labels: np.ndarray, names=NAMES) -> list:
    """Strings of numbers, "" of -1."""
    return np.array([*names, ""], object)[labels].tolist()


def assert_alike(strings, integers, names=NAMES) -> None:
    """Two answers: strings that are the others' numbers, and the same bits of distances."""
    assert strings.labels.dtype == STRINGS and strings.labels.shape == integers.labels.shape
    assert strings.labels.tolist() == named(integers.labels, names)
    assert strings.distances.tobytes() == integers.distances.tobytes()


@pytest.fixture(scope="module")
def pair():
    """An index of strings, and that of their numbers; read only."""
    return built(NAMES), built()


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_answers_are_those_of_integers(pair, dtype):
    strings, integers = pair if dtype == "fp32" else (built(NAMES, dtype=dtype), built(dtype=dtype))
    few, most, many = [4, 7, 290], np.arange(0, COUNT, 2), np.arange(2 * COUNT // 3)
    assert_alike(strings.search(QUERIES, 7), integers.search(QUERIES, 7))
    assert_alike(strings.exact_search(QUERIES, 7), integers.exact_search(QUERIES, 7))
    assert_alike(strings.neighbor_graph(4), integers.neighbor_graph(4))
    for allow in (few, most, many):
        found = strings.search(QUERIES, 7, allow=[*named(np.array(allow)), "unknown"])
        assert_alike(found, integers.search(QUERIES, 7, allow=allow))
    one, other = (
        index.search_radius(QUERIES, 9, allow=allow)
        for index, allow in zip(pair, (named(most), most), strict=True)
    )
    assert isinstance(one, RadiusResult) and one.offsets.tolist() == other.offsets.tolist()
    assert one.labels.tolist() == named(other.labels) and len(one.labels)
    nothing = strings.search_radius(QUERIES[:0], 9)
    assert nothing.labels.dtype == STRINGS and nothing.offsets.tolist() == [0]
    too_few = strings.search(QUERIES[:1], 5, allow=[NAMES[3]])
    assert too_few.labels.tolist() == [[NAMES[3], "", "", "", ""]]
    assert np.isinf(too_few.distances[0, 1:]).all()


def test_what_is_in_it(pair):
    strings, integers = pair
    assert strings.label_kind == "strings" and integers.label_kind == "integers"
    assert strings.labels.dtype == STRINGS and strings.labels.tolist() == NAMES == list(strings)
    assert NAMES[5] in strings and "nobody" not in strings and 5 not in strings
    assert NAMES[5] not in integers and 5 in integers
    assert strings.holds(["nobody", NAMES[9]]).tolist() == [False, True]
    np.testing.assert_array_equal(strings.vectors(NAMES[20:30]), ROWS[20:30])
    for (name, row), wanted in zip(strings.items(), ROWS, strict=True):
        np.testing.assert_array_equal(row, wanted)
        assert name in strings
    with pytest.raises(KeyError, match="label 'nobody' and 1 more: not in the index"):
        strings.vectors([NAMES[0], "nobody", "neither"])
    text = sum(map(len, NAMES))
    assert integers.nbytes + text < strings.nbytes < integers.nbytes + 3 * text + 300 * COUNT
    strings.check()


def test_changes_are_those_of_integers():
    strings, integers = built(NAMES[:200], ROWS[:200]), built(range(200), ROWS[:200])
    both = [(strings, named), (integers, np.array)]

    def compare():
        assert strings.labels.tolist() == named(integers.labels)
        assert strings.deleted.tolist() == named(integers.deleted)
        assert_alike(strings.search(QUERIES, 5), integers.search(QUERIES, 5))

    assert strings.add(ROWS[200:], NAMES[200:]).tolist() == NAMES[200:]
    assert integers.add(ROWS[200:]).tolist() == list(range(200, 300))
    compare()
    for index, told in both:
        index.update(told(np.array([7, 3])), -ROWS[[7, 3]])
        index.add(ROWS[:2] + 9, told(np.array([11, 5])), replace=True)
        index.delete(told(np.arange(100, 180)))
    compare()
    for index, told in both:
        index.undelete(told(np.array([170, 101])))
        index.forget(told(np.array([102])))
    compare()
    with pytest.raises(KeyError, match=f"label '{NAMES[102]}': was not deleted, or is gone"):
        strings.undelete([NAMES[102]])
    with pytest.raises(KeyError, match="label 'nobody': not in the index"):
        strings.update(["nobody"], ROWS[:1])
    with pytest.raises(KeyError, match="label 'nobody': not in the index"):
        strings.delete(["nobody"])
    for index, _ in both:
        index.compact(keep_deleted=True)
    compare()
    for index, _ in both:
        index.compact()
    compare()
    strings.check()


def test_strings_that_nobody_uses_are_dropped():
    """By `compact`, and by an `add` that rebuilds; what is left keeps its order."""
    index = built(NAMES)
    index.delete(NAMES[:200])
    index.forget(NAMES[:10])
    before = index.search(QUERIES, 5)
    index.compact(keep_deleted=True)
    oracle.assert_same(index.search(QUERIES, 5), before)
    assert index.deleted.tolist() == NAMES[10:200]
    index.add(ROWS[:1], NAMES[:1])  # rebuilds: more than half are deleted
    assert index.labels.tolist() == NAMES[200:] + NAMES[:1] and not len(index.deleted)
    assert len(index._state.names) == index._state.next_label == 101
    index.delete(index.labels)
    index.compact()
    assert index.add(ROWS[:2]).tolist() == [0, 1]  # an empty index takes either
    index.check()


def test_the_same_strings_again():
    """A label that was deleted for good, and given again, is a new one."""
    index = built(NAMES)
    index.delete(NAMES[:3])
    index.forget(NAMES[:3])
    assert index.add(ROWS[:3] + 5, NAMES[2::-1]).tolist() == NAMES[2::-1]
    np.testing.assert_array_equal(index.vectors(NAMES[:3]), ROWS[2::-1] + 5)
    index.check()


def test_all_or_none():
    strings, integers = built(NAMES[:20], ROWS[:20]), built(rows=ROWS[:20])
    not_strings = "integers, and the labels of this index are strings"
    not_integers = "strings, and the labels of this index are integers"
    calls = [
        lambda index, labels: index.add(ROWS[:2], labels),
        lambda index, labels: index.add(ROWS[:2], labels, replace=True),
        lambda index, labels: index.update(labels, ROWS[:2]),
        lambda index, labels: index.delete(labels),
        lambda index, labels: index.undelete(labels),
        lambda index, labels: index.forget(labels),
        lambda index, labels: index.vectors(labels),
        lambda index, labels: index.holds(labels),
        lambda index, labels: index.search(QUERIES, 3, allow=labels),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=not_strings):
            call(strings, [0, 1])
        with pytest.raises(TypeError, match=not_integers):
            call(integers, NAMES[:2])
    with pytest.raises(ValueError, match="labels=None: the labels of this index are strings"):
        strings.add(ROWS[:1])
    for mask in (np.ones(20, bool), np.ones((len(QUERIES), 20), bool), np.ones(3, np.uint8)):
        with pytest.raises(ValueError, match="a mask is indexed by integer labels"):
            strings.search(QUERIES, 3, allow=mask)
    with pytest.raises(TypeError, match=not_strings):
        strings.merge(built(rows=ROWS[:2]))
    with pytest.raises(TypeError, match=not_integers):
        integers.merge(strings)
    for write in (lambda: strings.to_hnswlib("never"), strings.to_faiss):
        with pytest.raises(ValueError, match="labels are strings here"):
            write()
    strings.delete(strings.labels)  # what can come back counts
    with pytest.raises(TypeError, match=not_strings):
        strings.add(ROWS[:1], [3])
    strings.forget(strings.deleted)
    assert strings.add(ROWS[:1], [3]).tolist() == [3]
    strings.check()
    integers.delete(range(20))
    integers.forget(range(20))
    assert integers.add(ROWS[:1], ["three"]).tolist() == ["three"]
    integers.check()
    assert strings.add(ROWS[:0], []).dtype == np.int64


class Kind(str):
    """A string, and more."""

    def __str__(self):
        return "another"


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        np.array,
        lambda labels: np.array(labels, object),
        lambda labels: np.array(labels, STRINGS),
        lambda labels: [np.str_(label) for label in labels],
        lambda labels: [Kind(label) for label in labels],
        lambda labels: pytest.importorskip("pyarrow", reason="the extra io").array(labels),
        lambda labels: pytest.importorskip("polars", reason="of the extra test").Series(labels),
    ],
)
def test_forms_of_strings(form):
    index = built(form(NAMES[:5]), ROWS[:5])
    assert index.labels.tolist() == NAMES[:5]
    assert {type(label) for label in index} == {str}
    index.delete(form(NAMES[:1]))
    assert index.search(ROWS[:2], 1, allow=form(NAMES[1:2])).labels.tolist() == [[NAMES[1]]] * 2
    assert index.holds(NAMES[1]).tolist() == [True]  # one string


NO_STRINGS = r"labels: values that are no strings \(all labels are, or none\) in row"


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (["a", "", "c", ""], RowsError, r"labels: empty strings \(which mean none\) in rows 1, 3"),
        (
            ["a", None, "c", "d"],
            RowsError,
            NO_STRINGS + " 1",
        ),
        (
            ["a", "b", float("nan"), "d"],
            RowsError,
            NO_STRINGS + " 2",
        ),
        (
            ["a", "b", "c", 1],
            RowsError,
            NO_STRINGS + " 3",
        ),
        (
            [1, "b", 2, 3],
            RowsError,
            NO_STRINGS + "s 0, 2, 3",
        ),
        (
            ["a", b"b", "c", "d"],
            RowsError,
            NO_STRINGS + " 1",
        ),
        (
            np.array(["a", None, "c", "d"], object),
            RowsError,
            NO_STRINGS + " 1",
        ),
        (["a", "\ud800", "c", "\ud800\udc00"], RowsError, "labels: lone surrogates in rows 1, 3"),
        (["a", "b\0", "c", "d"], RowsError, "labels: null characters in row 1"),
        ([b"a", b"b", b"c", b"d"], TypeError, "expected integers or strings"),
        (
            [1, None, 2, 3],
            RowsError,
            "labels: values that are neither integers nor strings in row 1",
        ),
        ({"a", "b"}, TypeError, "labels: set, expected an array or a list"),
        (iter("abcd"), TypeError, "labels: str_.*iterator, expected an array or a list"),
        (["a", "b", "a", "d"], ValueError, "labels: label 'a' is given more than once"),
        (["a", "b", "c"], ValueError, "labels: 3 for 4 vectors"),
        ([["a", "b"], ["c", "d"]], ValueError, r"labels: shape \(2, 2\), expected \(m,\)"),
    ],
)
def test_no_labels(labels, error, words):
    index = built()
    empty = Index(DIM, "l2")
    for each in (index, empty):
        with pytest.raises(error, match=words):
            each.add(ROWS[:4], labels)
    assert len(index) == COUNT and index.label_kind == empty.label_kind == "integers"
    assert empty.add(ROWS[:1]).tolist() == [0]


def test_integers_that_are_objects_are_integers():
    """As a column of pandas may hold them."""
    index = Index(DIM, "l2")
    assert index.add(ROWS[:3], np.array([7, np.int64(9), 8], object)).tolist() == [7, 9, 8]
    with pytest.raises(ValueError, match="labels beyond int64"):
        index.add(ROWS[:1], np.array([2**63], object))


def test_what_is_refused_adds_no_string(tmp_path):
    """The file is as it was, and so is the number of the next string."""
    index = built(NAMES)
    index.save(tmp_path / "before")
    bad = ROWS[:2].copy()
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        index.add(bad, ["new", "newer"])
    with pytest.raises(ValueError, match=f"label '{NAMES[4]}' is already in the index"):
        index.add(ROWS[:2], ["new", NAMES[4]])
    with pytest.raises(ValueError, match="is in both"):
        index.merge(built(["new", NAMES[0]], ROWS[:2]))
    index.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    before = index._state
    with pytest.raises(ValueError, match="NaN"):
        index.add(bad, ["new", "newer"])
    index.add(ROWS[:1], ["newer"])
    assert "new" not in index and index.labels.tolist() == [*NAMES, "newer"]
    assert len(index._state.names) == COUNT + 1
    assert len(to_file(before)["string_offsets"]) == COUNT + 1  # an older state, as it was
    index.check()


@pytest.mark.parametrize("first", [100, 200])
def test_merge(first):
    """Of either into either, the larger or the smaller one."""
    mine, yours = built(NAMES[:first], ROWS[:first]), built(NAMES[first:], ROWS[first:])
    numbers, others = built(rows=ROWS[:first]), built(range(first, COUNT), ROWS[first:])
    for index, gone in ((mine, NAMES[first - 2 : first]), (numbers, [first - 2, first - 1])):
        index.delete(gone)
    mine.forget(NAMES[first - 1 : first])
    yours.add(ROWS[first - 1 : first], NAMES[first - 1 : first])  # with a number that is lower here
    others.add(ROWS[first - 1 : first], [first - 1])
    mine.merge(yours), numbers.merge(others)
    assert mine.labels.tolist() == named(numbers.labels)
    assert_alike(mine.search(QUERIES, 5), numbers.search(QUERIES, 5))
    mine.check()
    empty = Index(DIM, "l2", M=4, ef_construction=20, seed=5)
    empty.merge(yours)
    assert sorted(empty.labels.tolist()) == sorted(yours.labels.tolist())
    empty.merge(Index(DIM, "l2", M=4))
    empty.check()
    with pytest.raises(ValueError, match="is in both"):
        empty.merge(empty)


@pytest.mark.parametrize("form", ["saved", "mapped", "pickled", "copied"])
def test_kept(form, tmp_path):
    index = built(NAMES)
    index.delete(NAMES[4:9])
    index.tune(0.9, k=3)
    index.save(tmp_path / "strings.hnsw")
    if form in ("saved", "mapped"):
        again = hnsw_gpu.load(tmp_path / "strings.hnsw", mmap=form == "mapped", device="cpu")
        again = pickle.loads(pickle.dumps(again))
    else:
        again = pickle.loads(pickle.dumps(index)) if form == "pickled" else copy.deepcopy(index)
    oracle.assert_same(again.search(QUERIES, 3, recall=0.9), index.search(QUERIES, 3, recall=0.9))
    assert "_table" not in vars(again._state.names)  # nothing was looked up
    assert again.labels.tolist() == index.labels.tolist()
    assert again.deleted.tolist() == NAMES[4:9]
    again.save(tmp_path / "again.hnsw")
    assert (tmp_path / "again.hnsw").read_bytes() == (tmp_path / "strings.hnsw").read_bytes()
    again.undelete(NAMES[4:9])
    again.add(ROWS[:1], ["new"])
    assert again.labels.tolist() == [*NAMES, "new"]
    again.check()


def at(place, value):
    def change(arrays):
        name, row = place
        arrays[name] = arrays[name].copy()
        arrays[name][row] = value

    return change


def cut(name, stop):
    def change(arrays):
        arrays[name] = arrays[name][:stop]

    return change


def without(name):
    def change(arrays):
        del arrays[name]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (at(("string_offsets", 0), 1), "string_offsets do not cover"),
        (at(("string_offsets", -1), 2**62), "string_offsets do not cover"),
        (cut("string_bytes", -1), "string_offsets do not cover"),
        (at(("string_offsets", 2), 1), "string_offsets do not ascend, or a string is empty"),
        (at(("string_offsets", 2), -5), "string_offsets do not ascend, or a string is empty"),
        (at(("string_offsets", 2), 3), "string_offsets do not ascend, or a string is empty"),
        (at(("string_bytes", 1), 0xFF), "utf-8"),
        (at(("string_bytes", slice(0, 3)), [0xED, 0xA0, 0x80]), "utf-8"),
        (at(("string_bytes", slice(0, 6)), list(b"eeefff")), "'eee' is there twice"),
        (at(("string_bytes", slice(0, 6)), list(b"aaaaaa")), "'aaa' is there twice"),
        (at(("string_bytes", 5), 0), "string_bytes hold a null character"),
        (without("string_offsets"), "string_offsets"),
        (without("string_bytes"), "string_bytes"),
        (at(("label_strings", 0), 5), "labels are negative or repeated|the next label"),
        (at(("label_strings", 0), -1), "labels are negative or repeated"),
        (at(("deleted_labels", 0), 77), "strings, where the next label is"),
        (lambda arrays: arrays.update(string_offsets=arrays["string_offsets"].astype(np.int32)),
         "are no strings"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, change, words):
    index = built(["aaa", "bbb", "ccc", "ddd", "eee"], ROWS[:5])
    index.delete(["ccc"])
    index.save(tmp_path / "index.hnsw")
    arrays, about = read_arrays(tmp_path / "index.hnsw")
    change(arrays)
    write_arrays(tmp_path / "index.hnsw", arrays, about)
    with pytest.raises(CorruptIndexError, match=words):
        hnsw_gpu.load(tmp_path / "index.hnsw")


def test_no_reader_takes_numbers_for_labels(tmp_path):
    """A release without strings finds no labels in the file, and refuses it."""
    built(NAMES).save(tmp_path / "index.hnsw")
    arrays, _ = read_arrays(tmp_path / "index.hnsw")
    assert "labels" not in arrays and arrays["label_strings"].dtype == np.int64


def test_results_in_given_arrays(pair):
    strings, _ = pair
    out = np.empty((len(QUERIES), 3), STRINGS), np.empty((len(QUERIES), 3), np.float32)
    found = strings.search(QUERIES, 3, out=out)
    assert found.labels is out[0]
    oracle.assert_same(found, strings.search(QUERIES, 3))
    wrong = np.empty((len(QUERIES), 3), np.int64), out[1]
    with pytest.raises(ValueError, match="out: int64"):
        strings.search(QUERIES, 3, out=wrong)


def test_tuned(pair):
    strings, integers = pair
    assert strings.tune(0.9, k=3) == integers.tune(0.9, k=3)
    assert strings.tune(0.9, k=3, queries=QUERIES) == integers.tune(0.9, k=3, queries=QUERIES)


def test_searches_beside_adds():
    """Each search sees a whole state: known strings, each where its vector is."""
    index = built(NAMES[:20], ROWS[:20])
    place = {name: i for i, name in enumerate(NAMES)}
    problems, is_over = [], threading.Event()

    def look():
        while not is_over.is_set():
            found = index.search(QUERIES, 3, threads=1)
            rows = ROWS[[[place[name] for name in row] for row in found.labels.tolist()]]
            wanted = np.square(rows - QUERIES[:, None]).sum(axis=2)
            few = index.search(QUERIES[:1], 3, allow=NAMES[:3], threads=1).labels[0].tolist()
            if not np.array_equal(found.distances, wanted) or set(few) != set(NAMES[:3]):
                problems.append((found, few))

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for start in range(20, COUNT, 20):
            index.add(ROWS[start : start + 20], NAMES[start : start + 20])
            with pytest.raises(ValueError, match="NaN"):
                index.add(np.full((1, DIM), np.nan), [f"never {start}"])
            index.delete(NAMES[start : start + 10])
            if start % 60 == 0:
                index.compact()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert not problems
    index.check()


# ---------------------------------------------------------------- beside one index


def test_batches(pair):
    strings, _ = pair
    allowed = NAMES[:90]
    with Batcher(strings, batch_rows=10, threads=1) as batcher:
        asked = [batcher.submit(QUERIES, 3), batcher.submit(QUERIES[:4], 5, allow=allowed)]
        oracle.assert_same(asked[0].result(), strings.search(QUERIES, 3))  # in several parts
        oracle.assert_same(asked[1].result(), strings.search(QUERIES[:4], 5, allow=allowed))
        with pytest.raises(TypeError, match="integers, and the labels of this index are strings"):
            batcher.submit(QUERIES[:1], 5, allow=[1, 2]).result()


def test_a_collection(tmp_path):
    """As one of numbers, whose order is that of the strings."""
    order = np.argsort(np.argsort(np.array(NAMES, object)))
    ordered = sorted(NAMES)
    make(tmp_path / "s", ROWS, NAMES, metric="l2", M=4)
    make(tmp_path / "i", ROWS, order, metric="l2", M=4)
    strings, integers = hnsw_gpu.load(tmp_path / "s"), hnsw_gpu.load(tmp_path / "i")
    assert (strings.label_kind, integers.label_kind) == ("strings", "integers")
    assert strings.labels.tolist() == ordered
    assert_alike(strings.exact_search(QUERIES, 5), integers.exact_search(QUERIES, 5), ordered)
    some = np.arange(0, COUNT, 3)
    found = strings.search(QUERIES, 5, allow=[*named(some, ordered), "nobody"])
    assert_alike(found, integers.search(QUERIES, 5, allow=some), ordered)
    one, other = strings.search_radius(QUERIES, 9), integers.search_radius(QUERIES, 9)
    assert one.labels.tolist() == named(other.labels, ordered)
    assert one.offsets.tolist() == other.offsets.tolist()
    np.testing.assert_array_equal(strings.vectors(NAMES[::9]), ROWS[::9])
    assert strings.tune(0.9, k=3).recall == integers.tune(0.9, k=3).recall
    assert NAMES[3] in strings and "nobody" not in strings and 3 not in strings
    with pytest.raises(KeyError, match="label 'nobody': not in the collection"):
        strings.vectors([NAMES[0], "nobody"])
    strings.check()


def test_a_string_that_two_shards_have(tmp_path):
    make(tmp_path / "c", ROWS, [*NAMES[:-1], NAMES[0]])
    said = f"label '{NAMES[0]}' is in shard-0000.hnsw and in shard-0002.hnsw (1 are)"
    with pytest.raises(CorruptIndexError) as caught:
        hnsw_gpu.load(tmp_path / "c")
    assert str(caught.value) == f"{tmp_path / 'c'}: {said}"


def test_near_duplicates_of_an_index(pair, tmp_path):
    """By row numbers, and by strings: the same rows have the same others."""
    pytest.importorskip("pyarrow", reason="the extra io")
    rows = np.concatenate([ROWS[:20], QUERIES])
    how = {"max_distance": 0.1, "metric": "l2", "itself": False}
    found, expected = (hnsw_gpu.dedup(rows, against=index, **how) for index in pair)
    assert found.against.tolist() == named(expected.against)
    told = found.duplicates.column("against").to_pylist()
    assert told == named(expected.duplicates.column("against").to_numpy()) and len(told) == 20
    np.testing.assert_array_equal(found.keep, expected.keep)
