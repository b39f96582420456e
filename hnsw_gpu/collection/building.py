"""A collection from files of vectors, which may be more than memory holds; resumable.

Rows are cut in shards of equal length, each built and saved in turn. A saved shard is whole, and is
its own mark that it is done: the same command goes on with the others, and writes the same bytes
as a run that nothing stopped. The plan in a folder of our own in OUT says what they belong to
(`files/checkpoints.py`); when the last shard is there, the manifest is written and that folder
removed.

In memory at a time: one shard's rows in float32, its index, and 8 bytes a row of the ids.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hnsw_gpu
from hnsw_gpu import inputs
from hnsw_gpu.collection.manifest import (
    COLLECTION_VERSION,
    PARAMETERS,
    Manifest,
    ShardEntry,
    entry_of,
    write_manifest,
)
from hnsw_gpu.files import (
    FORMAT_VERSION,
    Checkpoints,
    Sources,
    held,
    list_files,
    open_sources,
)
from hnsw_gpu.index import Index

WORK = "_hnsw_gpu_build"  # in OUT, while a collection is built
MADE_BY = "hnsw-gpu build"
NO_STEPS = r"(?!)"  # in the work folder: a shard lies where it is to stay


def build_collection(
    paths: Sequence[Path],
    out: Path,
    *,
    shard_rows: int,
    column: str = "embedding",
    id_column: str | None = None,
    threads: int | None = None,
    progress: bool = False,
    **how: Any,
) -> Manifest:
    """Build the shards of a collection that are not there yet, then its manifest.

    id_column: integers, the labels; None: row numbers. how: `metric`, `dtype`, `refine`, `M`,
    `ef_construction` and `seed` of an Index. ValueError where `out` holds anything else than a run
    of the same input and parameters, where another job writes there, where a row is no vector, an
    id is there twice, or an input changes meanwhile.
    """
    inputs.integer("shard_rows", shard_rows, 1, inputs.MOST_NODES)
    with held(out):
        work = Checkpoints(out / WORK, MADE_BY, NO_STEPS)
        _require_ours(out, is_begun=work.is_begun())
        sources = open_sources(list_files(paths, except_for=[out]), column=column)
        like = Index(sources.dim, **how)
        ids = None if id_column is None else _ids(sources, id_column)
        parameters = {name: getattr(like, name) for name in PARAMETERS}
        work.begin(
            {
                "version": hnsw_gpu.__version__,
                "format": [COLLECTION_VERSION, FORMAT_VERSION],
                "settings": parameters,
                "column": column,
                "id_column": id_column,
                "shard_rows": shard_rows,
                "files": sources.fingerprints(),
            }
        )
        entries = []
        for s, start in enumerate(range(0, max(1, len(sources)), shard_rows)):
            path = out / f"shard-{s:04}.hnsw"
            stop = min(start + shard_rows, len(sources))
            labels = np.arange(start, stop) if ids is None else ids[start:stop]
            if not path.exists():
                index = Index(sources.dim, **how)
                rows = _rows(sources, start, stop, index)
                index.add(rows, labels, threads=threads, progress=progress)
                del rows
                index.save(path)
            entries.append(_entry(path, labels))
        sources.require_unchanged()
        manifest = Manifest(**parameters, rows=len(sources), shards=tuple(entries))
        write_manifest(out, manifest)
        work.remove()
        return manifest


def interrupted_state(out: Path) -> str:
    """How far an interrupted build into OUT has come, in words."""
    built = len(list(out.glob("shard-*.hnsw")))
    return f"{built} shards built: the same command goes on from there"


def _require_ours(out: Path, *, is_begun: bool) -> None:
    """ValueError where a folder holds what no run of ours, to be gone on with, has left."""
    others = sorted(path.name for path in out.iterdir() if path.name != WORK)
    if others and not is_begun:
        raise ValueError(
            f"{out} holds {others[0]}: a collection is built in a folder of its own; delete {out}, "
            "or choose another"
        )


def _ids(sources: Sources, column: str) -> np.ndarray:
    """int64 labels (n,) from a column; ValueError names the rows of one that is there twice."""
    import pyarrow

    kind = sources.column_type(column)
    if not pyarrow.types.is_integer(kind):
        raise ValueError(f"column {column!r} is {kind}: labels are integers")
    ids = inputs.labels(f"column {column!r}", sources.column(column).to_numpy())
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(twice):
        one, other = (sources.where(int(order[twice[0] + i])) for i in (0, 1))
        raise ValueError(f"column {column!r}: {ids[order[twice[0]]]} is in {one}, and in {other}")
    return ids


def _rows(sources: Sources, start: int, stop: int, index: Index) -> np.ndarray:
    """float32 (stop - start, dim): rows that are vectors of the index; ValueError names others."""
    rows = np.empty((stop - start, sources.dim), np.float32)
    first = start
    for block in sources.vectors(start, stop):
        given = inputs.vectors("vectors", block, sources.dim)
        try:
            rows[first - start :][: len(block)] = index.checked_rows(given, first)
        except inputs.RowsError as error:
            raise ValueError(f"{sources.where(int(error.rows[0]))}: {error.what}") from None
        first += len(block)
    return rows


def _entry(path: Path, labels: np.ndarray) -> ShardEntry:
    """The entry of a shard; ValueError where it is not the one of these labels."""
    entry = entry_of(path)
    ends = (int(labels.min()), int(labels.max())) if len(labels) else None
    if (entry.rows, entry.labels) != (len(labels), ends):
        raise ValueError(f"{path}: is not the shard that belongs there; delete it")
    return entry
