"""Which threshold? How alike rows are to their most alike other row, and pairs to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.engine import (
    KEY_NONE,
    encode,
    exact_block,
    key_distances,
    key_nodes,
    rows_as_queries,
    thread_count,
)
from hnsw_gpu.files import Sources, open_sources
from hnsw_gpu.progress import bar

BANDS = (1.0, 0.98, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)  # of similarity, each down to the next
BINS = 50  # of the histogram, from 0 to 1
WIDTH = 60  # characters of its longest bar
TEXT = 76  # characters shown of a text
METRIC = "cosine"


def dedup_preview(
    paths: Sequence[Path],
    *,
    column: str = "embedding",
    text_column: str | None = None,
    sample: int = 2000,
    examples: int = 20,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Of `sample` rows, each compared with all others: a histogram, and pairs by band.

    Returns rows, sampled, histogram {edges, rows} of cosine similarities, and bands: a list of
    {from, to, rows, pairs}, a pair {row, other, similarity, text, other_text}. Exact copies are in
    the first band. ValueError names rows that are NaN, infinite or zero.
    """
    sources = open_sources(paths, column=column)
    if text_column is not None:
        sources.column_type(text_column)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(sources), min(sample, len(sources)), replace=False))
    others, similarity = _most_alike(sources, rows, thread_count(threads), progress)
    counts, edges = np.histogram(np.clip(similarity[others >= 0], 0, 1), BINS, (0, 1))
    bands = _bands(others, similarity, examples, rng)
    used = np.concatenate([band["pairs"] for band in bands])
    wanted = np.unique(np.concatenate([rows[used], others[used]]))
    texts = [sources.where(row) for row in wanted.tolist()]
    if text_column is not None:
        texts = [text or "" for text in sources.texts(text_column, wanted)]
    text_of = dict(zip(wanted.tolist(), texts, strict=True))
    for band in bands:
        band["pairs"] = [
            {
                "row": int(rows[i]),
                "other": int(others[i]),
                "similarity": float(similarity[i]),
                "text": text_of[int(rows[i])],
                "other_text": text_of[int(others[i])],
            }
            for i in band["pairs"]
        ]
    histogram = {"edges": edges.tolist(), "rows": counts.tolist()}
    return {"rows": len(sources), "sampled": len(rows), "histogram": histogram, "bands": bands}


def _most_alike(
    sources: Sources, rows: np.ndarray, threads: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of each of some rows the most alike other row, -1 where there is none; the similarity."""
    asking = [np.empty((0, sources.dim), np.float32)]
    with bar(progress, 2 * len(sources), "compare") as progress_bar:
        for first, block in _blocks(sources):
            inside = rows[(rows >= first) & (rows < first + len(block))] - first
            asking.append(block[inside])
            progress_bar.update(len(block))
        queries = rows_as_queries(encode(np.concatenate(asking), METRIC, "fp32"))
        keys = np.full((len(rows), 2), KEY_NONE, np.uint64)
        for first, block in _blocks(sources):
            encoded = encode(block, METRIC, "fp32")
            exact_block(keys, encoded, first, queries, METRIC, threads=threads)
            progress_bar.update(len(block))
    is_own = key_nodes(keys[:, 0]) == rows
    key = np.where(is_own, keys[:, 1], keys[:, 0])
    is_none = key == KEY_NONE
    others = np.where(is_none, -1, key_nodes(key))
    return others, np.where(is_none, np.nan, 1 - key_distances(key))


def _bands(
    others: np.ndarray, similarity: np.ndarray, examples: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Each band with its number of rows and, as pairs, the places of some, most alike first."""
    bands: list[dict[str, Any]] = []
    for high, low in zip(BANDS, (*BANDS[1:], -1.0), strict=True):
        # a copy is as alike as can be, whatever its distance is rounded to
        is_in = (similarity >= low) & (others >= 0)
        is_in &= (similarity < high) | (high == BANDS[0])
        places = np.flatnonzero(is_in)
        chosen = np.sort(rng.choice(places, min(examples, len(places)), replace=False))
        chosen = chosen[np.argsort(-similarity[chosen], kind="stable")]
        bands.append({"from": low, "to": high, "rows": len(places), "pairs": chosen})
    return bands


def _blocks(sources: Sources) -> Any:
    """Checked float32 rows, and the number of the first."""
    first = 0
    for block in sources.vectors(0, len(sources)):
        yield first, inputs.float_vectors("vectors", block, METRIC, first=first)
        first += len(block)


def preview_text(found: dict[str, Any]) -> str:
    """The preview as text for a terminal."""
    lines = [
        f"{found['sampled']:,} of {found['rows']:,} rows, each compared with all others: cosine",
        "similarity of the most alike other row",
        "",
    ]
    counts, edges = found["histogram"]["rows"], found["histogram"]["edges"]
    last = max((i for i, count in enumerate(counts) if count), default=0)
    start = next((i for i, count in enumerate(counts) if count), 0)
    for i in range(start, last + 1):
        length = round(WIDTH * counts[i] / max(1, *counts))
        lines.append(f"{edges[i]:5.2f}  {'#' * length}{' ' * bool(length)}{counts[i]:,}")
    for band in found["bands"]:
        if not band["rows"]:
            continue
        low = f"{band['from']:.2f} to " if band["from"] >= 0 else "below "
        share = 100 * band["rows"] / found["sampled"]
        lines += ["", f"{low}{band['to']:.2f}: {band['rows']:,} rows ({share:.1f} %)"]
        for pair in band["pairs"]:
            lines.append(f"  {pair['similarity']:.4f}  {_cut(pair['text'])}")
            lines.append(f"          {_cut(pair['other_text'])}")
    return "\n".join(lines)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT else line[: TEXT - 3] + "..."
