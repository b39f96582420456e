"""The main job on real text, from sentences to answers: what `hnsw-gpu demo` runs.

Four English Bibles are indexed. Verses of a fifth, which the index has never seen, are the
queries. Each step says what it does and what came of it; the index, a plot and all the figures
stay in a folder.
"""

import contextlib
import json
import shutil
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from hnsw_gpu import Index, SearchResult, __version__, exact_search, load
from hnsw_gpu import recall as measure
from hnsw_gpu.demo.verses import PACKAGES, TRANSLATIONS, Verses, load_verses, require
from hnsw_gpu.engine import thread_count

K = 10
EFS = (16, 32, 64, 128, 256)
EF = 128  # for everything but the sweep over EFS
GRAPH_K = 16  # neighbours of an indexed verse: room for its copies before the first other wording
EXAMPLES = (20016018, 58011001, 1001003)  # Proverbs 16:18, Hebrews 11:1, Genesis 1:3
EXAMPLE_K = 6
FILES = {"index": "verses.hnsw", "plot": "recall.png", "figures": "figures.json"}


def run_demo(
    folder: Path,
    threads: int | None = None,
    progress: bool = False,
    *,
    verses: Verses | None = None,
    query_count: int = 10_000,
) -> dict[str, Any]:
    """Do the job, print what happens, write into `folder`; returns what figures.json holds.

    `verses` are those of `load_verses()` if not given; labels in the index are their row numbers.
    Raises ImportError, saying what to install, when a package of the extra `demo` is missing.
    """
    require((*PACKAGES, "matplotlib"))
    folder.mkdir(parents=True, exist_ok=True)
    how = {"threads": thread_count(threads), "progress": progress}
    files = {what: folder / name for what, name in FILES.items()}
    seconds: dict[str, float] = {}
    with _timed(seconds, "total"):
        click.echo("1/6  Read five English Bibles and turn every verse into a vector")
        with _timed(seconds, "text"):
            verses = load_verses() if verses is None else verses
        base, asked = hold_out(verses, query_count)
        _result(
            f"{len(verses.texts):,} verses, {verses.vectors.shape[1]} values each", seconds["text"]
        )
        index = build(base, how, seconds)
        index = save_and_load(index, files["index"], seconds)
        truth, curve = sweep(index, base.vectors, asked.vectors, how, seconds)
        measure.plot(curve, K, files["plot"])
        examples = show_examples(index, base, verses)
        again = find_again(index, base, asked, truth, how)
    figures = {
        "version": __version__,
        "threads": how["threads"],
        "indexed": len(base.texts),
        "dim": index.dim,
        "index_bytes": index.nbytes,
        "queries": len(asked.texts),
        "k": K,
        "seconds": seconds,
        "sweep": curve,
        "same_verse": again,
        "examples": examples,
    }
    files["figures"].write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    click.echo(f"\nDone in {seconds['total']:.0f} s.")
    for what, path in files.items():
        _line(f"{what:<8} {path}")
    return figures


def hold_out(verses: Verses, count: int) -> tuple[Verses, Verses]:
    """(all translations but the last, `count` verses taken evenly from the last)."""
    rows = np.flatnonzero(is_held_out(verses))
    count = min(count, len(rows))
    asked = rows[np.arange(count) * len(rows) // count]
    return verses.take(~is_held_out(verses)), verses.take(asked)


def is_held_out(verses: Verses) -> np.ndarray:
    """bool (n,): the verses of the last translation."""
    return verses.translation == len(TRANSLATIONS) - 1


def build(base: Verses, how: dict[str, Any], seconds: dict[str, float]) -> Index:
    """An index over all of `base`; label i is row i."""
    click.echo(f"\n2/6  Index four of them, on {how['threads']} threads")
    index = Index(base.vectors.shape[1], "cosine")
    with _timed(seconds, "build"):
        index.add(base.vectors, **how)
    copies = len(base.texts) - len(set(base.texts))
    _result(f"{len(index):,} verses; {copies:,} repeat another word for word", seconds["build"])
    return index


def save_and_load(index: Index, path: Path, seconds: dict[str, float]) -> Index:
    """The index as it comes back from the file; what follows is answered by that one."""
    click.echo("\n3/6  Save the index, and load it again")
    with _timed(seconds, "save"):
        index.save(path)
    _result(f"saved: {path.stat().st_size / 1e6:,.0f} MB", seconds["save"])
    with _timed(seconds, "load"):
        loaded = load(path)
    _result("loaded and checked", seconds["load"])
    return loaded


def sweep(
    index: Index,
    vectors: np.ndarray,
    queries: np.ndarray,
    how: dict[str, Any],
    seconds: dict[str, float],
) -> tuple[SearchResult, list[dict[str, float]]]:
    """The exact answers, and recall and queries/s at every ef of EFS, all queries in one batch."""
    click.echo(f"\n4/6  Answer {len(queries):,} verses of the fifth Bible in one batch")
    with _timed(seconds, "exact"):
        truth = exact_search(vectors, queries, K, "cosine", **how)
    _line(f"    ef  recall@{K}  queries/s")
    index.search(queries[:500], K, threads=how["threads"])  # loads compiled code, warms the caches
    points: list[dict[str, float]] = []
    for ef in EFS:
        with _timed(seconds, f"ef {ef}"):
            found = index.search(queries, K, ef=ef, threads=how["threads"])
        share = measure.recall(vectors, queries, "cosine", found.labels, truth.labels)
        speed = len(queries) / seconds[f"ef {ef}"]
        _line(f"{ef:>6}  {share:>9.4f}  {speed:>9,.0f}")
        points.append({"ef": ef, "recall": share, "queries_per_s": speed})
    _line(f" exact  {1:>9.4f}  {len(queries) / seconds['exact']:>9,.0f}")
    return truth, points


def show_examples(index: Index, base: Verses, verses: Verses) -> list[dict[str, Any]]:
    """Print the held-out translation's EXAMPLES with their neighbours; returns what it printed."""
    click.echo("\n5/6  Look at three answers: distance, verse, words")
    is_asked = is_held_out(verses) & np.isin(verses.ids, EXAMPLES)
    examples = []
    for row in np.flatnonzero(is_asked).tolist():
        labels, distances = index.search(verses.vectors[row], EXAMPLE_K, ef=EF)
        near = [
            {"distance": far, "source": base.source(label), "text": base.texts[label]}
            for label, far in zip(labels[0].tolist(), distances[0].tolist(), strict=True)
            if label >= 0
        ]
        question = {"source": verses.source(row), "text": verses.texts[row]}
        _line(f"{question['source']}: {question['text']}")
        _print_neighbors(near)
        examples.append({**question, "found": near})
    return examples


def find_again(
    index: Index, base: Verses, asked: Verses, truth: SearchResult, how: dict[str, Any]
) -> dict[str, float]:
    """How often the nearest neighbour is the right verse: same book, chapter and number.

    Asked from outside, by verses of a translation that is not in the index; and from inside, by
    every indexed verse that another translation words differently. There, neighbours with the
    very same words are passed over: to find a copy proves nothing.
    """
    click.echo("\n6/6  Find every verse again in the other translations")
    found = index.search(asked.vectors, K, ef=EF, threads=how["threads"])
    outside, outside_exact = (
        float(is_right(asked.ids, base.ids, answer, answer.labels >= 0).mean())
        for answer in (found, truth)
    )
    graph = index.neighbor_graph(GRAPH_K, ef=EF, **how)
    right = is_right_in_other_words(base.ids, base.texts, graph)
    inside = float(right.mean())
    _line(
        f"The nearest is the right verse for {outside:.1%} of {len(asked.texts):,} verses of the "
        f"fifth Bible (by exact search: {outside_exact:.1%}),"
    )
    _line(f"the nearest in other words for {inside:.1%} of {len(right):,} indexed verses.")
    _line("Right: the same book, chapter and verse; of several equally near, one is enough.")
    return {"outside": outside, "outside_exact": outside_exact, "inside": inside}


def is_right(
    asked_ids: np.ndarray, ids: np.ndarray, answer: SearchResult, usable: np.ndarray
) -> np.ndarray:
    """bool (q,): is one of the nearest usable results the verse that was asked for?

    asked_ids (q,) and ids (n,) are verse ids, usable bool (q, k). Equal vectors come back as
    several results at one distance, in the order of labels: all at the smallest distance count.
    """
    distances = np.where(usable, answer.distances, np.inf)
    is_nearest = usable & (distances == distances.min(axis=1, keepdims=True))
    return (is_nearest & (ids[answer.labels] == asked_ids[:, None])).any(axis=1)


def is_right_in_other_words(ids: np.ndarray, texts: list[str], graph: SearchResult) -> np.ndarray:
    """`is_right` of every row for which a row with its verse id and other words exists.

    Neighbours with the very words of the row do not count, in whatever verse they stand.
    ids (n,) and texts (n) belong to the rows of `graph`, a neighbor graph; its labels are rows.
    """
    numbers: dict[str, int] = {}
    wording = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
    usable = (graph.labels >= 0) & (wording[graph.labels] != wording[:, None])
    known, counts = np.unique(  # how many wordings each verse id has
        np.unique(np.stack([ids, wording], axis=1), axis=0)[:, 0], return_counts=True
    )
    has_other = counts[np.searchsorted(known, ids)] > 1
    return is_right(ids, ids, graph, usable)[has_other]


def _print_neighbors(near: list[dict[str, Any]]) -> None:
    """One line each: distance, source, and as much of the text as the terminal has room for."""
    wide = max(len(neighbor["source"]) for neighbor in near)
    room = max(40, shutil.get_terminal_size((120, 0)).columns - wide - 18)
    for neighbor in near:
        text = textwrap.shorten(neighbor["text"], room, placeholder=" ...")
        _line(f"  {neighbor['distance']:.3f}  {neighbor['source']:<{wide}}  {text}")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _line(text: str) -> None:
    click.echo(f"     {text}")


def _result(text: str, seconds: float) -> None:
    _line(f"{text:<60} {seconds:6.1f} s")
