"""What shards of one kind answer together, wherever they are."""

import itertools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs, label_inputs, tuning
from hnsw_gpu.collection.ids import KEYS_END, label_keys
from hnsw_gpu.collection.manifest import PARAMETERS, Manifest
from hnsw_gpu.engine import Walk, merged
from hnsw_gpu.files import CorruptIndexError
from hnsw_gpu.index import Index
from hnsw_gpu.searching import IsNear, Searching
from hnsw_gpu.string_labels import NONE, Names

Answers = tuple[np.ndarray, np.ndarray]  # labels, engines' distances
LABELS_AT_A_TIME = 1 << 20  # that are looked at for one that is there twice
STRINGS_AT_A_TIME = 1 << 24  # 8 bytes each; every time all shards hash all of theirs


class Sharded(Searching):
    """Shards that are searched as one index is: asked for the same, and their answers made one.

    Every shard is asked with the whole ef, and of their answers the nearest are taken: by distance,
    then by label. Distances are the bits that the shard computes, whatever the other shards are.
    """

    def __init__(self, path: object, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        for name in PARAMETERS:
            setattr(self, name, getattr(manifest, name))
        self._metric = inputs.METRICS[self.metric]
        self._tuned = tuning.read(manifest.tuned)

    def _of_each(self, ask: Callable[..., Any], *what: Any) -> list[Any]:
        """`ask(shard, *what)` of each shard, in their order."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.manifest.rows

    def __contains__(self, label: object) -> bool:
        return any(self._of_each(Index.__contains__, label))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.path)!r}, metric={self.metric!r}, dim={self.dim}, "
            f"dtype={self.dtype!r}): {len(self):,} vectors in {len(self.manifest.shards)} shards"
        )

    @property
    def label_kind(self) -> str:
        """What the labels are: "strings" or "integers"; these too where there are none."""
        ends = [entry.labels for entry in self.manifest.shards if entry.labels is not None]
        return "strings" if ends and isinstance(ends[0][0], str) else "integers"

    @property
    def labels(self) -> np.ndarray:
        """All labels, ascending: int64 (n,), or strings."""
        return _sorted(self._of_each(attrgetter("labels")))

    def some_labels(self, count: int) -> np.ndarray:
        """`count` (m,) of the labels, or all where they are fewer; spread evenly."""
        each = -(-count // len(self.manifest.shards))
        some = _sorted(self._of_each(Index.some_labels, each))
        return some[np.arange(m := min(count, len(some))) * len(some) // max(m, 1)]

    @property
    def nbytes(self) -> int:
        """Bytes that the nodes, links and labels take, mapped rows too."""
        return sum(self._of_each(attrgetter("nbytes")))

    @property
    def has_deleted(self) -> bool:
        """Is there a node that is walked through and never returned?"""
        return any(self._of_each(attrgetter("has_deleted")))

    def compile_kernels(self) -> None:
        """Compile every kernel that a search on the GPU may need, so that none waits for it.

        On the CPU there is nothing to do.
        """
        self._of_each(Index.compile_kernels)

    def vectors(self, labels: ArrayLike) -> np.ndarray:
        """float32 (m, dim) vectors of labels (m,), as stored: unit length under cosine.

        From the refine rows where there are some. KeyError names the first unknown label.
        """
        given = label_inputs.labels("labels", labels)
        found, is_known = np.empty((len(given), self.dim), np.float32), np.zeros(len(given), bool)
        for mine, rows in self._of_each(_stored, given):
            found[mine] = rows
            is_known |= mine
        missing = given[~is_known].tolist()
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise KeyError(f"label {missing[0]!r}{more}: not in the collection")
        return found

    def require_labels_once(self) -> None:
        """CorruptIndexError names a label that several shards have, and these."""
        ends = [entry.labels for entry in self.manifest.shards if entry.labels is not None]
        filled: list[Any] = sorted(ends)  # all integers, or all strings
        if all(a[1] < b[0] for a, b in itertools.pairwise(filled)):
            return  # their ranges are apart
        first, count = (
            self._strings_twice() if self.label_kind == "strings" else self._integers_twice(filled)
        )
        if first is not None:
            held = self._of_each(Index.__contains__, first)
            files = [e.file for e, is_in in zip(self.manifest.shards, held, strict=True) if is_in]
            raise CorruptIndexError(
                f"{self.path}: label {first!r} is in {' and in '.join(sorted(files))} ({count} are)"
            )

    def _integers_twice(self, ends: list[Any]) -> tuple[int | None, int]:
        """The first label that several shards have, and how many there are."""
        parts = -(-len(self) // LABELS_AT_A_TIME)
        some = np.sort(np.concatenate(self._of_each(_evenly, parts)))
        edges = [*np.unique(some[:: len(ends)]).tolist(), max(last for _, last in ends) + 1]
        first, count = None, 0
        for start, stop in itertools.pairwise(edges):
            some = np.sort(np.concatenate(self._of_each(_labels_within, start, stop)))
            twice = some[1:][some[1:] == some[:-1]]
            count += len(twice)
            first = int(twice[0]) if first is None and len(twice) else first
        return first, count

    def _strings_twice(self) -> tuple[str | None, int]:
        """As of integers; a label is told by 8 bytes, and looked at where these are there twice."""
        parts = -(-len(self) // STRINGS_AT_A_TIME)
        edges = [KEYS_END * part // parts for part in range(parts + 1)]
        shared: list[str] = []
        for start, stop in itertools.pairwise(edges):
            keys = np.sort(np.concatenate(self._of_each(_keys_within, start, stop)))
            twice = keys[1:][keys[1:] == keys[:-1]]
            if len(twice):
                some = _sorted(self._of_each(_labels_of_keys, twice)).tolist()
                shared += [one for one, other in itertools.pairwise(some) if one == other]
        return min(shared, default=None), len(shared)

    # ---------------------------------------------------------------- what `Searching` asks

    def _nearest(self, queries: np.ndarray, walk: Walk, allow: ArrayLike | None) -> Answers:
        return merged_answers(self._of_each(Index._nearest, queries, walk, allow), walk.k)

    def _compared(self, queries: np.ndarray, k: int, threads: int) -> Answers:
        return merged_answers(self._of_each(Index._compared, queries, k, threads), k)

    def _near(
        self, queries: np.ndarray, is_near: IsNear, walk: Walk, allow: ArrayLike | None
    ) -> list[Answers]:
        parts = self._of_each(Index._near, queries, is_near, walk, allow)
        return [
            merged_answers(list(answers), sum(labels.shape[1] for labels, _ in answers))
            for answers in zip(*parts, strict=True)
        ]


def merged_answers(answers: Sequence[Answers], k: int) -> Answers:
    """One answer of the shards' (q, m) each, which need not be of one m."""
    strings = [labels.ravel() for labels, _ in answers if labels.dtype.kind == "T"]
    if strings:
        return _merged_strings(answers, Names(_sorted_texts(strings)), k)
    queries, most = len(answers[0][0]), max(labels.shape[1] for labels, _ in answers)
    labels = np.full((len(answers), queries, most), -1, np.int64)
    distances = np.full(labels.shape, np.inf, np.float32)
    for s, (mine, far) in enumerate(answers):
        labels[s, :, : mine.shape[1]], distances[s, :, : mine.shape[1]] = mine, far
    found: Answers = merged(labels, distances, k)
    return found


def _merged_strings(answers: Sequence[Answers], names: Names, k: int) -> Answers:
    """The same, of strings, whose numbers are in their order; a shard without any has integers."""
    numbered = [
        (names.numbers(labels.ravel()).reshape(labels.shape), far)
        if labels.dtype.kind == "T"
        else (labels, far)
        for labels, far in answers
    ]
    labels, distances = merged_answers(numbered, k)
    return names.strings(labels), distances


def _sorted_texts(strings: list[np.ndarray]) -> list[str]:
    """The strings of some labels (m,) each, ascending, without those that mean none."""
    found = set(itertools.chain.from_iterable(some.tolist() for some in strings))
    return sorted(found - {NONE})


def _sorted(parts: list[np.ndarray]) -> np.ndarray:
    """Labels of shards, ascending. A shard without any has integers."""
    filled = [labels for labels in parts if len(labels)]
    return np.sort(np.concatenate(filled or parts))


def _keys_within(shard: Index, start: int, stop: int) -> np.ndarray:
    """int64 (m,): those keys of a shard's strings that are from `start` up to `stop`."""
    keys = label_keys(shard.labels)
    return keys[(keys >= start) & (keys < stop)]


def _labels_of_keys(shard: Index, keys: np.ndarray) -> np.ndarray:
    """Those labels of a shard that have one of these keys."""
    labels = shard.labels
    return labels[np.isin(label_keys(labels), keys)]


def _stored(shard: Index, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of labels (m,), bool (m,) of those that a shard holds, and their vectors."""
    mine = shard.holds(labels)
    return mine, shard.vectors(labels[mine])


def _evenly(shard: Index, count: int) -> np.ndarray:
    """`count` of a shard's labels, the least among them; none of an empty one."""
    labels = shard.labels
    count = count if len(labels) else 0
    return labels[np.linspace(0, len(labels), count, endpoint=False).astype(np.int64)]


def _labels_within(shard: Index, start: int, stop: int) -> np.ndarray:
    """Labels of a shard from `start` up to `stop`."""
    labels = shard.labels
    first, last = np.searchsorted(labels, start), np.searchsorted(labels, stop - 1, side="right")
    return labels[first:last]
