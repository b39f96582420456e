"""The steps of a deduplication of files, each resumed where its file is there.

Of each shard its distinct rows, encoded, and their graph are a step; then each join of two shards
(`sharded_join.py`); then the nearest of another set. One shard with its graph is held at a time.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

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
from hnsw_gpu.deduplication.sharded_join import Block, Pairs, Shards, numbers_of_nodes
from hnsw_gpu.engine import Graph, build_graph
from hnsw_gpu.files import Checkpoints, Sources
from hnsw_gpu.progress import bar

MAPPED = ("rows", "neighbors0", "neighbors", "nodes", "below")  # large arrays of a shard


class ResumableSteps:
    """Shards built, joined and compared with another set, each step once."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: Settings,
        *,
        shard_rows: int,
        is_exact: bool,
        threads: int,
        device: str,
        progress: bool,
    ) -> None:
        self._checkpoints, self._settings = checkpoints, settings
        self._shard_rows, self._is_exact = shard_rows, is_exact
        self._threads, self._device, self._progress = threads, device, progress
        self._held: dict[str, Nodes] = {}  # the shard that was opened last
        self._mapped: dict[str, np.ndarray] = {}

    def close(self) -> None:
        """Let go of the files."""
        self._held.clear()
        self._mapped.clear()

    def shards(
        self, sources: Sources, *, are_copies_one: bool = True, kind: str = "shard"
    ) -> tuple[Shards, Rows]:
        """All shards of some files, named by their kind, and the rows that they are of."""
        starts = range(0, max(1, len(sources)), self._shard_rows)
        names = [f"{kind}-{s:04}" for s in range(len(starts))]
        valid, node_of, digests = [], [], []
        with bar(self._progress, len(sources), f"build {len(names)} shards") as progress_bar:
            for name, start in zip(names, starts, strict=True):
                stop = min(start + self._shard_rows, len(sources))

                def build(start: int = start, stop: int = stop) -> dict[str, np.ndarray]:
                    return self._shard(sources, start, stop, are_copies_one, progress_bar.update)

                self._checkpoints.do_once(name, build)
                arrays = self._checkpoints.read(name, MAPPED)
                valid.append(arrays["valid"])
                node_of.append(arrays["node_of"])
                digests.append(arrays["digests"])
                self._mapped[name] = arrays["rows"]
                progress_bar.update(stop - progress_bar.n)
        if are_copies_one:
            numbers = numbers_of_nodes(digests)
        else:
            ends = np.cumsum([0] + [len(part) for part in digests])
            numbers = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
        whole = Shards(
            numbers, lambda s: self._open(names[s]), lambda s: self._mapped[names[s]],
            self._settings.engine_metric, ef=self._settings.ef, threads=self._threads,
            device=self._device,
        )  # fmt: skip
        nodes = [number[of] for number, of in zip(numbers, node_of, strict=True)]
        return whole, rows_of(len(sources), np.concatenate(valid), np.concatenate(nodes))

    def _shard(
        self,
        sources: Sources,
        start: int,
        stop: int,
        are_copies_one: bool,
        advance: Callable[[int], object],
    ) -> dict[str, np.ndarray]:
        """The arrays of a shard of rows start..stop."""
        settings, shape = self._settings, (stop - start, sources.dim)
        parts = _numbered(sources.vectors(start, stop, settings.on_invalid), start)
        try:
            rows, valid = encoded_rows("", parts, shape, settings.metric_name, settings.on_invalid)
        except inputs.RowsError as error:
            raise ValueError(f"{sources.where(int(error.rows[0]))}: {error.what}") from None
        node_of = np.arange(len(rows))
        if are_copies_one:
            rows, node_of = without_copies(rows)
        arrays = {"rows": rows, "valid": valid, "node_of": node_of, "digests": digest(rows)}
        if self._is_exact:
            return arrays
        graph = build_graph(
            rows, settings.engine_metric, M=settings.M, ef_construction=settings.ef_construction,
            seed=settings.seed, threads=self._threads, advance=advance,
        )  # fmt: skip
        return arrays | graph._asdict()

    def _open(self, name: str) -> Nodes:
        if name not in self._held:
            self._held.clear()
            arrays = self._checkpoints.read(name)
            graph = None
            if "neighbors0" in arrays:
                graph = Graph(*(arrays[field] for field in Graph._fields))
            self._held[name] = Nodes(arrays["rows"], graph, self._settings.engine_metric)
        return self._held[name]

    def pairs(self, shards: Shards) -> Pairs:
        """All pairs, of blocks joined now or before."""
        homes = [len(shards.home(t)) for _, t in shards.blocks]
        title = f"join {len(homes)} blocks"
        with bar(self._progress, sum(homes), title) as progress_bar, closing(shards.join):
            for (s, t), count in zip(shards.blocks, homes, strict=True):

                def join(s: int = s, t: int = t) -> dict[str, np.ndarray]:
                    block = shards.join_block(s, t, self._settings.limit, progress_bar.update)
                    return block._asdict()

                before = progress_bar.n
                self._checkpoints.do_once(_block(s, t), join)
                progress_bar.update(before + count - progress_bar.n)
        return shards.unite(lambda s, t: Block(**self._checkpoints.read(_block(s, t))))

    def nearest_other(self, other: Sources | Path, shards: Shards, dim: int) -> NearestOther:
        """Of each node its nearest in the other set: files of vectors, or one saved index."""

        def find() -> dict[str, np.ndarray]:
            parts = self._parts_of_other(other, dim)
            with bar(self._progress, shards.nodes * len(parts), "against") as progress_bar:
                return other_set.nearest_of_all(
                    parts, lambda place: shards.rows_of(np.arange(place.start, place.stop)),
                    shards.nodes, progress_bar.update,
                )._asdict()  # fmt: skip

        self._checkpoints.do_once("against", find)
        return NearestOther(**self._checkpoints.read("against"))

    def _parts_of_other(self, other: Sources | Path, dim: int) -> list[FindNearest]:
        settings, ef, threads = self._settings, self._settings.ef, self._threads
        if isinstance(other, Path):
            index = other_set.open_index(other, settings.metric_name, dim)
            return [other_set.nearest_in_index(index, settings.engine_metric, ef, threads)]
        shards, rows = self.shards(other, kind="against")

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
