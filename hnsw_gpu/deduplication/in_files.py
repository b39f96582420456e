"""Near-duplicates of vectors in files: more than memory holds, and resumable.

Rows are read in shards, and each step on the way leaves a file in a folder of our own in OUT, from
where the same command goes on (`files/checkpoints.py`). At the end the tables and the report are
written, and that folder is removed. Files in OUT that are not ours are neither overwritten nor
removed.

In memory at a time: one shard with its graph, the pairs, and per row some 100 bytes and the id.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hnsw_gpu
from hnsw_gpu import inputs
from hnsw_gpu.deduplication import report as reports
from hnsw_gpu.deduplication.checkpoints import MADE_BY, checkpoints_in
from hnsw_gpu.deduplication.conclusion import conclude
from hnsw_gpu.deduplication.decision import NearRows
from hnsw_gpu.deduplication.keep_order import KEEP
from hnsw_gpu.deduplication.settings import Settings
from hnsw_gpu.deduplication.shard_size import shard_rows_within
from hnsw_gpu.deduplication.shard_steps import ResumableSteps
from hnsw_gpu.deduplication.sharded_join import no_pairs
from hnsw_gpu.deduplication.stage_clock import StageClock
from hnsw_gpu.deduplication.tables import require_writable, write_tables
from hnsw_gpu.engine import thread_count
from hnsw_gpu.files import (
    FORMAT_VERSION,
    Sources,
    file_checksum,
    held,
    list_files,
    open_sources,
    ordered_values,
)


def dedup_files(
    paths: Sequence[Path],
    out: Path,
    settings: Settings,
    *,
    column: str = "embedding",
    id_column: str | None = None,
    text_column: str | None = None,
    against: Sequence[Path] = (),
    itself: bool = True,
    shard_rows: int | None = None,
    memory_limit: int | None = None,
    write_kept: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Do the job, write into folder `out`; returns the report.

    memory_limit: bytes of the whole process, by which `shard_rows` is chosen where it is not given;
    None: half of the machine's, or of a container's. device: where rows are joined; a run may go on
    on another one. Results and work of earlier runs in `out` are no input. ValueError where `out`
    holds a run of other input or parameters, or foreign files where ours would be, where another
    job writes there, where an input would be overwritten or changes meanwhile, and where the limit
    is too small.
    """
    settings.check()
    inputs.device(device)
    with held(out):
        clock = StageClock()
        checkpoints = checkpoints_in(out)
        is_begun = checkpoints.is_begun()
        of_ours = [out, *(out / name for name in reports.RESULTS if is_begun)]
        paths, others = (list_files(given, except_for=of_ours) for given in (paths, against))
        reports.require_ours(out, [*paths, *others], is_begun=is_begun)
        sources = open_sources(paths, column=column)
        if write_kept:
            require_writable(sources.schema())
        keep = _keep(sources, settings.keep)
        ids = None if id_column is None else _ids(sources, id_column)
        if text_column is not None:
            sources.column_type(text_column)  # is it there?
        rows_a_shard = shard_rows or shard_rows_within(
            memory_limit, len(sources), sources.dim, settings.M
        )
        other = _open_other(others, column)
        plan = {
            "version": hnsw_gpu.__version__,
            "format": FORMAT_VERSION,
            "settings": settings._asdict(),
            "column": column,
            "id_column": id_column,
            "text_column": text_column,
            "write_kept": write_kept,
            "shard_rows": rows_a_shard,
            "itself": itself,
            "files": sources.fingerprints(),
            "against": _fingerprints(other),
        }
        checkpoints.begin(plan)
        steps = ResumableSteps(
            checkpoints, settings, shard_rows=rows_a_shard,
            is_exact=settings.compares_all(len(sources)),
            threads=thread_count(threads), device=device, progress=progress,
        )  # fmt: skip
        clock.ends("read")
        near = _near_rows(steps, settings, sources, other, itself, clock)
        result = conclude(near, settings._replace(keep=keep), ids, itself, clock)
        result.report["parameters"] |= _parameters(settings)
        report = (
            {"made_by": MADE_BY}
            | result.report
            | {
                "curve": reports.curve(result),
                "largest_groups": reports.largest_groups(result, sources, text_column),
                "sources": plan["files"],
                "shards": {"count": len(near.shards.numbers), "rows": rows_a_shard},
                "version": hnsw_gpu.__version__,
            }
        )
        sources.require_unchanged()
        if isinstance(other, Sources):
            other.require_unchanged()
        write_tables(out, result, sources, write_kept)
        clock.ends("write")
        report["seconds"] = {stage: round(value, 3) for stage, value in clock.seconds.items()}
        reports.write_report(out, report)
        steps.close()
        checkpoints.remove()
        return report


def _near_rows(
    steps: ResumableSteps,
    settings: Settings,
    sources: Sources,
    other: Sources | Path | None,
    itself: bool,
    clock: StageClock,
) -> NearRows:
    shards, rows = steps.shards(sources, are_copies_one=itself)
    clock.ends("build")
    nearest = None if other is None else steps.nearest_other(other, shards, sources.dim)
    clock.ends("against")
    if itself:
        pairs = steps.pairs(shards)
    else:
        assert nearest is not None
        pairs = no_pairs(nearest.distances)
    clock.ends("join")
    return NearRows(settings.metric_name, settings.limit, rows, shards, pairs, nearest)


def _keep(sources: Sources, keep: str) -> Any:
    """`keep` of the command line as `dedup` takes it: a column's values in place of its name."""
    which, _, column = keep.partition(":")
    if not column:
        return inputs.one_of("keep", keep, KEEP)
    inputs.one_of("keep", which, ("max", "min"))
    try:
        return which, ordered_values(sources.column(column))
    except ValueError as error:
        raise ValueError(f"keep={keep!r}: {error}") from None


def _ids(sources: Sources, column: str) -> Any:
    """Values by which rows are named in the tables; ValueError where they name nothing."""
    import pyarrow

    kind = sources.column_type(column)
    if pyarrow.types.is_nested(kind):
        raise ValueError(f"column {column!r} is {kind}: no names of rows")
    require_writable(pyarrow.schema([(column, kind)]))
    return sources.column(column)


def _parameters(settings: Settings) -> dict[str, Any]:
    """What the report says of the settings, beside what the decision was made with."""
    names = ("keep", "M", "ef_construction", "ef", "seed")
    return {name: getattr(settings, name) for name in names}


def _open_other(against: Sequence[Path], column: str) -> Sources | Path | None:
    """Files of vectors, or one saved index."""
    if not against:
        return None
    saved = [path for path in against if path.is_file() and path.suffix == ".hnsw"]
    if saved and len(against) > 1:
        raise ValueError(f"against: one saved index, or files of vectors, not {len(against)} paths")
    return saved[0] if saved else open_sources(against, column=column)


def _fingerprints(other: Sources | Path | None) -> list[dict[str, Any]]:
    """Path and checksum of each file of the other set."""
    if other is None:
        return []
    if isinstance(other, Sources):
        return other.fingerprints()
    return [{"path": str(other), "checksum": file_checksum(other)}]
