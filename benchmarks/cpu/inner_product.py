"""Recall@10 under inner product where lengths differ, beside hnswlib at the same ef.

python -m benchmarks.cpu.inner_product

writes `results/inner-product.json`. Recall does not depend on the machine; each figure is the mean
of several draws or seeds.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import click
import hnswlib
import numpy as np

from benchmarks.record import RESULTS, SETTING, about, rounded
from hnsw_gpu import Index
from hnsw_gpu.demo.verses import load_verses

EFS = (16, 64, 256)
SPREADS = ((0.0, 32), (0.5, 32), (1.0, 32), (1.5, 8))  # sigma of the lengths' logarithm, dim
FACTORS = 64
Rows = tuple[np.ndarray, np.ndarray]  # base, queries


def drawn(sigma: float, dim: int, seed: int, count: int = 20_000) -> Rows:
    """Gaussian rows times exp(sigma x Gaussian), and 500 Gaussian queries."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, dim)) * np.exp(sigma * rng.normal(size=(count, 1)))
    return rows.astype(np.float32), rng.normal(size=(500, dim)).astype(np.float32)


def verse_and_word_factors() -> Rows:
    """Factors of the table of verses and words: truncated SVD (Halko et al. 2011, alg. 4.4)."""
    words = [re.findall("[a-z]+", text.lower()) for text in load_verses().texts[::5]]
    counts = Counter(word for verse in words for word in set(verse))
    place = {word: i for i, (word, count) in enumerate(counts.most_common()) if count >= 5}
    table = np.zeros((len(words), len(place)), np.float32)
    for row, verse in zip(table, words, strict=True):
        for word, count in Counter(verse).items():
            if word in place:
                row[place[word]] = np.log1p(count)
    basis = table @ np.random.default_rng(0).normal(size=(len(place), 96)).astype(np.float32)
    for _ in range(4):
        basis = table @ (table.T @ np.linalg.qr(basis)[0])
    basis = np.linalg.qr(basis)[0]
    left, values, right = np.linalg.svd(basis.T @ table, full_matrices=False)
    roots = np.sqrt(values[:FACTORS])
    return basis @ left[:, :FACTORS] * roots, right[:FACTORS].T * roots


def some(rows: np.ndarray, seed: int) -> np.ndarray:
    return rows[np.random.default_rng(seed).permutation(len(rows))[:500]]


def sets(draws: int) -> Iterator[tuple[str, list[Rows]]]:
    """Names, and what is measured for each."""
    for sigma, dim in SPREADS:
        yield f"sigma {sigma}, {dim}-d", [drawn(sigma, dim, seed) for seed in range(draws)]
    verses, words = verse_and_word_factors()
    yield "verses for words", [(verses, some(words, seed)) for seed in range(draws)]
    yield "words for verses", [(words, some(verses, seed)) for seed in range(draws)]


def recalls(base: np.ndarray, queries: np.ndarray, seed: int) -> dict[str, list[float]]:
    """Recall@10 of each library at each ef."""
    ours = Index(
        base.shape[1], "ip", M=SETTING.M, ef_construction=SETTING.ef_construction, seed=seed
    )
    ours.add(base)
    theirs = hnswlib.Index("ip", base.shape[1])
    theirs.init_index(
        max_elements=len(base), M=SETTING.M, ef_construction=SETTING.ef_construction,
        random_seed=seed,
    )  # fmt: skip
    theirs.add_items(base)
    truth = np.argsort(-(queries.astype(np.float64) @ base.T.astype(np.float64)), axis=1)[:, :10]
    found: dict[str, list[float]] = {"ours": [], "hnswlib": []}
    for ef in EFS:
        theirs.set_ef(ef)
        for name, labels in (
            ("ours", ours.search(queries, 10, ef=ef).labels),
            ("hnswlib", theirs.knn_query(queries, 10)[0]),
        ):
            hits = [len(np.intersect1d(*pair)) for pair in zip(labels, truth, strict=True)]
            found[name].append(mean(hits) / 10)
    return found


@click.command()
@click.option("--draws", default=10, show_default=True, help="Draws of each set, or seeds.")
@click.option("--out", type=Path, default=RESULTS / "inner-product.json", show_default=True)
def main(draws: int, out: Path) -> None:
    """Recall under inner product, beside hnswlib."""
    results = {**about(["hnswlib"]), "metric": "ip", "draws": draws, "ef": EFS, "recall": {}}
    for name, drawn_rows in sets(draws):
        found = [recalls(*rows, seed) for seed, rows in enumerate(drawn_rows)]
        results["recall"][name] = {
            who: [mean(each) for each in zip(*(one[who] for one in found), strict=True)]
            for who in ("ours", "hnswlib")
        }
        click.echo(f"{name}: {rounded(results['recall'][name])}")
    out.write_text(json.dumps(rounded(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
