"""Deduplication of files as other programs write them: bad rows, types of columns, many parts."""

import datetime
import decimal
import json
import os
import uuid

import numpy as np
import pytest
from click.testing import CliRunner

from hnsw_gpu import cli
from hnsw_gpu.files import open_sources

pyarrow = pytest.importorskip("pyarrow")
compute = pytest.importorskip("pyarrow.compute")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
ROWS[10:20] = ROWS[:10]  # row 10 + i is a copy of row i


def told(*arguments, code=0) -> str:
    result = CliRunner().invoke(cli.main, ["dedup", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def lists(rows=ROWS, kind=None) -> "pyarrow.Array":
    return pyarrow.array([list(map(float, row)) for row in rows], kind or FLOATS)


FLOATS = pyarrow.list_(pyarrow.float32())


def write(path, **columns):
    columns = {"embedding": lists()} | columns
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=12)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=12)
    return path


def report(out) -> dict:
    return json.loads((out / "report.json").read_text())


def kept(out):
    return parquet.read_table(out / "kept.parquet")


# ---------------------------------------------------------------- bad rows

BAD = {
    "empty": [],
    "null": None,
    "null inside": [None, *range(7)],
    "only nulls": [None] * 8,
    "short": [1.0] * 7,
    "long": [1.0] * 9,
    "nan": [float("nan")] + [1.0] * 7,
    "infinite": [float("inf")] + [1.0] * 7,
    "zero": [0.0] * 8,
}


def with_bad(names, kind=FLOATS):
    """The 30 rows, with bad ones before, among and after them; and which are bad."""
    rows, is_bad = [row.tolist() for row in ROWS], np.zeros(30 + len(names), bool)
    for place, name in enumerate(names):
        at = place * len(rows) // max(len(names), 1)
        rows.insert(at, BAD[name])
        is_bad = np.insert(is_bad, at, True)[:-1]
    return pyarrow.array(rows, kind), is_bad


@pytest.mark.parametrize("names", [[name] for name in BAD] + [list(BAD), list(BAD)[::-1] * 3])
@pytest.mark.parametrize(
    "kind",
    [FLOATS, pyarrow.large_list(pyarrow.float64()), pyarrow.list_view(pyarrow.float32())],
    ids=["list", "large_list", "list_view"],
)
def test_every_kind_of_bad_row_is_dropped_and_counted(tmp_path, names, kind) -> None:
    column, is_bad = with_bad(names, kind)
    numbers = np.arange(len(is_bad))
    path = write(tmp_path / "in.parquet", embedding=column, number=numbers)
    out = tmp_path / "out"
    told(path, "-o", out, "--on-invalid", "drop", "--write-kept", "--shard-rows", 20)
    good = numbers[~is_bad]
    assert report(out)["invalid"] == len(names) and report(out)["exact_copies"] == 10
    np.testing.assert_array_equal(kept(out)["number"], np.delete(good, np.s_[10:20]))
    if len(names) == 1:
        said = told(path, "-o", tmp_path / "raised", "--shard-rows", 20, code=1)
        assert f"row {numbers[is_bad][0]} " in said


def test_bad_rows_of_whole_numbers(tmp_path) -> None:
    rows = [[1, 0, 3], None, [None, 2, 3], [], [1, 0, 3], [5, 5]]
    column = pyarrow.array(rows, pyarrow.list_(pyarrow.int64()))
    path = write(tmp_path / "in.parquet", embedding=column)
    told(path, "-o", tmp_path / "out", "--on-invalid", "drop")
    assert kept(tmp_path / "out")["id"].to_pylist() == [0]
    assert report(tmp_path / "out")["invalid"] == 4


def test_a_bad_first_row_does_not_decide_what_is_expected(tmp_path) -> None:
    path = write(tmp_path / "in.parquet", embedding=with_bad(["short"])[0])
    assert open_sources([path]).dim == 8


@pytest.mark.parametrize("bad", [[None] * 3, [[]] * 3])
def test_a_file_of_bad_rows_only(tmp_path, bad) -> None:
    good = write(tmp_path / "good.parquet")
    column = pyarrow.array(bad, FLOATS)
    path = write(tmp_path / "bad.parquet", embedding=column)
    out = tmp_path / "out"
    told(path, good, "-o", out, "--on-invalid", "drop")
    assert report(out)["invalid"] == 3 and report(out)["kept"] == 20
    assert f"{path}" in told(path, good, "-o", tmp_path / "raised", code=1)
    assert f"{path}: no vectors" in told(path, "-o", tmp_path / "alone", code=1)


# ---------------------------------------------------------------- files without rows


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("empty", ["first", "last", "between"])
def test_parts_without_rows(tmp_path, suffix, empty) -> None:
    """Spark writes one for each empty partition."""
    ids = pyarrow.array([f"r{i}" for i in range(30)])
    places = {"first": ["a", "b"], "last": ["b", "a"], "between": ["b", "a", "c"]}[empty]
    given = []
    for place in places:
        count = 0 if place == "a" else 30
        path = tmp_path / f"{place}{suffix}"
        given.append(write(path, embedding=lists()[:count], id=ids[:count]))
    out = tmp_path / "out"
    told(*given, "-o", out, "--write-kept", "--id-column", "id", "--text-column", "id")
    assert kept(out)["id"].to_pylist() == [f"r{i}" for i in range(30) if not 10 <= i < 20]


def test_kept_parquet_has_its_columns_where_nothing_is_kept(tmp_path) -> None:
    path = write(tmp_path / "in.parquet", embedding=lists(np.zeros((3, 8))), number=[1, 2, 3])
    told(path, "-o", tmp_path / "out", "--write-kept", "--on-invalid", "drop")
    assert kept(tmp_path / "out").schema.names == ["embedding", "number"]
    np.save(tmp_path / "none.npy", ROWS[:0])
    told(tmp_path / "none.npy", "-o", tmp_path / "none", "--write-kept")
    assert kept(tmp_path / "none").schema.types == [pyarrow.list_(pyarrow.float32(), 8)]


# ---------------------------------------------------------------- types of vectors


def as_tensors(rows):
    kind = pyarrow.fixed_shape_tensor(pyarrow.float32(), [8])
    values = pyarrow.array(rows.reshape(-1))
    return pyarrow.ExtensionArray.from_storage(
        kind, pyarrow.FixedSizeListArray.from_arrays(values, 8)
    )


VECTORS = {
    "list": lists,
    "list_view": lambda rows: lists(rows, pyarrow.list_view(pyarrow.float32())),
    "large_list_view": lambda rows: lists(rows, pyarrow.large_list_view(pyarrow.float64())),
    "tensor": as_tensors,
    "decimal": lambda rows: pyarrow.array(
        [[decimal.Decimal(repr(float(x))) for x in row] for row in rows],
        pyarrow.list_(pyarrow.decimal128(30, 20)),
    ),
    "dictionary": lambda rows: pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(np.arange(len(rows))), lists(rows)
    ),
}


@pytest.mark.parametrize("name", list(VECTORS))
def test_types_of_vectors(tmp_path, name) -> None:
    rows = ROWS.astype(np.float16).astype(np.float32)  # decimals of 20 digits hold them
    column = VECTORS[name](rows)
    path = write(tmp_path / "in.arrow", embedding=column)
    blocks = list(open_sources([path]).vectors(5, 30))
    np.testing.assert_array_equal(np.concatenate(blocks).astype(np.float32), rows[5:])
    if name != "dictionary":  # Parquet has no dictionaries of lists
        told(path, "-o", tmp_path / "out", "--write-kept")
        written = kept(tmp_path / "out")["embedding"]
        assert written.type.equals(column.type) or written.type.value_type.equals(
            column.type.value_type
        )
        assert written.to_pylist() == column.take([*range(10), *range(20, 30)]).to_pylist()


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_types_that_are_no_vectors_are_said_with_those_that_are(tmp_path, suffix) -> None:
    for values in (["a"], [b"abcd"], [1.5], [[True]], [["x"]], [[[1.0]]]):
        path = write(tmp_path / f"in{suffix}", embedding=pyarrow.array(values))
        said = told(path, "-o", tmp_path / "out", code=1)
        assert "expected lists of numbers (list, large_list, fixed_size_list, list_view" in said


# ---------------------------------------------------------------- types of ids and texts

DAY = datetime.date(2024, 2, 28)
UUIDS = [uuid.UUID(int=2**127 + i) for i in range(30)]
BYTES = [bytes([255, i]) for i in range(30)]
IDS = {
    "int64": (pyarrow.array([2**62 + i for i in range(30)]), str(2**62)),
    "uint64": (pyarrow.array([2**64 - 1 - i for i in range(30)], pyarrow.uint64()), str(2**64 - 1)),
    "string": (pyarrow.array([f"é{i}" for i in range(30)]), "é0"),
    "string_view": (pyarrow.array([f"a{i}" for i in range(30)], pyarrow.string_view()), "a0"),
    "large_string": (pyarrow.array([f"a{i}" for i in range(30)], pyarrow.large_string()), "a0"),
    "bytes": (pyarrow.array(BYTES), "ff00"),
    "bytes of text": (pyarrow.array([f"a{i}".encode() for i in range(30)]), "a0"),
    "binary_view": (pyarrow.array(BYTES, pyarrow.binary_view()), "ff00"),
    "fixed bytes": (pyarrow.array(BYTES, pyarrow.binary(2)), "ff00"),
    "uuid": (pyarrow.array([u.bytes for u in UUIDS], pyarrow.uuid()), str(UUIDS[0])),
    "date": (pyarrow.array([DAY + datetime.timedelta(i) for i in range(30)]), "2024-02-28"),
    "far date": (pyarrow.array(range(2**30, 2**30 + 30), pyarrow.int32()).cast(pyarrow.date32()),
                 "<value out of range: 1073741824>"),
    "timestamp": (pyarrow.array(range(1, 31), pyarrow.timestamp("ns")),
                  "1970-01-01 00:00:00.000000001"),
    "time": (pyarrow.array(range(1, 31), pyarrow.time64("ns")), "00:00:00.000000001"),
    "zoned": (pyarrow.array(range(30), pyarrow.timestamp("us", "UTC")),
              "1970-01-01 00:00:00.000000Z"),
    "duration": (pyarrow.array(range(30), pyarrow.duration("s")), "0"),
    "decimal": (pyarrow.array([decimal.Decimal(i) / 4 for i in range(30)]), "0.00"),
    "float": (pyarrow.array([i / 2 for i in range(30)]), "0"),
    "bool": (pyarrow.array([False] * 30), "false"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(IDS))
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_ids_and_texts_of_every_type(tmp_path, name, suffix) -> None:
    ids, shown = IDS[name]
    path, out = write(tmp_path / f"in{suffix}", name=ids), tmp_path / "out"
    how = ("--id-column", "name", "--text-column", "name")
    told(path, "-o", out, *how)
    dropped = parquet.read_table(out / "duplicates.parquet")
    assert kept(out)["id"].type == dropped["id"].type == ids.type
    places = [*range(10), *range(20, 30)]
    assert kept(out)["id"].combine_chunks().equals(taken(ids, places))
    assert dropped["id"].combine_chunks().equals(taken(ids, range(10, 20)))
    assert dropped["duplicate_of"].combine_chunks().equals(taken(ids, range(10)))
    group = report(out)["largest_groups"][0]
    assert (group["id"], group["text"], group["size"]) == (shown, shown, 2)
    assert json.dumps(shown)[1:-1].replace("<", "\\u003c").replace(">", "\\u003e") in (
        (out / "report.html").read_text()
    )
    told(path, "-o", tmp_path / "whole", "--write-kept")
    assert kept(tmp_path / "whole")["name"].combine_chunks().equals(taken(ids, places))


def taken(values, places):
    return pyarrow.concat_arrays([values[place : place + 1] for place in places])


@pytest.mark.parametrize("encode", ["dictionary_encode", "run_end_encode"])
def test_encoded_ids_are_decoded(tmp_path, encode) -> None:
    ids = pyarrow.array([f"a{i // 2}" for i in range(30)])
    path = write(tmp_path / "in.arrow", name=getattr(compute, encode)(ids))
    told(path, "-o", tmp_path / "out", "--id-column", "name", "--text-column", "name")
    assert (
        kept(tmp_path / "out")["id"].to_pylist()
        == ids.take([*range(10), *range(20, 30)]).to_pylist()
    )


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ([[1]] * 30, ["--id-column", "name"], "column 'name' is list<element: int64>: no names"),
        ([{"a": 1}] * 30, ["--id-column", "name"], "column 'name' is struct<a: int64>: no names"),
        ([{"a": 1}] * 30, ["--keep", "max:name"], "keep='max:name': struct<a: int64> has no"),
        ([None, *range(29)], ["--id-column", "name"], "row 0 (row group 0): null in column 'name'"),
        ([None, *range(29)], ["--keep", "max:name"], "row 0 (row group 0): null in column 'name'"),
    ],
)  # fmt: skip
def test_what_cannot_be_an_id_is_said_before_any_work(
    tmp_path, monkeypatch, values, arguments, message
) -> None:
    path = write(tmp_path / "in.parquet", name=pyarrow.array(values))
    assert message in told(path, "-o", tmp_path / "out", *arguments, code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--id-column", "span"], ["--write-kept"]])
def test_what_cannot_be_written_is_said_before_any_work(tmp_path, arguments) -> None:
    spans = pyarrow.array([(1, 2, 3)] * 30, pyarrow.month_day_nano_interval())
    path = write(tmp_path / "in.arrow", span=spans)
    said = told(path, "-o", tmp_path / "out", *arguments, code=1)
    assert "column 'span' is month_day_nano_interval, which cannot be written as Parquet" in said
    assert not (tmp_path / "out").exists()


def test_texts_of_any_kind_and_length(tmp_path) -> None:
    values = [None, "a\x00b", "<script>", "x" * 20_000, "", "\U0001f600"] * 5
    nested = pyarrow.array([{"a": i} for i in range(30)])
    path = write(tmp_path / "in.parquet", text=pyarrow.array(values), nested=nested)
    out = tmp_path / "out"
    told(path, "-o", out, "--text-column", "text")
    shown = [group["text"] for group in report(out)["largest_groups"]]
    assert shown == [None if v is None else v if len(v) < 500 else v[:497] + "..." for v in (
        values[:10]
    )]  # fmt: skip
    assert "x" * 498 not in (out / "report.html").read_text()
    told(path, "-o", out, "--text-column", "nested")
    assert report(out)["largest_groups"][3]["text"] == "{'a': 3}"


def test_a_text_that_is_no_utf8(tmp_path) -> None:
    """Parquet and Arrow take the word of who wrote it."""
    wrong = pyarrow.array([b"\xff\xfe"] * 30)
    text = pyarrow.Array.from_buffers(pyarrow.string(), 30, wrong.buffers())
    path = write(tmp_path / "in.arrow", text=text)
    told(path, "-o", tmp_path / "out", "--id-column", "text", "--text-column", "text")
    assert report(tmp_path / "out")["largest_groups"][0]["text"] == "\ufffd\ufffd"


# ---------------------------------------------------------------- who is kept

BIG = 2**62
ORDERS = {
    "whole numbers": pyarrow.array([BIG + (i * 7) % 30 for i in range(30)]),
    "unsigned": pyarrow.array([2**63 + (i * 7) % 30 for i in range(30)], pyarrow.uint64()),
    "iso texts": pyarrow.array([f"2024-01-{1 + (i * 7) % 30:02}T00:00:00Z" for i in range(30)]),
    "views": pyarrow.array([f"{(i * 7) % 30:02}" for i in range(30)], pyarrow.string_view()),
    "encoded": pyarrow.array([f"{(i * 7) % 30:02}" for i in range(30)]).dictionary_encode(),
    "timestamps": pyarrow.array([BIG + (i * 7) % 30 for i in range(30)], pyarrow.timestamp("ns")),
    "dates": pyarrow.array([DAY + datetime.timedelta((i * 7) % 30) for i in range(30)]),
    "decimals": pyarrow.array([decimal.Decimal(BIG + (i * 7) % 30) for i in range(30)]),
    "bytes": pyarrow.array([bytes([(i * 7) % 30]) for i in range(30)]),
    "halves": pyarrow.array([float((i * 7) % 30) for i in range(30)], pyarrow.float16()),
}


@pytest.mark.parametrize("which", ["max", "min"])
@pytest.mark.parametrize("name", list(ORDERS))
def test_who_is_kept_by_a_column_of_any_ordered_type(tmp_path, name, which) -> None:
    path = write(tmp_path / "in.arrow", time=ORDERS[name])
    told(path, "-o", tmp_path / "out", "--keep", f"{which}:time")
    order = {i: (i * 7) % 30 for i in range(30)}
    best = max if which == "max" else min
    expected = {best((i, i + 10), key=order.get) for i in range(10)} | set(range(20, 30))
    assert set(kept(tmp_path / "out")["id"].to_pylist()) == expected


# ---------------------------------------------------------------- parts that differ


def parts(tmp_path, first, second, suffix=".arrow"):
    return [
        write(tmp_path / f"a{suffix}", embedding=lists()[:15], name=first),
        write(tmp_path / f"b{suffix}", name=second, embedding=lists()[15:]),
    ]


NAMES = [f"a{i}" for i in range(30)]
UNITED = {
    "strings": (pyarrow.array(NAMES[:15]), pyarrow.array(NAMES[15:], pyarrow.large_string())),
    "views": (pyarrow.array(NAMES[:15], pyarrow.string_view()), pyarrow.array(NAMES[15:])),
    "dictionary": (pyarrow.array(NAMES[:15]), pyarrow.array(NAMES[15:]).dictionary_encode()),
    "integers": (
        pyarrow.array(range(15), pyarrow.int32()),
        pyarrow.array(range(15, 30), pyarrow.int64()),
    ),
    "times": (
        pyarrow.array(range(15), pyarrow.timestamp("s")),
        pyarrow.array(range(15, 30), pyarrow.timestamp("us")),
    ),
}


@pytest.mark.parametrize("name", list(UNITED))
@pytest.mark.parametrize("turned", [False, True])
def test_parts_whose_types_unite(tmp_path, name, turned) -> None:
    both = UNITED[name][::-1] if turned else UNITED[name]
    paths = parts(tmp_path, *both)
    how = ("--write-kept", "--id-column", "name", "--text-column", "name", "--keep", "min:name")
    told(*paths, "-o", tmp_path / "out", *how)
    every = [value for part in both for value in part.to_pylist()]
    keep = set(every) - {max(every[i], every[i + 10]) for i in range(10)}
    assert set(kept(tmp_path / "out")["name"].to_pylist()) == keep


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (range(15), NAMES[15:]),
        (range(15), [i / 2 for i in range(15, 30)]),  # 2^53 and beyond would be lost
        (pyarrow.array(range(15), pyarrow.uint64()), range(15)),
    ],
)
@pytest.mark.parametrize("arguments", [["--write-kept"], ["--id-column", "name"]])
def test_parts_whose_types_do_not_unite_are_named(tmp_path, first, second, arguments) -> None:
    first, second = pyarrow.array(first), pyarrow.array(second)
    a, b = parts(tmp_path, first, second)
    said = told(a, b, "-o", tmp_path / "out", *arguments, code=1)
    assert f"{b}: column 'name' is {second.type}, and in {a} {first.type}: no type holds" in said
    assert not (tmp_path / "out").exists()


def test_more_files_than_may_be_open(tmp_path) -> None:
    resource = pytest.importorskip("resource")
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(30):
        write(folder / f"{i:02}a.parquet", embedding=lists()[i : i + 1])
        write(folder / f"{i:02}b.arrow", embedding=lists()[i : i + 1])
        for part in "cde":  # which, mapped, would be open as long
            np.save(folder / f"{i:02}{part}.npy", ROWS[i : i + 1])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    told(write(tmp_path / "small.parquet"), "-o", tmp_path / "warm")  # imports open files
    largest = max(map(int, os.listdir("/dev/fd")))  # other tests may have left some open
    resource.setrlimit(resource.RLIMIT_NOFILE, (largest + 40, before[1]))
    try:
        told(folder, "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert report(tmp_path / "out")["kept"] == 20 and report(tmp_path / "out")["rows"] == 150
    spans = [(0, 40), (40, 111), (111, 150)]
    parts_read = [list(open_sources([folder]).vectors(*span)) for span in spans]
    every = np.concatenate([block for part in parts_read for block in part])
    np.testing.assert_array_equal(every, np.repeat(ROWS, 5, axis=0))


def test_compressed_arrow_files_are_held_a_batch_at_a_time(tmp_path) -> None:
    rows = np.zeros((64_000, 64), np.float32)
    values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), 64)
    table = pyarrow.table({"embedding": values, "other": values})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_file(tmp_path / "in.feather", table.schema, options=options) as file:
        file.write_table(table, max_chunksize=4000)
    del table, values
    before = pyarrow.total_allocated_bytes()
    opened = open_sources([tmp_path / "in.feather"])
    assert pyarrow.total_allocated_bytes() - before < rows.nbytes / 8
    most = 0
    for block in opened.vectors(0, len(opened)):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        assert not block.any()
    assert most < rows.nbytes / 4


def test_a_text_column_is_read_where_it_is_shown(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "in.parquet", text=NAMES)
    opened = open_sources([path])
    read = []
    iter_batches = parquet.ParquetFile.iter_batches

    def counted(self, *arguments, **how):
        read.append(how["row_groups"])
        return iter_batches(self, *arguments, **how)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    assert opened.column_type("text") == pyarrow.string() and not read
    assert opened.texts("text", np.array([13, 15])) == ["a13", "a15"] and read == [[1]]
