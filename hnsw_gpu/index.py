"""The index: vectors, graph and labels behind one object, and the choice of engine."""

import copy
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs, label_inputs, tuning
from hnsw_gpu.engine import (
    LOST_SHARE,
    STORAGE,
    ChangeLock,
    Labels,
    Parameters,
    Rounded,
    State,
    Stopped,
    compacted,
    copy_aligned,
    empty_state,
    from_arrays,
    insert,
    joined,
    repaired,
    run_to_a_stop,
    with_vectors,
)
from hnsw_gpu.files import CorruptIndexError, open_arrays, write_arrays
from hnsw_gpu.gpu import GpuEngine, bytes_a_query, index_bytes, on_gpu
from hnsw_gpu.peers import PeerGraph, faiss_index, outgoing, write_hnswlib
from hnsw_gpu.progress import bar
from hnsw_gpu.searching import StateSearching
from hnsw_gpu.string_labels import (
    from_file,
    labels_of,
    numbered_alike,
    numbers_of,
    require_strings_of,
    to_file,
    with_all_strings,
    without_unused,
)

logger = logging.getLogger("hnsw_gpu")

ENCODE_ROWS = 16384  # vectors checked and encoded at a time
ROWS = ("vectors", "refine_vectors")  # in a file
PARAMETERS = ("dim", "metric", "dtype", "M", "ef_construction", "refine", "seed")  # in a file


class Index(StateSearching):
    """An HNSW graph over vectors (Malkov & Yashunin 2016) with deterministic answers.

    dim: numbers a vector, 1 to 65,536.
    metric: "cosine" ("cos", "angular"), "l2" ("sqeuclidean"), "euclidean" (its root), or "ip"
        ("inner_product", "dot"). Distances are 1 - cosine, squared l2, l2, and 1 - dot.
    dtype: how vectors are stored: "fp32", "fp16", "int8" or "int4" (an eighth of fp32: rotated,
        four bits a number).
    M: most links of a node on the layers above; twice as many on layer 0. 2 to 128.
    ef_construction: beam capacity while building.
    refine: also keep rows as "fp32" (True) or "fp16", finer than dtype: they re-rank the beam and
        give the distances. None: "fp16" with "int4", which needs some, else none.
    seed: of the levels. Same seed and same calls give the same bytes.
    device: where searches run: "cpu", "cuda" (CuPy's current GPU; RuntimeError says what is
        missing), "cuda:1" (a GPU by number), or "auto" (a GPU if there is one; the logger says
        which). An index is on one GPU: load it once for each. Graphs are built on the CPU.

    Equal vectors (equal as the finest rows that are kept) share a node, so copies cost no more
    than a label; the logger "hnsw_gpu" warns where rounding made them equal, or took over a quarter
    of what tells vectors apart. Distances are float32: cosine ones are right to 2e-7, and copies
    nearer than that come in any order. Under l2 and ip a vector's length is 0, or 1e-14 to 9e18.

    Any method may be called from many threads: a search sees the index as it was before a change or
    as it is after, and waits for none; changes wait for each other. A forked process has the index
    as it was, without what other threads were adding.
    """

    def __init__(
        self,
        dim: int,
        metric: str = "cosine",
        dtype: str = "fp32",
        *,
        M: int = 16,
        ef_construction: int = 200,
        refine: bool | str | None = None,
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
        self._tuned = {}
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
        state = self._state
        if isinstance(label, str) and state.names is not None:
            number = state.names.number(label)
        elif state.names is None and isinstance(label, (int, np.integer)):
            number = -1 if isinstance(label, bool) or label > inputs.LARGEST_LABEL else int(label)
        else:
            return False
        return number >= 0 and bool(state.labels.find(np.array([number], np.int64))[0] >= 0)

    def holds(self, labels: ArrayLike) -> np.ndarray:
        """bool (m,): which of labels (m,) are in the index."""
        state = self._state
        given = numbers_of(state, label_inputs.labels("labels", labels))
        found: np.ndarray = state.labels.find(given) >= 0
        return found

    def __iter__(self) -> Iterator[int | str]:
        """The labels, in the order of `labels`, as they are now."""
        return iter(self.labels.tolist())

    def items(self) -> Iterator[tuple[int | str, np.ndarray]]:
        """Each label with its vector (dim,), see `vectors`; as they are now, a block at a time."""
        state = self._state
        ordered = state.labels.sorted
        for start in range(0, len(ordered), ENCODE_ROWS):
            part = ordered[start : start + ENCODE_ROWS]
            rows = state.vectors(state.labels.nodes(state.labels.find(part)))
            state.require_unchanged()
            yield from zip(labels_of(state, part).tolist(), rows, strict=True)

    def __repr__(self) -> str:
        refine = f", refine={self.refine!r}" if self.refine else ""
        return (
            f"Index(dim={self.dim}, metric={self.metric!r}, dtype={self.dtype!r}, M={self.M}, "
            f"ef_construction={self.ef_construction}{refine}, seed={self.seed}, "
            f"device={self.device!r}): {len(self):,} vectors"
        )

    @property
    def labels(self) -> np.ndarray:
        """The labels in the index: int64 (n,), ascending, or strings in the order first given."""
        state = self._state
        return labels_of(state, state.labels.sorted.copy())

    @property
    def nbytes(self) -> int:
        """Bytes that the nodes, links and labels take, mapped rows too.

        Room for vectors to come is not counted.
        """
        state = self._state
        return state.nbytes + (0 if state.names is None else state.names.nbytes)

    @property
    def has_deleted(self) -> bool:
        """Is there a node that is walked through and never returned?"""
        return not self._state.labels.are_all_live

    def vectors(self, labels: ArrayLike) -> np.ndarray:
        """float32 (m, dim) vectors of labels (m,), as stored: unit length under cosine.

        From the refine rows where there are some. KeyError names the first unknown label.
        """
        given = label_inputs.labels("labels", labels)
        state = self._state
        entries = state.labels.entries_of(numbers_of(state, given), given)
        found = state.vectors(state.labels.nodes(entries))
        state.require_unchanged()
        return found

    @property
    def device(self) -> str:
        """Where searches run: "cpu"; "cuda", or "cuda:1" on a GPU that is not the first."""
        if self._gpu is None:
            return "cpu"
        return f"cuda:{self._gpu.number}" if self._gpu.number else "cuda"

    def to(self, device: str) -> "Index":
        """Search on a device from here on (see `device` of the class); returns the index itself.

        MemoryError where the index does not fit the GPU (`memory` gives the figures).
        """
        number = inputs.device(device).partition(":")[2]
        with self._changing.lock:
            gpu, state = self._gpu, self._state
            if device == "cpu":
                self._gpu = None
            elif gpu is None or not gpu.is_usable or (number and int(number) != gpu.number):
                self._gpu = on_gpu(device, state.cpu, self.dim, state.version)
            if gpu is not None and gpu is not self._gpu:
                gpu.close()
        return self

    def compile_kernels(self) -> None:
        """Compile every kernel that a search on the GPU may need, so that none waits for it.

        On the CPU there is nothing to do.
        """
        gpu = self._gpu
        if gpu is not None:
            gpu.compile_all()

    def memory(self, queries: int = 10_000, *, ef: int = 64) -> dict[str, int]:
        """Bytes by name that the index takes on a GPU, and a batch of queries; needs no GPU.

        Where less is free, a large batch is cut in parts, refine rows stay with the host, whose CPU
        re-ranks, and an index that does not fit without them is a MemoryError. Of a query for
        k = 10, with `rerank` as it is by default.
        """
        count = inputs.integer("queries", queries, 0)
        ef = inputs.integer("ef", ef, 1)
        kept = min(inputs.reranked("auto", 10, ef, self.dtype) or ef, ef)
        keys = kept * (3 if self.refine else 1)  # found, compared, cut
        state = self._state
        parts = index_bytes(
            self.dtype, self.refine, self.dim, self.M, state.node_count, len(state.graph.nodes),
            len(state.labels) if state.names is None else 0,
        )  # fmt: skip
        return {**parts, "queries": count * bytes_a_query(self.dtype, self.refine, self.dim, keys)}

    # ---------------------------------------------------------------- changing it

    def add(
        self,
        vectors: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        replace: bool = False,
        keep_deleted: bool = False,
        threads: int | None = None,
        progress: bool | Callable[[int], object] = False,
    ) -> np.ndarray:
        """Add vectors (m, dim), any array-like of real numbers; returns their labels (m,).

        labels: integers >= 0, or strings (an index holds one kind), each once and not in the index;
        None continues after the largest integer ever given. replace: labels that are in the index
        get these vectors instead of theirs, in one change. keep_deleted: see `compact`. Bad input
        raises ValueError or TypeError and adds nothing. After KeyboardInterrupt the vectors of the
        batches that were finished are in, in order; with `replace` the index is as it was.

        progress: draw a bar; or what is told how many nodes more are in, each time.
        """

        def choose(state: State, count: int) -> tuple[State, np.ndarray]:
            return label_inputs.new_labels(labels, count, state, replace)

        return self._add(vectors, choose, replace, keep_deleted, threads, progress)

    def update(
        self,
        labels: ArrayLike,
        vectors: ArrayLike,
        *,
        threads: int | None = None,
        progress: bool = False,
    ) -> None:
        """Give labels (m,) that are in the index other vectors (m, dim), in one change.

        KeyError names the first label that is not; nothing changes then, nor after
        KeyboardInterrupt. See `add`, which with `replace` takes new labels too.
        """

        def choose(state: State, count: int) -> tuple[State, np.ndarray]:
            given = label_inputs.labels_for(labels, count)
            numbers = numbers_of(state, given)
            state.labels.entries_of(numbers, given)
            return state, numbers

        self._add(vectors, choose, True, False, threads, progress)

    def _add(
        self,
        vectors: ArrayLike,
        choose: Callable[[State, int], tuple[State, np.ndarray]],
        replaces: bool,
        keep_deleted: bool,
        threads: int | None,
        progress: bool | Callable[[int], object],
    ) -> np.ndarray:
        """Add vectors (m, dim); their labels, which choose(state, m) gives the engine's of.

        It gives the state, too, as it takes them. What `replaces` is in whole or not at all.
        """
        given = inputs.vectors("vectors", vectors, self.dim)
        threads = inputs.threads(threads)
        result = []

        def work(is_stopped: Callable[[], bool]) -> None:
            inputs.require_room(self._state, len(given))
            state, new_labels = choose(self._state, len(given))
            held = state.labels
            live = held.kept_count if keep_deleted else held.live_count
            if state.node_count - live > live + len(given):
                self._compact(threads, progress is True, is_stopped, keep_deleted)
                state, new_labels = choose(self._state, len(given))
            parts = self._checked_parts(given, is_stopped)
            state, nodes, rounded = with_vectors(state, len(given), parts, threads=threads)
            self._tell(rounded, len(given))
            new = max(int(nodes.max(initial=-1)) + 1, state.node_count) - state.node_count
            with bar(progress is True, new, "build", "vectors") as shown:
                insert(
                    state, nodes, new_labels, self._publish, all_or_none=replaces, threads=threads,
                    is_stopped=is_stopped, advance=progress if callable(progress) else shown.update,
                )  # fmt: skip
            result.append(labels_of(self._state, new_labels))

        self._change(work)
        return result[0]

    def _change(self, work: Callable[[Callable[[], bool]], None]) -> None:
        """Call work(is_stopped), which may `_publish`, while nobody else changes the index."""

        def locked(is_stopped: Callable[[], bool]) -> None:
            with self._changing.lock:
                if self._state.names is not None:  # without strings that did not get in before
                    self._state.names.keep_first(self._state.next_label)
                before = len(self)
                work(is_stopped)
                tuning.tell_of_growth(self._tuned, before, len(self))

        run_to_a_stop(locked)

    def _publish(self, state: State, changed: np.ndarray | None) -> None:
        """Let searches that begin see a state; nodes whose links on layer 0 changed, None: any."""
        if self._gpu is not None and state.version != self._state.version:
            self._gpu.note(state.version, changed)
        if state is not self._state:
            self._mapped = None
        self._state = state

    def _tell(self, rounded: Rounded, count: int) -> None:
        """Say on the logger what the dtype took from vectors that are being added."""
        dtype = f"{self.dtype}, refine={self.refine!r}" if self.refine else self.dtype
        if rounded.worn:
            logger.warning(
                "%s: rounding takes over %.0f %% of what tells them apart from %s of %s vectors; a "
                "finer dtype finds more,%s or vectors without their mean and outliers",
                dtype, 100 * LOST_SHARE, f"{rounded.worn:,}", f"{count:,}",
                " rerank=None does," if self.refine else "",
            )  # fmt: skip
        inputs.tell_blurred(rounded.blurred, count)
        if rounded.merged:
            logger.warning(
                "%s: %s of %s vectors become equal to others that differ, and come back as their "
                "copies; a finer dtype, or refine=True, keeps them apart",
                dtype, f"{rounded.merged:,}", f"{count:,}",
            )  # fmt: skip

    def _checked_parts(
        self, given: np.ndarray, is_stopped: Callable[[], bool]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The vectors (m, dim) as they are and as float32, a block at a time, until a stop."""
        for start in range(0, len(given), ENCODE_ROWS):
            if is_stopped():
                raise Stopped
            part = given[start : start + ENCODE_ROWS]
            yield part, self.checked_rows(part, start)

    def checked_rows(self, part: np.ndarray, first: int) -> np.ndarray:
        """float32 (m, dim) of vectors from row `first` on; what `add` raises where they are bad."""
        stored_as = "fp16" if "fp16" in (self.dtype, self.refine) else self.dtype
        return inputs.float_vectors("vectors", part, self._metric, stored_as, first)

    def merge(self, other: "Index", *, threads: int | None = None, progress: bool = False) -> None:
        """Take in all that another index holds, which keeps vectors as this one does.

        No label may be in both (ValueError), nor strings in one and integers in the other
        (TypeError); the other stays as it is. It costs a fraction of building: the nodes of the
        smaller of the two are inserted into the larger, with the links that they have. What was
        deleted in either cannot come back. KeyboardInterrupt leaves the index as it was.
        """
        if not isinstance(other, Index):
            raise TypeError(f"other: {type(other).__name__}, expected an Index")
        for name in ("dim", "metric", "dtype", "refine", "M"):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                raise ValueError(f"merge: {name} is {here!r} here, {there!r} there")
        threads, theirs = inputs.threads(threads), other._settled()

        def work(is_stopped: Callable[[], bool]) -> None:
            mine, yours = numbered_alike(self._state, theirs)
            shared = yours.labels.sorted[mine.labels.find(yours.labels.sorted) >= 0]
            if len(shared):
                first = labels_of(mine, shared[:1]).tolist()[0]
                raise ValueError(f"merge: label {first!r} is in both ({len(shared)} are)")
            smaller = min(mine.node_count, yours.node_count)
            with bar(progress, smaller, "merge", "vectors") as shown:

                def advance(count: int) -> None:
                    shown.update(count)
                    if is_stopped():
                        raise Stopped

                state = joined(mine, yours, threads=threads, advance=advance)
                advance(0)  # the last moment
                self._publish(with_all_strings(state), None)

        self._change(work)

    def delete(self, labels: ArrayLike) -> None:
        """Remove labels (m,). Their nodes are still walked through, until `compact`.

        Until then `undelete` brings them back. KeyError names the first label that is not in the
        index; nothing is removed then.
        """
        self._relabel(labels, lambda held, *given: held.without(held.entries_of(*given)))

    def _relabel(self, labels: ArrayLike, change: Callable[..., Labels]) -> None:
        """Give the nodes the labels change(theirs, the engine's of `labels`, these as given)."""
        given = label_inputs.unique_labels("labels", labels)

        def work(_: Callable[[], bool]) -> None:
            state = self._state
            changed = change(state.labels, numbers_of(state, given), given)
            self._publish(state._replace(labels=changed), None)

        self._change(work)

    def undelete(self, labels: ArrayLike) -> None:
        """Bring labels (m,) back, with their vectors, that were deleted since the last `compact`.

        KeyError names the first that cannot come back; nothing changes then.
        """
        self._relabel(labels, Labels.undeleted)

    def forget(self, labels: ArrayLike) -> None:
        """Let deleted labels (m,) not come back: see `deleted`. KeyError names the first unknown.

        Their vectors are gone with the next `compact`.
        """
        self._relabel(labels, Labels.forgetting)

    @property
    def deleted(self) -> np.ndarray:
        """The labels (m,) that `undelete` would bring back, in the order of `labels`."""
        state = self._state
        return labels_of(state, np.sort(state.labels.deleted.labels))

    def compact(
        self,
        *,
        keep_deleted: bool = False,
        threads: int | None = None,
        progress: bool = False,
    ) -> None:
        """Rebuild without deleted nodes. KeyboardInterrupt leaves the index as it was.

        `add` does so itself where more than half of the nodes would be deleted ones. keep_deleted:
        but for those that `undelete` can bring back.
        """
        threads = inputs.threads(threads)
        self._change(lambda is_stopped: self._compact(threads, progress, is_stopped, keep_deleted))

    def _compact(
        self, threads: int, progress: bool, is_stopped: Callable[[], bool], keep_deleted: bool
    ) -> None:
        with bar(progress, self._state.labels.live_count, "compact", "vectors") as shown:

            def advance(count: int) -> None:
                shown.update(count)
                if is_stopped():
                    raise Stopped

            state = compacted(
                self._state, threads=threads, advance=advance, keep_deleted=keep_deleted
            )
            state = without_unused(state)
            advance(0)  # the last moment
            self._publish(state, None)

    # ---------------------------------------------------------------- keeping it

    def __reduce__(self) -> tuple:
        """As a saved index; one that is mapped, and as it was loaded, as its path and checksum."""
        device, source = "cpu" if self._gpu is None else "auto", self._state.source
        self._state.require_unchanged()
        if source is not None and self._state is self._mapped:
            return _load_again, (source.path, source.checksum, device, self._tuned)
        _, about, arrays = self._contents()
        return _unpickled, (about, arrays, device)

    def __copy__(self) -> "Index":
        return copy.deepcopy(self)  # an `add` would write behind rows that the two shared

    def check(self) -> None:
        """Raise ValueError naming what is wrong with the graph, the labels or the vectors.

        First links the nodes of the last small calls of `add` that are not reachable yet, as
        `save` does.
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
        about: dict[str, Any] = {name: getattr(self, name) for name in PARAMETERS}
        about["next_label"] = state.next_label
        if self._tuned:
            about["tuned"] = tuning.written(self._tuned)
        return state, about, to_file(state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .safetensors file. The old file stays whole until the new one is complete.

        ValueError, before anything is written, if `load` would refuse what it would hold.
        """
        state, about, arrays = self._contents()
        restored(about, arrays, unread=ROWS)  # what `load` would refuse is not written
        write_arrays(path, arrays, about, state.require_unchanged)

    @staticmethod
    def load(path: str | os.PathLike[str], *, mmap: bool = False, device: str = "auto") -> "Index":
        """The Index of a file; see `hnsw_gpu.load`, which opens collections too."""
        return load_index(path, mmap=mmap, device=device)

    def to_hnswlib(self, path: str | os.PathLike[str], *, max_elements: int | None = None) -> None:
        """Write the graph as it is, and its vectors as float32, as a file that hnswlib loads.

        Loading it, say the metric: "l2", "ip" or "cosine". Copies become elements of their own, and
        deleted nodes are marked so. max_elements: the capacity of the file, at least what it holds.
        After small `add`s call `check` first: it links what cannot be reached yet.
        """
        capacity = inputs.integer("max_elements", max_elements or 0, 0, inputs.MOST_NODES)
        write_hnswlib(path, self._outgoing(), capacity)

    def to_faiss(self) -> Any:
        """The graph, as it is, as faiss's IndexHNSWFlat, of inner product under cosine.

        In an IndexIDMap2 where labels are not 0..n-1. ValueError if there are deleted nodes. After
        small `add`s call `check` first, as for `to_hnswlib`.
        """
        return faiss_index(self._outgoing(), self._metric)

    def _outgoing(self) -> PeerGraph:
        state = self._state
        if state.names is not None:
            raise ValueError("labels are strings here, and other libraries keep integers")
        return outgoing(state)


def load_index(
    path: str | os.PathLike[str],
    *,
    mmap: bool = False,
    device: str = "auto",
    checksum: str | None = None,
) -> Index:
    """The Index of one file; see `hnsw_gpu.load`.

    checksum: what `arrays_checksum` is of the file that is meant; CorruptIndexError of another one.
    """
    inputs.device(device)
    mapped: set[str] = set()

    def choose(names: Iterable[str]) -> set[str]:
        if mmap:
            mapped.add("refine_vectors" if "refine_vectors" in names else "vectors")
        return mapped

    arrays, about, file = open_arrays(path, choose)
    if checksum is not None and file.checksum != checksum:
        raise CorruptIndexError(
            f"{path}: is another index than the one that was meant: checksum {file.checksum}, "
            f"expected {checksum}"
        )
    try:
        index = restored(about, arrays, unread=mapped)
    except KeyError as error:
        raise CorruptIndexError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise CorruptIndexError(f"{path}: {error}") from None
    if mmap:
        index._state = index._mapped = index._state._replace(source=file)
    return index.to(device)


def _load_again(
    path: str, checksum: str, device: str, tuned: dict[tuple[float, int], tuning.Tuning]
) -> Index:
    """The mapped Index of a file that must be the one it was."""
    index = load_index(path, mmap=True, device=device, checksum=checksum)
    index._tuned = tuned
    return index


def _unpickled(about: dict[str, Any], arrays: dict[str, np.ndarray], device: str) -> Index:
    arrays = {name: copy_aligned(array) for name, array in arrays.items()}
    return restored(about, arrays, unread=ROWS).to(device)


def restored(
    about: dict[str, Any],
    arrays: dict[str, np.ndarray],
    *,
    unread: Collection[str],
    unrepaired: int = 0,
) -> Index:
    """The Index of what is in a file; KeyError, TypeError, ValueError say what is wrong.

    unread: the names of rows that are not looked at. unrepaired: how many nodes may not be
    reachable.
    """
    index = Index(**{name: about[name] for name in PARAMETERS})
    next_label = inputs.integer("next_label", about["next_label"], 0, inputs.LARGEST_LABEL + 1)
    index._tuned = tuning.read(about.get("tuned", ()))
    kept, (arrays, names) = index._state.parameters, from_file(arrays)
    state = from_arrays(kept, arrays, next_label, unread=unread, unrepaired=unrepaired)
    index._state = state._replace(names=names)
    require_strings_of(index._state)
    return index
