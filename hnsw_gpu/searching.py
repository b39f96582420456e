"""Searching: checked arguments, what finds, and the answer; and one engine over one state, which
is what an index finds with."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs, label_inputs
from hnsw_gpu.engine import (
    KEY_NONE,
    Allowed,
    CpuEngine,
    Labels,
    Queries,
    State,
    Walk,
    key_nodes,
    nearest,
    unlinked,
    within,
)
from hnsw_gpu.gpu import GpuEngine
from hnsw_gpu.progress import bar
from hnsw_gpu.results import RadiusResult, SearchResult, into, reported
from hnsw_gpu.string_labels import STRINGS, labels_of, numbers_of
from hnsw_gpu.tuning import SAMPLE, SAMPLE_SHARE, Tuned, Tuning, required, tuned

WARM_ROWS = 64
SELF_ROWS = 16384  # nodes of a neighbour graph searched at a time
Found = TypeVar("Found")
IsNear = Callable[[np.ndarray], np.ndarray]  # of engines' distances float32 (...), bool (...)


class Searching:
    """Checks what is asked and tells what was found; how it is found is left to three methods.

    `_nearest`, `_compared` and `_near` give engines' distances (R1), by which answers are ordered:
    what callers are told is rounded once more.
    """

    dim: int
    metric: str
    dtype: str
    refine: str
    M: int
    ef_construction: int
    seed: int
    _metric: str  # the engines'
    _tuned: dict[tuple[float, int], Tuning]  # what reaches a recall at a k

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def device(self) -> str:
        """Where searches run: "cpu" or "cuda"."""
        raise NotImplementedError

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,), ascending, or strings."""
        raise NotImplementedError

    @property
    def label_kind(self) -> str:
        """What the labels are: "integers" or "strings"."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, mapped rows too."""
        raise NotImplementedError

    @property
    def has_deleted(self) -> bool:
        """Is there a node that is walked through and never returned?"""
        raise NotImplementedError

    def vectors(self, labels: ArrayLike) -> np.ndarray:
        """float32 (m, dim) vectors of labels (m,), as stored."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ValueError naming what is wrong."""
        raise NotImplementedError

    def compile_kernels(self) -> None:
        """Compile every kernel that a search on the GPU may need, so that none waits for it.

        On the CPU there is nothing to do.
        """
        raise NotImplementedError

    def warm_up(self, threads: int | None = None) -> None:
        """Compile what searches need, and run one of each kind, so that no caller waits for it."""
        self.compile_kernels()
        if not len(self):
            return
        labels = self.labels
        queries, k = self.vectors(labels[:WARM_ROWS]), min(10, len(labels))
        for allow in (None, labels[: max(1, len(labels) // 2)], labels[:1]):
            for rows in (queries, queries[:1]):
                self.search(rows, k, allow=allow, threads=threads)

    def some_labels(self, count: int) -> np.ndarray:
        """`count` (m,) of the labels, or all where they are fewer; spread evenly."""
        labels = self.labels
        return labels[np.arange(m := min(count, len(labels))) * len(labels) // max(m, 1)]

    @property
    def calls_at_once(self) -> int:
        """How many searches of large batches are worth running beside each other."""
        return (
            1 if self.device == "cpu" else 2
        )  # on a GPU one is prepared while another is searched

    def is_ready(self) -> bool:
        """Is there what answers a search?"""
        return True

    def _nearest(
        self, queries: np.ndarray, walk: Walk, allow: ArrayLike | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels and engines' distances (q, k) of checked queries."""
        raise NotImplementedError

    def _compared(self, queries: np.ndarray, k: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """As `_nearest`, by comparing all."""
        raise NotImplementedError

    def _near(
        self, queries: np.ndarray, is_near: IsNear, walk: Walk, allow: ArrayLike | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each checked query, labels and engines' distances (1, hits) that `is_near`."""
        raise NotImplementedError

    def _left_out(self, labels: np.ndarray) -> tuple[np.ndarray, "Searching", "Searching"]:
        """Which of these labels can be left out, what to walk without them, what to compare."""
        raise ValueError(
            "queries: expected some: no vectors can be left out of what lies elsewhere"
        )

    def _on_gpu(
        self,
        queries: ArrayLike,
        walk: Walk,
        allow: ArrayLike | None,
        stream: Any,
        out: tuple[Any, Any] | None,
    ) -> SearchResult | None:
        """The answer to queries that lie on a GPU, there; None where they do not, or cannot."""
        return None

    def search(
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        ef: int = 64,
        recall: float | None = None,
        allow: ArrayLike | None = None,
        expand: int | None = None,
        ef_upper: int = 1,
        rerank: int | str | None = "auto",
        threads: int | None = None,
        stream: Any = None,
        out: tuple[Any, Any] | None = None,
    ) -> SearchResult:
        """The k nearest labels of each query (q, dim), or of one query (dim,): a SearchResult.

        ef: beam capacity; a larger one finds more and takes longer; a beam holds max(ef, k).
        recall: in place of ef, the one that `tune` found for this recall and k.
        allow: what may be returned: bool (n,) or (q, n) indexed by label; the same packed, uint8
            (`np.packbits(mask, axis=-1, bitorder="little")`); or labels (m,).
        expand: nodes expanded in one step, 1 to 32. None: 1 on the CPU; on a GPU 4, below ef 48 it
            is 2. Devices answer alike at the same `expand`. ef_upper: beam capacity above layer 0.
        rerank: how many of the nearest in the beam the refine rows compare, where the index has
            them; at least k are. "auto": of int4 the largest of 2 k, 20 and ef / 4, else all ef, as
            None.
        stream: of a GPU, for queries that lie there; None: CuPy's current one.
        out: arrays (labels int64, or StringDType; distances float32), each (q, k), that take the
            result.

        With a filter, or after deletes, ef counts allowed nodes: the beam is larger by their share,
        and doubled, for the queries that need it, until it holds ef of them but for what chance may
        take. Where they are few (64 times the beam or fewer), a beam does not fit the GPU, or a
        walk meets fewer than k, all of them are compared, which is exact.

        Queries (q, dim) in the memory of the index's GPU (CuPy, torch, whatever offers DLPack or
        `__cuda_array_interface__`) give CuPy arrays, and the host waits for nothing, unless there
        is a filter or something was deleted. They are not checked: one with NaN finds nothing, as
        does any that would be refused.
        """
        ef = self.chosen_ef(k, ef, recall)
        expand = self._expand(ef) if expand is None else expand
        walk = inputs.walk(k, ef, threads, expand, ef_upper, rerank, self.dtype)
        answer = self._on_gpu(queries, walk, allow, stream, out)
        if answer is not None:
            return answer
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
        rerank: int | str | None = "auto",
        threads: int | None = None,
    ) -> SearchResult:
        """As `search`, of queries that `checked_queries` gave."""
        expand = self._expand(ef)
        walk = inputs.walk(k, ef, threads, expand, rerank=rerank, dtype=self.dtype)
        return self._found(queries, walk, allow)

    def chosen_ef(self, k: int, ef: int, recall: float | None) -> int:
        """ef, or in its place the one that `tune` found for this recall and k.

        ValueError: both are given, or nothing was tuned for the two.
        """
        if recall is None:
            return ef
        return required(self._tuned, inputs.recall(recall, ef), k)

    def checked_queries(self, queries: ArrayLike) -> np.ndarray:
        """float32 (q, dim) of the queries of a search; what `search` raises where they are bad."""
        given = inputs.vectors("queries", queries, self.dim)
        return inputs.float_vectors("queries", given, self._metric, "")

    def _expand(self, ef: int) -> int:
        """Nodes expanded in one step, where the caller leaves it to the device."""
        if self.device == "cpu":
            return 1
        return 4 if ef >= 48 else 2

    def _found(self, queries: np.ndarray, walk: Walk, allow: ArrayLike | None) -> SearchResult:
        """The answer to checked queries."""
        labels, distances = self._nearest(queries, walk, allow)
        return SearchResult(labels, reported(distances, self.metric))

    def tune(
        self,
        recall: float = 0.95,
        k: int = 10,
        queries: ArrayLike | None = None,
        *,
        threads: int | None = None,
        progress: bool = False,
    ) -> Tuned:
        """Find the smallest ef whose recall@k is `recall` on queries (q, dim), and keep it.

        `search(..., k, recall=recall)` uses it from then on; an index saves it. Truth is
        `exact_search`, so vectors as they are kept. queries: a few hundred like those to come.
        None: up to a thousand stored vectors, in the index without them, on the CPU; queries that
        lie elsewhere than the vectors need more. Tune again when the index has grown: the logger
        says when that is.

        Returns a Tuned, with the recall of the sample and its interval. ValueError where not even a
        beam that holds everything reaches the recall.
        """
        target = inputs.share("recall", recall)
        k = inputs.integer("k", k, 1, inputs.MOST_NODES)
        walked: Searching = self
        compared: Searching = self
        if queries is None:
            count = min(SAMPLE, len(self) // SAMPLE_SHARE)
            some = np.random.default_rng(self.seed).permutation(len(self))[:count]
            own, walked, compared = self._left_out(self.labels[np.sort(some)])
            if not len(own):
                raise ValueError(
                    f"{len(self)} vectors, {SAMPLE_SHARE} of which stand for one query (copies of "
                    "each other, and the entry point, for none): too few; give queries"
                )
            queries = self.vectors(own)
        given = self.checked_queries(queries)
        if not len(given) or not len(self):
            raise ValueError(f"{len(given)} queries, {len(self)} vectors: expected some of both")
        found = tuned(
            lambda ef: walked.search(given, k, ef=ef, threads=threads),
            compared.exact_search(given, k, threads=threads),
            target, self.metric, most=len(self), progress=progress,
        )  # fmt: skip
        self._tuned = {**self._tuned, (target, k): Tuning(found.ef, len(self))}
        return found

    def exact_search(
        self, queries: ArrayLike, k: int = 10, *, threads: int | None = None
    ) -> SearchResult:
        """As `search`, by comparing all vectors as they are kept: what `search` is measured by.

        On the CPU, whatever the device.
        """
        k, threads = inputs.integer("k", k, 1, inputs.MOST_NODES), inputs.threads(threads)
        labels, distances = self._compared(self.checked_queries(queries), k, threads)
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
        is_near = functools.partial(
            _is_within, np.float64(inputs.number("radius", radius)), self.metric
        )
        walk = inputs.walk(1, ef, threads, self._expand(ef))
        found = self._near(given, is_near, walk, allow)
        kind = STRINGS if self.label_kind == "strings" else np.int64
        none = [(np.empty((1, 0), kind), np.empty((1, 0), np.float32))]
        parts = zip(*(found or none), strict=True)
        labels, distances = (np.concatenate(part, axis=1)[0] for part in parts)
        offsets = np.cumsum([0] + [part.shape[1] for part, _ in found]).astype(np.int64)
        return RadiusResult(offsets, labels, reported(distances, self.metric))


def _is_within(limit: np.float64, metric: str, distances: np.ndarray) -> np.ndarray:
    """bool (...): which engines' distances are within a radius, as callers are told both."""
    told = reported(distances, metric).astype(np.float64)
    if metric == "ip":  # 1 - dot was rounded; what is told is itself a radius
        return (distances.astype(np.float64) <= limit - 1) | (told == limit)
    return told <= limit


class StateSearching(Searching):
    """The half of `Index` that asks; what it asks is one state, which never changes."""

    _state: State
    _gpu: GpuEngine | None

    @property
    def label_kind(self) -> str:
        """What the labels are: "strings" or "integers"; these too where there are none."""
        return "integers" if self._state.names is None else "strings"

    def _nearest(
        self, queries: np.ndarray, walk: Walk, allow: ArrayLike | None
    ) -> tuple[np.ndarray, np.ndarray]:
        def find(state: State, engine: CpuEngine | GpuEngine) -> tuple[np.ndarray, np.ndarray]:
            entries, nodes = _filter(state, allow, len(queries))
            keys = nearest(engine, Queries(queries), walk, nodes)
            labels, distances = state.labels.keys_to_labels(keys, walk.k, entries)
            return labels_of(state, labels), distances

        return self._searched(find)

    def _compared(self, queries: np.ndarray, k: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
        state = self._state
        live = np.flatnonzero(state.labels.live_nodes())
        keys = state.cpu.compare(Queries(queries), live, min(k, len(live)), threads)
        labels, distances = state.labels.keys_to_labels(keys, k)
        state.require_unchanged()
        return labels_of(state, labels), distances

    def _near(
        self, queries: np.ndarray, is_near: IsNear, walk: Walk, allow: ArrayLike | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        def find(state: State, engine: CpuEngine | GpuEngine) -> list[tuple]:
            held = state.labels
            entries, nodes = _filter(state, allow, len(queries))
            keys = within(engine, Queries(queries), is_near, walk, nodes)
            found = [
                held.keys_to_labels(
                    row[None], int(held.carried(key_nodes(row)).sum()), _row_of(entries, i)
                )
                for i, row in enumerate(keys)
            ]
            # entries that are not allowed leave room behind the others
            is_there = [labels >= 0 for labels, _ in found]
            return [
                (labels_of(state, labels[mine][None]), far[mine][None])
                for (labels, far), mine in zip(found, is_there, strict=True)
            ]

        return self._searched(find)

    def _left_out(self, labels: np.ndarray) -> tuple[np.ndarray, Searching, Searching]:
        state, held = self._state, self._state.labels
        entries = held.entries_of(numbers_of(state, labels), labels)
        is_kept = held.nodes(entries) == state.graph.entry_point  # of every walk
        labels, entries = labels[~is_kept], entries[~is_kept]
        left = held.without(entries)
        is_gone = held.live_nodes() & ~left.live_nodes()
        walked = state._replace(graph=unlinked(state.graph, is_gone), labels=left)
        if held.are_all_live:  # nodes that nobody meets need no filter
            walked = walked._replace(labels=held.without(entries[~is_gone[held.nodes(entries)]]))
        return labels, _View(self, walked), _View(self, state._replace(labels=left))

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

    def _on_gpu(
        self,
        queries: Any,
        walk: Walk,
        allow: ArrayLike | None,
        stream: Any,
        out: tuple[Any, Any] | None,
    ) -> SearchResult | None:
        if self._gpu is None or not inputs.is_on_gpu(queries):
            return None
        if self._state.names is not None:
            raise TypeError(
                "queries: on a GPU, where no labels can lie that are strings: expected an array in "
                "host memory"
            )

        def find(state: State, engine: CpuEngine | GpuEngine) -> SearchResult | GpuEngine | None:
            if isinstance(engine, CpuEngine):
                return None
            if allow is not None or not state.labels.are_all_live or engine.reranks_on_host:
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

    def neighbor_graph(
        self, k: int = 15, *, ef: int = 64, threads: int | None = None, progress: bool = False
    ) -> SearchResult:
        """The k nearest other labels of every label: row i belongs to `labels[i]`.

        Each search starts from the vector's own node (R10). Copies are neighbours of each other.
        """
        walk = inputs.walk(k, ef, threads, self._expand(ef), dtype=self.dtype)

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
            return labels_of(state, labels), distances

        labels, distances = self._searched(find)
        return SearchResult(labels, reported(distances, self.metric))


class _View(StateSearching):
    """Another state, searched on the CPU as an index would be."""

    def __init__(self, index: StateSearching, state: State) -> None:
        self.dim, self.metric, self.dtype = index.dim, index.metric, index.dtype
        self._metric, self._state, self._gpu = index._metric, state, None

    @property
    def device(self) -> str:
        return "cpu"


def _filter(
    state: State, allow: ArrayLike | None, queries: int
) -> tuple[np.ndarray | None, Allowed | None]:
    """Packed bits of allowed entries, and the allowed nodes; None where all live ones are."""
    held = state.labels
    if allow is None:
        return None, _live(held)
    entries = label_inputs.allowed_entries(allow, state, queries)
    return np.atleast_2d(entries), Allowed.of(held.node_bits(entries))


def _live(held: Labels) -> Allowed | None:
    """The nodes that carry labels; None: all do."""
    return None if held.live_bits is None else Allowed(held.live_bits, held.live_count)


def _keys_of_others(
    held: Labels, engine: CpuEngine | GpuEngine, ids: np.ndarray, walk: Walk
) -> np.ndarray:
    """Keys of the nodes nearest to nodes (m,), and of the node itself where it has copies."""
    keys = nearest(engine, Queries(own=ids), walk, _live(held))
    own = engine.own_keys(ids)
    own[held.carried(ids) == 1] = KEY_NONE
    return np.sort(np.concatenate([keys, own[:, None]], axis=1), axis=1)


def _row_of(entries: np.ndarray | None, i: int) -> np.ndarray | None:
    if entries is None or len(entries) == 1:
        return entries
    return entries[i : i + 1]
