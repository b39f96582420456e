"""Bad input: a clear error of the right type, and an index that answers as if nothing happened."""

import inspect
from typing import Any, ClassVar

import numpy as np
import oracle
import pytest

import hnsw_gpu

DIM, N = 12, 200


def good(rows=3):
    return oracle.gaussian(rows, DIM, seed=5)


def bad_rows(value, at=(1,)):
    rows = good()
    rows[list(at), 2] = value
    return rows


def with_zero_row():
    rows = good(6)
    rows[4] = 0
    return rows


class OnAGPU:
    """An array in device memory, as CuPy or torch would hand it over."""

    shape, dtype = (3, DIM), np.dtype(np.float32)
    __cuda_array_interface__: ClassVar[dict[str, Any]] = {
        "shape": (3, DIM),
        "typestr": "<f4",
        "data": (4096, True),
        "version": 3,
    }

    def __array__(self, dtype=None, copy=None):
        raise TypeError("implicit conversion to a host array is not allowed")

    def __dlpack__(self, **options):
        raise BufferError("no device")

    def __dlpack_device__(self):
        return (2, 0)


# name: (call, type of error, pieces of the message)
ROWS = {
    "one NaN": (bad_rows(np.nan), ValueError, ["NaN", "1"]),
    "one infinity": (bad_rows(np.inf), ValueError, ["1"]),
    "negative infinity": (bad_rows(-np.inf), ValueError, ["1"]),
    "NaN in several": (bad_rows(np.nan, at=(0, 2)), ValueError, ["0", "2"]),
    "too large for float32": (good().astype(np.float64) * 1e300, ValueError, ["0"]),
    "wrong dim": (good()[:, :5], ValueError, ["5", "12"]),
    "three axes": (good()[None], ValueError, ["(1, 3, 12)", "12"]),
    "no axis": (np.float32(3), ValueError, ["12"]),
    "objects": (good().astype(object), TypeError, ["object"]),
    "complex": (good().astype(complex), TypeError, ["complex128"]),
    "text": (good().astype(str), TypeError, ["U"]),
    "bytes": (np.full((3, DIM), b"1"), TypeError, ["S1"]),
    "dates": (np.zeros((3, DIM), "datetime64[s]"), TypeError, ["datetime64"]),
    "ragged lists": ([[1.0] * DIM, [1.0]], (ValueError, TypeError), []),
    "None": (None, TypeError, []),
    "a dict": ({"a": 1}, TypeError, []),
    "a generator": ((row for row in [[1.0] * DIM]), TypeError, []),
    "a string": ("vectors.npy", TypeError, []),
    "on a GPU": (OnAGPU(), (TypeError, ValueError), []),
}

LABELS = {
    "floats": (np.arange(3.0), TypeError, ["float64"]),
    "float list": ([7000.5, 7001.0, 7002.0], TypeError, ["float64"]),
    "text": (["a", "b", "c"], TypeError, ["strings"]),
    "booleans": (np.array([True, False, True]), TypeError, ["bool"]),
    "objects": (np.array([7000, 7001, None]), ValueError, ["neither", "row 2"]),
    "booleans as objects": (np.array([7000, True, 9], object), ValueError, ["neither", "row 1"]),
    "too few": ([7000, 7001], ValueError, ["2", "3"]),
    "too many": ([7000, 7001, 7002, 7003], ValueError, ["4", "3"]),
    "two axes": ([[7000, 7001, 7002]], ValueError, ["(1, 3)"]),
    "twice the same": ([7000, 7001, 7000], ValueError, ["7000"]),
    "already present": ([7000, 5, 9], ValueError, ["5"]),
    "minus one": ([7000, -1, 7002], ValueError, ["-1"]),
    "beyond int64": (np.array([7000, 2**63, 7002], np.uint64), (ValueError, OverflowError), []),
    "far beyond": ([7000, 2**70, 7002], (ValueError, TypeError, OverflowError), []),
}

NUMBERS = {
    "zero": (0, ValueError, ["0"]),
    "negative": (-3, ValueError, ["-3"]),
    "a float": (2.5, TypeError, ["2.5"]),
    "text": ("10", TypeError, ["10"]),
    "None": (None, TypeError, ["None"]),
    "an array": (np.array([3, 4]), TypeError, []),
    "NaN": (float("nan"), (TypeError, ValueError), ["nan"]),
    "huge": (2**70, (ValueError, OverflowError), []),
}


def settings_cases():
    for name, value, error in [
        ("dim", 0, ValueError),
        ("dim", -1, ValueError),
        ("dim", 2.0, TypeError),
        ("dim", "4", TypeError),
        ("dim", True, TypeError),
        ("metric", "manhattan", ValueError),
        ("metric", 3, (TypeError, ValueError)),
        ("metric", None, (TypeError, ValueError)),
        ("dtype", "fp64", ValueError),
        ("dtype", "float32", ValueError),
        ("dtype", np.float32, (TypeError, ValueError)),
        ("M", 1, ValueError),
        ("M", 0, ValueError),
        ("M", -16, ValueError),
        ("M", 129, ValueError),
        ("M", 16.0, TypeError),
        ("ef_construction", 0, ValueError),
        ("ef_construction", -5, ValueError),
        ("ef_construction", 10.5, TypeError),
        ("ef_construction", 2**40, ValueError),
        ("refine", "fp64", ValueError),
        ("refine", True, ValueError),  # fp32 rows have nothing finer beside them
        ("refine", 2, ValueError),
        ("seed", -1, ValueError),
        ("seed", 1.5, TypeError),
        ("seed", 2**64, ValueError),
        ("device", "tpu", ValueError),
    ]:
        yield pytest.param(name, value, error, id=f"{name}={value}")


@pytest.fixture
def index():
    index = hnsw_gpu.Index(DIM, "cosine", M=6, ef_construction=30)
    index.add(oracle.gaussian(N, DIM, seed=1))
    return index


@pytest.fixture(autouse=True)
def unharmed(index):
    """After every test the index answers with the same bits as before it."""
    queries = oracle.gaussian(15, DIM, seed=2)
    before = state(index, queries)
    yield
    after = state(index, queries)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    index.check()


def state(index, queries):
    labels, distances = index.search(queries, 9)
    offsets, within, far = index.search_radius(queries, 0.7)
    return {
        "labels": labels,
        "distances": distances,
        "offsets": offsets,
        "within": within,
        "far": far,
        "all": index.labels,
        "rows": index.vectors(index.labels),
        "len": len(index),
        "nbytes": index.nbytes,
        "repr": repr(index),
    }


def refuses(error, pieces, call, *args, **options):
    """`call` raises `error`, ours and not numpy's: the message holds all `pieces`."""
    with pytest.raises(error) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert len(message) > 10, message
    for piece in pieces:
        assert piece in message, f"{piece!r} is not in {message!r}"
    return message


@pytest.mark.parametrize("case", ROWS)
def test_rows(index, case):
    rows, error, pieces = ROWS[case]
    refuses(error, pieces, index.add, rows)
    refuses(error, pieces, index.search, rows, 3)
    refuses(error, pieces, index.search_radius, rows, 0.3)
    refuses(error, pieces, hnsw_gpu.exact_search, good(), rows, 3)
    if case not in ("wrong dim", "three axes", "no axis"):
        refuses(error, pieces, hnsw_gpu.exact_search, rows, good(), 3)


def test_zero_vectors_have_no_direction(index):
    refuses(ValueError, ["4", "zero"], index.add, with_zero_row())
    refuses(ValueError, ["4", "zero"], index.search, with_zero_row(), 3)
    refuses(ValueError, ["4", "zero"], index.search_radius, with_zero_row(), 0.2)
    refuses(ValueError, ["4", "zero"], hnsw_gpu.exact_search, with_zero_row(), good(), 3, "cosine")
    refuses(ValueError, ["4", "zero"], hnsw_gpu.exact_search, good(), with_zero_row(), 3, "cosine")


def test_the_first_offending_rows_are_named_not_all_of_them(index):
    rows = oracle.gaussian(5000, DIM, seed=3)
    rows[123:] = np.nan
    message = refuses(ValueError, ["123", "124"], index.add, rows)
    assert len(message) < 400


def test_fp16_storage_has_a_largest_number():
    index = hnsw_gpu.Index(DIM, "l2", "fp16")
    index.add(good())
    before = index.search(good(), 3)
    rows = good(4)
    rows[2, 0] = 70000
    refuses(ValueError, ["2"], index.add, rows)
    oracle.assert_same(index.search(good(), 3), before)
    assert len(index) == 3
    refined = hnsw_gpu.Index(DIM, "l2", "int8", refine="fp16")
    refuses(ValueError, ["2"], refined.add, rows)
    assert len(refined) == 0


def test_distances_beyond_float32_are_refused_or_right():
    """Squares of 1e25 overflow; no row may turn into "nothing found" in silence."""
    rows = good(40) * np.float32(1e25)
    for dtype in ("fp32", "int8"):
        index = hnsw_gpu.Index(DIM, "l2", dtype)
        try:
            index.add(rows)
        except ValueError as error:
            assert "0" in str(error)  # the first row
            continue
        labels, _ = index.search(rows, 40)
        np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.arange(40), (40, 1)))


@pytest.mark.parametrize("case", LABELS)
def test_labels(index, case):
    labels, error, pieces = LABELS[case]
    refuses(error, pieces, index.add, good(), labels)


def test_good_rows_beside_a_bad_one_are_not_added(index):
    rows = oracle.gaussian(3000, DIM, seed=6)
    rows[2999, 11] = np.inf
    refuses(ValueError, ["2999"], index.add, rows, np.arange(3000) + 10_000)
    assert 10_000 not in index


def test_a_refused_label_leaves_the_next_number_alone():
    index = hnsw_gpu.Index(DIM, "l2")
    index.add(good())
    refuses(ValueError, ["1"], index.add, good(), [50, 51, 1])
    refuses(ValueError, ["1"], index.add, bad_rows(np.nan), [60, 61, 62])
    np.testing.assert_array_equal(index.add(good(1)), [3])


def test_no_number_is_left_after_the_largest_label():
    index = hnsw_gpu.Index(DIM, "l2")
    index.add(good(1), [2**63 - 1])
    refuses((ValueError, OverflowError), [], index.add, good(2))
    np.testing.assert_array_equal(index.add(good(1), [4]), [4])
    assert len(index) == 2


# None is a default; a huge ef or number of threads is more than there is to do
RIGHT_NUMBERS = {
    ("threads", "None"),
    ("rerank", "None"),
    ("rerank", "huge"),
    ("expand", "None"),
    ("ef", "huge"),
    ("threads", "huge"),
}
WRONG_NUMBERS = [
    (name, case)
    for name in ("k", "ef", "expand", "ef_upper", "rerank", "threads")
    for case in NUMBERS
    if (name, case) not in RIGHT_NUMBERS
]


@pytest.mark.parametrize(("name", "case"), WRONG_NUMBERS)
def test_numbers_of_a_search(index, name, case):
    value, error, pieces = NUMBERS[case]
    refuses(error, [name, *pieces], index.search, good(), **{name: value})
    if name in inspect.signature(hnsw_gpu.Index.neighbor_graph).parameters:
        refuses(error, [name, *pieces], index.neighbor_graph, **{name: value})
    if name in ("ef", "threads"):
        refuses(error, [name, *pieces], index.search_radius, good(), 0.2, **{name: value})
    if name in ("k", "threads"):
        refuses(error, [name, *pieces], hnsw_gpu.exact_search, good(), good(), **{name: value})
    if name == "threads":
        refuses(error, [name, *pieces], index.add, good(), **{name: value})
        refuses(error, [name, *pieces], index.compact, **{name: value})


@pytest.mark.parametrize("radius", (float("nan"), "0.5", None, [0.1, 0.2], 1j))
def test_radius(index, radius):
    refuses((TypeError, ValueError), ["radius"], index.search_radius, good(), radius)


ALLOW = {
    "too short": (np.ones(N - 1, bool), ValueError, [str(N - 1)]),
    "no booleans": (np.ones(0, bool), ValueError, [str(N - 1)]),
    "packed, too short": (np.zeros(N // 8 - 1, np.uint8), ValueError, [str(N - 8), str(N - 1)]),
    "floats": (np.ones(N), TypeError, ["float64"]),
    "text": (["a", "b"], TypeError, ["strings"]),
    "objects": (np.array([True, None]), TypeError, ["object"]),
    "two rows for three queries": (np.ones((2, N), bool), ValueError, ["2", "3"]),
    "three axes": (np.ones((1, 3, N), bool), ValueError, [f"(1, 3, {N})"]),
    "labels in two axes": (np.zeros((3, 4), np.int64), (ValueError, TypeError), ["int64"]),
    "a number": (5, (TypeError, ValueError), []),
    "True": (True, (TypeError, ValueError), []),
}


@pytest.mark.parametrize("case", ALLOW)
def test_allow(index, case):
    allow, error, pieces = ALLOW[case]
    refuses(error, pieces, index.search, good(), 3, allow=allow)
    refuses(error, pieces, index.search_radius, good(), 0.2, allow=allow)


def test_unknown_labels(index):
    refuses(KeyError, ["7777"], index.delete, [3, 7777])
    refuses((KeyError, ValueError), ["-1"], index.delete, [-1])
    refuses(KeyError, ["7777"], index.vectors, [3, 7777, 8888])
    for call in (index.delete, index.vectors):
        refuses(TypeError, ["float64"], call, [3.0])
        refuses(TypeError, ["bool"], call, np.ones(N, bool))
        refuses(TypeError, ["strings"], call, ["3"])
        refuses(ValueError, ["(1, 2)"], call, [[3, 4]])


def test_a_label_deleted_twice():
    index = hnsw_gpu.Index(DIM)
    index.add(oracle.gaussian(20, DIM, seed=1))
    refuses((KeyError, ValueError), ["3"], index.delete, [3, 4, 3])
    assert len(index) == 20
    index.delete([3])
    before = index.search(good(), 20)
    refuses(KeyError, ["3"], index.delete, [4, 3])
    refuses(KeyError, ["3"], index.vectors, [3])
    oracle.assert_same(index.search(good(), 20), before)
    assert len(index) == 19


@pytest.mark.parametrize(("name", "value", "error"), list(settings_cases()))
def test_settings_of_an_index(name, value, error):
    message = refuses(error, [name], hnsw_gpu.Index, **{"dim": 4, name: value})
    assert str(value) in message or repr(value) in message, message


def test_a_gpu_that_is_not_there(index):
    refuses(RuntimeError, ["cuda"], hnsw_gpu.Index, 4, device="cuda")
    refuses(RuntimeError, ["cuda"], index.to, "cuda")
    refuses(ValueError, ["tpu"], index.to, "tpu")


def test_exact_search_of_unequal_dims():
    refuses(ValueError, ["12", "5"], hnsw_gpu.exact_search, good(), good()[:, :5], 3)
    refuses(ValueError, ["manhattan"], hnsw_gpu.exact_search, good(), good(), 3, "manhattan")


def test_unknown_keywords_are_refused(index):
    for call, args in (
        (hnsw_gpu.Index, (4,)),
        (index.search, (good(),)),
        (index.add, (good(),)),
        (hnsw_gpu.exact_search, (good(), good())),
    ):
        with pytest.raises(TypeError, match="nonsense"):
            call(*args, nonsense=1)


def test_files_that_are_not_there(index, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        hnsw_gpu.load(tmp_path / "absent.hnsw")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        index.save(tmp_path / "nowhere" / "index.hnsw")
    with pytest.raises(IsADirectoryError):
        hnsw_gpu.load(tmp_path)
    with pytest.raises(OSError, match=tmp_path.name):
        index.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for path in (None, 3.5):
        with pytest.raises(TypeError):
            index.save(path)
        with pytest.raises(TypeError):
            hnsw_gpu.load(path)
