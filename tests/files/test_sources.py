"""Vectors and columns from files, in blocks, beside what was written."""

import numpy as np
import pytest

from hnsw_gpu.files import sources

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
safetensors = pytest.importorskip("safetensors.numpy")

ROWS = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
TEXTS = [f"text {i}" for i in range(100)]


def lists(rows: np.ndarray, kind: str = "list") -> "pyarrow.Array":
    values = pyarrow.array(rows.reshape(-1))
    if kind == "fixed":
        return pyarrow.FixedSizeListArray.from_arrays(values, rows.shape[1])
    offsets = np.arange(len(rows) + 1) * rows.shape[1]
    if kind == "large":
        return pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets, pyarrow.int64()), values)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), values)


def table(rows: np.ndarray = ROWS, kind: str = "list") -> "pyarrow.Table":
    count = len(rows)
    text = pyarrow.array(TEXTS[:count]).dictionary_encode()
    return pyarrow.table({"id": np.arange(count), "embedding": lists(rows, kind), "text": text})


def write(path, rows=ROWS, kind="list"):
    suffix = path.suffix
    if suffix == ".npy":
        np.save(path, rows)
    elif suffix == ".fbin":
        path.write_bytes(np.array(rows.shape, np.uint32).tobytes() + rows.tobytes())
    elif suffix == ".safetensors":
        safetensors.save_file({"embedding": rows, "other": np.ones(3)}, path)
    elif suffix == ".parquet":
        parquet.write_table(table(rows, kind), path, row_group_size=30)
    elif suffix == ".arrow":
        with pyarrow.ipc.new_file(path, table(rows, kind).schema) as file:
            file.write_table(table(rows, kind), max_chunksize=30)
    else:
        with pyarrow.ipc.new_stream(path, table(rows, kind).schema) as file:
            file.write_table(table(rows, kind), max_chunksize=30)
    return path


SPANS = [(0, 100), (0, 30), (29, 31), (30, 60), (7, 93), (99, 100), (50, 50)]


@pytest.mark.parametrize("suffix", [".npy", ".fbin", ".safetensors", ".parquet", ".arrow", ".ipc"])
def test_vectors(tmp_path, monkeypatch, suffix) -> None:
    monkeypatch.setattr(sources, "BATCH_ROWS", 16)
    opened = sources.open_sources([write(tmp_path / f"a{suffix}")])
    assert (len(opened), opened.dim) == (100, 6)
    for start, stop in SPANS:
        blocks = [np.empty((0, 6)), *opened.vectors(start, stop)]
        assert all(len(block) <= 16 for block in blocks)
        np.testing.assert_array_equal(np.concatenate(blocks), ROWS[start:stop])
    copied = pyarrow.Table.from_batches(opened.tables())
    np.testing.assert_array_equal(np.stack(copied["embedding"].to_numpy()), ROWS)


@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_lists_of_numbers(tmp_path, kind, dtype) -> None:
    rows = (ROWS * 10).astype(dtype)
    opened = sources.open_sources([write(tmp_path / "a.parquet", rows, kind)])
    (block,) = opened.vectors(35, 50)
    assert block.dtype == dtype
    np.testing.assert_array_equal(block, rows[35:50])


def test_many_files_and_a_folder(tmp_path) -> None:
    for place, name in enumerate(["b/two.parquet", "a.parquet", "c.ipc", "_left/out.parquet"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, ROWS[place * 20 : place * 20 + 20])
    opened = sources.open_sources([tmp_path, write(tmp_path.parent / "last.npy", ROWS[80:])])
    expected = np.concatenate([ROWS[20:40], ROWS[:20], ROWS[40:60], ROWS[80:]])
    np.testing.assert_array_equal(np.concatenate(list(opened.vectors(0, 80))), expected)
    np.testing.assert_array_equal(np.concatenate(list(opened.vectors(15, 45))), expected[15:45])
    assert opened.where(25) == f"{tmp_path / 'b/two.parquet'}, row 5 (row group 0)"
    assert [told["rows"] for told in opened.fingerprints()] == [20] * 4
    with pytest.raises(ValueError, match=r"last.npy: no column 'text' beside the vectors: none"):
        opened.column("text")
    columns = sources.open_sources([tmp_path]).column("text")
    assert columns.to_pylist() == TEXTS[:20] * 3
    taken = sources.open_sources([tmp_path]).texts("text", np.array([3, 19, 20, 59]))
    assert taken == [TEXTS[3], TEXTS[19], TEXTS[0], TEXTS[19]]


def test_a_changed_byte_changes_the_checksum(tmp_path) -> None:
    path = write(tmp_path / "a.npy")
    (before,) = sources.open_sources([path]).fingerprints()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (after,) = sources.open_sources([path]).fingerprints()
    assert before["checksum"] != after["checksum"] and before["size"] == after["size"]


def with_rows(change) -> "pyarrow.Table":
    rows = [row.tolist() for row in ROWS]
    change(rows)
    column = pyarrow.array(rows, pyarrow.list_(pyarrow.float32()))
    return pyarrow.table({"embedding": column})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.__setitem__(72, None), r"null in row 72 \(row group 7\)"),
        (lambda rows: rows.__setitem__(75, rows[75][:5]), r"5 numbers, expected 6, in row 75 \("),
        (lambda rows: rows[71].__setitem__(3, None), r"null among numbers in row 71 \(row group"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(with_rows(change), path, row_group_size=10)
    opened = sources.open_sources([path])
    assert len(np.concatenate(list(opened.vectors(0, 70)))) == 70
    with pytest.raises(ValueError, match=rf"a.parquet: column 'embedding': {message}"):
        list(opened.vectors(0, 100))


def test_a_null_id_is_named(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    ids = pyarrow.array([1, 2, None] + [4] * 97)
    parquet.write_table(table().set_column(0, "id", ids), path)
    with pytest.raises(ValueError, match=r"a.parquet, row 2 \(row group 0\): null in column 'id'"):
        sources.open_sources([path]).column("id")


def test_files_that_cannot_be_read(tmp_path) -> None:
    path = write(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: no column 'x'; there are 'id', 'embedding'"):
        sources.open_sources([path], column="x")
    with pytest.raises(ValueError, match="column 'id' is int64, expected lists of numbers"):
        sources.open_sources([path], column="id")
    six, five = write(tmp_path / "six.npy"), write(tmp_path / "five.npy", ROWS[:, :5].copy())
    with pytest.raises(ValueError, match=r"five.npy: vectors of 5 numbers, and .*six.npy has 6"):
        sources.open_sources([six, five])
    for name in ("a.parquet", "b.arrow", "c.safetensors"):
        data = write(tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"{name}: "):
            list(sources.open_sources([tmp_path / name]).vectors(0, 100))
        with pytest.raises(FileNotFoundError, match=name):
            sources.open_sources([tmp_path / "no" / name])
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"a.txt: unknown suffix '.txt'"):
        sources.open_sources([tmp_path / "a.txt"])
    for name in ("folder", "no.txt", "no.npz:name"):
        with pytest.raises(FileNotFoundError, match=name):
            sources.list_files([tmp_path / name])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no files of vectors"):
        sources.open_sources([tmp_path / "empty"])
    two = tmp_path / "two.parquet"
    parquet.write_table(table().drop(["text"]), two)
    good = write(tmp_path / "good.parquet")
    with pytest.raises(ValueError, match=r"two.parquet: columns id int64, embedding"):
        sources.open_sources([good, two]).schema()


def test_a_row_group_is_read_in_batches(tmp_path) -> None:
    rows = np.random.default_rng(1).normal(size=(60_000, 64)).astype(np.float32)  # 15 MB
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"embedding": lists(rows)}), path, use_dictionary=False,
        compression="none", data_page_size=1 << 16,
    )  # fmt: skip
    opened = sources.open_sources([path])
    opened._count = 1000
    most, before = 0, pyarrow.total_allocated_bytes()
    for block, start in zip(opened.vectors(0, 60_000), range(0, 60_000, 1000), strict=True):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        np.testing.assert_array_equal(block, rows[start : start + 1000])
    assert most < rows.nbytes / 4
