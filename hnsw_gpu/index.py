"""The index: vectors, graph and labels behind one object, and the choice of engine."""

import copy
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs
from hnsw_gpu.engine import (
    KEY_NONE,
    LOST_SHARE,
    STORAGE,
    ChangeLock,
    CpuEngine,
    Labels,
    Parameters,
    Queries,
    Rounded,
    State,
    Stopped,
    Walk,
    compacted,
    copy_aligned,
    empty_state,
    from_arrays,
    insert,
    key_nodes,
    nearest,
    pack_bits,
    repaired,
    run_to_a_stop,
    with_vectors,
    within,
)
from hnsw_gpu.files import CorruptIndexError, open_arrays, write_arrays
from hnsw_gpu.gpu import GpuEngine, bytes_a_query, index_bytes, on_gpu
from hnsw_gpu.progress import bar
from hnsw_gpu.results import RadiusResult, SearchResult, into, reported

logger = logging.getLogger("hnsw_gpu")
Found = TypeVar("Found")

ENCODE_ROWS = 16384  # vectors checked and encoded at a time
SELF_ROWS = 16384  # nodes of a neighbour graph searched at a time
PARAMETERS = ("dim", "metric", "dtype", "M", "ef_construction", "refine", "seed")  # in a file


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
    than a label; the logger "hnsw_gpu" warns where rounding made them equal, or took over a quarter
    of what tells vectors apart. Distances are float32: cosine ones are right to 2e-7, and copies
    nearer than that come in any order. Under l2 and ip a vector's length is 0, or 1e-14 to 9e18.

    Searches may run from many threads; `add`, `delete`, `compact`, `check` and `save`
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
        self.refine = inputs.refine(refine, dtype)  # "", "fp32" or "fp16"
        self._metric = inputs.METRICS[self.metric]
        self._changing = ChangeLock()
        self._gpu: GpuEngine | None = None
        self._mapped: State | None = None  # as it was loaded
        self._state = empty_state(
            Parameters(
                self.dim,
                self._metric,
                self.dtype,
                self.refine,
                self.M,
                self.ef_construction,
                self.seed,
            )
        )
        self.to(device)

    # ---------------------------------------------------------------- what is in it

    def __len__(self) -> int:
        return len(self._state.labels)

    def __contains__(self, label: object) -> bool:
        is_label = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
        if not is_label or not 0 <= label <= np.iinfo(np.int64).max:  # type: ignore[operator]
            return False
        return bool(self._state.labels.find(np.array([label], np.int64))[0] >= 0)

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
        return self._state.labels.sorted.copy()

    @property
    def nbytes(self) -> int:
        """Bytes that the nodes, links and labels take; room for vectors to come is not counted."""
        return self._state.nbytes

    @property
    def has_deleted(self) -> bool:
        """Is there a node that is walked through and never returned?"""
        return not self._state.labels.are_all_live

    def vectors(self, labels: ArrayLike) -> np.ndarray:
        """float32 (m, dim) vectors of labels (m,), as stored: unit length under cosine.

        From the refine rows where there are some. KeyError names the first unknown label.
        """
        given = inputs.labels("labels", labels)
        state = self._state
        found = state.vectors(state.labels.nodes(state.labels.entries_of(given)))
        state.require_unchanged()
        return found

    @property
    def device(self) -> str:
        """Where searches run: "cpu" or "cuda"."""
        return "cpu" if self._gpu is None else "cuda"

    def to(self, device: str) -> "Index":
        """Search on a device from here on, "cpu", "cuda" or "auto"; returns the index itself.

        MemoryError where the index does not fit the GPU (`memory` gives the figures).
        """
        inputs.one_of("device", device, ("cpu", "auto", "cuda"))
        with self._changing.lock:
            gpu, state = self._gpu, self._state
            if device == "cpu" and gpu is not None:
                self._gpu = None
                gpu.close()
            elif device != "cpu" and gpu is None:
                self._gpu = on_gpu(device, state.cpu, self.dim, state.version)
        return self

    def memory(self, queries: int = 10_000, *, ef: int = 64) -> dict[str, int]:
        """Bytes by name that the index takes on a GPU, and a batch of queries; needs no GPU.

        Where less is free, a large batch is cut in parts, and an index is a MemoryError.
        """
        count = inputs.integer("queries", queries, 0)
        keys = inputs.integer("ef", ef, 1) * (3 if self.refine else 1)  # found, compared, cut
        state = self._state
        parts = index_bytes(
            self.dtype, self.refine, self.dim, self.M, state.node_count, len(state.graph.nodes),
            len(self),
        )  # fmt: skip
        return {**parts, "queries": count * bytes_a_query(self.dtype, self.refine, self.dim, keys)}

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
        """
        given = inputs.vectors("vectors", vectors, self.dim)
        threads = inputs.threads(threads)
        result = []

        def work(is_stopped: Callable[[], bool]) -> None:
            new_labels = inputs.new_labels(labels, len(given), self._state)
            state, nodes, rounded = with_vectors(
                self._state, len(given), self._checked_parts(given)
            )
            self._tell(rounded, len(given))
            new = max(int(nodes.max(initial=-1)) + 1, state.node_count) - state.node_count
            with bar(progress, new, "build", "vectors") as shown:
                insert(
                    state, nodes, new_labels, self._publish,
                    threads=threads, is_stopped=is_stopped, advance=shown.update,
                )  # fmt: skip
            result.append(new_labels)

        self._change(work)
        return result[0]

    def _change(self, work: Callable[[Callable[[], bool]], None]) -> None:
        """Call work(is_stopped), which may `_publish`, while nobody else changes the index."""

        def locked(is_stopped: Callable[[], bool]) -> None:
            with self._changing.lock:
                work(is_stopped)

        run_to_a_stop(locked)

    def _publish(self, state: State, changed: np.ndarray | None) -> None:
        """Let searches that begin see a state; nodes whose links on layer 0 changed, None: any."""
        if self._gpu is not None and state.version != self._state.version:
            self._gpu.note(state.version, changed)
        self._state = state

    def _tell(self, rounded: Rounded, count: int) -> None:
        """Say on the logger what the dtype took from vectors that are being added."""
        dtype = f"{self.dtype}, refine={self.refine!r}" if self.refine else self.dtype
        if rounded.worn:
            logger.warning(
                "%s: rounding takes over %.0f %% of what tells them apart from %s of %s vectors; a "
                "finer dtype finds more, or vectors without their mean and outliers",
                dtype, 100 * LOST_SHARE, f"{rounded.worn:,}", f"{count:,}",
            )  # fmt: skip
        if rounded.merged:
            logger.warning(
                "%s: %s of %s vectors become equal to others that differ, and come back as their "
                "copies; a finer dtype, or refine=True, keeps them apart",
                dtype, f"{rounded.merged:,}", f"{count:,}",
            )  # fmt: skip

    def _checked_parts(self, given: np.ndarray) -> Iterator[np.ndarray]:
        """The vectors (m, dim) as float32, a block at a time."""
        stored_as = "fp16" if "fp16" in (self.dtype, self.refine) else self.dtype
        for start in range(0, len(given), ENCODE_ROWS):
            part = given[start : start + ENCODE_ROWS]
            yield inputs.float_vectors("vectors", part, self._metric, stored_as, start)

    def delete(self, labels: ArrayLike) -> None:
        """Remove labels (m,). Their nodes are still walked through, until `compact`.

        KeyError names the first label that is not in the index; nothing is removed then.
        """
        given = inputs.unique_labels("labels", labels)

        def work(_: Callable[[], bool]) -> None:
            held = self._state.labels
            self._state = self._state._replace(labels=held.without(held.entries_of(given)))

        self._change(work)

    def compact(self, *, threads: int | None = None, progress: bool = False) -> None:
        """Rebuild without deleted nodes. KeyboardInterrupt leaves the index as it was."""
        threads = inputs.threads(threads)

        def work(is_stopped: Callable[[], bool]) -> None:
            live = int(self._state.labels.live_nodes().sum())
            with bar(progress, live, "compact", "vectors") as shown:

                def advance(count: int) -> None:
                    shown.update(count)
                    if is_stopped():
                        raise Stopped

                self._publish(compacted(self._state, threads=threads, advance=advance), None)

        self._change(work)

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
        is a filter or something was deleted. They are not checked: one with NaN finds nothing, as
        does any that would be refused.
        """
        walk = inputs.walk(k, ef, threads, self._expand(ef) if expand is None else expand, ef_upper)
        if inputs.is_on_gpu(queries) and self._gpu is not None:
            return self._search_on_gpu(queries, walk, allow, stream, out)
        if stream is not None:
            raise ValueError("stream: the queries are in host memory, which has no streams")
        return into(out, self._found(self.checked_queries(queries), walk, allow))

    def search_checked(
        self,
        queries: np.ndarray,
        k: int,
        *,
        ef: int,
        allow: ArrayLike | None = None,
        threads: int | None = None,
    ) -> SearchResult:
        """As `search`, of queries that `checked_queries` gave."""
        return self._found(queries, inputs.walk(k, ef, threads, self._expand(ef)), allow)

    def checked_queries(self, queries: ArrayLike) -> np.ndarray:
        """float32 (q, dim) of the queries of a search; what `search` raises where they are bad."""
        given = inputs.vectors("queries", queries, self.dim)
        return inputs.float_vectors("queries", given, self._metric, "")

    def _expand(self, ef: int) -> int:
        """Nodes expanded in one step, where the caller leaves it to the device."""
        if self._gpu is None:
            return 1
        return 4 if ef >= 48 else 2

    def _found(self, queries: np.ndarray, walk: Walk, allow: ArrayLike | None) -> SearchResult:
        """The answer to checked queries."""

        def find(state: State, engine: CpuEngine | GpuEngine) -> tuple[np.ndarray, np.ndarray]:
            entries, nodes = _filter(state.labels, allow, len(queries))
            keys = nearest(engine, Queries(queries), walk, nodes)
            found: tuple[np.ndarray, np.ndarray] = state.labels.keys_to_labels(
                keys, walk.k, entries
            )
            return found

        labels, distances = self._searched(find)
        return SearchResult(labels, reported(distances, self.metric))

    def _searched(self, find: Callable[[State, CpuEngine | GpuEngine], Found]) -> Found:
        """find(state, engine), over a state and the engine that holds it."""
        while True:
            gpu, state = self._gpu, self._state
            cpu = state.cpu
            if gpu is None:
                found = (find(state, cpu),)
            else:
                found = gpu.at(state.version, cpu, functools.partial(find, state, gpu))
            if found is not None:  # else the GPU holds a later one by now
                state.require_unchanged()
                return found[0]

    def _search_on_gpu(
        self,
        queries: Any,
        walk: Walk,
        allow: ArrayLike | None,
        stream: Any,
        out: tuple[Any, Any] | None,
    ) -> SearchResult:
        """Queries, and the answer, in the memory of the GPU."""

        def find(state: State, engine: CpuEngine | GpuEngine) -> SearchResult | GpuEngine | None:
            if isinstance(engine, CpuEngine):
                return None
            if allow is not None or not state.labels.are_all_live:
                return engine
            found = engine.search_on_device(
                queries, walk, state.labels,
                root=self.metric == "euclidean", stream=stream, out=out,
            )  # fmt: skip
            return SearchResult(*found)

        found = self._searched(find)
        if isinstance(found, SearchResult):
            return found
        if found is None:
            raise RuntimeError("queries: on a GPU, which the index has left for the CPU")
        given = self.checked_queries(found.to_host(queries, stream))
        return SearchResult(*found.to_device(*self._found(given, walk, allow), stream, out))

    def exact_search(
        self, queries: ArrayLike, k: int = 10, *, threads: int | None = None
    ) -> SearchResult:
        """As `search`, by comparing all vectors as they are kept: what `search` is measured by.

        On the CPU, whatever the device.
        """
        k, threads = inputs.integer("k", k, 1, inputs.MOST_NODES), inputs.threads(threads)
        given = self.checked_queries(queries)
        state = self._state
        live = np.flatnonzero(state.labels.live_nodes())
        keys = state.cpu.compare(Queries(given), live, min(k, len(live)), threads)
        labels, distances = state.labels.keys_to_labels(keys, k)
        state.require_unchanged()
        return SearchResult(labels, reported(distances, self.metric))

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

        Under ip those of dot >= 1 - radius, in float64, and those returned with this very distance.

        A query whose beam was full of hits is searched again with twice the ef, until it is not.
        """
        given = self.checked_queries(queries)
        limit = np.float64(inputs.number("radius", radius))
        walk = inputs.walk(1, ef, threads, self._expand(ef))

        def is_near(distances: np.ndarray) -> np.ndarray:
            told = reported(distances, self.metric).astype(np.float64)
            if self.metric == "ip":  # 1 - dot was rounded; what is told is itself a radius
                return (distances.astype(np.float64) <= limit - 1) | (told == limit)
            return told <= limit

        def find(state: State, engine: CpuEngine | GpuEngine) -> list[tuple]:
            held = state.labels
            entries, nodes = _filter(held, allow, len(given))
            keys = within(engine, Queries(given), is_near, walk, nodes)
            return [
                held.keys_to_labels(row[None], held.count(key_nodes(row)), _row_of(entries, i))
                for i, row in enumerate(keys)
            ]

        found = self._searched(find)
        none = [(np.empty((1, 0), np.int64), np.empty((1, 0), np.float32))]
        labels, distances = (np.concatenate(p, 1)[0] for p in zip(*none, *found, strict=True))
        is_in = labels >= 0
        ends = np.cumsum([0] + [part.shape[1] for part, _ in found])
        offsets = np.concatenate([[0], np.cumsum(is_in)])[ends].astype(np.int64)
        return RadiusResult(offsets, labels[is_in], reported(distances[is_in], self.metric))

    def neighbor_graph(
        self, k: int = 15, *, ef: int = 64, threads: int | None = None, progress: bool = False
    ) -> SearchResult:
        """The k nearest other labels of every label: row i belongs to `labels[i]`.

        Each search starts from the vector's own node (R10). Copies are neighbours of each other.
        """
        walk = inputs.walk(k, ef, threads, self._expand(ef))

        def find(state: State, engine: CpuEngine | GpuEngine) -> tuple[np.ndarray, np.ndarray]:
            held = state.labels
            entries = held.find(held.sorted)
            labels = np.empty((len(entries), walk.k), np.int64)
            distances = np.empty((len(entries), walk.k), np.float32)
            with bar(progress, len(entries), "neighbor graph", "vectors") as shown:
                for start in range(0, len(entries), SELF_ROWS):
                    part = entries[start : start + SELF_ROWS]
                    place = slice(start, start + len(part))
                    keys = _keys_of_others(held, engine, held.nodes(part), walk)
                    labels[place], distances[place] = held.keys_to_labels(
                        keys, walk.k, skipped=part
                    )
                    shown.update(len(part))
            return labels, distances

        labels, distances = self._searched(find)
        return SearchResult(labels, reported(distances, self.metric))

    # ---------------------------------------------------------------- keeping it

    def __reduce__(self) -> tuple:
        """As a saved index; one that is mapped, and as it was loaded, as its path and checksum."""
        device, source = "cpu" if self._gpu is None else "auto", self._state.source
        if source is not None and self._state is self._mapped:
            return _load_again, (source.path, source.checksum, device)
        _, about, arrays = self._contents()
        return _unpickled, (about, arrays, device)

    def __copy__(self) -> "Index":
        return copy.deepcopy(self)  # an `add` would write behind rows that the two shared

    def check(self) -> None:
        """Raise ValueError naming what is wrong with the graph, the labels or the vectors.

        First links the nodes of the last small `add`s that are not reachable yet, as `save` does.
        """
        problems = self._settled().problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _settled(self) -> State:
        """The state, after its last nodes were made reachable."""
        settled = []

        def work(_: Callable[[], bool]) -> None:
            self._publish(*repaired(self._state, threads=inputs.threads(None)))
            settled.append(self._state)

        self._change(work)
        return settled[0]

    def _contents(self) -> tuple[State, dict[str, Any], dict[str, np.ndarray]]:
        """The state, and what a file of it holds: values by name, and arrays."""
        state = self._settled()
        about = {name: getattr(self, name) for name in PARAMETERS}
        return state, about | {"next_label": state.next_label}, state.arrays()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .safetensors file. The old file stays whole until the new one is complete.

        ValueError, before anything is written, if `load` would refuse what it would hold.
        """
        state, about, arrays = self._contents()
        _restored(about, arrays, reads_rows=False)  # what `load` would refuse is not written
        write_arrays(path, arrays, about, state.require_unchanged)


def load(path: str | os.PathLike[str], *, mmap: bool = False, device: str = "auto") -> Index:
    """The Index saved at `path`. CorruptIndexError if the file is damaged or not an index.

    mmap: map the vectors instead of reading them; neither their checksum nor their values are
        looked at then (`check` looks at the values). Leave the file as it is meanwhile; to replace
        it, write another one and rename it over the old one, as `save` does. Before and after each
        search the size and the time of the file are compared: CorruptIndexError if it was written
        to or cut in place. A file that is cut during a search ends the process (SIGBUS), and a
        change that keeps size and time goes unnoticed.
    """
    inputs.one_of("device", device, ("cpu", "auto", "cuda"))
    mapped = ("vectors", "refine_vectors") if mmap else ()
    arrays, about, file = open_arrays(path, mapped)
    try:
        index = _restored(about, arrays, reads_rows=not mmap)
    except KeyError as error:
        raise CorruptIndexError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise CorruptIndexError(f"{path}: {error}") from None
    if mmap:
        index._state = index._mapped = index._state._replace(source=file)
    return index.to(device)


def _load_again(path: str, checksum: str, device: str) -> Index:
    """The mapped Index of a file that must be the one it was."""
    index = load(path, mmap=True, device=device)
    source = index._state.source
    assert source is not None
    if source.checksum != checksum:
        raise CorruptIndexError(f"{path}: is another index than the one that was pickled")
    return index


def _unpickled(about: dict[str, Any], arrays: dict[str, np.ndarray], device: str) -> Index:
    arrays = {name: copy_aligned(array) for name, array in arrays.items()}
    return _restored(about, arrays, reads_rows=False).to(device)


def _restored(about: dict[str, Any], arrays: dict[str, np.ndarray], *, reads_rows: bool) -> Index:
    """The Index of what is in a file; KeyError, TypeError, ValueError say what is wrong."""
    index = Index(**{name: about[name] for name in PARAMETERS})
    next_label = inputs.integer("next_label", about["next_label"], 0, inputs.LARGEST_LABEL + 1)
    kept = index._state.parameters
    index._state = from_arrays(kept, arrays, next_label, reads_rows=reads_rows)
    return index


def _filter(
    held: Labels, allow: ArrayLike | None, queries: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Packed bits of allowed entries, and bool mask of allowed nodes; None where all are."""
    if allow is not None:
        mask = inputs.entry_mask(allow, held.labels, queries)
        return np.atleast_2d(pack_bits(mask)), held.any_of_node(mask)
    return None, None if held.are_all_live else held.live_nodes()


def _keys_of_others(
    held: Labels, engine: CpuEngine | GpuEngine, ids: np.ndarray, walk: Walk
) -> np.ndarray:
    """Keys of the nodes nearest to nodes (m,), and of the node itself where it has copies."""
    mask = None if held.are_all_live else held.live_nodes()
    keys = nearest(engine, Queries(own=ids), walk, mask)
    own = engine.own_keys(ids)
    own[np.diff(held.offsets)[ids] == 1] = KEY_NONE
    return np.sort(np.concatenate([keys, own[:, None]], axis=1), axis=1)


def _row_of(entries: np.ndarray | None, i: int) -> np.ndarray | None:
    if entries is None or len(entries) == 1:
        return entries
    return entries[i : i + 1]
