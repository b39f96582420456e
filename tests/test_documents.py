"""Documents beside an index: one folder, the old one or the new one, never two halves."""

import contextlib
import importlib
import itertools
import json
import os
import pickle
import sys
import threading

import numpy as np
import oracle
import pytest

import hnsw_gpu.documents
from hnsw_gpu.documents import DOCUMENTS, SAVING, Documents, Record
from hnsw_gpu.files import CorruptIndexError, atomic_file

DIM, COUNT = 8, 40
ROWS = oracle.gaussian(COUNT, DIM, seed=1)
IDS = [f"d{number}" for number in range(COUNT)]


def records(ids=IDS, edition=1):
    return [Record(f"text of {id}", {"id": id, "edition": edition}) for id in ids]


def filled(**options):
    documents = Documents(**options)
    documents.add(IDS, ROWS, records())
    return documents


def nearest(documents, row, k=3, **how):
    return [found.id for found in documents.search(row, k, **how)]


def truth(row, k, ids=IDS):
    distances = oracle.distances(row[None], ROWS, "cosine")[0]
    return sorted(ids, key=lambda id: distances[IDS.index(id)])[:k]


def test_searches_find_the_documents_of_the_nearest_vectors():
    documents = filled()
    for row in ROWS[:5] + 0.1:
        assert nearest(documents, row) == truth(row, 3)
        allowed = IDS[1::2]
        assert nearest(documents, row, allow=allowed) == truth(row, 3, allowed)
    found = documents.search(ROWS[7], 1)[0]
    assert (found.id, found.record) == ("d7", records()[7])
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert len(documents.search(ROWS[0], 1_000)) == COUNT == len(documents)
    assert nearest(documents, ROWS[0], allow=[]) == []


def test_an_id_that_is_here_is_replaced_and_the_last_of_two_counts():
    documents = filled()
    documents.add(["d3", "d3"], -ROWS[[4, 3]], records(["first", "last"], edition=2))
    assert nearest(documents, -ROWS[3], 1) == ["d3"] and len(documents) == COUNT
    assert documents.records(["d3"]) == [("d3", records(["last"], edition=2)[0])]


def test_what_is_deleted_is_gone():
    documents = filled()
    documents.delete(["d3", "no such", "d3", "d5"])
    assert len(documents) == COUNT - 2 and documents.records(["d3", "d4"])[0][0] == "d4"
    assert "d3" not in nearest(documents, ROWS[3], COUNT)
    documents.delete(IDS)
    assert nearest(documents, ROWS[3]) == []
    documents.add(["new"], ROWS[:1], records(["new"]))
    assert nearest(documents, ROWS[3]) == ["new"]
    documents.clear()
    documents.add(["short"], ROWS[:1, :3], records(["short"]))  # another dim
    assert nearest(documents, ROWS[0, :3]) == ["short"]


def test_bad_input_adds_nothing():
    documents = filled()
    before = documents.records(IDS)
    for ids, rows, error in [
        (["a", "b"], ROWS[:1], ValueError),
        (["d1"], ROWS[:1] * np.nan, ValueError),
        (["d1"], ROWS[:1, :3], ValueError),
        ([""], ROWS[:1], ValueError),
        ([1], ROWS[:1], TypeError),
    ]:
        with pytest.raises(error):
            documents.add(ids, rows, records(["x"] * len(ids)))
    assert documents.records(IDS) == before and len(documents) == COUNT
    with pytest.raises(TypeError, match="ef_constructoin"):
        Documents(ef_constructoin=1)


def test_an_interrupted_add_is_whole_or_nothing(monkeypatch):
    documents = filled()

    def interrupted(*given, **how):
        if is_in:
            add(*given, **how)
        raise KeyboardInterrupt

    add = documents.index.add
    monkeypatch.setattr(documents.index, "add", interrupted)
    for ids, is_in in itertools.product((["d3", "new"], ["d5"]), (False, True)):
        before = dict(documents.records([*IDS, "new"]))
        given = {id: Record(f"changed {id}", {"id": id}) for id in ids}
        with pytest.raises(KeyboardInterrupt):
            documents.add(ids, ROWS[: len(ids)], list(given.values()))
        assert dict(documents.records([*IDS, "new"])) == (before | given if is_in else before)
        assert set(documents.index) == {id for id, _ in documents.records([*IDS, "new"])}


def test_searches_beside_changes_find_whole_documents():
    documents, is_over, wrong = filled(), threading.Event(), []

    def ask():
        while not is_over.is_set():
            for found in documents.search(ROWS[0], 10):
                if found.record.metadata["id"] != found.id:
                    wrong.append(found)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(10):
        documents.delete(IDS[:20])
        documents.add(IDS[:20], ROWS[:20], records(IDS[:20]))
    is_over.set()
    asking.join()
    assert wrong == [] and len(documents) == COUNT


def test_what_is_deleted_meanwhile_is_passed_over(monkeypatch):
    documents = filled()
    assert documents.ids_where(lambda *_: documents.delete(["d1", "d2"]) is None) == IDS
    search, gone = documents.search, [["d0"], []]

    def search_and_delete(*given, **how):
        found = search(*given, **how)
        documents.delete(gone.pop(0))
        return found

    monkeypatch.setattr(documents, "search", search_and_delete)
    found, vectors = documents.search_vectors(ROWS[0], 2)
    assert [one.id for one in found] == truth(ROWS[0], 2, IDS[3:]) and gone == []
    np.testing.assert_allclose(vectors, oracle.unit(ROWS[[IDS.index(f.id) for f in found]]), 1e-5)


# ---------------------------------------------------------------- in a folder


@pytest.mark.parametrize("mmap", [False, True])
def test_a_folder_keeps_all(tmp_path, mmap):
    documents = filled(metric="l2", dtype="int4", M=8)
    documents.delete(["d0"])
    documents.save(tmp_path / "store")
    loaded = Documents.load(tmp_path / "store", mmap=mmap, device="cpu")
    assert loaded.records(IDS) == documents.records(IDS)
    assert loaded.search(ROWS[0], 5) == documents.search(ROWS[0], 5)
    assert (loaded.metric, loaded.index.dtype, loaded.index.M) == ("l2", "int4", 8)
    loaded.clear()  # and it still knows how to make an index
    loaded.add(["d0"], ROWS[:1], records(["d0"]))
    assert (loaded.index.dtype, loaded.index.M) == ("int4", 8)


def test_texts_and_metadata_of_any_kind(tmp_path):
    texts = ["", "a\nb\u2028c", "\ud800 alone", "日本語", "\0"]
    metadata = {"日": [1, 2.5, None, True], "in": {"a": {}}, "large": 2**70, "nothing": None}
    documents = Documents()
    documents.add([texts[1], "é", "a b"], ROWS[:3], [Record(t, metadata) for t in texts[:3]])
    documents.add(["4", "5"], ROWS[3:5], [Record(t, {}) for t in texts[3:]])
    documents.save(tmp_path)
    loaded = Documents.load(tmp_path)
    assert loaded.ids_where(lambda *_: True) == [texts[1], "é", "a b", "4", "5"]
    assert loaded.records(["é"]) == [("é", Record(texts[1], metadata))]
    assert [record.text for _, record in loaded.records(["a b", "4", "5"])] == texts[2:]


@pytest.mark.parametrize("metadata", [{"a": (1, 2)}, {1: "a"}, {"a": [{"b": {None: 1}}]}])
def test_what_json_would_change_is_refused(tmp_path, metadata):
    documents = filled()
    documents.add(["odd"], ROWS[:1], [Record("text", metadata)])
    words = (
        r"document 'odd': JSON cannot hold its metadata: (\(1, 2\), a tuple|the key (1|None), wh)"
    )
    with pytest.raises(TypeError, match=words):
        documents.save(tmp_path / "store")


def test_an_empty_store_is_kept_too(tmp_path):
    Documents(metric="ip").save(tmp_path)
    loaded = Documents.load(tmp_path)
    assert (len(loaded), loaded.index, loaded.metric) == (0, None, "ip")
    loaded.add(IDS, ROWS, records())
    loaded.delete(IDS)
    loaded.save(tmp_path)
    assert len(Documents.load(tmp_path)) == 0


def test_a_store_is_saved_over_and_leaves_two_files(tmp_path):
    documents = filled()
    for edition in (2, 3):
        documents.add(IDS[:1], ROWS[:1], records(IDS[:1], edition))
        documents.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["documents.2.hnsw", DOCUMENTS]
    assert Documents.load(tmp_path).records(["d0"])[0][1].metadata["edition"] == 3


@pytest.mark.parametrize("step", ["index", "documents"])
def test_a_save_that_fails_leaves_the_old_store(tmp_path, monkeypatch, step):
    documents = filled()
    documents.save(tmp_path)
    documents.delete(["d0"])
    if step == "index":

        def fail(path):
            raise OSError("the disk is full")

        monkeypatch.setattr(documents.index, "save", fail)
    else:
        documents.add(["bad"], ROWS[:1], [Record("", {"when": object()})])
    with pytest.raises((OSError, TypeError), match=r"disk is full|document 'bad': JSON cannot"):
        documents.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["documents.1.hnsw", DOCUMENTS]
    assert len(Documents.load(tmp_path)) == COUNT


def test_an_interrupt_just_after_the_last_write_leaves_the_new_store(tmp_path, monkeypatch):
    documents = filled()
    documents.save(tmp_path)
    documents.delete(["d0"])

    @contextlib.contextmanager
    def interrupted(path):
        with atomic_file(path) as file:
            yield file
        raise KeyboardInterrupt

    monkeypatch.setattr(hnsw_gpu.documents, "atomic_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        documents.save(tmp_path)
    assert len(Documents.load(tmp_path)) == COUNT - 1


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / DOCUMENTS).write_text('{"text": "a line of a data set"}\n')
    with pytest.raises(CorruptIndexError, match=DOCUMENTS):
        filled().save(tmp_path)
    assert os.listdir(tmp_path) == [DOCUMENTS]
    os.rename(tmp_path / DOCUMENTS, tmp_path / SAVING)
    with pytest.raises(CorruptIndexError, match=SAVING):
        filled().save(tmp_path)
    assert os.listdir(tmp_path) == [SAVING]
    os.rename(tmp_path / SAVING, tmp_path / "documents.7.hnsw")
    filled().save(tmp_path)
    filled().save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["documents.7.hnsw", "documents.9.hnsw", DOCUMENTS]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork is killed")
def test_a_kill_between_the_two_files_leaves_the_old_store(tmp_path, monkeypatch):
    documents = filled()
    documents.save(tmp_path)
    documents.delete(["d0"])
    killed = os.fork()
    if not killed:
        monkeypatch.setattr(hnsw_gpu.documents, "atomic_file", lambda path: os._exit(9))
        documents.save(tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == 9
    there = ["documents.1.hnsw", "documents.2.hnsw", DOCUMENTS, SAVING]
    assert sorted(os.listdir(tmp_path)) == there
    loaded = Documents.load(tmp_path)
    assert len(loaded) == COUNT
    loaded.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["documents.3.hnsw", DOCUMENTS]


def test_halves_that_do_not_belong_together_are_refused(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    documents = filled()
    documents.save(one)
    documents.delete(["d0"])
    documents.save(two)
    os.replace(two / "documents.1.hnsw", one / "documents.1.hnsw")
    with pytest.raises(CorruptIndexError, match="another index than the one that was meant"):
        Documents.load(one)
    with pytest.raises(CorruptIndexError, match=r"documents\.1\.hnsw: is missing"):
        Documents.load(two)
    with pytest.raises(FileNotFoundError, match=f"there is no {DOCUMENTS}"):
        Documents.load(tmp_path / "none")
    documents.index.delete(["d1"])  # behind the store's back
    with pytest.raises(ValueError, match="38 labels and 39 documents"):
        documents.save(two)


def test_a_damaged_file_of_documents_is_refused(tmp_path):
    filled().save(tmp_path)
    path = tmp_path / DOCUMENTS
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptIndexError):
            Documents.load(tmp_path)
        path.write_bytes(whole[:place])
        with pytest.raises(CorruptIndexError):
            Documents.load(tmp_path)
    path.write_bytes(whole + b"\n")
    with pytest.raises(CorruptIndexError):
        Documents.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, where this release reads 1"),
        ({"index": "../documents.1.hnsw"}, "no name of an index"),
        ({"documents": 10**18}, "damaged"),
    ],
)
def test_a_hostile_head_is_refused(tmp_path, changes, message):
    filled().save(tmp_path)
    path = tmp_path / DOCUMENTS
    head, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(json.dumps(json.loads(head) | changes).encode() + b"\n" + b"".join(rest))
    with pytest.raises(CorruptIndexError, match=message):
        Documents.load(tmp_path)


def test_a_load_beside_a_save_finds_one_of_the_two_stores(tmp_path, monkeypatch):
    documents = filled()
    documents.save(tmp_path)
    read = hnsw_gpu.documents._read

    def read_late(folder):
        result = read(folder)
        monkeypatch.undo()
        documents.delete(["d0"])
        documents.save(tmp_path)  # removes the index that `result` names
        return result

    monkeypatch.setattr(hnsw_gpu.documents, "_read", read_late)
    assert len(Documents.load(tmp_path)) == COUNT - 1


def test_pickles_are_stores_of_their_own():
    documents = filled()
    copy = pickle.loads(pickle.dumps(documents))
    documents.delete(["d0"])
    assert len(copy) == COUNT and nearest(copy, ROWS[0], 1) == ["d0"]


def test_a_url(monkeypatch, tmp_path):
    pytest.importorskip("fsspec", reason="URLs are fsspec's, of the extra `remote`")
    monkeypatch.setenv("HNSW_GPU_SHARD_CACHE", str(tmp_path))
    documents = filled()
    for _ in range(2):
        documents.delete(IDS[:1])
        documents.save("memory://stores/one")
    loaded = Documents.load("memory://stores/one")
    assert loaded.search(ROWS[0], 5) == documents.search(ROWS[0], 5)


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("langchain", "langchain_core", "langchain"), ("llama_index", "llama_index", "llama-index")],
)
def test_without_its_package_a_store_says_what_to_install(monkeypatch, module, package, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"hnsw_gpu.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "hnsw-gpu\[{extra}\]"'):
        importlib.import_module(f"hnsw_gpu.{module}")
