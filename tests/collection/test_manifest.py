"""The manifest: what is read back, and every way in which it can be wrong."""

import json
import os
import pickle
import zlib
from collections import Counter

import numpy as np
import pytest
from collections_of import make, manifest_of

pytest.importorskip("hypothesis", reason="properties are tested with the extra `test`")

from hypothesis import given, settings
from hypothesis import strategies as st

import hnsw_gpu
from hnsw_gpu import CorruptIndexError
from hnsw_gpu.collection import sharded
from hnsw_gpu.collection.manifest import (
    MANIFEST,
    Manifest,
    ShardEntry,
    entry_of,
    read_manifest,
    write_manifest,
)
from hnsw_gpu.files import arrays_checksum

ROWS = np.random.default_rng(0).normal(size=(90, 8)).astype(np.float32)
GOOD = Manifest(
    "l2", 8, "fp32", "", 16, 200, 0, 5,
    (ShardEntry("a.hnsw", 2, (0, 1), 100, "0123abcd"), ShardEntry("b", 3, (4, 9), 9, "ffffffff")),
    ((0.9, 10, 48, 5),),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "c.collection", ROWS, metric="l2")
    return tmp_path / "c.collection"


def rewritten(folder, change):
    """Change the facts of a manifest and close them with the right checksum."""
    facts = json.loads((folder / MANIFEST).read_text())
    del facts["checksum"]
    change(facts)
    facts["checksum"] = f"{zlib.crc32(json.dumps(facts).encode()):08x}"
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n")


def test_what_is_written_is_read(tmp_path):
    write_manifest(tmp_path, GOOD)
    assert read_manifest(tmp_path) == GOOD
    assert GOOD.checksum == read_manifest(tmp_path).checksum
    assert GOOD._replace(seed=1).checksum != GOOD.checksum
    assert os.listdir(tmp_path) == [MANIFEST]
    write_manifest(tmp_path, GOOD._replace(tuned=()))
    assert "tuned" not in (tmp_path / MANIFEST).read_text()
    assert read_manifest(tmp_path) == GOOD._replace(tuned=())


def test_an_entry_describes_its_file(folder):
    entries = read_manifest(folder).shards
    assert [entry.rows for entry in entries] == [30, 30, 30]
    assert [entry.labels for entry in entries] == [(0, 29), (30, 59), (60, 89)]
    for entry in entries:
        path = folder / entry.file
        assert (entry.bytes, entry.checksum) == (path.stat().st_size, arrays_checksum(path))


def test_every_flipped_bit_is_found(tmp_path):
    write_manifest(tmp_path, GOOD)
    whole = (tmp_path / MANIFEST).read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            (tmp_path / MANIFEST).write_bytes(damaged)
            with pytest.raises(CorruptIndexError, match=MANIFEST):
                read_manifest(tmp_path)
    for stop in range(len(whole)):
        (tmp_path / MANIFEST).write_bytes(whole[:stop])
        with pytest.raises(CorruptIndexError, match=MANIFEST):
            read_manifest(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
NAMES = (*Manifest._fields, "format_version")


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(ShardEntry._fields), st.booleans(), VALUES)
def test_hostile_values_are_refused_or_harmless(tmp_path_factory, name, field, is_entry, value):
    folder = tmp_path_factory.mktemp("hostile")
    write_manifest(folder, GOOD)

    def change(facts):
        if is_entry:
            facts["shards"][0][field] = value
        else:
            facts[name] = value

    rewritten(folder, change)
    try:
        manifest = read_manifest(folder)
    except CorruptIndexError as error:
        assert str(folder / MANIFEST) in str(error)
    else:  # what is read is what such a file means
        write_manifest(folder, manifest)
        assert read_manifest(folder) == manifest


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "1", "[" * 100_000, "NaN", "\ufffd", "{"])
def test_json_that_is_no_manifest(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CorruptIndexError, match="damaged, or no manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format_version=2), "format version 2, where this release reads 1"),
        (lambda m: m.update(shards=[]), "no shards: the collection is empty"),
        (lambda m: m.update(rows=91), "rows=91, and the shards have 90"),
        (lambda m: m.update(metric="hamming"), "metric='hamming'"),
        (lambda m: m.update(dim=0), "dim=0"),
        (lambda m: m["shards"][1].update(file="../x.hnsw"), "'../x.hnsw' is no name of a file"),
        (lambda m: m["shards"][1].update(file="/etc/passwd"), "is no name of a file"),
        (lambda m: m["shards"][1].update(file=MANIFEST), "is no name of a file"),
        (lambda m: m["shards"][1].update(file="shard-0000.hnsw"), "shard-0000.hnsw is there twice"),
        (lambda m: m["shards"][1].update(bytes=-1), "shard 1: bytes=-1"),
        (lambda m: m["shards"][1].update(bytes=1e9), "shard 1: bytes=1000000000.0"),
        (lambda m: m["shards"][1].update(labels=[9, 3]), "shard 1: labels=3"),
        (lambda m: m["shards"][1].update(labels=["b", "a"]), "shard 1: labels ['b', 'a']"),
        (lambda m: m["shards"][1].update(labels=["", "a"]), "shard 1: labels ['', 'a']"),
        (lambda m: m["shards"][1].update(labels=["a", "b"]), "shards of integer labels, and of"),
        (lambda m: m["shards"][1].update(labels=[0, 3]), "shard 1: 30 rows of labels 0 to 3"),
        (lambda m: m["shards"][1].update(labels=None), "shard 1: 30 rows of labels None"),
        (lambda m: m["shards"][1].update(checksum="xyz"), "shard 1: checksum 'xyz'"),
        (lambda m: m["shards"][1].update(more=1), "do not agree"),
        (lambda m: m.update(tuned=[[2, 10, 48, 5]]), "recall: 2.0, expected above 0"),
        (lambda m: m.update(tuned=[[0.9, 10]]), "not enough values"),
        (lambda m: m.update(tuned=[]), "do not agree"),
    ],
)
def test_values_that_make_no_sense(folder, change, words):
    rewritten(folder, change)
    with pytest.raises(CorruptIndexError) as caught:
        hnsw_gpu.load(folder)
    assert str(folder / MANIFEST) in str(caught.value)
    assert words in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (CorruptIndexError, str(caught.value))


def test_a_manifest_beyond_any_size(folder):
    with open(folder / MANIFEST, "r+b") as file:
        file.truncate(1 << 40)  # a hole: nothing of that size is read
    with pytest.raises(CorruptIndexError, match="longer than the 16,777,216 bytes"):
        hnsw_gpu.load(folder)


def test_what_is_no_collection(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        hnsw_gpu.load(tmp_path / "absent.collection")
    with pytest.raises(IsADirectoryError, match=r"without manifest\.json: no collection"):
        hnsw_gpu.load(tmp_path)
    os.mkfifo(tmp_path / MANIFEST)  # on which reading would wait
    with pytest.raises(CorruptIndexError, match="is not a file"):
        hnsw_gpu.load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing, and manifest.json names it"),
        (lambda path: path.write_bytes(path.read_bytes()[:-64]), "manifest.json says"),
        (lambda path: path.write_bytes(b"x" * path.stat().st_size), "not a saved index"),
        (lambda path: (path.unlink(), path.mkdir()), "shard-0001.hnsw"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "shard-0001.hnsw"),
    ],
)
def test_a_shard_that_is_damaged_is_named(folder, damage, words):
    damage(folder / "shard-0001.hnsw")
    with pytest.raises(CorruptIndexError, match=r"shard-0001\.hnsw") as caught:
        hnsw_gpu.load(folder)
    assert words in str(caught.value)


def test_shards_that_were_swapped_are_named(folder):
    one, other = folder / "shard-0000.hnsw", folder / "shard-0001.hnsw"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    with pytest.raises(CorruptIndexError, match=r"shard-0000\.hnsw: is another index"):
        hnsw_gpu.load(folder)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"dim": 4}, "dim 4, and manifest.json says 8"),
        ({"metric": "ip"}, "metric ip, and manifest.json says l2"),
        ({"dtype": "fp16"}, "dtype fp16, and manifest.json says fp32"),
        ({"seed": 7}, "seed 7, and manifest.json says 0"),
    ],
)
def test_shards_of_different_kinds(folder, how, words):
    """Each file is as its entry says, and yet not of the collection."""
    index = hnsw_gpu.Index(**{"dim": 8, "metric": "l2"} | how)
    index.add(ROWS[30:60, : index.dim], np.arange(30, 60))
    index.save(folder / "shard-0001.hnsw")
    entries = [entry_of(folder, entry.file) for entry in read_manifest(folder).shards]
    write_manifest(folder, manifest_of(hnsw_gpu.load(folder / "shard-0000.hnsw"), entries))
    with pytest.raises(CorruptIndexError) as caught:
        hnsw_gpu.load(folder)
    assert f"shard-0001.hnsw: {words}" in str(caught.value)


def test_labels_that_two_shards_have(tmp_path):
    labels = np.arange(90)
    labels[70] = 13
    make(tmp_path / "c", ROWS, labels)
    with pytest.raises(CorruptIndexError) as caught:
        hnsw_gpu.load(tmp_path / "c")
    said = "label 13 is in shard-0000.hnsw and in shard-0002.hnsw (1 are)"
    assert str(caught.value) == f"{tmp_path / 'c'}: {said}"


def counted(monkeypatch, name):
    """How many labels a function of (shard, start, stop) gives from now on, by the start."""
    looked_at, within = Counter(), getattr(sharded, name)

    def counting(shard, start, stop):
        found = within(shard, start, stop)
        looked_at[start] += len(found)
        return found

    monkeypatch.setattr(sharded, name, counting)
    return looked_at


def test_labels_are_compared_a_part_at_a_time(tmp_path, monkeypatch):
    """However unevenly they lie: most of a range may be empty."""
    labels = np.random.default_rng(1).permutation(len(ROWS)).astype(np.int64)
    labels[0] = 2**62
    looked_at = counted(monkeypatch, "_labels_within")
    monkeypatch.setattr(sharded, "LABELS_AT_A_TIME", 20)
    make(tmp_path / "c", ROWS, labels)
    assert len(hnsw_gpu.load(tmp_path / "c")) == len(ROWS) == looked_at.total()
    assert max(looked_at.values()) <= 3 * 20


@pytest.mark.parametrize("doubled", [(), ((70, 13),), ((70, 13), (35, 2), (88, 40))])
def test_strings_are_compared_a_part_at_a_time(tmp_path, monkeypatch, doubled):
    """By their hashes; what is there twice is counted over all parts, and the first is named."""
    labels = [f"text {(7 * i) % 90:02d}" for i in range(90)]
    for place, of in doubled:
        labels[place] = labels[of]
    looked_at = counted(monkeypatch, "_keys_within")
    monkeypatch.setattr(sharded, "STRINGS_AT_A_TIME", 20)
    make(tmp_path / "c", ROWS, labels)
    if doubled:
        first = min(labels[of] for _, of in doubled)
        with pytest.raises(CorruptIndexError, match=rf"{first}.* \({len(doubled)} are\)"):
            hnsw_gpu.load(tmp_path / "c")
    else:
        assert len(hnsw_gpu.load(tmp_path / "c")) == len(ROWS)
    assert looked_at.total() == len(ROWS) and max(looked_at.values()) < 40
