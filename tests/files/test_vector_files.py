"""Files of vectors: what struct and numpy write comes back; what is cut or damaged is refused."""

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="properties are tested with the extra `test`")

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hnsw_gpu.files.vector_files import read_vectors, write_result

DTYPES = {".fbin": "<f4", ".u8bin": "u1", ".i8bin": "i1", ".fvecs": "<f4", ".bvecs": "u1"}
SUFFIXES = [".npy", ".npz", *DTYPES]


def file_bytes(suffix, vectors):
    """The bytes of a file, written by the format's definition."""
    if suffix in (".npy", ".npz"):
        file = io.BytesIO()
        if suffix == ".npy":
            np.save(file, vectors)
        else:
            np.savez(file, vectors)
        return file.getvalue()
    n, dim = vectors.shape
    if suffix.endswith("bin"):
        return struct.pack("<II", n, dim) + vectors.tobytes()
    return b"".join(struct.pack("<i", dim) + row.tobytes() for row in vectors)


def sample(suffix, n=20, dim=5, seed=0):
    values = np.random.default_rng(seed).integers(0, 120, (n, dim))
    return values.astype(DTYPES.get(suffix, "<f4"))


def assert_same(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


def assert_refused(path, data, words):
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=words) as caught:
        read_vectors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    assert peak < 100 * len(data) + 5_000_000  # what is compiled and cached on the way


@st.composite
def files(draw, suffixes=tuple(SUFFIXES), min_rows=0):
    suffix = draw(st.sampled_from(suffixes))
    if suffix.endswith("vecs"):
        min_rows = max(min_rows, 1)  # an empty file has no dim
    dtype = DTYPES.get(suffix) or draw(
        st.sampled_from(["f2", "f4", "f8", ">f4", "i1", "u1", "<i4", ">i8", "u8", "?"])
    )
    shape = st.tuples(st.integers(min_rows, 9), st.integers(1, 9))
    vectors = draw(hnp.arrays(np.dtype(dtype), shape))
    return suffix, np.asfortranarray(vectors) if draw(st.booleans()) else vectors


@settings(max_examples=200, deadline=None)
@given(file=files())
def test_round_trip(tmp_path_factory, file):
    suffix, vectors = file
    path = tmp_path_factory.mktemp("any") / f"x{suffix}"
    path.write_bytes(file_bytes(suffix, vectors))
    found = read_vectors(path)
    assert_same(found, vectors)
    if suffix != ".npz":
        assert isinstance(found, np.memmap)
        assert not found.flags.writeable


@settings(max_examples=300, deadline=None)
@given(file=files(min_rows=1), data=st.data())
def test_truncated_anywhere(tmp_path_factory, file, data):
    suffix, vectors = file
    whole = file_bytes(suffix, vectors)
    place = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / f"x{suffix}"
    row_bytes = 4 + vectors.shape[1] * vectors.dtype.itemsize
    if suffix.endswith("vecs") and place > 0 and place % row_bytes == 0:
        path.write_bytes(whole[:place])  # a sound file of fewer rows
        assert_same(read_vectors(path), vectors[: place // row_bytes])
    else:
        assert_refused(path, whole[:place], "truncated")


@settings(max_examples=300, deadline=None)
@given(suffix=st.sampled_from(SUFFIXES), data=st.binary(max_size=200))
def test_garbage(tmp_path_factory, suffix, data):
    """An error with the path, or, where any bytes are rows, exactly those rows."""
    path = tmp_path_factory.mktemp("garbage") / f"x{suffix}"
    path.write_bytes(data)
    try:
        found = read_vectors(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert file_bytes(suffix, found) == data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "save"), [(".npy", np.save), (".npz", np.savez), (".npz", np.savez_compressed)]
)
def test_flipped_bits(tmp_path, suffix, save):
    """numpy's own formats: a flip gives an error with the path, or an array of the file's bytes."""
    path = tmp_path / f"x{suffix}"
    save(path, sample(suffix))
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = read_vectors(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
        else:
            assert found.ndim == 2
            assert found.nbytes == sample(suffix).nbytes
            if suffix == ".npz":  # its members have checksums
                assert_same(found, sample(suffix))
    assert refused > len(whole)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffixes_in_capitals(tmp_path, suffix):
    path = tmp_path / f"x{suffix.upper()}"
    path.write_bytes(file_bytes(suffix, sample(suffix)))
    assert_same(read_vectors(path), sample(suffix))
    assert_same(read_vectors(str(path)), sample(suffix))


@pytest.mark.parametrize("suffix", [*DTYPES, ".npy"])
def test_bytes_after_the_end(tmp_path, suffix):
    whole = file_bytes(suffix, sample(suffix))
    assert_refused(tmp_path / f"x{suffix}", whole + b"\1\0\0", "truncated or damaged")


@pytest.mark.parametrize("suffix", [".fbin", ".u8bin", ".i8bin"])
@pytest.mark.parametrize(
    ("n", "dim"),
    [(2**32 - 1, 2**32 - 1), (2**31, 2), (2**32 - 1, 1), (2**30, 2**2), (2**31, 2**31), (3, 100)],
)
def test_hostile_bin_header(tmp_path, suffix, n, dim):
    data = struct.pack("<II", n, dim) + bytes(100)
    assert_refused(tmp_path / f"x{suffix}", data, f"truncated.*{n}, {dim}")


@pytest.mark.parametrize("suffix", [".fbin", ".u8bin", ".i8bin"])
def test_bin_without_numbers(tmp_path, suffix):
    assert_refused(tmp_path / f"x{suffix}", struct.pack("<II", 2**32 - 1, 0), "dim >= 1")
    (tmp_path / f"y{suffix}").write_bytes(struct.pack("<II", 0, 2**32 - 1))
    assert_same(
        read_vectors(tmp_path / f"y{suffix}"), np.empty((0, 2**32 - 1), np.dtype(DTYPES[suffix]))
    )


@pytest.mark.parametrize("suffix", [".fvecs", ".bvecs"])
@pytest.mark.parametrize("dim", [0, -1, -(2**31), 2**31 - 1, 5_000])
def test_hostile_vecs_header(tmp_path, suffix, dim):
    data = struct.pack("<i", dim) + bytes(400)
    assert_refused(tmp_path / f"x{suffix}", data, f"dim {dim}")
    assert_refused(tmp_path / f"x{suffix}", b"", "0 bytes")


@pytest.mark.parametrize("suffix", [".fvecs", ".bvecs"])
@pytest.mark.parametrize("row", [1, 7, 19])
def test_vecs_with_rows_of_another_dim(tmp_path, suffix, row):
    data = bytearray(file_bytes(suffix, sample(suffix)))
    row_bytes = len(data) // 20
    for at in (row, 19):
        data[at * row_bytes : at * row_bytes + 4] = struct.pack("<i", 100 + at)
    assert_refused(tmp_path / f"x{suffix}", data, f"row {row} has dim {100 + row}, row 0 has 5")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([[None, {}]], dtype=object), "dtype object"),
        (np.array([["a", "b"]]), "dtype <U1"),
        (np.zeros((2, 3), np.complex64), "dtype complex64"),
        (np.zeros((2, 3), "M8[s]"), "dtype datetime64"),
        (np.zeros((2, 3), "i4,f4"), "dtype "),
        (np.zeros(7), r"shape \(7,\)"),
        (np.zeros(()), r"shape \(\)"),
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\)"),
        (np.zeros((4, 0)), r"shape \(4, 0\)"),
    ],
)
def test_arrays_that_are_no_vectors(tmp_path, suffix, array, words):
    assert_refused(tmp_path / f"x{suffix}", file_bytes(suffix, array), words)


def npy_bytes(header, data=b"", version=(1, 0)):
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.parametrize("is_zipped", [False, True])
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("(4611686018427387904, 4611686018427387904)", "truncated"),
        ("(4294967296, 4294967296)", "truncated"),
        ("(2305843009213693952, 8)", "truncated"),
        ("(100000000000, 1)", "truncated"),
        ("(-1, -7)", "shape"),
        ("(-1, 7)", r"not \(n, dim\)"),
        ("(0, -7)", "shape"),
        ("(0, 0)", "shape"),
        ("(1.0, 7)", "shape"),
        ("[1, 7]", "shape"),
        ("7", "shape"),
        ("(" * 500 + ")" * 500, "no .npy array"),
        ("(" * 5000, "no .npy array"),
        ("'" * 3, "no .npy array"),
        ("__import__('os')", "no .npy array"),
        ("-" * 4000 + "1", "no .npy array"),
        ("-" * 9000 + "1", "no .npy array"),
        ("{[]: 1}", "no .npy array"),
    ],
)
def test_hostile_npy_header(tmp_path, shape, words, is_zipped):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    data = npy_bytes(header, bytes(28))
    if is_zipped:
        assert_refused(tmp_path / "x.npz", zipped({"a.npy": data}), words)
    else:
        assert_refused(tmp_path / "x.npy", data, words)


def test_npy_versions(tmp_path):
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    numbers = np.arange(6, dtype="<f4").reshape(2, 3)
    for version in ((1, 0), (2, 0)):
        (tmp_path / "x.npy").write_bytes(npy_bytes(header, numbers.tobytes(), version))
        assert_same(read_vectors(tmp_path / "x.npy"), numbers)
    data = npy_bytes(header, numbers.tobytes(), (7, 1))
    assert_refused(tmp_path / "x.npy", data, r"unknown .npy version \(7, 1\)")
    huge = b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b"{"
    path = tmp_path / "y.npy"
    path.write_bytes(huge)
    with pytest.raises(ValueError, match="truncated"):
        read_vectors(path)


def test_npz_by_name(tmp_path):
    path = tmp_path / "x.npz"
    base, query = sample(".npz"), sample(".npz", n=3, seed=1)
    np.savez_compressed(path, base=base, query=query)
    assert_same(read_vectors(f"{path}:base"), base)
    assert_same(read_vectors(f"{path}:query"), query)
    with pytest.raises(ValueError, match=r"holds 2 arrays; .*FILE.npz:NAME.*\['base', 'query'\]"):
        read_vectors(path)
    with pytest.raises(ValueError, match=r"has no array 'other'; .*\['base', 'query'\]"):
        read_vectors(f"{path}:other")
    with pytest.raises(ValueError, match="has no array ''"):
        read_vectors(f"{path}:")
    with pytest.raises(FileNotFoundError):
        read_vectors(f"{tmp_path}/missing.npz:base")


def test_npz_of_one_array_and_other_things(tmp_path):
    data = file_bytes(".npy", sample(".npy"))
    (tmp_path / "x.npz").write_bytes(zipped({"README": b"text", "a.npy": data}))
    assert_same(read_vectors(tmp_path / "x.npz"), sample(".npy"))
    assert_refused(tmp_path / "y.npz", zipped({"README": b"text"}), "holds 0 arrays")
    assert_refused(tmp_path / "y.npz", data, "no .npz file")
    assert_refused(tmp_path / "y.npy", zipped({"a.npy": data}), "no .npy array")


def test_unknown_suffix(tmp_path):
    for name in ("x.parquet", "x", "x.npy.gz", ".npy"):
        with pytest.raises(ValueError, match="unknown suffix") as caught:
            read_vectors(tmp_path / name)
        assert all(suffix in str(caught.value) for suffix in SUFFIXES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_errors_of_the_system(tmp_path, suffix):
    with pytest.raises(FileNotFoundError):
        read_vectors(tmp_path / f"x{suffix}")
    (tmp_path / f"x{suffix}").mkdir()
    with pytest.raises(IsADirectoryError):
        read_vectors(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", [*DTYPES, ".npy"])
def test_reading_takes_no_memory(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(file_bytes(suffix, sample(suffix, n=10_000, dim=500)))
    tracemalloc.start()
    found = read_vectors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000
    assert_same(found[-1:], sample(suffix, n=10_000, dim=500)[-1:])


def test_write_result(tmp_path):
    labels = np.arange(12).reshape(4, 3)
    distances = np.array([[0, 1, np.inf]] * 4, np.float32)
    write_result(tmp_path / "a.npz", labels, distances)
    write_result(tmp_path / "b.npz", np.asfortranarray(labels)[:, ::1].copy(), distances)
    with np.load(tmp_path / "a.npz") as found:
        assert sorted(found) == ["distances", "labels"]
        assert_same(found["labels"], labels)
        assert_same(found["distances"], distances)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert_same(read_vectors(f"{tmp_path}/a.npz:distances"), distances)


def test_write_result_all_or_nothing(tmp_path):
    path = tmp_path / "a.npz"
    labels, distances = np.zeros((2, 3), np.int64), np.zeros((2, 3), np.float32)
    write_result(path, labels, distances)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_result(path, labels + 1, distances.astype(object))
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"saved as \.npz"):
        write_result(tmp_path / "a.csv", labels, distances)
    with pytest.raises(FileNotFoundError):
        write_result(tmp_path / "no" / "a.npz", labels, distances)
    assert os.listdir(tmp_path) == ["a.npz"]
