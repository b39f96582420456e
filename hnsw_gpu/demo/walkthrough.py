"""The main job on real text, from sentences to answers: what `hnsw-gpu demo` runs.

Four English Bibles are indexed; verses of a fifth, which the index has never seen, are the
queries. Each of six steps prints what it does and what came of it. The index, a plot and all
figures are kept in a folder.
"""

import contextlib
import json
import shutil
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from hnsw_gpu import Index, SearchResult, __version__, exact_search
from hnsw_gpu import recall as measure
from hnsw_gpu.demo.verses import PACKAGES, TRANSLATIONS, Verses, load_verses, require
from hnsw_gpu.engine import thread_count
from hnsw_gpu.files import atomic_file
from hnsw_gpu.index import load_index

K = 10
EFS = (16, 32, 64, 128, 256)
EF = 128  # for everything but the sweep over EFS
GRAPH_K = 16  # neighbours of an indexed verse: room for its copies before the first other wording
EXAMPLES = (20016018, 58011001, 1001003)  # Proverbs 16:18, Hebrews 11:1, Genesis 1:3
EXAMPLE_K = 6
MADE_BY = "hnsw-gpu demo"
FILES = {"index": "verses.hnsw", "plot": "recall.png", "figures": "figures.json"}


@dataclass
class Run:
    """How one demo runs, and what it has measured so far."""

    threads: int
    progress: bool
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)  # by what was timed

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def print_result(self, text: str, name: str) -> None:
        """A line with the seconds that `name` took."""
        _print_line(f"{text:<60} {self.seconds[name]:6.1f} s")


def run_demo(
    folder: Path,
    threads: int | None = None,
    progress: bool = False,
    *,
    verses: Verses | None = None,
    query_count: int = 10_000,
) -> dict[str, Any]:
    """Run the six steps, write into `folder`, and return what figures.json holds.

    verses: default `load_verses()`; labels in the index are row numbers of the indexed verses.
    Raises ImportError, saying what to install, if a package of the extra `demo` is missing;
    ValueError if a file there that is not ours would be overwritten.
    """
    require((*PACKAGES, "matplotlib"))
    paths = {what: folder / name for what, name in FILES.items()}
    require_ours(paths)
    folder.mkdir(parents=True, exist_ok=True)
    write_figures(paths["figures"], {})  # marks the folder as ours
    run = Run(thread_count(threads), progress)
    with run.timed("total"):
        verses = read_verses(run, verses)
        base, queries = hold_out(verses, query_count)
        index = build(run, base, verses)
        index = save_and_load(run, index, paths["index"])
        truth, sweep = search_in_one_batch(run, index, base, queries)
        measure.plot(sweep, K, paths["plot"])
        examples = show_examples(index, base, verses)
        same_verse = find_again(run, index, base, queries, truth)
    figures = {
        "version": __version__,
        "threads": run.threads,
        "indexed": len(base.texts),
        "dim": index.dim,
        "index_bytes": index.nbytes,
        "queries": len(queries.texts),
        "k": K,
        "seconds": run.seconds,
        "sweep": sweep,
        "same_verse": same_verse,
        "examples": examples,
    }
    write_figures(paths["figures"], figures)
    click.echo(f"\nDone in {run.seconds['total']:.0f} s.")
    for what, path in paths.items():
        _print_line(f"{what:<8} {path}")
    return figures


def require_ours(paths: dict[str, Path]) -> None:
    """ValueError where a file is there, and no figures of ours beside it."""
    there = [path for path in paths.values() if path.exists()]
    try:
        found = json.loads(paths["figures"].read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = None
    if there and not (isinstance(found, dict) and found.get("made_by") == MADE_BY):
        raise ValueError(
            f"{there[0]} is there, and not from {MADE_BY}: it would be overwritten; choose another "
            "folder (--out)"
        )


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps({"made_by": MADE_BY} | figures, indent=2) + "\n").encode())


def read_verses(run: Run, verses: Verses | None) -> Verses:
    click.echo("1/6  Read five English Bibles and turn every verse into a vector")
    with run.timed("text"):
        verses = load_verses() if verses is None else verses
    run.print_result(f"{len(verses.texts):,} verses, {verses.vectors.shape[1]} values each", "text")
    return verses


def hold_out(verses: Verses, count: int) -> tuple[Verses, Verses]:
    """(all translations but the last, `count` verses taken evenly from the last)."""
    rows = np.flatnonzero(is_held_out(verses))
    count = min(count, len(rows))
    queries = rows[np.arange(count) * len(rows) // count]
    return verses.take(~is_held_out(verses)), verses.take(queries)


def is_held_out(verses: Verses) -> np.ndarray:
    """bool (n,): the verses of the last translation."""
    return verses.translation == len(TRANSLATIONS) - 1


def build(run: Run, base: Verses, verses: Verses) -> Index:
    """An index over all of `base`; label i is row i. The first Bible answers first."""
    click.echo(f"\n2/6  Index four of them, on {run.threads} threads")
    index = Index(base.vectors.shape[1], "cosine")
    first = np.count_nonzero(base.translation == 0)
    with run.timed("build"):
        index.add(base.vectors[:first], threads=run.threads, progress=run.progress)
        show_first_answer(run, index, base, verses)
        index.add(base.vectors[first:], threads=run.threads, progress=run.progress)
    copies = len(base.texts) - len(set(base.texts))
    run.print_result(f"{len(index):,} verses; {copies:,} repeat another word for word", "build")
    return index


def show_first_answer(run: Run, index: Index, base: Verses, verses: Verses) -> None:
    """Print the first of the held-out EXAMPLES and its nearest, as soon as there is one."""
    row = np.flatnonzero(is_held_out(verses) & (verses.ids == EXAMPLES[0]))[0]
    labels, distances = index.search(verses.vectors[row], 1)
    run.seconds["first_answer"] = time.perf_counter() - run.started
    _print_line(
        f"First answer, {run.seconds['first_answer']:.0f} s after the start, "
        f"from {len(index):,} verses:"
    )
    _print_line(f"{verses.source(row)}: {verses.texts[row]}")
    source, text = base.source(labels[0, 0]), base.texts[labels[0, 0]]
    _print_neighbors([{"distance": distances[0, 0], "source": source, "text": text}])


def save_and_load(run: Run, index: Index, path: Path) -> Index:
    """The index as loaded from the file, which answers everything from here on."""
    click.echo("\n3/6  Save the index, and load it again")
    with run.timed("save"):
        index.save(path)
    run.print_result(f"saved: {path.stat().st_size / 1e6:,.0f} MB", "save")
    with run.timed("load"):
        loaded = load_index(path)
    run.print_result("loaded and checked", "load")
    return loaded


def search_in_one_batch(
    run: Run, index: Index, base: Verses, queries: Verses
) -> tuple[SearchResult, list[dict[str, float]]]:
    """The exact answers; and recall and queries/s at every ef of EFS."""
    count, threads = len(queries.vectors), run.threads
    click.echo(f"\n4/6  Answer {count:,} verses of the fifth Bible in one batch")
    with run.timed("exact"):
        truth = exact_search(
            base.vectors, queries.vectors, K, "cosine", threads=threads, progress=run.progress
        )
    _print_line(f"    ef  recall@{K}  queries/s")
    index.search(queries.vectors[:500], K, threads=threads)  # loads compiled code, warms caches
    points: list[dict[str, float]] = []
    for ef in EFS:
        with run.timed(f"ef {ef}"):
            found = index.search(queries.vectors, K, ef=ef, threads=threads)
        share = measure.recall(base.vectors, queries.vectors, "cosine", found.labels, truth.labels)
        speed = count / run.seconds[f"ef {ef}"]
        _print_line(f"{ef:>6}  {share:>9.4f}  {speed:>9,.0f}")
        points.append({"ef": ef, "recall": share, "queries_per_s": speed})
    _print_line(f" exact  {1:>9.4f}  {count / run.seconds['exact']:>9,.0f}")
    return truth, points


def show_examples(index: Index, base: Verses, verses: Verses) -> list[dict[str, Any]]:
    """Print the held-out EXAMPLES with their neighbours, and return what was printed."""
    click.echo("\n5/6  Look at three answers: distance, verse, words")
    is_example = is_held_out(verses) & np.isin(verses.ids, EXAMPLES)
    examples = []
    for row in np.flatnonzero(is_example).tolist():
        labels, distances = index.search(verses.vectors[row], EXAMPLE_K, ef=EF)
        near = [
            {"distance": distance, "source": base.source(label), "text": base.texts[label]}
            for label, distance in zip(labels[0].tolist(), distances[0].tolist(), strict=True)
            if label >= 0
        ]
        question = {"source": verses.source(row), "text": verses.texts[row]}
        _print_line(f"{question['source']}: {question['text']}")
        _print_neighbors(near)
        examples.append({**question, "found": near})
    return examples


def find_again(
    run: Run, index: Index, base: Verses, queries: Verses, truth: SearchResult
) -> dict[str, float]:
    """How often the nearest neighbour is the right verse: same book, chapter and number.

    From outside: for verses of a translation that is not in the index. From inside: for every
    indexed verse that another translation words differently; neighbours with the very same words
    are skipped, since finding a copy proves nothing.
    """
    click.echo("\n6/6  Find every verse again in the other translations")
    found = index.search(queries.vectors, K, ef=EF, threads=run.threads)
    outside, outside_exact = (
        float(is_right(queries.ids, base.ids, answer, answer.labels >= 0).mean())
        for answer in (found, truth)
    )
    graph = index.neighbor_graph(GRAPH_K, ef=EF, threads=run.threads, progress=run.progress)
    right = is_right_in_other_words(base.ids, base.texts, graph)
    inside = float(right.mean())
    _print_line(
        f"The nearest is the right verse for {outside:.1%} of {len(queries.texts):,} verses of the "
        f"fifth Bible (by exact search: {outside_exact:.1%}),"
    )
    _print_line(f"the nearest in other words for {inside:.1%} of {len(right):,} indexed verses.")
    _print_line("Right: the same book, chapter and verse; of several equally near, one is enough.")
    return {"outside": outside, "outside_exact": outside_exact, "inside": inside}


def is_right(
    asked_ids: np.ndarray, ids: np.ndarray, answer: SearchResult, usable: np.ndarray
) -> np.ndarray:
    """bool (q,): whether one of the nearest usable results is the verse that was asked for.

    asked_ids (q,) and ids (n,) are verse ids; usable is bool (q, k). Equal vectors give several
    results at the same distance, in the order of labels: all at the smallest distance count.
    """
    distances = np.where(usable, answer.distances, np.inf)
    is_nearest = usable & (distances == distances.min(axis=1, keepdims=True))
    return (is_nearest & (ids[answer.labels] == asked_ids[:, None])).any(axis=1)


def is_right_in_other_words(ids: np.ndarray, texts: list[str], graph: SearchResult) -> np.ndarray:
    """`is_right` for every row whose verse also exists in other words.

    Neighbours with exactly the words of the row do not count, whatever verse they are. ids (n,)
    and texts (n) belong to the rows of `graph`, a neighbor graph whose labels are row numbers.
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
    """One line each: distance, source, and as much of the text as fits the terminal."""
    width = max(len(neighbor["source"]) for neighbor in near)
    room = max(40, shutil.get_terminal_size((120, 0)).columns - width - 18)
    for neighbor in near:
        text = textwrap.shorten(neighbor["text"], room, placeholder=" ...")
        _print_line(f"  {neighbor['distance']:.3f}  {neighbor['source']:<{width}}  {text}")


def _print_line(text: str) -> None:
    click.echo(f"     {text}")
