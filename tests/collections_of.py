"""Collections that tests make, shard by shard."""

import numpy as np

import hnsw_gpu
from hnsw_gpu.collection.manifest import Manifest, entry_of, write_manifest


def make(folder, vectors, labels=None, *, shards=3, **how):
    """A collection of `shards` parts of the vectors; returns the Index of each, in memory."""
    folder.mkdir()
    labels = np.arange(len(vectors)) if labels is None else labels
    indexes, entries = [], []
    parts = zip(np.array_split(vectors, shards), np.array_split(labels, shards), strict=True)
    for s, (rows, names) in enumerate(parts):
        index = hnsw_gpu.Index(vectors.shape[1], **how)
        index.add(rows, names)
        index.save(folder / f"shard-{s:04}.hnsw")
        indexes.append(index)
        entries.append(entry_of(folder, f"shard-{s:04}.hnsw"))
    write_manifest(folder, manifest_of(indexes[0], entries))
    return indexes


def manifest_of(index, entries):
    """What `hnsw-gpu build` would write of shards with these entries."""
    names = ("metric", "dim", "dtype", "refine", "M", "ef_construction", "seed")
    rows = sum(entry.rows for entry in entries)
    return Manifest(*(getattr(index, name) for name in names), rows, tuple(entries))


def in_turn(answers, k):
    """One answer (k labels, k distances) of parts' lists of (distance, label): slow and obvious."""
    heads, found = [list(part) for part in answers], []
    while len(found) < k and any(heads):
        best = min((part for part in heads if part), key=lambda part: part[0])
        found.append(best.pop(0))
    found += [(np.float32(np.inf), -1)] * (k - len(found))
    return [label for _, label in found], [far for far, _ in found]
