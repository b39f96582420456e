"""Input that is refused: masked rows, nulls; and what a refusal leaves behind."""

import gc
import tracemalloc

import numpy as np
import pytest

from hnsw_gpu import Batcher, Index, dedup, exact_search, hnswlib


def test_a_refused_add_keeps_no_room() -> None:
    """Not even until the next collection: the error held all that was made for the rows."""
    index = Index(32, "l2")
    index.add(np.eye(32))
    rows = np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float32)
    rows[-1, 5] = np.nan
    held = index.nbytes
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(2):  # the first loads compiled code
            before = tracemalloc.get_traced_memory()[0]
            try:
                index.add(rows)
            except ValueError as error:
                assert "row 19999" in str(error)
            kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < 100_000 and index.nbytes == held


# ---------------------------------------------------------------- what is missing


DIM = 4
ROWS = np.random.default_rng(0).normal(size=(30, DIM)).astype(np.float32)


def masked(rows=(3, 7, 8), place=1):
    result = np.ma.MaskedArray(ROWS.copy(), mask=False)
    result[list(rows), place] = np.ma.masked
    return result


def filled() -> Index:
    index = Index(DIM, "l2")
    index.add(ROWS)
    return index


def submitted(value):
    with Batcher(filled()) as batcher:
        return batcher.submit(value, 2).result()


def added_as_hnswlib(value):
    index = hnswlib.Index("l2", DIM)
    index.init_index(len(ROWS))
    index.add_items(value)


USES = {
    "add": lambda value: filled().add(value),
    "search": lambda value: filled().search(value, 2),
    "exact_search of an index": lambda value: filled().exact_search(value, 2),
    "search_radius": lambda value: filled().search_radius(value, 0.1),
    "exact_search": lambda value: exact_search(value, ROWS, 2),
    "exact_search for": lambda value: exact_search(ROWS, value, 2),
    "dedup": dedup,
    "dedup that drops": lambda value: dedup(value, on_invalid="drop"),
    "dedup against": lambda value: dedup(ROWS, against=value),
    "Batcher": submitted,
    "hnsw_gpu.hnswlib": added_as_hnswlib,
}


@pytest.mark.parametrize("use", USES)
def test_masked_rows_are_refused(use) -> None:
    for value in (masked(), list(masked()), tuple(masked())):
        with pytest.raises(ValueError, match=r": masked values in rows 3, 7, 8$"):
            USES[use](value)
    with pytest.raises(ValueError, match=r": masked values in rows 0, 1, 2, 3, 4 and 25 more$"):
        USES[use](masked(range(30)))


@pytest.mark.parametrize("use", USES)
def test_arrays_that_mask_nothing_are_taken(use) -> None:
    USES[use](np.ma.MaskedArray(ROWS, mask=False))
    USES[use](np.ma.MaskedArray(ROWS))


@pytest.mark.parametrize("use", [use for use in USES if use != "hnsw_gpu.hnswlib"])
def test_columns_of_vectors(use) -> None:
    """As tables hold them: each row an object. Rows that are none are named."""
    column = np.empty(30, object)
    column[:] = list(ROWS)
    for value in (column, as_arrow(column), as_polars(column)):
        USES[use](value)
    for place, row, words in (
        (4, None, r": what is no vector in row 4$"),
        (7, ROWS[0, :3], r": other lengths than the first's, \d+, in row 7$"),
    ):
        broken = column.copy()
        broken[place] = row
        with pytest.raises(ValueError, match=words):
            USES[use](broken)


def as_arrow(column):
    return pytest.importorskip("pyarrow").array(list(column))


def as_polars(column):
    return pytest.importorskip("polars").Series(values=[row.tolist() for row in column])


def test_numbers_beyond_float32_are_not_called_infinite() -> None:
    rows = ROWS.astype(np.float64)
    rows[3, 1], rows[5, 0] = 1e300, np.inf
    with pytest.raises(ValueError, match=r"values beyond float32 in row 3: multiply all vectors"):
        filled().add(rows)
    rows[3, 1] = 0
    with pytest.raises(ValueError, match=r"NaN or infinite values in row 5$"):
        filled().add(rows)


def test_masked_labels_filters_and_values() -> None:
    index = filled()
    numbers = np.ma.MaskedArray(np.arange(30), mask=np.arange(30) % 10 == 4)
    for call in (
        lambda: index.add(ROWS + 1, numbers + 100),
        lambda: index.delete(numbers),
        lambda: index.vectors(numbers),
        lambda: index.search(ROWS, 2, allow=numbers),
        lambda: index.search(ROWS, 2, allow=np.ma.MaskedArray(numbers.data > 3, numbers.mask)),
        lambda: dedup(ROWS, keep=("max", numbers)),
    ):
        with pytest.raises(ValueError, match=r": masked values in rows 4, 14, 24$"):
            call()
    with pytest.raises(ValueError, match=r"queries: masked values in row 0$"):
        index.search(masked()[3], 2)
    assert len(index) == 30


def test_nulls_of_arrow_columns() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    index = filled()
    columns = {f"c{i}": pyarrow.array(ROWS[:, i]) for i in range(DIM)}
    index.search(pyarrow.table(columns), 2)
    holed = pyarrow.array([None if i in (2, 9) else float(i) for i in range(30)])
    columns["c1"] = holed
    for table in (pyarrow.table(columns), pyarrow.record_batch(columns)):
        for use in USES.values():
            with pytest.raises(ValueError, match=r": null in rows 2, 9$"):
                use(table)
    labels = pyarrow.array([1, None, 3, None])
    for value in (labels, pyarrow.chunked_array([labels.slice(0, 1), labels.slice(1)])):
        with pytest.raises(ValueError, match=r"^labels: null in rows 1, 3$"):
            index.delete(value)
        with pytest.raises(ValueError, match=r"^allow: null in rows 1, 3$"):
            index.search(ROWS, 2, allow=value)
    with pytest.raises(ValueError, match=r"^keep: null in rows 2, 9$"):
        dedup(ROWS, keep=("min", holed))
    index.delete(pyarrow.array([1, 3]))
    assert len(index) == 28


def test_nulls_of_polars_columns() -> None:
    polars = pytest.importorskip("polars")
    index = filled()
    index.search(polars.DataFrame({f"c{i}": ROWS[:, i] for i in range(DIM)}), 2)
    whole = {f"c{i}": ROWS[:, i].tolist() for i in range(DIM)}
    whole["c1"] = [None if i in (2, 9) else i for i in range(30)]
    nested = polars.Series(ROWS.tolist(), dtype=polars.Array(polars.Float32, DIM))
    holed = [None if i in (2, 9) else row for i, row in enumerate(ROWS.tolist())]
    index.search(nested, 2)
    for value in (polars.DataFrame(whole), polars.Series(holed, dtype=nested.dtype)):
        for use in USES.values():
            with pytest.raises(ValueError, match=r": null in rows 2, 9$"):
                use(value)
    with pytest.raises(ValueError, match=r"^labels: null in rows 1, 3$"):
        index.delete(polars.Series([1, None, 3, None]))


# ---------------------------------------------------------------- values that decide who is kept


@pytest.mark.parametrize("which", ["max", "min"])
def test_values_that_float64_cannot_tell_apart(which) -> None:
    rows = np.repeat(ROWS[:1], 6, axis=0)
    for values in (
        2**60 + np.array([3, 1, 5, 5, 0, 0]),
        np.array([3, 1, 5, 5, 0, 0], np.uint64) + np.uint64(2**64 - 6),
        np.array([-(2**63) + 1, -(2**63), 7, 7, 2, -(2**63)]),
        np.array([0, 0, 1, 1, 0, 0], bool),
        np.array([0.5, -np.inf, np.inf, np.inf, 2, -np.inf]),
    ):
        best = int(values.argmax() if which == "max" else values.argmin())  # ties to the lower row
        assert np.flatnonzero(dedup(rows, keep=(which, values)).keep).tolist() == [best]


def test_a_value_that_is_nan_is_named_by_its_row() -> None:
    rows = ROWS.copy()
    rows[:5] = np.nan
    values = np.arange(30.0)
    values[[2, 17]] = np.nan
    with pytest.raises(ValueError, match=r"^keep: NaN in row 17$"):
        dedup(rows, keep=("max", values), on_invalid="drop")
