"""The file of an index: against a second writer, safetensors itself, and every kind of damage."""

import io
import json
import math
import os
import pickle
import re
import resource
import signal
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="properties are tested with the extra `test`")

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file, save

import hnsw_gpu.files.storage as storage
from hnsw_gpu.files.storage import (
    CorruptIndexError,
    atomic_file,
    read_arrays,
    verify_arrays,
    write_arrays,
)

CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16",
    "float16": "F16", "uint32": "U32", "int32": "I32", "float32": "F32", "uint64": "U64",
    "int64": "I64", "float64": "F64",
}  # fmt: skip
ABOUT = {"metric": "cosine", "dim": 7, "tau": 0.1, "words": ["ä", "\\", '"'], "none": None}


def sample_arrays(seed=0, n=50):
    """One array of each dtype, of odd sizes, random bytes; and two empty ones."""
    random = np.random.default_rng(seed)
    arrays = {}
    for count, name in enumerate(CODES):
        shape = (n + count, 3)
        integers = random.integers(0, 120, shape)
        arrays[f"a_{name}"] = integers.astype(name)
    arrays["vectors"] = random.standard_normal((n, 7)).astype(np.float32)
    arrays["vectors_16"] = random.standard_normal((n, 7)).astype(np.float16)
    arrays["empty"] = np.empty((0, 7), np.float32)
    arrays["no_columns"] = np.empty((3, 0), np.int8)
    arrays["scalar"] = np.array(5, np.int64)
    return arrays


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype.newbyteorder("<")
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.astype(found[name].dtype).tobytes(), name


def checksum(data):
    blocks = [zlib.crc32(data[start : start + 2**22]) for start in range(0, len(data), 2**22)]
    return f"{zlib.crc32(b''.join(struct.pack('<I', block) for block in blocks)):08x}"


def entries_of(arrays):
    """Every array and its padding, sorted: [(name, code, shape, bytes)]."""
    entries = []
    for name, array in arrays.items():
        data = array.tobytes()
        entries.append((name, CODES[array.dtype.name], list(array.shape), data))
        if len(data) % 64:
            padding = 64 - len(data) % 64
            entries.append((f"{name}.pad", "U8", [padding], bytes(padding)))
    return sorted(entries)


def file_bytes(arrays, about, change_facts=None, change_table=None):
    """A second, independent writer of the format; the changes forge a file with true checksums."""
    entries = entries_of(arrays)
    facts = {
        "about": about,
        "format_version": 1,
        "arrays": {
            name: {"dtype": code, "shape": shape, "checksum": checksum(data)}
            for name, code, shape, data in entries
        },
    }
    if change_facts:
        change_facts(facts)
    text_checksum = f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"
    text = json.dumps({**facts, "checksum": text_checksum}, sort_keys=True)
    table: dict[str, dict] = {"__metadata__": {"hnsw_gpu": text}}
    place = 0
    for name, code, shape, data in entries:
        offsets = [place, place + len(data)]
        table[name] = {"dtype": code, "shape": shape, "data_offsets": offsets}
        place += len(data)
    if change_table:
        change_table(table)
    header = json.dumps(table, separators=(",", ":")).encode()
    return with_header(header + b" " * (-(len(header) + 8) % 64)) + b"".join(e[3] for e in entries)


def with_header(header):
    return struct.pack("<Q", len(header)) + header


def assert_corrupt(path, data, words="."):
    """Both readers refuse `data` with the path and `words`, in little memory."""
    path.write_bytes(data)
    for reader in (read_arrays, verify_arrays, lambda path: read_arrays(path, mapped=("vectors",))):
        tracemalloc.start()
        with pytest.raises(CorruptIndexError, match=words) as caught:
            reader(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < len(str(path)) + 1000
        assert peak < 100 * len(data) + 5_000_000  # what is compiled and cached on the way


# --- the right answer


def test_round_trip_of_every_dtype(tmp_path):
    arrays = sample_arrays()
    write_arrays(tmp_path / "x.hnsw", arrays, ABOUT)
    found, about = read_arrays(tmp_path / "x.hnsw")
    assert_same(found, arrays)
    assert about == ABOUT
    assert all(array.flags.writeable for array in found.values())
    verify_arrays(tmp_path / "x.hnsw")


@settings(max_examples=60, deadline=None)
@given(
    arrays=st.dictionaries(
        st.sampled_from(["a", "a_", "a1", "aB", "ab", "b"]),
        hnp.arrays(st.sampled_from(list(CODES)), hnp.array_shapes(min_dims=0, min_side=0)),
    ),
    about=st.dictionaries(
        st.text(), st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    ),
)
def test_round_trip_property(tmp_path_factory, arrays, about):
    path = tmp_path_factory.mktemp("any") / "x"
    write_arrays(path, arrays, about)
    found, found_about = read_arrays(path)
    assert_same(found, arrays)
    assert found_about == about
    assert_same(read_arrays(path, mapped=tuple(arrays))[0], arrays)


@pytest.mark.parametrize("n", [0, 1, 50, 400_000])  # the last: several blocks an array
def test_bytes_are_those_of_the_second_writer(tmp_path, n):
    arrays = sample_arrays(n=n)
    write_arrays(tmp_path / "x", arrays, ABOUT)
    assert (tmp_path / "x").read_bytes() == file_bytes(arrays, ABOUT)


def test_safetensors_reads_it(tmp_path):
    arrays = sample_arrays()
    write_arrays(tmp_path / "x", arrays, ABOUT)
    found = load_file(tmp_path / "x")
    assert_same({name: found[name] for name in arrays}, arrays)
    rest = set(found) - set(arrays)
    assert all(name.removesuffix(".pad") in arrays for name in rest)
    assert not any(found[name].any() for name in rest)
    with safe_open(tmp_path / "x", "np") as file:
        assert list(file.metadata()) == ["hnsw_gpu"]


def test_strides_byte_order_and_maps(tmp_path):
    base = np.arange(240, dtype=np.float32).reshape(20, 12)
    base.flags.writeable = False
    mapped = np.memmap(tmp_path / "raw", np.int32, "w+", shape=(6, 2))
    mapped[:] = np.arange(12).reshape(6, 2)
    arrays = {
        "fortran": np.asfortranarray(base),
        "strided": base[::3, ::-2],
        "transposed": base.T,
        "big_endian": base.astype(">f4"),
        "read_only": base,
        "mapped": mapped,
    }
    write_arrays(tmp_path / "x", arrays, {})
    assert_same(read_arrays(tmp_path / "x")[0], arrays)


def test_about_comes_back_as_json_has_it(tmp_path):
    write_arrays(tmp_path / "x", {}, {"tuple": (1, 2), "keys": {10: "a", 9: "b"}})
    assert read_arrays(tmp_path / "x") == ({}, {"tuple": [1, 2], "keys": {"10": "a", "9": "b"}})


def test_every_process_writes_the_same_bytes(tmp_path):
    write_arrays(tmp_path / "here", sample_arrays(), ABOUT)
    for number in range(3):
        path = tmp_path / f"{number}"
        run_child("save", path, PYTHONHASHSEED=str(number + 1))
        assert path.read_bytes() == (tmp_path / "here").read_bytes()


def test_order_of_the_arguments_leaves_no_trace(tmp_path):
    write_arrays(tmp_path / "a", sample_arrays(), ABOUT)
    write_arrays(
        tmp_path / "b", dict(reversed(sample_arrays().items())), dict(reversed(ABOUT.items()))
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_mapped_arrays(tmp_path):
    arrays = sample_arrays()
    write_arrays(tmp_path / "x", arrays, ABOUT)
    found, about = read_arrays(tmp_path / "x", mapped=(*arrays, "not_there"))
    assert_same(found, arrays)
    assert about == ABOUT
    for array in found.values():
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert array.size == 0 or array.ctypes.data % 64 == 0
    some = read_arrays(tmp_path / "x", mapped=("vectors",))[0]
    assert [name for name in some if isinstance(some[name], np.memmap)] == ["vectors"]


def test_mapped_arrays_outlive_a_save_over_their_file(tmp_path):
    path, arrays = tmp_path / "x", sample_arrays()
    write_arrays(path, arrays, {})
    found = read_arrays(path, mapped=tuple(arrays))[0]
    write_arrays(path, {**found, "vectors": -found["vectors"]}, {})
    assert_same(found, arrays)
    assert_same(read_arrays(path)[0], {**arrays, "vectors": -arrays["vectors"]})


def test_damage_in_a_mapped_array_is_left_to_verify(tmp_path):
    path, arrays = tmp_path / "x", sample_arrays()
    write_arrays(path, arrays, {})
    data = bytearray(path.read_bytes())
    data[data.index(arrays["vectors"].tobytes())] ^= 1
    path.write_bytes(data)
    found = read_arrays(path, mapped=("vectors",))[0]
    assert np.count_nonzero(found["vectors"] != arrays["vectors"]) == 1
    for reader in (
        read_arrays,
        verify_arrays,
        lambda path: read_arrays(path, mapped=("vectors_16",)),
    ):
        with pytest.raises(CorruptIndexError, match="'vectors' is damaged: checksum"):
            reader(path)


@pytest.mark.slow
def test_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "thread_count", lambda _: 2)
    vectors = np.random.default_rng(0).integers(0, 256, 60_000_001).astype(np.uint8)

    def peak(call, *arguments):
        tracemalloc.start()
        call(*arguments)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(write_arrays, tmp_path / "x", {"vectors": vectors}, {}) < 2_000_000
    assert peak(read_arrays, tmp_path / "x") < vectors.nbytes + 2_000_000
    assert peak(read_arrays, tmp_path / "x", ("vectors",)) < 2_000_000
    assert peak(verify_arrays, tmp_path / "x") < 20_000_000


def test_readers_beside_a_writer_never_see_a_mixture(tmp_path):
    path = tmp_path / "x"
    versions = [{"a": np.full(100_000, n), "b": np.full(9, n)} for n in range(2)]
    write_arrays(path, versions[0], {"n": 0})
    done = threading.Event()
    seen: list[tuple[int, set, set]] = []

    def keep_reading():
        while not done.is_set() or not seen:
            arrays, about = read_arrays(path)
            seen.append((about["n"], set(arrays["a"].tolist()), set(arrays["b"].tolist())))

    reader = threading.Thread(target=keep_reading)
    reader.start()
    for number in range(60):
        write_arrays(path, versions[number % 2], {"n": number % 2})
    done.set()
    reader.join()
    assert all(a == b == {n} for n, a, b in seen)


# --- bad input to write


@pytest.mark.parametrize("name", ["", "a.pad", "a b", "1a", "ä", "__metadata__", "a\n"])
def test_names_that_are_no_identifiers(tmp_path, name):
    with pytest.raises(ValueError, match="plain identifier"):
        write_arrays(tmp_path / "x", {name: np.zeros(3)}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", ["complex64", "U3", "O", "M8[s]", "i4,f4", "longdouble"])
def test_dtypes_that_have_no_place(tmp_path, dtype):
    with pytest.raises(TypeError, match="array 'a': a file cannot hold dtype"):
        write_arrays(tmp_path / "x", {"a": np.zeros(3, dtype)}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("about", "error"),
    [
        ({"a": math.nan}, ValueError),
        ({"a": np.int64(3)}, TypeError),
        ({"a": "x" * 2**20}, ValueError),
    ],
)
def test_facts_that_are_no_json(tmp_path, about, error):
    with pytest.raises(error):
        write_arrays(tmp_path / "x", {"a": np.zeros(3)}, about)
    assert os.listdir(tmp_path) == []


# --- damage


@pytest.fixture
def sound(tmp_path):
    return file_bytes(sample_arrays(), ABOUT)


@pytest.mark.slow
def test_truncated_at_200_places(tmp_path, sound):
    data_start = 8 + int.from_bytes(sound[:8], "little")
    places = {
        *range(12),
        *range(len(sound) - 4, len(sound)),
        *range(data_start - 4, data_start + 4),
    }
    places |= set(np.linspace(0, len(sound) - 1, 200 - len(places)).astype(int).tolist())
    for place in sorted(places):
        assert_corrupt(tmp_path / "x", sound[:place], "truncated")


@pytest.mark.slow
def test_500_single_bit_flips(tmp_path, sound):
    random = np.random.default_rng(1)
    data_start = 8 + int.from_bytes(sound[:8], "little")
    places = [*range(8), *random.integers(8, data_start, 242)]
    places += random.integers(data_start, len(sound), 250).tolist()
    path = tmp_path / "x"
    for place in places:
        data = bytearray(sound)
        data[place] ^= 1 << random.integers(8)
        path.write_bytes(data)
        for reader in (read_arrays, verify_arrays):
            with pytest.raises(CorruptIndexError, match=re.escape(str(path))):
                reader(path)


def test_every_flip_in_the_header(tmp_path):
    """Spaces, quotes, digits: no bit of it is free."""
    sound = file_bytes({"a": np.arange(3)}, {"dim": 3})
    path = tmp_path / "x"
    for bit in range(8 * (8 + int.from_bytes(sound[:8], "little"))):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CorruptIndexError):
            read_arrays(path)


@pytest.mark.slow
def test_many_blocks_on_many_threads(tmp_path, monkeypatch):
    """Each block lands in its own place."""
    monkeypatch.setattr(storage, "thread_count", lambda _: 8)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 64)
    arrays = {"vectors": np.arange(100_000)}
    write_arrays(tmp_path / "x", arrays, {})
    assert_same(read_arrays(tmp_path / "x")[0], arrays)
    verify_arrays(tmp_path / "x")


def test_flips_in_any_block(tmp_path):
    path = tmp_path / "x"
    vectors = np.random.default_rng(2).integers(0, 256, 9_000_000).astype(np.uint8)
    write_arrays(path, {"vectors": vectors}, {})
    size = path.stat().st_size
    for place in (size // 8, size // 2, size - 70):
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 16]))
        for reader in (read_arrays, verify_arrays):
            with pytest.raises(CorruptIndexError, match="'vectors' is damaged"):
                reader(path)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
    assert_same(read_arrays(path)[0], {"vectors": vectors})


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300) | st.binary(max_size=200).map(with_header))
def test_garbage(tmp_path_factory, data):
    assert_corrupt(tmp_path_factory.mktemp("garbage") / "x", data)


def foreign_safetensors(metadata=None):
    return save({"a": np.arange(6)}, metadata)


def saved_npz():
    file = io.BytesIO()
    np.savez(file, a=np.arange(100))
    return file.getvalue()


def saved_npy():
    file = io.BytesIO()
    np.save(file, np.arange(100))
    return file.getvalue()


def saved_hnswlib(dim=4, count=10):
    """Its layout: header, records of 33 links, vector and label, then upper levels."""
    record = 4 + 4 * 32 + 4 * dim + 8
    header = struct.pack(
        "<QQQQQQiIQQQdQ",
        0, count, count, record, record - 8, 132, 0, 0, 16, 32, 16, 1 / math.log(16), 200,
    )  # fmt: skip
    return header + bytes(record * count) + bytes(4 * count)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 5000,
        b"\xff" * 5000,
        b"word 0.1 0.2 0.3\n" * 100,
        np.random.default_rng(3).bytes(100_000),
        pickle.dumps({"a": list(range(1000))}),
        saved_npz(),
        saved_npy(),
        saved_hnswlib(),
        foreign_safetensors(),
        foreign_safetensors({"format": "pt"}),
        foreign_safetensors({"hnsw_gpu": "hello"}),
        foreign_safetensors({"hnsw_gpu": "[]"}),
        foreign_safetensors({"hnsw_gpu": "{}"}),
        foreign_safetensors({"hnsw_gpu": '{"format_version":1}'}),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_another_format(tmp_path, data):
    assert_corrupt(tmp_path / "x", data, "not a saved index|damaged header")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32 + 300, 2**63 - 1, 2**63, 2**64 - 1])
def test_hostile_header_length(tmp_path, sound, length):
    assert_corrupt(tmp_path / "x", struct.pack("<Q", length) + sound[8:], "not a saved index")


def test_huge_sparse_file_with_a_huge_header(tmp_path):
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**39) + b"{")
        file.truncate(2**40)
    with pytest.raises(CorruptIndexError, match="not a saved index"):
        read_arrays(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"__metadata__":{"hnsw_gpu":"' + b"[" * 500_000 + b'"}}',
        b'{"__metadata__":{"hnsw_gpu":"{\\"format_version\\":1,\\"about\\":'
        + b'{\\"a\\":' * 900 + b"1" + b"}" * 900
        + b',\\"arrays\\":{},\\"checksum\\":\\"0\\"}"}}',
        b'{"a":' + b"9" * 100_000 + b"}",
        b'{"a":"\xff\xfe"}',
        b'{"a":"' + b"\xff" * 100_000 + b'"}',
        b'{"a":"\xed\xa0\x80"}',
        '{"ä":1}'.encode("utf-16"),
        b"\x00" * 100,
        b"null",
        b'"text"',
        b'{"__metadata__":null}',
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"hnsw_gpu":3}}',
    ],
    ids=lambda header: repr(header[:20]),
)  # fmt: skip
def test_hostile_header(tmp_path, header):
    assert_corrupt(tmp_path / "x", with_header(header), "header")


def test_facts_nested_to_the_limit_of_the_parser(tmp_path):
    """What can just be parsed may be too deep to be written again."""
    left = 1000 - sys.getrecursionlimit()
    for depth in range(880 - left, 1005 - left, 2):
        nested = '{"a":' * depth + "1" + "}" * depth
        text = '{"format_version":1,"arrays":{},"checksum":"0","about":' + nested + "}"
        header = json.dumps({"__metadata__": {"hnsw_gpu": text}}).encode()
        (tmp_path / "x").write_bytes(with_header(header))
        with pytest.raises(CorruptIndexError, match="header"):
            read_arrays(tmp_path / "x")


def test_duplicate_keys(tmp_path, sound):
    length = int.from_bytes(sound[:8], "little")
    header, rest = sound[8 : 8 + length].rstrip(), sound[8 + length :]
    entry = json.dumps({"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]})
    twice = header[:-1] + b',"empty":' + entry.encode() + b"}"
    assert_corrupt(tmp_path / "x", with_header(twice) + rest, "damaged header")
    metadata = json.dumps(json.loads(header)["__metadata__"]).encode()
    twice = b'{"__metadata__":' + metadata + b"," + header[1:]
    assert_corrupt(tmp_path / "x", with_header(twice) + rest, "damaged header")


@pytest.mark.parametrize("version", [2, 1000, 0, -1, "1", None, [1], 10**400])
def test_other_format_version(tmp_path, version):
    data = file_bytes(sample_arrays(), ABOUT, lambda facts: facts.update(format_version=version))
    assert_corrupt(tmp_path / "x", data, "format version .*this release reads 1")


def change_both(field, value, array="vectors"):
    """Forge the array's field in the facts and in the table alike."""
    return {
        "change_facts": lambda facts: facts["arrays"][array].update({field: value}),
        "change_table": lambda table: table[array].update({field: value}),
    }


@pytest.mark.parametrize(
    "shape",
    [
        [-1, 7], [-50, -7], [50, 8], [2**62, 2**62], [2**63, 7], [0, 2**62], [0, 2**63],
        [2**64 // 28, 7], [50.0, 7], [True, 350], ["50", 7], [None], "ab", {}, None, 350,
        [1] * 100 + [50, 7], [[50], 7],
    ],
    ids=repr,
)  # fmt: skip
def test_hostile_shape_in_both_places(tmp_path, shape):
    arrays = sample_arrays()
    assert_corrupt(tmp_path / "x", file_bytes(arrays, {}, **change_both("shape", shape)))


@pytest.mark.parametrize("shape", [[0, 2**59], [0, 2**62], [2**40, 0, 2**40], [0, 2**64]])
def test_no_bytes_but_a_shape_beyond_numpy(tmp_path, shape):
    forged = file_bytes(sample_arrays(), {}, **change_both("shape", shape, "empty"))
    assert_corrupt(tmp_path / "x", forged, "no array has the shape")


@pytest.mark.parametrize("dtype", ["F64", "F16", "C64", "BF16", "O", "<f4", "", None, 4, ["F32"]])
def test_hostile_dtype_in_both_places(tmp_path, dtype):
    assert_corrupt(tmp_path / "x", file_bytes(sample_arrays(), {}, **change_both("dtype", dtype)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "I32"),
        ("shape", [7, 50]),
        ("data_offsets", [0, 1400]),
        ("data_offsets", [-1400, 0]),
        ("data_offsets", [0, 2**64]),
        ("extra", 1),
    ],
)
def test_table_against_facts(tmp_path, field, value):
    def change_table(table):
        table["vectors"][field] = value

    data = file_bytes(sample_arrays(), {}, change_table=change_table)
    assert_corrupt(tmp_path / "x", data, "do not agree")


@pytest.mark.parametrize(
    "change",
    [
        {"about": None}, {"about": 5}, {"about": "text"}, {"about": [1]}, {"about": math.nan},
        {"about": {"a": math.inf}, "arrays": {}}, {"arrays": []}, {"arrays": None},
        {"arrays": {"a": 1}},
        {"arrays": {"a": {}}}, {"arrays": {"": {"dtype": "U8", "shape": [0], "checksum": "0"}}},
        {"checksum": "00000000"}, {"extra": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_hostile_facts(tmp_path, change):
    data = file_bytes(sample_arrays(), {}, lambda facts: facts.update(change))
    assert_corrupt(tmp_path / "x", data, "header")


def test_wrong_checksum_of_an_array(tmp_path):
    for value in ("00000000", "", None, 7):

        def change_facts(facts, value=value):
            facts["arrays"]["a_int8"]["checksum"] = value

        forged = file_bytes(sample_arrays(), {}, change_facts)
        assert_corrupt(tmp_path / "x", forged, "'a_int8' is damaged")


def test_bytes_after_the_end(tmp_path, sound):
    assert_corrupt(tmp_path / "x", sound + b"\0", "truncated or overwritten")
    assert_corrupt(tmp_path / "x", sound + sound, "truncated or overwritten")


# --- what the system says stays as it is


def test_errors_of_the_system(tmp_path):
    for reader in (read_arrays, verify_arrays):
        with pytest.raises(FileNotFoundError):
            reader(tmp_path / "missing")
        with pytest.raises(IsADirectoryError):
            reader(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"'{tmp_path}/no/'")):
        write_arrays(tmp_path / "no" / "x", {}, {})
    with pytest.raises(IsADirectoryError):
        write_arrays(tmp_path, {}, {})
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(NotADirectoryError):
        write_arrays(tmp_path / "file" / "x", {}, {})
    assert (tmp_path / "file").read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["file"]


def test_permission(tmp_path):
    write_arrays(tmp_path / "x", {}, {})
    tmp_path.chmod(0)
    user = os.geteuid()
    if user == 0:  # whom no mode keeps out
        os.seteuid(65534)
    try:
        for call in (read_arrays, verify_arrays, lambda path: write_arrays(path, {}, {})):
            with pytest.raises(PermissionError):
                call(tmp_path / "x")
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
    assert read_arrays(tmp_path / "x") == ({}, {})


def test_pipes_are_neither_waited_for_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptIndexError, match="pipe"):
        read_arrays(tmp_path / "pipe")
    with pytest.raises(CorruptIndexError, match="device"):
        read_arrays("/dev/zero")
    with pytest.raises(ValueError, match="pipe"):
        write_arrays(tmp_path / "pipe", {}, {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


# --- writing


def test_modes(tmp_path):
    old = os.umask(0o027)
    try:
        write_arrays(tmp_path / "x", {}, {})
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
        (tmp_path / "x").chmod(0o600)
        write_arrays(tmp_path / "x", {}, {"new": 1})
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
        assert read_arrays(tmp_path / "x")[1] == {"new": 1}
    finally:
        os.umask(old)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "x")
    for number in range(2):  # leading nowhere at first
        write_arrays(tmp_path / "link", {}, {"n": number})
        assert (tmp_path / "link").is_symlink()
        assert read_arrays(tmp_path / "folder" / "x") == ({}, {"n": number})
    assert sorted(os.listdir(tmp_path)) == ["folder", "link"]
    assert os.listdir(tmp_path / "folder") == ["x"]


def test_any_name_that_the_system_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x", "ä" * 127, "n" * 255, " ", "a:b", os.fsdecode(b"\xff\xfe")):
        write_arrays(name, {}, {"name": len(name)})
        assert read_arrays(name) == ({}, {"name": len(name)})


def act_at(step, act, patch):
    """Call `act` at the step-th moment of a save: within and after each write, before each sync,
    before and after the renaming. `patch(object, name, value)` puts the hooks in."""
    left = [step]
    real_fsync, real_replace = os.fsync, os.replace

    def moment():
        left[0] -= 1
        if left[0] == -1:
            act()

    class File(io.BufferedWriter):
        def write(self, data):
            half = len(data) // 2
            for part in (data[:half], data[half:]):
                super().write(part)
                self.flush()
                moment()
            return len(data)

    def fsync(descriptor):
        moment()
        real_fsync(descriptor)

    def replace(source, target):
        moment()
        real_replace(source, target)
        moment()

    patch(storage, "open", lambda path, mode: File(io.FileIO(path, mode)))
    patch(os, "fsync", fsync)
    patch(os, "replace", replace)


OLD, NEW = sample_arrays(1), sample_arrays(2)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left"), MemoryError()]
)
def test_failure_at_every_moment(tmp_path, error):
    path = tmp_path / "x"
    write_arrays(path, OLD, {"is": "old"})

    def fail():
        raise error

    outcomes = []
    for step in range(100):
        with pytest.MonkeyPatch.context() as patch:
            # `storage` has no `open` of its own until now
            act_at(step, fail, partial(patch.setattr, raising=False))
            try:
                write_arrays(path, NEW, {"is": "new"})
            except type(error):
                outcomes.append("failed")
            else:
                outcomes.append("saved")
        assert os.listdir(tmp_path) == ["x"]
        arrays, about = read_arrays(path)
        assert_same(arrays, {"old": OLD, "new": NEW}[about["is"]])
        outcomes[-1] += ", " + about["is"]
        if about["is"] == "new":
            write_arrays(path, OLD, {"is": "old"})
        if outcomes[-1] == "saved, new":
            break
    # once it is renamed the new file stands; that the folder cannot be synced is only logged
    shown = 1 if isinstance(error, OSError) else 2
    count = len(outcomes) - shown - 1
    assert outcomes == ["failed, old"] * count + ["failed, new"] * shown + ["saved, new"]
    assert count == 2 * (1 + len(entries_of(NEW))) + 2


@pytest.mark.slow
def test_killed_at_every_moment(tmp_path):
    """SIGKILL within a save over an existing file: the old file or the new one, and saves go on."""
    path = tmp_path / "x"
    moments = 2 * (1 + len(entries_of(NEW))) + 4
    last = moments - 1
    seen = set()
    for step in (0, 1, 2, 5, moments // 2, last - 4, last - 3, last - 2, last - 1, last):
        write_arrays(path, OLD, {"is": "old"})
        assert run_child("killed", path, step) == -signal.SIGKILL
        arrays, about = read_arrays(path)
        is_old = step < last - 1
        assert about == {"is": "old" if is_old else "new"}
        assert_same(arrays, OLD if is_old else NEW)
        verify_arrays(path)
        left = set(os.listdir(tmp_path)) - {"x"}
        assert len(left) == is_old and not left & seen  # the save before this removed the last one
        assert all(name.startswith(".x.") and name.endswith(".tmp") for name in left)
        seen |= left
    assert len(seen) == 8
    assert run_child("killed", path, moments) == 0
    assert_same(read_arrays(path)[0], NEW)
    assert os.listdir(tmp_path) == ["x"]


def mounted(folder, size):
    """Whether a small disk could be mounted there."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_full_disk(tmp_path):
    """On a disk of 256 KiB; where we may not mount one, under a limit on the size of files."""
    path = tmp_path / "disk" / "x"
    path.parent.mkdir()
    large = {"vectors": np.zeros((1000, 256), np.float32)}
    is_mounted = mounted(path.parent, "256k")
    try:
        write_arrays(path, OLD, {"is": "old"})
        if is_mounted:
            with pytest.raises(OSError, match="No space left on device"):
                write_arrays(path, large, {})
        else:
            assert run_child("limited", path) == 0
        assert os.listdir(path.parent) == ["x"]
        assert_same(read_arrays(path)[0], OLD)
        write_arrays(path, NEW, {"is": "new"})  # both fit at once
        assert_same(read_arrays(path)[0], NEW)
    finally:
        if is_mounted:
            subprocess.run(["umount", str(path.parent)], check=True)


def test_limit_on_file_size(tmp_path):
    write_arrays(tmp_path / "x", OLD, {"is": "old"})
    assert run_child("limited", tmp_path / "x") == 0
    assert os.listdir(tmp_path) == ["x"]
    assert_same(read_arrays(tmp_path / "x")[0], OLD)


def test_atomic_file_that_was_closed_early(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ValueError, match="closed"), atomic_file(tmp_path / "x") as file:
        file.write(b"new")
        file.close()
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


# --- what the tests above run in a process of its own


def run_child(*arguments, **environment):
    root = Path(storage.__file__).parents[2]
    search = os.pathsep.join([str(root), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": search, **environment}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, timeout=60, check=False).returncode


def main(task, path, step=0):
    if task == "save":
        write_arrays(path, sample_arrays(), ABOUT)
    if task == "killed":
        act_at(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL), setattr)
        write_arrays(path, NEW, {"is": "new"})
    if task == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(OSError, match="File too large"):
            write_arrays(path, {"vectors": np.zeros((1000, 256), np.float32)}, {})


if __name__ == "__main__":
    main(*sys.argv[1:])
