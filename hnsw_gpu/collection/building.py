"""An index from files of vectors, and a collection from more than memory holds, which is resumable.

Rows are cut in shards of equal length; to build and save one is a step, done here one after the
other or wherever a runner does it (`files/step_runner.py`). A saved shard is whole, and is its own
mark that it is done: the same command goes on with the others, and writes the same bytes as a run
that nothing stopped. The plan in a folder of our own in OUT says what they belong to
(`files/checkpoints.py`); when the last shard is there, the manifest is written and that folder
removed.

In memory at a time: of a step one shard's rows in float32, its index and its ids; here the names of
files and shards. Ids are first looked through for one that is there twice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import hnsw_gpu
from hnsw_gpu import inputs
from hnsw_gpu.collection.ids import ids_of, require_ids_once
from hnsw_gpu.collection.manifest import (
    COLLECTION_VERSION,
    PARAMETERS,
    Manifest,
    ShardEntry,
    ends_of,
    entry_of,
    write_manifest,
)
from hnsw_gpu.files import (
    FORMAT_VERSION,
    HERE,
    Advance,
    Checkpoints,
    CorruptIndexError,
    Folder,
    LocalFolder,
    Place,
    Sources,
    StepRunner,
    folder_at,
    held,
    list_files,
    open_sources,
    verify_open,
)
from hnsw_gpu.index import Index
from hnsw_gpu.progress import bar

WORK = "_hnsw_gpu_build"  # in OUT, while a collection is built
MADE_BY = "hnsw-gpu build"
NO_STEPS = r"(?!)"  # in the work folder: a shard lies where it is to stay


class Plan(NamedTuple):
    """What every step needs."""

    out: Folder
    work: Checkpoints
    sources: Sources
    id_column: str | None
    how: dict[str, Any]  # parameters of an Index
    threads: int | None


def build_index(
    paths: Sequence[Path],
    *,
    column: str = "embedding",
    id_column: str | None = None,
    labels: np.ndarray | None = None,
    threads: int | None = None,
    progress: bool = False,
    **how: Any,
) -> Index:
    """One index of all rows of files, as `build_collection` reads them; `labels` or a column's."""
    sources = open_sources(paths, column=column)
    index = Index(sources.dim, **how)
    if id_column is not None:
        labels = ids_of(sources, id_column, 0, len(sources))
    rows = sources.mapped()  # `add` reads it in parts
    if rows is None:
        rows = _rows(sources, 0, len(sources), index)
    index.add(rows, labels, threads=threads, progress=progress)
    return index


def build_collection(
    paths: Sequence[Path],
    out: Place,
    *,
    shard_rows: int,
    column: str = "embedding",
    id_column: str | None = None,
    runner: StepRunner = HERE,
    progress: bool = False,
    **how: Any,
) -> Manifest:
    """Build the shards of a collection that are not there yet, then its manifest.

    id_column: integers or strings, the labels; None: row numbers. how: `metric`, `dtype`, `refine`,
    `M`, `ef_construction` and `seed` of an Index. ValueError where `out` holds anything else than a
    run of the same input and parameters, where another job writes there, where a row is no vector,
    an id is there twice, a shard that is there is damaged, or an input changes meanwhile.
    """
    inputs.integer("shard_rows", shard_rows, 1, inputs.MOST_NODES)
    folder = folder_at(out)
    except_for = [folder.path] if isinstance(folder, LocalFolder) else []
    with held(folder):
        work = Checkpoints(folder.within(WORK), MADE_BY, NO_STEPS)
        _require_ours(folder, is_begun=work.is_begun())
        sources = open_sources(list_files(paths, except_for=except_for), column=column)
        like = Index(sources.dim, **how)
        starts = range(0, max(1, len(sources)), shard_rows)
        spans = [(start, min(start + shard_rows, len(sources))) for start in starts]
        if id_column is not None:
            require_ids_once(sources, id_column, spans, runner)
        parameters = {name: getattr(like, name) for name in PARAMETERS}
        work.begin(
            {
                "version": hnsw_gpu.__version__,
                "format": [COLLECTION_VERSION, FORMAT_VERSION],
                "settings": parameters,
                "column": column,
                "id_column": id_column,
                "shard_rows": shard_rows,
                "files": sources.fingerprints(runner),
            }
        )
        plan = Plan(folder, work, sources, id_column, how, runner.threads)
        given = [(f"shard-{s:04}.hnsw", *span) for s, span in enumerate(spans)]
        rows = [stop - start for start, stop in spans]
        title = f"build {len(given)} shard{'s' * (len(given) > 1)}"
        with bar(progress, len(sources), title) as progress_bar:
            entries = runner.each(_build_shard, (plan,), given, rows, progress_bar)
        sources.require_unchanged()
        manifest = Manifest(**parameters, rows=len(sources), shards=tuple(entries))
        write_manifest(folder, manifest)
        work.remove()
        return manifest


def interrupted_state(out: Place) -> str:
    """How far an interrupted build into OUT has come, in words."""
    names = folder_at(out).names()
    built = sum(name.startswith("shard-") and name.endswith(".hnsw") for name in names)
    return f"{built} shards built: the same command goes on from there"


def _require_ours(folder: Folder, *, is_begun: bool) -> None:
    """ValueError where a folder holds what no run of ours, to be gone on with, has left."""
    others = [name for name in folder.names() if name != WORK]
    if others and not is_begun:
        raise ValueError(
            f"{folder} holds {others[0]}: a collection is built in a folder of its own; delete "
            f"{folder}, or choose another"
        )


def _build_shard(plan: Plan, name: str, start: int, stop: int, *, advance: Advance) -> ShardEntry:
    """Build the shard of some rows, unless it is there; its entry."""
    plan.work.require_here()
    labels = ids_of(plan.sources, plan.id_column, start, stop)
    if plan.out.has(name):
        _require_whole(plan.out, name)
    else:
        index = Index(plan.sources.dim, **plan.how)
        rows = _rows(plan.sources, start, stop, index)
        index.add(rows, labels, threads=plan.threads, progress=advance)
        del rows
        with plan.out.writing(name) as path:
            index.save(path)
    entry = entry_of(plan.out, name)
    if (entry.rows, entry.labels) != (len(labels), ends_of(labels)):
        place = plan.out.place(name)
        raise ValueError(f"{place}: is not the shard that belongs there; delete it")
    return entry


def _require_whole(folder: Folder, name: str) -> None:
    """CorruptIndexError where a shard that a run before left was damaged since: all of it is read.

    To read it takes far less time than to build it.
    """
    place = folder.place(name)
    with folder.open(name) as file:
        try:
            verify_open(file, place)
        except CorruptIndexError as error:
            told = f"{error}: delete it, and the same command builds it again"
            raise CorruptIndexError(told) from None


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
