"""Damaged files: the one typed error or the right answers, never a crash or a wrong answer."""

import json
import os
import struct

import numpy as np
import oracle
import pytest

import hnsw_gpu
from hnsw_gpu import CorruptIndexError
from hnsw_gpu.files import storage

DIM, N = 8, 120


@pytest.fixture(scope="module")
def index():
    rows = oracle.gaussian(N, DIM, seed=1)
    index = hnsw_gpu.Index(DIM, "cosine", "int8", M=4, ef_construction=30, refine="fp16")
    index.add(np.concatenate([rows, rows[:10]]), np.arange(N + 10) * 5)
    index.delete([15, 600])
    return index


@pytest.fixture(scope="module")
def content(index, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "index.hnsw"
    index.save(path)
    return path.read_bytes()


def answers(index):
    """All that a file must give back."""
    queries = oracle.gaussian(20, DIM, seed=2)
    return (
        *index.search(queries, 7),
        *index.search(queries, 3, allow=[5, 10, 605]),
        *index.neighbor_graph(3),
        index.labels,
        index.vectors(index.labels),
        np.array([len(index), index.M, index.ef_construction, index.seed, index.dim]),
        np.array([index.metric, index.dtype, str(index.refine)]),
    )


@pytest.fixture(scope="module")
def expected(index):
    return answers(index)


def is_refused(path, **options):
    """Whether loading says that the file is corrupt; if it loads, the index is returned."""
    try:
        return hnsw_gpu.load(path, **options)
    except CorruptIndexError as error:
        assert isinstance(error, ValueError)
        assert path.name in str(error)
        assert len(str(error)) > len(str(path)) + 15
        return None


def write(path, content):
    # a new file each time: a mapped one must not be written to
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("mmap", (False, True))
def test_the_file_itself_is_right(content, expected, tmp_path, mmap):
    path = tmp_path / "index.hnsw"
    write(path, content)
    oracle.assert_same(answers(hnsw_gpu.load(path, mmap=mmap)), expected)
    oracle.assert_same(answers(hnsw_gpu.load(str(path), mmap=mmap)), expected)


@pytest.mark.parametrize("mmap", (False, True))
def test_truncated_at_200_places(content, tmp_path, mmap):
    path = tmp_path / "index.hnsw"
    places = [1, 7, 8, 9, 64, 65, *np.linspace(0, len(content) - 1, 194).astype(int).tolist()]
    assert len(set(places)) == 200
    for size in places:
        write(path, content[:size])
        assert is_refused(path, mmap=mmap) is None, size


def test_500_single_bit_flips(content, expected, tmp_path):
    path = tmp_path / "index.hnsw"
    random = np.random.default_rng(5)
    header = 8 + int.from_bytes(content[:8], "little")
    places = np.concatenate(
        [
            np.arange(64),
            random.integers(64, 8 * header, 136),
            random.integers(8 * header, 8 * len(content), 300),
        ]
    )
    refused = 0
    for place in places:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << (place % 8)
        write(path, flipped)
        loaded = is_refused(path)
        refused += loaded is None
        if loaded is not None:
            oracle.assert_same(answers(loaded), expected)
    assert refused >= 490  # a right answer is only for bits that carry nothing


def test_bit_flips_in_a_mapped_file(content, expected, tmp_path):
    """Mapping does not read the rows, so a flip there is for `verify` to find; all else is read."""
    path = tmp_path / "index.hnsw"
    random = np.random.default_rng(6)
    for place in random.integers(8 * len(content), size=150):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << (place % 8)
        write(path, flipped)
        loaded = is_refused(path, mmap=True)
        if loaded is None:
            continue
        np.testing.assert_array_equal(loaded.labels, expected[6])
        labels, _ = loaded.search(oracle.gaussian(20, DIM, seed=2), 130, ef=200)
        found = labels[labels >= 0]
        assert np.isin(found, expected[6]).all()
        with pytest.raises(CorruptIndexError, match="vectors"):
            storage.verify_arrays(path)


def test_bytes_too_many_or_shuffled(content, tmp_path):
    path = tmp_path / "index.hnsw"
    half = len(content) // 2
    for wrong in (
        content + b"\0",
        content + content,
        b"\0" + content,
        content[half:] + content[:half],
        content[:half] + bytes(len(content) - half),
        content[::-1],
    ):
        write(path, wrong)
        assert is_refused(path) is None
        assert is_refused(path, mmap=True) is None


def npz(path):
    with open(path, "wb") as file:
        np.savez(file, vectors=np.ones((4, 8), np.float32))


def npy(path):
    with open(path, "wb") as file:
        np.save(file, np.ones((4, 8), np.float32))


def foreign_safetensors(path):
    others = pytest.importorskip("safetensors.numpy", reason="it comes with the extra `test`")
    others.save_file({"vectors": np.ones((4, 8), np.float32)}, path)


def header_only(text, length=None, data=b""):
    def make(path):
        encoded = text.encode()
        path.write_bytes(
            struct.pack("<Q", len(encoded) if length is None else length) + encoded + data
        )

    return make


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(10_000)),
    "ones": lambda path: path.write_bytes(b"\xff" * 10_000),
    "noise": lambda path: path.write_bytes(np.random.default_rng(1).bytes(10_000)),
    "text": lambda path: path.write_text("vectors,labels\n1,2\n" * 100),
    "npz": npz,
    "npy": npy,
    "safetensors of others": foreign_safetensors,
    "a header of 2**63": header_only("{}", length=2**63),
    "a header of 2**64 - 1": header_only("{}", length=2**64 - 1),
    "an empty header": header_only("{}"),
    "deep nesting": header_only("[" * 100_000 + "]" * 100_000),
    "a list": header_only("[1, 2]"),
    "not JSON": header_only("{'vectors'"),
    "not UTF-8": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe{}"),
    "metadata of another kind": header_only('{"__metadata__": 5}'),
    "huge numbers": header_only(
        '{"__metadata__": {"hnsw_gpu": "{\\"format_version\\": 1, \\"about\\": {}, \\"arrays\\":'
        ' {\\"vectors\\": {\\"dtype\\": \\"F32\\", \\"shape\\": [4294967296, 4294967296],'
        ' \\"checksum\\": \\"00000000\\"}}}"}}'
    ),
    "a huge integer": header_only('{"__metadata__": {"hnsw_gpu": "' + "9" * 5000 + '"}}'),
}


@pytest.mark.parametrize("mmap", (False, True))
@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_others(kind, mmap, tmp_path):
    path = tmp_path / "index.hnsw"
    FOREIGN[kind](path)
    assert is_refused(path, mmap=mmap) is None


def test_a_future_version_is_named(index, tmp_path, monkeypatch):
    path = tmp_path / "index.hnsw"
    with monkeypatch.context() as later:
        later.setattr(storage, "FORMAT_VERSION", 977)
        index.save(path)
    with pytest.raises(CorruptIndexError, match="977") as caught:
        hnsw_gpu.load(path)
    assert "version" in str(caught.value)
    index.save(path)
    hnsw_gpu.load(path).check()


def changed(name, change):
    def tamper(arrays, about):
        array = arrays[name].copy()
        arrays[name] = change(array)

    return tamper


def put(place, value):
    def change(array):
        array[place] = value
        return array

    return change


def fact(name, value):
    def tamper(arrays, about):
        assert name in json.dumps(about)
        about[name] = value

    return tamper


ARRAYS = (
    "vectors refine_vectors neighbors0 layer_offsets nodes neighbors below label_offsets labels"
)
LIES = {
    "a link out of range": changed("neighbors0", put((5, 0), N)),
    "a far link": changed("neighbors0", put((5, 0), 2**31 - 1)),
    "a negative link": changed("neighbors0", put((5, 0), -7)),
    "a link to itself": changed("neighbors0", put((5, 0), 5)),
    "a hole": changed("neighbors0", put((5, 0), -1)),
    "no way in": changed("neighbors0", lambda links: np.full_like(links, -1)),
    "an upper link out of range": changed("neighbors", put((0, 0), N)),
    "an upper node out of range": changed("nodes", put(-1, N + 3)),
    "a negative upper node": changed("nodes", put(0, -4)),
    "upper nodes not ascending": changed("nodes", lambda nodes: nodes[::-1]),
    "below out of range": changed("below", put(0, N + 9)),
    "below negative": changed("below", put(0, -2)),
    "layers descending": changed("layer_offsets", lambda offsets: offsets[::-1]),
    "layers beyond": changed("layer_offsets", put(-1, 10**9)),
    "layers negative": changed("layer_offsets", put(0, -1)),
    "no layers": changed("layer_offsets", lambda offsets: offsets[:0]),
    "labels of a node descending": changed("labels", lambda labels: labels[::-1]),
    "the same label twice": changed("labels", put(3, 0)),
    "the label -1": changed("labels", put(0, -1)),
    "label offsets descending": changed("label_offsets", lambda offsets: offsets[::-1]),
    "label offsets beyond": changed("label_offsets", put(-1, 10**12)),
    "label offsets negative": changed("label_offsets", put(1, -5)),
    "another dim": fact("dim", 100),
    "dim 0": fact("dim", 0),
    "dim negative": fact("dim", -8),
    "dim huge": fact("dim", 2**40),
    "dim as text": fact("dim", "8"),
    "a metric unknown": fact("metric", "manhattan"),
    "a metric of another kind": fact("metric", ["l2"]),
    "a dtype unknown": fact("dtype", "fp64"),
    "another dtype": fact("dtype", "fp32"),
    "M too small": fact("M", 1),
    "another M": fact("M", 5),
    "M as text": fact("M", "4"),
    "M null": fact("M", None),
    "the next label is taken": fact("next_label", 5),
    "the next label negative": fact("next_label", -1),
    "the next label as text": fact("next_label", "700"),
    "no facts": lambda arrays, about: about.clear(),
    "no metric": lambda arrays, about: about.pop("metric"),
}
for _name in ARRAYS.split():
    LIES |= {
        f"{_name} missing": lambda arrays, about, name=_name: arrays.pop(name),
        f"{_name} too short": changed(_name, lambda array: array[:-1]),
        f"{_name} empty": changed(_name, lambda array: array[:0]),
        f"{_name} of another dtype": changed(_name, lambda array: array.astype(np.float64)),
        f"{_name} with an axis more": changed(_name, lambda array: array[None]),
    }
for _name in ("vectors", "refine_vectors", "neighbors0", "neighbors"):
    LIES[f"{_name} too narrow"] = changed(_name, lambda array: array[:, :-1])


@pytest.mark.parametrize("lie", LIES)
def test_checksums_right_and_content_wrong(content, lie, tmp_path):
    """A file written by something else than `save`: every number in it is hostile."""
    path = tmp_path / "index.hnsw"
    write(path, content)
    arrays, about = storage.read_arrays(path)
    LIES[lie](arrays, about)
    storage.write_arrays(path, arrays, about)
    storage.verify_arrays(path)
    assert is_refused(path) is None
    assert is_refused(path, mmap=True) is None


def test_rows_that_are_not_numbers(tmp_path):
    """Nothing reads every number of a file; whatever they are, a search ends, with real labels."""
    path = tmp_path / "index.hnsw"
    index = hnsw_gpu.Index(DIM, "l2")
    index.add(oracle.gaussian(30, DIM, seed=1))
    for value in (np.nan, np.inf):
        index.save(path)
        arrays, about = storage.read_arrays(path)
        arrays["vectors"][3, 2] = value
        storage.write_arrays(path, arrays, about)
        loaded = is_refused(path)
        if loaded is not None:
            labels, _ = loaded.search(oracle.gaussian(20, DIM, seed=2), 30)
            assert np.isin(labels, np.arange(-1, 30)).all()
            assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in labels)


def test_saving_over_the_file_that_is_mapped(content, expected, tmp_path):
    path = tmp_path / "index.hnsw"
    write(path, content)
    mapped = hnsw_gpu.load(path, mmap=True)
    mapped.save(path)
    assert path.read_bytes() == content
    other = hnsw_gpu.Index(DIM)
    other.add(oracle.gaussian(5, DIM, seed=1))
    other.save(path)
    oracle.assert_same(answers(mapped), expected)
    assert len(hnsw_gpu.load(path)) == 5
    mapped.add(oracle.gaussian(3, DIM, seed=8))
    mapped.delete([0])
    mapped.save(path)
    again = hnsw_gpu.load(path, mmap=True)
    np.testing.assert_array_equal(again.labels, mapped.labels)
    oracle.assert_same(answers(again), answers(mapped))
    assert os.listdir(tmp_path) == ["index.hnsw"]


def test_a_mapped_index_never_writes_to_its_file(content, tmp_path):
    path = tmp_path / "index.hnsw"
    write(path, content)
    path.chmod(0o444)
    mapped = hnsw_gpu.load(path, mmap=True)
    mapped.add(oracle.gaussian(20, DIM, seed=8))
    mapped.delete(mapped.labels[::2])
    mapped.compact()
    mapped.check()
    assert path.read_bytes() == content
