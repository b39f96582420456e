"""Near-duplicates of vectors in files: more than memory holds, and resumable.

Rows are read in shards. Of each shard its distinct rows, encoded, and their graph are written to
OUT/work, then each join of two shards (`shards.py`) to a file of its own. Such a file appears whole
or not at all and carries checksums: it is its own mark that this step is done, and the same command
goes on with the steps that are left. plan.json there says what the steps belong to: parameters, and
checksums of the input. At the end the tables and the report are written, and OUT/work is removed.

In memory at a time: one shard with its graph, the pairs, and per row some 100 bytes and the id.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import hnsw_gpu
from hnsw_gpu import inputs
from hnsw_gpu.deduplication import against as others
from hnsw_gpu.deduplication import pairs, report_page, shards
from hnsw_gpu.deduplication.in_memory import (
    EXACT_ROWS,
    Against,
    Clock,
    DedupResult,
    Join,
    encoded,
    limit_of,
    named,
)
from hnsw_gpu.engine import Graph, NodeTable, move_together, row_length, thread_count
from hnsw_gpu.files import (
    Sources,
    atomic_file,
    file_checksum,
    open_sources,
    read_arrays,
    write_arrays,
)
from hnsw_gpu.progress import bar

PROCESS_BYTES = 350 << 20  # Python with its libraries, compiled code, and blocks being read
ROW_BYTES = 160  # held of every row: numbers, order, digests
LEAST_SHARD = 1000  # rows
PAIRS_AT_ONCE = 1 << 20  # written
CURVE = 40  # thresholds of which the report says what they would drop
GROUPS, MEMBERS = 50, 20  # the largest groups that the report shows, and rows of each


class FileSettings(NamedTuple):
    """What decides the result."""

    threshold: float | None = None
    max_distance: float | None = None
    metric: str = "cosine"
    keep: str = "first"  # or "max:COLUMN", "min:COLUMN"
    linkage: str = "star"
    method: str = "auto"
    on_invalid: str = "raise"
    M: int = 16
    ef_construction: int = 80
    ef: int = 48
    seed: int = 0


def dedup_files(
    paths: Sequence[Path],
    out: Path,
    settings: FileSettings,
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
    progress: bool = False,
) -> dict[str, Any]:
    """Do the job, write into folder `out`; returns the report.

    memory_limit: bytes of the whole process, by which `shard_rows` is chosen where it is not given;
    None: half of the machine's memory. ValueError where OUT/work belongs to other input or
    parameters, and where the limit is too small.
    """
    clock, seconds = Clock(), {}
    opened = open_sources(paths, column=column)
    if write_kept:
        opened.require_same_columns()
    keep, values = _keep(opened, settings.keep)
    ids = None if id_column is None else opened.column(id_column)
    if text_column is not None:
        opened.take(text_column, np.empty(0, np.int64))
    rows_a_shard = shard_rows or _shard_rows(len(opened), opened.dim, settings.M, memory_limit)
    out.mkdir(parents=True, exist_ok=True)
    job = _Job(out / "work", opened, settings, rows_a_shard, thread_count(threads), progress)
    theirs = _their_files(against, column)
    fingerprints = opened.fingerprints()
    job.plan(
        {
            "version": hnsw_gpu.__version__,
            "settings": dict(settings._asdict()),
            "shard_rows": rows_a_shard,
            "itself": itself,
            "files": fingerprints,
            "against": theirs.fingerprints()
            if isinstance(theirs, Sources)
            else [{"path": str(path), "checksum": file_checksum(path)} for path in against],
        }
    )
    seconds["read"] = clock.lap()
    whole, valid, node_of = job.build(collapse=itself)
    seconds["build"] = clock.lap()
    limit = limit_of(inputs.metric(settings.metric), settings.threshold, settings.max_distance)
    nearest = job.against(theirs, whole, limit) if against else None
    seconds["against"] = clock.lap()
    if itself:
        found = job.join(whole, limit)
    else:
        assert nearest is not None
        found = shards.no_pairs(nearest.distances)
    seconds["join"] = clock.lap()
    name = inputs.metric(settings.metric)
    join = Join(name, len(opened), valid, node_of, limit, whole, found, values, nearest, ids)
    dropped = join.decide(limit, settings.linkage, values)
    seconds["group"] = clock.lap()
    report = {**join.counts(dropped, limit), "histogram": join.histogram()}
    report["recall"] = join.recall(settings.seed) if itself else None
    report["row_reads"] = whole.row_reads(300)
    seconds["recall"] = clock.lap()
    report["parameters"] = {
        "metric": name,
        "method": job.method,
        **named(name, limit, settings.linkage, keep),
        **{what: getattr(settings, what) for what in ("M", "ef_construction", "ef", "seed")},
    }
    result = DedupResult(join, dropped, report)
    report["curve"] = curve(result, CURVE)
    report["largest_groups"] = _largest_groups(result, opened, text_column)
    report["sources"] = fingerprints
    report["shards"] = {"count": len(whole.numbers), "rows": rows_a_shard}
    report["version"] = hnsw_gpu.__version__
    _write_tables(out, result, opened, write_kept)
    seconds["write"] = clock.lap()
    report["seconds"] = {stage: round(value, 3) for stage, value in seconds.items()}
    with atomic_file(out / "report.json") as file:
        file.write(json.dumps(report, indent=1, allow_nan=False).encode())
    report_page.write_page(out / "report.html", report)
    job.remove()
    return report


class _Job:
    """The steps whose results lie in the work folder."""

    def __init__(
        self,
        folder: Path,
        opened: Sources,
        settings: FileSettings,
        shard_rows: int,
        threads: int,
        progress: bool,
    ) -> None:
        self._folder, self._sources, self._settings = folder, opened, settings
        self._shard_rows, self._threads, self._progress = shard_rows, threads, progress
        is_exact = settings.method == "exact"
        if settings.method == "auto":
            is_exact = len(opened) <= EXACT_ROWS
        self.method = "exact" if is_exact else "hnsw"
        self._metric = inputs.METRICS[inputs.metric(settings.metric)]
        self._held: dict[str, pairs.Nodes] = {}  # the shard that was opened last
        self._mapped: dict[str, np.ndarray] = {}

    def plan(self, plan: dict[str, Any]) -> None:
        """Begin, or go on if the folder belongs to the same plan."""
        path = self._folder / "plan.json"
        plan = json.loads(json.dumps(plan))
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            if there != plan:
                raise ValueError(f"{self._folder} holds another run: {_difference(there, plan)}")
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        with atomic_file(path) as file:
            file.write(json.dumps(plan, indent=1).encode())

    def remove(self) -> None:
        self._held.clear()
        self._mapped.clear()
        (self._folder / "plan.json").unlink()  # what is left without it counts for nothing
        shutil.rmtree(self._folder)

    def build(self, collapse: bool) -> tuple[shards.Shards, np.ndarray, np.ndarray]:
        """All shards; the valid rows, int64 (m,), and their nodes (m,)."""
        return self._build("shard", self._sources, collapse)

    def _build(
        self, what: str, opened: Sources, collapse: bool
    ) -> tuple[shards.Shards, np.ndarray, np.ndarray]:
        count = max(1, -(-len(opened) // self._shard_rows))
        valid, node_of, digests = [], [], []
        with bar(self._progress, len(opened), f"build {count} shards") as shown:
            for s in range(count):
                start = s * self._shard_rows
                stop = min(start + self._shard_rows, len(opened))
                path = self._folder / f"{what}-{s:04}.safetensors"
                if not path.exists():
                    self._write_shard(path, opened, start, stop, collapse, shown.update)
                mapped = ("rows", "neighbors0", "neighbors", "nodes", "below")
                arrays, _ = read_arrays(path, mapped)
                valid.append(arrays["valid"])
                node_of.append(arrays["node_of"])
                digests.append(arrays["digests"])
                self._mapped[path.name] = arrays["rows"]
                shown.update(start + (stop - start) - shown.n)
        numbers = shards.numbered(digests)
        if not collapse:
            ends = np.cumsum([0] + [len(part) for part in digests])
            numbers = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
        names = [f"{what}-{s:04}.safetensors" for s in range(count)]
        whole = shards.Shards(
            numbers,
            lambda s: self._open(names[s]),
            lambda s: self._mapped[names[s]],
            self._metric,
            ef=self._settings.ef,
            threads=self._threads,
        )
        nodes = [number[of] for number, of in zip(numbers, node_of, strict=True)]
        return whole, np.concatenate(valid), np.concatenate(nodes)

    def _write_shard(
        self,
        path: Path,
        opened: Sources,
        start: int,
        stop: int,
        collapse: bool,
        advance: Callable[[int], object],
    ) -> None:
        settings = self._settings

        def parts() -> Any:
            first = 0
            for block in opened.vectors(start, stop):
                yield first, block
                first += len(block)

        shape = (stop - start, opened.dim)
        try:
            rows, valid = encoded("", parts(), shape, settings.metric, settings.on_invalid)
        except ValueError as error:
            raise self._retold(error, opened, start) from None
        node_of = np.arange(len(rows))
        if collapse:
            node_of, firsts = NodeTable().assign(rows, 0, len(rows))
            move_together(rows, firsts)
            rows = rows[: len(firsts)]
        graph = None
        if self.method == "hnsw":
            graph = pairs.build_nodes(
                rows, self._metric, M=settings.M, ef_construction=settings.ef_construction,
                seed=settings.seed, threads=self._threads, advance=advance,
            ).graph  # fmt: skip
        arrays = {"rows": rows, "valid": valid + start, "node_of": node_of, "digests": digest(rows)}
        write_arrays(path, arrays | ({} if graph is None else graph._asdict()), {})

    def _retold(self, error: ValueError, opened: Sources, start: int) -> ValueError:
        """An error about rows of a shard, as one about a row of a file."""
        what, found, listed = str(error).lstrip(": ").rpartition(" in row")
        number = listed.lstrip("s ").split(",")[0].split(" ")[0]
        if not found or not number.isdigit():
            return error
        return ValueError(f"{opened.where(start + int(number))}: {what}")

    def _open(self, name: str) -> pairs.Nodes:
        if name not in self._held:
            self._held.clear()
            arrays, _ = read_arrays(self._folder / name)
            graph = None
            if "neighbors0" in arrays:
                graph = Graph(*(arrays[field] for field in Graph._fields))
            self._held[name] = pairs.Nodes(arrays["rows"], graph, self._metric)
        return self._held[name]

    def join(self, whole: shards.Shards, limit: float) -> shards.Pairs:
        """All pairs; of a block that is done, what its file says."""
        asked = [len(whole.home(t)) for _, t in whole.blocks]
        with bar(self._progress, sum(asked), f"join {len(asked)} blocks") as shown:
            for (s, t), count in zip(whole.blocks, asked, strict=True):
                before, path = shown.n, self._block(s, t)
                if not path.exists():
                    block = whole.join(s, t, limit, shown.update)
                    write_arrays(path, block._asdict(), {})
                shown.update(before + count - shown.n)
        return whole.pairs(lambda s, t: shards.Block(**read_arrays(self._block(s, t))[0]))

    def _block(self, s: int, t: int) -> Path:
        return self._folder / f"block-{s:04}-{t:04}.safetensors"

    def against(self, theirs: Sources | Path | None, whole: shards.Shards, limit: float) -> Against:
        """Of each node its nearest in the other set."""
        path = self._folder / "against.safetensors"
        if not path.exists():
            if isinstance(theirs, Path):
                index = others.opened(theirs, self._settings.metric, self._sources.dim)
                parts = [
                    others.nearest_in_index(index, self._metric, self._settings.ef, self._threads)
                ]
            else:
                assert theirs is not None
                parts = self._their_parts(theirs)
            with bar(self._progress, whole.nodes * len(parts), "against") as shown:
                labels, distances = others.nearest_of_all(
                    parts, lambda place: whole.rows_of(np.arange(place.start, place.stop)),
                    whole.nodes, shown.update,
                )  # fmt: skip
            write_arrays(path, {"labels": labels, "distances": distances}, {})
        return Against(**read_arrays(path)[0])

    def _their_parts(self, theirs: Sources) -> list[others.Nearest]:
        them, valid, node_of = self._build("against", theirs, True)
        first = np.empty(them.nodes, np.int64)
        first[node_of[::-1]] = valid[::-1]

        def part(s: int) -> others.Nearest:
            def nearest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                nodes = them.opened(s)
                labels = first[them.numbers[s]]
                found = others.nearest_in_nodes(nodes, labels, self._settings.ef, self._threads)
                return found(rows)

            return nearest

        return [part(s) for s in range(len(them.numbers))]


def digest(rows: np.ndarray) -> np.ndarray:
    """uint64 (n, 2) BLAKE2b of each row: equal rows, and no others, have equal ones."""
    parts = (hashlib.blake2b(row, digest_size=16).digest() for row in np.ascontiguousarray(rows))
    return np.frombuffer(b"".join(parts), np.uint64).reshape(-1, 2)


def curve(result: DedupResult, points: int) -> list[dict[str, Any]]:
    """What narrower limits would keep: counts at evenly spaced thresholds."""
    report, start = result.report, result.report["parameters"]
    wide = start.get("threshold", start["max_distance"])
    key = "threshold" if "threshold" in start else "max_distance"
    end = max(wide, 1.0) if key == "threshold" else 0.0
    counts = ("kept", "near_duplicates", "groups", "pairs")
    told = []
    for place in range(points):
        at = wide + (end - wide) * place / (points - 1)
        narrower = result.regroup(**{key: at}).report if place else report
        told.append({key: at, **{name: narrower[name] for name in counts}})
        if at == end:
            break
    return told


def _largest_groups(
    result: DedupResult, opened: Sources, text_column: str | None
) -> list[dict[str, Any]]:
    dropped = np.flatnonzero(result.duplicate_of >= 0)
    order = dropped[np.argsort(result.duplicate_of[dropped], kind="stable")]
    heads, starts, sizes = np.unique(
        result.duplicate_of[order], return_index=True, return_counts=True
    )
    groups, wanted = [], []
    for g in np.argsort(-sizes, kind="stable")[:GROUPS]:
        members = order[starts[g] : starts[g] + sizes[g]]
        members = members[np.argsort(result.distance[members], kind="stable")][:MEMBERS]
        groups.append((int(heads[g]), int(sizes[g]) + 1, members))
        wanted += [heads[g : g + 1], members]
    rows = np.unique(np.concatenate(wanted)) if wanted else np.empty(0, np.int64)
    texts = [None] * len(rows) if text_column is None else opened.take(text_column, rows)
    text_of = dict(zip(rows.tolist(), texts, strict=True))
    name_of = dict(zip(rows.tolist(), result.names(rows), strict=True))
    is_l2 = "threshold" not in result.report["parameters"]

    def shown(row: int) -> dict[str, Any]:
        return {"id": name_of[row], "text": text_of[row]}

    def near(row: int) -> dict[str, Any]:
        distance = float(result.distance[row])
        return {"distance": distance} if is_l2 else {"similarity": 1 - distance}

    return [
        {**shown(head), "size": size, "members": [shown(row) | near(row) for row in rows.tolist()]}
        for head, size, rows in groups
    ]


def _write_tables(out: Path, result: DedupResult, opened: Sources, write_kept: bool) -> None:
    import pyarrow
    import pyarrow.parquet

    with atomic_file(out / "duplicates.parquet") as file:
        pyarrow.parquet.write_table(result.duplicates, file)
    tables = result.pair_tables(PAIRS_AT_ONCE)
    first = next(tables)
    with (
        atomic_file(out / "pairs.parquet") as file,
        pyarrow.parquet.ParquetWriter(file, first.schema) as writer,
    ):
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
    with atomic_file(out / "kept.parquet") as file:
        if not write_kept:
            rows = np.flatnonzero(result.keep)
            pyarrow.parquet.write_table(pyarrow.table({"id": result.names_array(rows)}), file)
            return
        writer, row = None, 0
        for batch in opened.tables():
            writer = writer or pyarrow.parquet.ParquetWriter(file, batch.schema)
            kept = pyarrow.array(result.keep[row : row + len(batch)])
            writer.write_batch(batch.filter(kept))
            row += len(batch)
        if writer is not None:
            writer.close()


def _keep(opened: Sources, keep: str) -> tuple[str, Any]:
    """What `keep` is called, and what `Join` takes for it."""
    which, _, column = keep.partition(":")
    if not column:
        return inputs.one_of("keep", keep, ("first", "last", "medoid")), keep
    inputs.one_of("keep", which, ("max", "min"))
    values = opened.column(column).to_numpy()
    if values.dtype.kind not in "fiub":
        raise ValueError(f"keep={keep!r}: the column holds {values.dtype}, expected numbers")
    return keep, (which, values)


def _their_files(against: Sequence[Path], column: str) -> Sources | Path | None:
    """Files of vectors, or one saved index."""
    if not against:
        return None
    saved = [path for path in against if path.is_file() and path.suffix == ".hnsw"]
    if saved and len(against) > 1:
        raise ValueError(f"against: one saved index, or files of vectors, not {len(against)} paths")
    return saved[0] if saved else open_sources(against, column=column)


def bytes_a_row(dim: int, M: int) -> int:
    """Held of a row while its shard is built: encoded, with links and their distances."""
    return 4 * row_length(dim, "fp32") + 2 * 8 * M + 100


def _shard_rows(rows: int, dim: int, M: int, memory_limit: int | None) -> int:
    if memory_limit is None:
        memory_limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    left = memory_limit - PROCESS_BYTES - ROW_BYTES * rows
    fit = left // bytes_a_row(dim, M)
    if fit < min(LEAST_SHARD, rows):
        needed = PROCESS_BYTES + ROW_BYTES * rows + LEAST_SHARD * bytes_a_row(dim, M)
        raise ValueError(
            f"a memory limit of {memory_limit:,} bytes: {rows:,} rows of {dim} need at least "
            f"{needed:,}"
        )
    count = max(1, -(-rows // fit))
    return max(1, -(-rows // count))


def _difference(there: dict[str, Any], plan: dict[str, Any]) -> str:
    """The first thing in which two plans differ, in words, and what to do."""
    for name in ("files", "against"):
        known = {file["path"]: file for file in there[name]}
        for file in plan[name]:
            before = known.get(file["path"])
            if before is not None and before != file:
                return (
                    f"{file['path']} has changed since (checksum {file['checksum']}, then "
                    f"{before['checksum']}); delete the folder to begin anew"
                )
        if there[name] != plan[name]:
            return "of other files; delete it to begin anew"
    for part in ("settings", "shard_rows", "itself", "version"):
        if there[part] != plan[part]:
            old, new = there[part], plan[part]
            if part == "settings":
                part = next(name for name in new if old[name] != new[name])
                old, new = old[part], new[part]
            return f"{part} was {old!r}, is {new!r}; delete the folder to begin anew"
    return "delete it to begin anew"


def interrupted_state(out: Path) -> str:
    """How far an interrupted job has come, in words."""
    work = out / "work"
    built, joined = (len(list(work.glob(f"{what}-*"))) for what in ("shard", "block"))
    return f"{built} shards built, {joined} blocks joined: the same command goes on from there"
