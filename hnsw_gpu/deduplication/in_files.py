"""Near-duplicates of vectors in files: more than memory holds, and resumable.

Rows are read in shards, and each step on the way leaves a file in a folder of our own in OUT, from
where the same command goes on (`files/checkpoints.py`). At the end the tables and the report are
written, and that folder is removed. Files in OUT that are not ours are neither overwritten nor
removed. A runner does the steps, here one after the other; the last of them decides.

In memory at a time: one shard with its graph; of the last step the pairs, and per row some 100
bytes and the id; outside of steps the names of files and shards, and their counts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hnsw_gpu
from hnsw_gpu import inputs
from hnsw_gpu.deduplication import report as reports
from hnsw_gpu.deduplication.checkpoints import MADE_BY, checkpoints_in
from hnsw_gpu.deduplication.conclusion import conclude
from hnsw_gpu.deduplication.decision import NearRows
from hnsw_gpu.deduplication.keep_order import KEEP
from hnsw_gpu.deduplication.settings import Settings
from hnsw_gpu.deduplication.shard_size import shard_rows_within
from hnsw_gpu.deduplication.shard_steps import (
    Cut,
    Job,
    ResumableSteps,
    nearest_other_in,
    pairs_in,
    rows_in,
    shards_of,
)
from hnsw_gpu.deduplication.sharded_join import no_pairs
from hnsw_gpu.deduplication.stage_clock import StageClock
from hnsw_gpu.deduplication.tables import require_writable, write_tables
from hnsw_gpu.files import (
    FORMAT_VERSION,
    HERE,
    UNSEEN,
    Advance,
    LocalFolder,
    Sources,
    StepRunner,
    file_checksum,
    held,
    list_files,
    open_sources,
    ordered_values,
    require_pyarrow,
)


class Task(NamedTuple):
    """What the last step needs: of what, where to, and how it is told."""

    job: Job
    cut: Cut
    sources: Sources
    other: Sources | Path | None
    out: Path
    id_column: str | None
    text_column: str | None
    write_kept: bool
    itself: bool


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
    runner: StepRunner = HERE,
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
    require_pyarrow("dedup")  # for its tables: not after all is done
    with held(LocalFolder(out)):
        clock = StageClock()
        checkpoints = checkpoints_in(out)
        is_begun = checkpoints.is_begun()
        of_ours = [out, *(out / name for name in reports.RESULTS if is_begun)]
        paths, others = (list_files(given, except_for=of_ours) for given in (paths, against))
        reports.require_ours(out, [*paths, *others], is_begun=is_begun)
        sources = open_sources(paths, column=column)
        if write_kept:
            require_writable(sources.schema())
        runner.each(_require_columns, (sources, settings.keep, id_column), [()], [0], UNSEEN)
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
            "files": sources.fingerprints(runner),
            "against": _fingerprints(other, runner),
        }
        checkpoints.begin(plan)
        is_exact = settings.compares_all(len(sources))
        job = Job(checkpoints, settings, is_exact, runner.threads, device)
        cut = Cut("shard", len(sources), rows_a_shard, itself)
        against_cut = (
            Cut("against", len(other), rows_a_shard) if isinstance(other, Sources) else None
        )
        steps = ResumableSteps(job, runner, cut, against_cut, progress=progress)
        clock.ends("read")
        try:
            steps.build(sources)
            clock.ends("build")
            if other is not None:
                steps.compare_with_other(other, sources.dim)
            clock.ends("against")
            if itself:
                steps.join()
            clock.ends("join")
            _require_unchanged(sources, other)
            task = Task(
                job, cut, sources, other, out.absolute(), id_column, text_column, write_kept, itself
            )
            (report,) = runner.each(
                _conclude, (task, plan["files"], clock.seconds), [()], [0], UNSEEN
            )
        finally:
            steps.close()
        checkpoints.remove()
        found: dict[str, Any] = report
        return found


def _conclude(
    task: Task, files: list[dict[str, Any]], seconds: dict[str, float], *, advance: Advance
) -> dict[str, Any]:
    """The last step: decide, and write the tables and the report, which is returned."""
    job, cut, sources = task.job, task.cut, task.sources
    settings, clock = job.settings, StageClock()
    near = _near_rows(task)
    keep, ids = _columns(sources, settings.keep, task.id_column)
    result = conclude(near, settings._replace(keep=keep), ids, task.itself, clock)
    result.report["parameters"] |= _parameters(settings)
    report = (
        {"made_by": MADE_BY}
        | result.report
        | {
            "curve": reports.curve(result),
            "largest_groups": reports.largest_groups(result, sources, task.text_column),
            "sources": files,
            "shards": {"count": len(cut.names), "rows": cut.shard_rows},
            "version": hnsw_gpu.__version__,
        }
    )
    _require_unchanged(sources, task.other)
    write_tables(task.out, result, sources, task.write_kept)
    clock.ends("write")
    every = seconds | clock.seconds
    report["seconds"] = {stage: round(value, 3) for stage, value in every.items()}
    reports.write_report(task.out, report)
    return report


def _near_rows(task: Task) -> NearRows:
    job, cut = task.job, task.cut
    shards, rows = shards_of(job, cut), rows_in(job, cut)
    nearest = None if task.other is None else nearest_other_in(job)
    if task.itself:
        pairs = pairs_in(job, cut)
    else:
        assert nearest is not None
        pairs = no_pairs(nearest.distances)
    return NearRows(job.settings.metric_name, job.settings.limit, rows, shards, pairs, nearest)


def _require_unchanged(sources: Sources, other: Sources | Path | None) -> None:
    sources.require_unchanged()
    if isinstance(other, Sources):
        other.require_unchanged()


def _require_columns(
    sources: Sources, keep: str, id_column: str | None, *, advance: Advance
) -> None:
    """ValueError, before the work, where a column is none by which rows are ordered or named."""
    _columns(sources, keep, id_column)


def _columns(sources: Sources, keep: str, id_column: str | None) -> tuple[Any, Any]:
    """Who is kept, as `dedup` takes it, and the names of rows."""
    return _keep(sources, keep), None if id_column is None else _ids(sources, id_column)


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


def _fingerprints(other: Sources | Path | None, runner: StepRunner) -> list[dict[str, Any]]:
    """Path and checksum of each file of the other set."""
    if other is None:
        return []
    if isinstance(other, Sources):
        return other.fingerprints(runner)
    return [{"path": str(other), "checksum": file_checksum(other)}]
