"""The index: vectors, graph and labels behind one object, and the choice of engine."""

import logging
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs
from hnsw_gpu.engine import (
    BLOCK,
    BLOCK_VALUES,
    KEY_NONE,
    STORAGE,
    CpuEngine,
    Graph,
    Labels,
    NodeTable,
    SharedLock,
    check_graph,
    decode,
    empty_graph,
    empty_rows,
    encode,
    encode_queries,
    exact_block,
    insert_nodes,
    key_distances,
    key_nodes,
    move_together,
    nearest,
    nearest_others,
    pack_bits,
    repair,
    run_to_a_stop,
    thread_count,
    within,
    without_unfinished,
)
from hnsw_gpu.files import CorruptIndexError, read_arrays, write_arrays
from hnsw_gpu.gpu import bytes_a_query, index_bytes
from hnsw_gpu.progress import bar

if TYPE_CHECKING:
    from hnsw_gpu.gpu import GpuEngine

logger = logging.getLogger("hnsw_gpu")

ENCODE_ROWS = 16384  # vectors checked and encoded at a time
SELF_ROWS = 16384  # nodes of a neighbour graph searched at a time
MOST_NODES = 2**31 - 1
REPAIR_SHARE = 2048  # new nodes a repair: it then takes about as long as adding them
REFINE = {False: "", "": "", True: "fp32", "fp32": "fp32", "fp16": "fp16"}


class SearchResult(NamedTuple):
    """Nearest first. Too few: label -1, distance +inf."""

    labels: np.ndarray  # (q, k) int64
    distances: np.ndarray  # (q, k) float32


class RadiusResult(NamedTuple):
    """All within a radius, nearest first: query i has results offsets[i]:offsets[i + 1]."""

    offsets: np.ndarray  # (q + 1,) int64
    labels: np.ndarray  # (results,) int64
    distances: np.ndarray  # (results,) float32


class Index:
    """An HNSW graph over vectors (Malkov & Yashunin 2016) with deterministic answers.

    dim: numbers a vector, 1 to 65,536.
    metric: "cosine" ("cos", "angular"), "l2" ("sqeuclidean"), "euclidean" (its root), or "ip"
        ("inner_product", "dot"). Distances are 1 - cosine, squared l2, l2, and 1 - dot.
    dtype: how vectors are stored: "fp32", "fp16" or "int8".
    M: most links of a node on the layers above; twice as many on layer 0. 2 to 128.
    ef_construction: beam capacity while building.
    refine: with "fp16" or "int8", also keep rows as "fp32" (True) or "fp16": they re-rank the beam.
    seed: of the levels. Same seed and same calls give the same bytes.
    device: where searches run: "cpu", "cuda" (the current GPU; RuntimeError says what is missing),
        or "auto" (a GPU if there is one; the logger says which). Graphs are built on the CPU.

    Equal vectors (equal as the finest rows that are kept) share a node, so copies cost no more
    than a label. Searches may run from many threads; `add`, `delete`, `compact`, `check` and `save`
    wait for them and hold others back meanwhile.
    """

    def __init__(
        self,
        dim: int,
        metric: str = "cosine",
        dtype: str = "fp32",
        *,
        M: int = 16,
        ef_construction: int = 200,
        refine: bool | str = False,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.dim = inputs.integer("dim", dim, 1, 65536)
        self.metric = inputs.metric(metric)
        self.dtype = inputs.one_of("dtype", dtype, STORAGE)
        self.M = inputs.integer("M", M, 2, 128)
        self.ef_construction = inputs.integer("ef_construction", ef_construction, 1, 65536)
        self.seed = inputs.integer("seed", seed, 0, 2**64 - 1)
        self.refine = _refine(refine, dtype)  # "", "fp32" or "fp16"
        self._metric = inputs.METRICS[self.metric]
        self._lock = SharedLock()
        self._next_label = 0
        self._gpu: GpuEngine | None = None
        self._gpu_lock = threading.Lock()  # of bringing the GPU up to date
        self._relinked: np.ndarray | None = None  # bool, nodes with links the GPU lacks; None: all
        self._is_stale = False  # the GPU lacks some of them
        self._start_empty()
        self.to(device)

    def _start_empty(self) -> None:
        self._graph = empty_graph(self.M)
        self._neighbors0 = self._graph.neighbors0  # with room for nodes to come; as the next two
        self._rows = empty_rows(0, self.dim, self.dtype)
        self._refine_rows = empty_rows(0, self.dim, self.refine) if self.refine else None
        self._labels = Labels()
        self._table = NodeTable()
        self._unrepaired = 0

    # ---------------------------------------------------------------- what is in it

    def __len__(self) -> int:
        return len(self._labels)

    def __contains__(self, label: object) -> bool:
        is_label = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
        if not is_label or not 0 <= label <= np.iinfo(np.int64).max:  # type: ignore[operator]
            return False
        return bool(self._labels.find(np.array([label], np.int64))[0] >= 0)

    def __repr__(self) -> str:
        refine = f", refine={self.refine!r}" if self.refine else ""
        return (
            f"Index(dim={self.dim}, metric={self.metric!r}, dtype={self.dtype!r}, M={self.M}, "
            f"ef_construction={self.ef_construction}{refine}, seed={self.seed}, "
            f"device={self.device!r}): {len(self):,} vectors"
        )

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,): the labels in the index, ascending."""
        return self._labels.sorted.copy()

    @property
    def nbytes(self) -> int:
        """Bytes that the nodes, links and labels take; room for vectors to come is not counted."""
        engine = self._cpu
        arrays = [engine.rows, *self._graph]
        if engine.refine_rows is not None:
            arrays.append(engine.refine_rows)
        return sum(array.nbytes for array in arrays) + self._labels.nbytes + self._table.nbytes

    @property
    def has_deleted(self) -> bool:
        """Is there a node that is walked through and never returned?"""
        return not self._labels.are_all_live

    def vectors(self, labels: ArrayLike) -> np.ndarray:
        """float32 (m, dim) vectors of labels (m,), as stored: unit length under cosine.

        From the refine rows where there are some. KeyError names the first unknown label.
        """
        given = inputs.labels("labels", labels)
        with self._lock.shared():
            nodes = self._labels.nodes(self._known_entries(given))
            if self._refine_rows is not None:
                return decode(self._refine_rows[nodes], self.dim, self.refine)
            return decode(self._rows[nodes], self.dim, self.dtype)

    @property
    def device(self) -> str:
        """Where searches run: "cpu" or "cuda"."""
        return "cpu" if self._gpu is None else "cuda"

    def to(self, device: str) -> "Index":
        """Search on a device from here on, "cpu", "cuda" or "auto"; returns the index itself.

        MemoryError where the index does not fit the GPU (`memory` gives the figures).
        """
        inputs.one_of("device", device, ("cpu", "auto", "cuda"))
        with self._lock.exclusive():
            if device == "cpu" and self._gpu is not None:
                self._gpu.close()
                self._gpu = None
            elif device != "cpu" and self._gpu is None:
                self._gpu = self._gpu_engine(is_needed=device == "cuda")
        return self

    def _gpu_engine(self, is_needed: bool) -> "GpuEngine | None":
        """The index on the GPU; where that cannot be, an error if it is needed, else None."""
        from hnsw_gpu.gpu import GpuEngine

        engine = None
        try:
            engine = GpuEngine(self._metric, self.dtype, self.refine, self.dim, self.M)
            self._relinked = None
            self._up_to_date(engine)
        except (RuntimeError, MemoryError) as error:
            if engine is not None:
                engine.close()
            if is_needed:
                raise type(error)(f"device='cuda': {error}") from error
            logger.info("device='auto': searching on the CPU: %s", error)
            return None
        logger.info("searching on %s", engine.name)
        return engine

    def _up_to_date(self, gpu: "GpuEngine") -> "GpuEngine":
        """The GPU's engine, with what was added since; called within a lock."""
        with self._gpu_lock:
            cpu = self._cpu
            if self._relinked is None:
                gpu.update(cpu.graph, cpu.rows, cpu.refine_rows)
            elif self._is_stale:
                changed = np.flatnonzero(self._relinked[: gpu.node_count])
                gpu.update(cpu.graph, cpu.rows, cpu.refine_rows, changed)
            else:
                return gpu
            self._relinked, self._is_stale = np.zeros(cpu.node_count, bool), False
        return gpu

    def memory(self, queries: int = 10_000, *, ef: int = 64) -> dict[str, int]:
        """Bytes by name that the index takes on a GPU, and a batch of queries; needs no GPU.

        Where less is free, a large batch is cut in parts, and an index is a MemoryError.
        """
        count = inputs.integer("queries", queries, 0)
        keys = inputs.integer("ef", ef, 1) * (3 if self.refine else 1)  # found, compared, cut
        parts = index_bytes(
            self.dtype, self.refine, self.dim, self.M, self._node_count, len(self._graph.nodes),
            len(self._labels),
        )  # fmt: skip
        a_query = bytes_a_query(self.dtype, self.refine, self.dim, keys)
        return {**parts, "queries": count * a_query}

    @property
    def _engine(self) -> "CpuEngine | GpuEngine":
        return self._cpu if self._gpu is None else self._up_to_date(self._gpu)

    @property
    def _cpu(self) -> CpuEngine:
        count = self._node_count
        refine_rows = None if self._refine_rows is None else self._refine_rows[:count]
        rows = self._rows[:count]
        return CpuEngine(self._graph, rows, refine_rows, self._metric, self.dtype, self.refine)

    @property
    def _node_count(self) -> int:
        return len(self._graph.neighbors0)

    def _known_entries(self, labels: np.ndarray) -> np.ndarray:
        entries = self._labels.find(labels)
        if (entries < 0).any():
            missing = labels[entries < 0]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise KeyError(f"label {missing[0]}{more}: not in the index")
        return entries

    # ---------------------------------------------------------------- changing it

    def add(
        self,
        vectors: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        threads: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Add vectors (m, dim), any array-like of real numbers; returns their int64 labels (m,).

        labels: integers >= 0, each once and not in the index; None continues after the largest
        label ever given. Bad input raises ValueError or TypeError and adds nothing. After
        KeyboardInterrupt the vectors of the batches that were finished are in, in order.
        Add many at a time: each call also takes time in proportion to what is there.
        """
        given = inputs.vectors("vectors", vectors, self.dim)
        threads = _threads(threads)
        with self._lock.exclusive():
            new_labels = self._new_labels(labels, len(given))
            first = self._node_count
            self._make_room(first + len(given))
            self._encode(given, first)
            nodes = self._join_copies(first, first + len(given))
            new = int(nodes.max(initial=first - 1)) + 1 - first

            def insert(stop: threading.Event) -> None:
                try:
                    with bar(progress, new, "build", "vectors") as shown:
                        for grown in self._insertion(first + new, threads):
                            added = len(grown.neighbors0) - self._node_count
                            self._graph = grown
                            self._unrepaired += added
                            shown.update(added)
                            if stop.is_set():
                                break
                finally:  # whatever happened, labels and graph agree on the nodes there are
                    self._keep_inserted(nodes, new_labels)
                self._repair(threads, self._node_count // REPAIR_SHARE)

            run_to_a_stop(insert)
        return new_labels

    def _keep_inserted(self, nodes: np.ndarray, labels: np.ndarray) -> None:
        """Give `labels` (m,) to `nodes` (m,), up to the first node that was not inserted."""
        count = self._node_count
        is_in = np.cumsum(nodes >= count) == 0
        if not is_in.all():
            self._graph = without_unfinished(self._graph)
            self._relinked = None
            self._unrepaired = count
            self._table.clear()
        self._labels = self._labels.with_added(labels[is_in], nodes[is_in], count)
        self._next_label = max(self._next_label, int(labels.max(initial=-1)) + 1)
        if len(self._rows) > 2 * count:  # most of the vectors were copies
            self._rows = self._rows[:count].copy()
            if self._refine_rows is not None:
                self._refine_rows = self._refine_rows[:count].copy()
            self._neighbors0 = self._graph.neighbors0.copy()
            self._graph = self._graph._replace(neighbors0=self._neighbors0)

    def _new_labels(self, labels: ArrayLike | None, count: int) -> np.ndarray:
        if labels is None:
            return np.arange(self._next_label, self._next_label + count, dtype=np.int64)
        given = inputs.unique_labels("labels", labels)
        if len(given) != count:
            raise ValueError(f"labels: {len(given)} for {count} vectors")
        known = self._labels.find(given) >= 0
        if known.any():
            raise ValueError(
                f"labels: label {given[known][0]} is already in the index ({known.sum()} are)"
            )
        return given

    def _make_room(self, count: int) -> None:
        used = self._node_count
        if count > MOST_NODES:
            raise ValueError(f"vectors: {count} in all, and an index holds at most {MOST_NODES}")
        self._rows = _grown(self._rows, used, count, self.dim, self.dtype)
        if self._refine_rows is not None:
            self._refine_rows = _grown(self._refine_rows, used, count, self.dim, self.refine)
        if len(self._neighbors0) < count:
            room = np.empty((len(self._rows), 2 * self.M), np.int32)
            room[:used] = self._graph.neighbors0
            self._neighbors0 = room
            self._graph = self._graph._replace(neighbors0=room[:used])

    def _encode(self, given: np.ndarray, first: int) -> None:
        """Check and write the given vectors behind the nodes, a block at a time."""
        for start in range(0, len(given), ENCODE_ROWS):
            part = given[start : start + ENCODE_ROWS]
            part = inputs.float_vectors("vectors", part, self._metric, self._stored_as, start)
            place = slice(first + start, first + start + len(part))
            self._rows[place] = encode(part, self._metric, self.dtype)
            if self._refine_rows is not None:
                self._refine_rows[place] = encode(part, self._metric, self.refine)

    @property
    def _stored_as(self) -> str:
        return "fp16" if "fp16" in (self.dtype, self.refine) else self.dtype

    def _join_copies(self, first: int, stop: int) -> np.ndarray:
        """Nodes of the encoded rows first..stop; those that are new move together."""
        finest = self._rows if self._refine_rows is None else self._refine_rows
        nodes, sources = self._table.assign(finest, first, stop)
        if len(sources) < stop - first:
            for rows in (self._rows, self._refine_rows):
                if rows is not None:
                    move_together(rows, sources, first)
        return nodes

    def _insertion(self, count: int, threads: int) -> Iterator[Graph]:
        if self._relinked is not None:
            self._relinked = np.pad(self._relinked, (0, count - len(self._relinked)))
            self._is_stale = True
        return insert_nodes(
            self._graph,
            self._neighbors0[:count],
            self._rows[:count],
            self._metric,
            ef_construction=self.ef_construction,
            seed=self.seed,
            threads=threads,
            relinked=self._relinked,
        )

    def _repair(self, threads: int, tolerated: int) -> None:
        """Link unreachable nodes, if more than `tolerated` nodes are new since the last time."""
        if self._unrepaired > tolerated:
            before = None if self._relinked is None else self._graph.neighbors0.copy()
            repair(
                self._graph,
                self._rows[: self._node_count],
                self._metric,
                ef_construction=self.ef_construction,
                threads=threads,
            )
            if before is not None and self._relinked is not None:
                self._relinked[: len(before)] |= (self._graph.neighbors0 != before).any(axis=1)
                self._is_stale = True
            self._unrepaired = 0

    def delete(self, labels: ArrayLike) -> None:
        """Remove labels (m,). Their nodes are still walked through, until `compact`.

        KeyError names the first label that is not in the index; nothing is removed then.
        """
        given = inputs.unique_labels("labels", labels)
        with self._lock.exclusive():
            self._labels = self._labels.without(self._known_entries(given))

    def compact(self, *, threads: int | None = None, progress: bool = False) -> None:
        """Rebuild without deleted nodes. KeyboardInterrupt leaves the index as it was."""
        threads = _threads(threads)
        with self._lock.exclusive():
            live = np.flatnonzero(self._labels.live_nodes())
            fresh = Index(
                self.dim,
                self.metric,
                self.dtype,
                M=self.M,
                ef_construction=self.ef_construction,
                refine=self.refine,
                seed=self.seed,
            )
            fresh._rows = self._rows[live]
            if self._refine_rows is not None:
                fresh._refine_rows = self._refine_rows[live]
            fresh._neighbors0 = np.empty((len(live), 2 * self.M), np.int32)
            with bar(progress, len(live), "compact", "vectors") as shown:
                for grown in fresh._insertion(len(live), threads):
                    shown.update(len(grown.neighbors0) - fresh._node_count)
                    fresh._graph = grown
            fresh._unrepaired = len(live)
            fresh._repair(threads, 0)
            counts = np.diff(self._labels.offsets)[live]
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            fresh._labels = Labels(offsets, self._labels.labels)
            if self._gpu is not None:
                self._gpu.close()
            self._relinked = None
            names = ("_graph", "_neighbors0", "_rows", "_refine_rows", "_labels", "_table")
            self.__dict__.update({name: getattr(fresh, name) for name in (*names, "_unrepaired")})

    # ---------------------------------------------------------------- searching it

    def search(
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        ef: int = 64,
        allow: ArrayLike | None = None,
        expand: int | None = None,
        ef_upper: int = 1,
        threads: int | None = None,
        stream: Any = None,
        out: tuple[Any, Any] | None = None,
    ) -> SearchResult:
        """The k nearest labels of each query (q, dim), or of one query (dim,): a SearchResult.

        ef: beam capacity, raised recall for time; a beam holds max(ef, k).
        allow: what may be returned: bool (n,) or (q, n) indexed by label; the same packed, uint8
            (`np.packbits(mask, axis=-1, bitorder="little")`); or int labels (m,).
        expand: nodes expanded in one step, 1 to 32. None: 1 on the CPU; on a GPU 4, below ef 48 it
            is 2. Devices answer alike at the same `expand`. ef_upper: beam capacity above layer 0.
        stream: of a GPU, for queries that lie there; None: CuPy's current one.
        out: arrays (labels int64, distances float32), each (q, k), that take the result.

        With a filter, or after deletes, ef counts allowed nodes: the beam is larger by their share.
        Where they are few (allowed nodes squared <= 64 max(ef, k) nodes), or a walk meets fewer
        than k, all of them are compared, which is exact.

        Queries (q, dim) in the memory of the index's GPU (CuPy, torch, whatever offers DLPack or
        `__cuda_array_interface__`) give CuPy arrays, and the host waits for nothing, unless there
        is a filter or something was deleted. They are not checked: one with NaN finds nothing.
        """
        k, ef = inputs.integer("k", k, 1, MOST_NODES), inputs.integer("ef", ef, 1)
        expand = inputs.integer("expand", self._expand(ef) if expand is None else expand, 1, 32)
        ef_upper, threads = inputs.integer("ef_upper", ef_upper, 1, 65536), _threads(threads)
        if inputs.is_on_gpu(queries) and self._gpu is not None:
            return self._search_on_gpu(
                queries, k, ef, allow, expand=expand, ef_upper=ef_upper, stream=stream, out=out
            )
        if stream is not None:
            raise ValueError("stream: the queries are in host memory, which has no streams")
        given = self.checked_queries(queries)
        found = self.search_checked(
            given, k, ef=ef, allow=allow, expand=expand, ef_upper=ef_upper, threads=threads
        )
        return _into(out, found)

    def search_checked(
        self,
        queries: np.ndarray,
        k: int,
        *,
        ef: int,
        allow: ArrayLike | None = None,
        expand: int | None = None,
        ef_upper: int = 1,
        threads: int | None = None,
    ) -> SearchResult:
        """As `search`, of queries that `checked_queries` gave, and nothing else is checked."""
        expand = self._expand(ef) if expand is None else expand
        with self._lock.shared():
            entries, nodes = self._filter(allow, len(queries))
            keys = nearest(
                self._engine, queries, k, ef, nodes,
                expand=expand, ef_upper=ef_upper, threads=thread_count(threads),
            )  # fmt: skip
            labels, distances = self._labels.spread(keys, k, entries)
        return SearchResult(labels, self._as_asked(distances))

    def exact_search(
        self, queries: ArrayLike, k: int = 10, *, threads: int | None = None
    ) -> SearchResult:
        """As `search`, by comparing all vectors as they are kept: what `search` is measured by.

        On the CPU, whatever the device.
        """
        k, threads = inputs.integer("k", k, 1, MOST_NODES), _threads(threads)
        given = self.checked_queries(queries)
        with self._lock.shared():
            live = np.flatnonzero(self._labels.live_nodes())
            keys = self._cpu.compare(given, live, min(k, len(live)), threads=threads)
            labels, distances = self._labels.spread(keys, k)
        return SearchResult(labels, self._as_asked(distances))

    def _search_on_gpu(
        self,
        queries: Any,
        k: int,
        ef: int,
        allow: ArrayLike | None,
        *,
        expand: int,
        ef_upper: int,
        stream: Any,
        out: tuple[Any, Any] | None,
    ) -> SearchResult:
        """Queries, and the answer, in the memory of the GPU."""
        with self._lock.shared():
            gpu = self._gpu
            if gpu is not None and allow is None and self._labels.are_all_live:
                found = self._up_to_date(gpu).search_on_device(
                    queries, k, max(ef, k), labels=self._labels, expand=expand,
                    ef_upper=ef_upper, root=self.metric == "euclidean", stream=stream, out=out,
                )  # fmt: skip
                return SearchResult(*found)
        if gpu is None:
            raise RuntimeError("queries: on a GPU, which the index has left for the CPU")
        given = gpu.to_host(queries, stream)
        result = self.search(given, k, ef=ef, allow=allow, expand=expand, ef_upper=ef_upper)
        return SearchResult(*gpu.to_device(*result, stream, out))

    def _expand(self, ef: int) -> int:
        if self._gpu is None:
            return 1
        return 4 if ef >= 48 else 2

    def search_radius(
        self,
        queries: ArrayLike,
        radius: float,
        *,
        ef: int = 64,
        allow: ArrayLike | None = None,
        threads: int | None = None,
    ) -> RadiusResult:
        """All labels within `radius` of each query (q, dim) that the graph leads to: RadiusResult.

        A query whose beam was full of hits is searched again with twice the ef, until it is not.
        """
        given = self.checked_queries(queries)
        limit = np.float64(inputs.number("radius", radius))
        ef, threads = inputs.integer("ef", ef, 1), _threads(threads)

        def is_near(distances: np.ndarray) -> np.ndarray:
            return self._as_asked(distances).astype(np.float64) <= limit

        with self._lock.shared():
            entries, nodes = self._filter(allow, len(given))
            keys = within(
                self._engine, given, is_near, ef, nodes, expand=self._expand(ef), threads=threads
            )
            found = [
                self._labels.spread(row[None], self._label_count(row), _row_of(entries, i))
                for i, row in enumerate(keys)
            ]
        none = [(np.empty((1, 0), np.int64), np.empty((1, 0), np.float32))]
        labels, distances = (np.concatenate(p, 1)[0] for p in zip(*none, *found, strict=True))
        is_in = labels >= 0
        ends = np.cumsum([0] + [part.shape[1] for part, _ in found])
        offsets = np.concatenate([[0], np.cumsum(is_in)])[ends].astype(np.int64)
        return RadiusResult(offsets, labels[is_in], self._as_asked(distances[is_in]))

    def neighbor_graph(
        self, k: int = 15, *, ef: int = 64, threads: int | None = None, progress: bool = False
    ) -> SearchResult:
        """The k nearest other labels of every label: row i belongs to `labels[i]`.

        Each search starts from the vector's own node (R10). Copies are neighbours of each other.
        """
        k, ef, threads = (
            inputs.integer("k", k, 1, MOST_NODES),
            inputs.integer("ef", ef, 1),
            _threads(threads),
        )
        with self._lock.shared():
            entries = self._labels.find(self._labels.sorted)
            labels = np.empty((len(entries), k), np.int64)
            distances = np.empty((len(entries), k), np.float32)
            with bar(progress, len(entries), "neighbor graph", "vectors") as shown:
                for start in range(0, len(entries), SELF_ROWS):
                    part = entries[start : start + SELF_ROWS]
                    place = slice(start, start + len(part))
                    keys = self._keys_of_others(self._labels.nodes(part), k, ef, threads)
                    labels[place], distances[place] = self._labels.spread(keys, k, skipped=part)
                    shown.update(len(part))
        return SearchResult(labels, self._as_asked(distances))

    def _keys_of_others(self, ids: np.ndarray, k: int, ef: int, threads: int) -> np.ndarray:
        """Keys of the nodes nearest to nodes (m,), and of the node itself where it has copies."""
        mask = None if self._labels.are_all_live else self._labels.live_nodes()
        engine = self._engine
        keys = nearest_others(engine, ids, k, ef, mask, expand=self._expand(ef), threads=threads)
        own = engine.own_keys(ids)
        own[np.diff(self._labels.offsets)[ids] == 1] = KEY_NONE
        return np.sort(np.concatenate([keys, own[:, None]], axis=1), axis=1)

    def _label_count(self, keys: np.ndarray) -> int:
        """Labels of the nodes of keys, none of them empty."""
        nodes, offsets = key_nodes(keys), self._labels.offsets
        return int((offsets[nodes + 1] - offsets[nodes]).sum())

    def checked_queries(self, queries: ArrayLike) -> np.ndarray:
        """float32 (q, dim) of the queries of a search; what `search` raises where they are bad."""
        given = inputs.vectors("queries", queries, self.dim)
        return inputs.float_vectors("queries", given, self._metric, "fp32")

    def _as_asked(self, distances: np.ndarray) -> np.ndarray:
        """An engine's distances as the metric means them."""
        return np.sqrt(distances) if self.metric == "euclidean" else distances

    def _filter(
        self, allow: ArrayLike | None, queries: int
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Packed bits of allowed entries, and bool mask of allowed nodes; None where all are."""
        if allow is not None:
            mask = inputs.entry_mask(allow, self._labels.labels, queries)
            return np.atleast_2d(pack_bits(mask)), self._labels.any_of_node(mask)
        return None, None if self._labels.are_all_live else self._labels.live_nodes()

    # ---------------------------------------------------------------- keeping it

    def check(self) -> None:
        """Raise ValueError naming what is wrong with the graph or the labels.

        First links the nodes of the last small `add`s that are not reachable yet, as `save` does.
        """
        with self._lock.exclusive():
            self._repair(_threads(None), 0)
            problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _problems(self) -> list[str]:
        problems = check_graph(self._graph)
        offsets, labels = self._labels.offsets, self._labels.labels
        if len(offsets) != self._node_count + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
            problems.append("label_offsets do not divide the labels among the nodes")
        elif offsets[-1] != len(labels):
            problems.append("label_offsets do not cover the labels")
        if problems:
            return problems
        is_within = np.ones(max(len(labels) - 1, 0), bool)  # a label and the next share a node
        firsts = offsets[1:-1]
        is_within[firsts[(firsts > 0) & (firsts < len(labels))] - 1] = False
        if (np.diff(labels)[is_within] <= 0).any():
            problems.append("the labels of a node do not ascend")
        ordered = np.sort(labels)
        if len(labels) and (ordered[0] < 0 or (np.diff(ordered) == 0).any()):
            problems.append("labels are negative or repeated")
        if len(labels) and ordered[-1] >= self._next_label:
            problems.append(f"the next label is {self._next_label}, and {ordered[-1]} is there")
        return problems

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .safetensors file. The old file stays whole until the new one is complete."""
        with self._lock.exclusive():
            self._repair(_threads(None), 0)
            count = self._node_count
            arrays = {"vectors": self._rows[:count], **self._graph._asdict()}
            if self._refine_rows is not None:
                arrays["refine_vectors"] = self._refine_rows[:count]
            arrays["label_offsets"] = self._labels.offsets
            arrays["labels"] = self._labels.labels
            about = {name: getattr(self, name) for name in PARAMETERS}
            about["next_label"] = self._next_label
            write_arrays(path, arrays, about)


PARAMETERS = ("dim", "metric", "dtype", "M", "ef_construction", "refine", "seed")


def load(path: str | os.PathLike[str], *, mmap: bool = False, device: str = "auto") -> Index:
    """The Index saved at `path`. CorruptIndexError if the file is damaged or not an index.

    mmap: map the vectors instead of reading them; their checksum is not read then.
    """
    inputs.one_of("device", device, ("cpu", "auto", "cuda"))
    mapped = ("vectors", "refine_vectors") if mmap else ()
    arrays, about = read_arrays(path, mapped)
    try:
        index = _from_arrays(arrays, about)
    except KeyError as error:
        raise CorruptIndexError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise CorruptIndexError(f"{path}: {error}") from None
    return index.to(device)


def _from_arrays(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> Index:
    parameters = {name: about[name] for name in PARAMETERS}
    index = Index(parameters.pop("dim"), **parameters)
    count = len(arrays["neighbors0"])
    _expect("vectors", arrays["vectors"], index._rows, count)
    if index._refine_rows is not None:
        _expect("refine_vectors", arrays["refine_vectors"], index._refine_rows, count)
    _expect("neighbors0", arrays["neighbors0"], index._neighbors0, count)
    _expect("neighbors", arrays["neighbors"], index._graph.neighbors, len(arrays["nodes"]))
    _expect("label_offsets", arrays["label_offsets"], index._labels.offsets, count + 1)
    _expect("labels", arrays["labels"], index._labels.labels, len(arrays["labels"]))
    index._rows, index._refine_rows = arrays["vectors"], arrays.get("refine_vectors")
    index._graph = Graph(*(arrays[name] for name in Graph._fields))
    index._neighbors0 = index._graph.neighbors0
    index._labels = Labels(arrays["label_offsets"], arrays["labels"])
    index._next_label = inputs.integer("next_label", about["next_label"], 0)
    index._table.clear()
    problems = index._problems()
    if problems:
        raise ValueError("; ".join(problems))
    return index


def _expect(name: str, array: np.ndarray, like: np.ndarray, count: int) -> None:
    """The array must have the dtype and row shape of an empty index's."""
    expected = (count, *like.shape[1:])
    if array.dtype != like.dtype or array.shape != expected:
        raise ValueError(f"{name}: {array.dtype} {array.shape}, expected {like.dtype} {expected}")


def exact_search(
    vectors: ArrayLike,
    queries: ArrayLike,
    k: int = 10,
    metric: str = "cosine",
    *,
    threads: int | None = None,
    progress: bool = False,
) -> SearchResult:
    """The k nearest of `vectors` (n, dim) to each query (q, dim), by comparing all.

    Returns a SearchResult whose labels are row numbers; ties go to the smaller. Distances are
    fp32, as an fp32 Index returns them. Memory beyond the input: the queries once more, 16 MB, and
    some blocks of vectors of at most 32 MB.
    The matrix products use as many threads as numpy's BLAS likes.
    """
    metric = inputs.metric(metric)
    name = inputs.METRICS[metric]
    given = inputs.vectors("vectors", vectors)
    asked = inputs.vectors("queries", queries, given.shape[1])
    k, threads = inputs.integer("k", k, 1, MOST_NODES), _threads(threads)
    encoded = encode_queries(inputs.float_vectors("queries", asked, name), name, "fp32")
    keys = np.full((len(asked), min(k, len(given))), KEY_NONE, np.uint64)
    with bar(progress, len(given), "exact search", "vectors") as shown:
        block = max(256, min(BLOCK, BLOCK_VALUES // given.shape[1]))
        for start in range(0, len(given), block):
            part = given[start : start + block]
            part = inputs.float_vectors("vectors", part, name, first=start)
            exact_block(keys, encode(part, name, "fp32"), start, encoded, name, threads=threads)
            shown.update(len(part))
    labels = np.full((len(asked), k), -1, np.int64)
    distances = np.full((len(asked), k), np.inf, np.float32)
    labels[:, : keys.shape[1]] = key_nodes(keys)
    distances[:, : keys.shape[1]] = key_distances(keys)
    return SearchResult(labels, np.sqrt(distances) if metric == "euclidean" else distances)


def _refine(refine: bool | str, dtype: str) -> str:
    if refine not in REFINE:
        raise ValueError(f"refine={refine!r}: expected True, False, 'fp32' or 'fp16'")
    kept = REFINE[refine]
    if kept and np.dtype(STORAGE[kept]).itemsize <= np.dtype(STORAGE[dtype]).itemsize:
        raise ValueError(f"refine={refine!r}: {kept} rows are no finer than dtype={dtype!r}")
    return kept


def _into(out: tuple[Any, Any] | None, result: SearchResult) -> SearchResult:
    """The result, in the caller's arrays if there are some."""
    if out is None:
        return result
    for given, found in zip(out, result, strict=True):
        if not isinstance(given, np.ndarray) or (given.shape, given.dtype) != (
            found.shape,
            found.dtype,
        ):
            what = f"{given.dtype} {given.shape}" if hasattr(given, "dtype") else type(given)
            raise ValueError(f"out: {what}, expected {found.dtype} {found.shape}")
    for given, found in zip(out, result, strict=True):
        given[...] = found
    return SearchResult(*out)


def _threads(threads: int | None) -> int:
    if threads is not None:
        inputs.integer("threads", threads, 1)
    return thread_count(threads)


def _row_of(entries: np.ndarray | None, i: int) -> np.ndarray | None:
    if entries is None or len(entries) == 1:
        return entries
    return entries[i : i + 1]


def _grown(rows: np.ndarray, used: int, count: int, dim: int, dtype: str) -> np.ndarray:
    """`rows` with room for at least `count`: exactly at first, by a quarter more afterwards."""
    if len(rows) >= count:
        return rows
    grown = empty_rows(max(count, used + used // 4), dim, dtype)
    grown[:used] = rows[:used]
    return grown
