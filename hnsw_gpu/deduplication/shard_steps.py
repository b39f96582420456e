"""The steps of a deduplication of files, each of which leaves a file, and is done once.

Of each shard its distinct rows, encoded, and their graph are a step; then the numbers of all nodes;
then each join of two shards (`sharded_join.py`), and the nearest of another set. A step needs the
plan and the files of those before it, and nothing else: whoever runs it (`files/step_runner.py`)
may be another process, on another machine that sees the same folders. It holds one shard with its
graph; that of numbers 56 bytes a row of the whole set.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.deduplication import other_set
from hnsw_gpu.deduplication.distinct_rows import (
    Rows,
    digest,
    encoded_rows,
    rows_of,
    without_copies,
)
from hnsw_gpu.deduplication.near_pairs import Nodes
from hnsw_gpu.deduplication.other_set import FindNearest, NearestOther
from hnsw_gpu.deduplication.settings import Settings
from hnsw_gpu.deduplication.sharded_join import (
    Block,
    Pairs,
    Shards,
    blocks_of,
    numbers_of_nodes,
    starts_of,
)
from hnsw_gpu.engine import Graph, build_graph, thread_count
from hnsw_gpu.files import UNSEEN, Advance, Checkpoints, Sources, StepRunner
from hnsw_gpu.progress import bar

GRAPH = Graph._fields
LARGE = ("rows", *GRAPH)  # arrays of a shard that are mapped where others are wanted
MAPPED = ("valid", "node_of", "digests", "numbers", *LARGE)


class Job(NamedTuple):
    """What every step needs."""

    checkpoints: Checkpoints
    settings: Settings
    is_exact: bool
    threads: int | None
    device: str


class Cut(NamedTuple):
    """How a set of rows is cut in shards."""

    kind: str  # "shard", or "against": of the other set
    rows: int
    shard_rows: int
    are_copies_one: bool = True

    @property
    def names(self) -> list[str]:
        """The steps of the shards."""
        return [f"{self.kind}-{s:04}" for s in range(len(self.spans))]

    @property
    def numbers(self) -> str:
        """The step of their nodes' numbers."""
        return f"{self.kind}-numbers"

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First row and end of each shard."""
        starts = range(0, max(1, self.rows), self.shard_rows)
        return [(start, min(start + self.shard_rows, self.rows)) for start in starts]


class ResumableSteps:
    """Shards built, joined and compared with another set, each step once, by a runner."""

    def __init__(
        self, job: Job, runner: StepRunner, cut: Cut, against: Cut | None, *, progress: bool
    ) -> None:
        self._job, self._runner, self._progress = job, runner, progress
        self._cut, self._against = cut, against
        self._homes: list[int] = []  # nodes at home in each shard

    def close(self) -> None:
        """Let go of the files, and of the GPU, that steps of this process have opened."""
        for shards in _opened.pop(self._job.checkpoints.place, {}).values():
            shards.join.close()

    def build(self, sources: Sources) -> None:
        """All shards of the files, and the numbers of their nodes."""
        self._homes = self._built(sources, self._cut)

    def _built(self, sources: Sources, cut: Cut) -> list[int]:
        names, spans = cut.names, cut.spans
        given = [(name, *span) for name, span in zip(names, spans, strict=True)]
        rows = [stop - start for start, stop in spans]
        common = self._job, sources, cut.are_copies_one
        with bar(self._progress, cut.rows, f"build {len(names)} shards") as progress_bar:
            self._runner.each(_build, common, given, rows, progress_bar)
        (homes,) = self._runner.each(_number, (self._job, cut), [()], [0], UNSEEN)
        found: list[int] = homes
        return found

    def join(self) -> None:
        """All blocks of two shards."""
        blocks = blocks_of(len(self._homes))
        rows = [self._homes[t] for _, t in blocks]
        with bar(self._progress, sum(rows), f"join {len(blocks)} blocks") as progress_bar:
            self._runner.each(_join, (self._job, self._cut), blocks, rows, progress_bar)

    def compare_with_other(self, other: Sources | Path, dim: int) -> None:
        """The nearest of each node in the other set: files of vectors, or one saved index."""
        parts = 1
        if self._against is not None:
            assert isinstance(other, Sources)
            parts = len(self._built(other, self._against))
        else:
            assert isinstance(other, Path)
            other = other.absolute()
        total = sum(self._homes) * parts
        with bar(self._progress, total, "against") as progress_bar:
            common = self._job, self._cut, other, self._against, dim
            self._runner.each(_compare, common, [()], [total], progress_bar)


def shards_of(job: Job, cut: Cut) -> Shards:
    """All shards, of which one is held; those opened last in this process, if it is them."""
    place, key = job.checkpoints.place, (job.checkpoints.identity(cut.numbers), *job[1:], cut)
    for other in [other for other in _opened if other != place]:
        _opened.pop(other, None)
    mine = _opened.setdefault(place, {})
    found = mine.get(key)
    if found is None:
        found = mine[key] = _shards(job, cut)
    return found


# By work folder, of one: what a step opened, the next of its kind asks again.
_opened: dict[str, dict[tuple, Shards]] = {}


def _shards(job: Job, cut: Cut) -> Shards:
    names, mapped = cut.names, dict[int, np.ndarray]()
    held: dict[int, Nodes] = {}  # the shard that was opened last

    def opened(s: int) -> Nodes:
        if s not in held:
            held.clear()
            arrays = job.checkpoints.read(names[s])
            graph = Graph(*(arrays[field] for field in GRAPH)) if GRAPH[0] in arrays else None
            held[s] = Nodes(arrays["rows"], graph, job.settings.engine_metric)
        return held[s]

    def rows(s: int) -> np.ndarray:
        if s not in mapped:
            mapped[s] = job.checkpoints.read(names[s], MAPPED)["rows"]
        return mapped[s]

    found = job.checkpoints.read(cut.numbers, MAPPED)
    numbers = [found["numbers"][a:b] for a, b in itertools.pairwise(found["ends"].tolist())]
    return Shards(
        numbers, opened, rows, job.settings.engine_metric, ef=job.settings.ef,
        threads=thread_count(job.threads), device=job.device, starts=found["starts"],
    )  # fmt: skip


def rows_in(job: Job, cut: Cut) -> Rows:
    """The rows that the shards are of."""
    shards, valid, node_of = shards_of(job, cut), [], []
    for name, numbers in zip(cut.names, shards.numbers, strict=True):
        arrays = job.checkpoints.read(name, LARGE)
        valid.append(arrays["valid"])
        node_of.append(numbers[arrays["node_of"]])
    return rows_of(cut.rows, np.concatenate(valid), np.concatenate(node_of))


def pairs_in(job: Job, cut: Cut) -> Pairs:
    """All pairs, of the blocks that were joined."""
    return shards_of(job, cut).unite(lambda s, t: Block(**job.checkpoints.read(_block(s, t))))


def nearest_other_in(job: Job) -> NearestOther:
    """Of each node its nearest in the other set."""
    return NearestOther.from_arrays(job.checkpoints.read("against"))


# ---------------------------------------------------------------- the steps


def _build(
    job: Job,
    sources: Sources,
    are_copies_one: bool,
    name: str,
    start: int,
    stop: int,
    *,
    advance: Advance,
) -> None:
    """The shard of rows start..stop."""

    def build() -> dict[str, np.ndarray]:
        settings, shape = job.settings, (stop - start, sources.dim)
        parts = _numbered(sources.vectors(start, stop, settings.on_invalid), start)
        try:
            rows, valid = encoded_rows("", parts, shape, settings.metric_name, settings.on_invalid)
        except inputs.RowsError as error:
            raise ValueError(
                f"{sources.where(int(error.rows[0]))}: {error.what} (on_invalid='drop' leaves such "
                "rows out)"
            ) from None
        node_of = np.arange(len(rows))
        if are_copies_one:
            rows, node_of = without_copies(rows)
        arrays = {"rows": rows, "valid": valid, "node_of": node_of, "digests": digest(rows)}
        if job.is_exact:
            return arrays
        graph = build_graph(
            rows, settings.engine_metric, M=settings.M, ef_construction=settings.ef_construction,
            seed=settings.seed, threads=thread_count(job.threads), advance=advance,
        )  # fmt: skip
        return arrays | graph._asdict()

    job.checkpoints.do_once(name, build)


def _number(job: Job, cut: Cut, *, advance: Advance) -> list[int]:
    """Number the nodes of all shards; how many are at home in each."""

    def number() -> dict[str, np.ndarray]:
        digests = [job.checkpoints.read(name, LARGE)["digests"] for name in cut.names]
        ends = np.cumsum([0] + [len(part) for part in digests])
        if cut.are_copies_one:
            numbers = numbers_of_nodes(digests)
        else:
            numbers = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
        return {"numbers": np.concatenate(numbers), "ends": ends, "starts": starts_of(numbers)}

    job.checkpoints.do_once(cut.numbers, number)
    homes: list[int] = np.diff(job.checkpoints.read(cut.numbers, MAPPED)["starts"]).tolist()
    return homes


def _join(job: Job, cut: Cut, s: int, t: int, *, advance: Advance) -> None:
    """Block (s, t)."""

    def join() -> dict[str, np.ndarray]:
        shards = shards_of(job, cut)
        return shards.join_block(s, t, job.settings.limit, advance)._asdict()

    job.checkpoints.do_once(_block(s, t), join)


def _compare(
    job: Job,
    cut: Cut,
    other: Sources | Path,
    against: Cut | None,
    dim: int,
    *,
    advance: Advance,
) -> None:
    """Of each node its nearest in the other set."""

    def find() -> dict[str, np.ndarray]:
        shards = shards_of(job, cut)
        return other_set.nearest_of_all(
            _parts_of_other(job, other, against, dim),
            lambda place: shards.rows_of(np.arange(place.start, place.stop)),
            shards.nodes, advance,
        ).arrays()  # fmt: skip

    job.checkpoints.do_once("against", find)


def _parts_of_other(
    job: Job, other: Sources | Path, against: Cut | None, dim: int
) -> list[FindNearest]:
    settings, ef, threads = job.settings, job.settings.ef, thread_count(job.threads)
    if against is None:
        index = other_set.open_index(other, settings.metric_name, dim)
        return [other_set.nearest_in_index(index, settings.engine_metric, ef, threads)]
    shards, rows = shards_of(job, against), rows_in(job, against)

    def part(s: int) -> FindNearest:
        labels = rows.first_row[shards.numbers[s]]
        # opened for each call: so that one shard is held at a time
        return lambda asking: other_set.nearest_in_nodes(shards.opened(s), labels, ef, threads)(
            asking
        )

    return [part(s) for s in range(len(shards.numbers))]


def _numbered(blocks: Iterator[np.ndarray], first: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each block with the number of its first row."""
    for block in blocks:
        yield first, block
        first += len(block)


def _block(s: int, t: int) -> str:
    return f"block-{s:04}-{t:04}"
