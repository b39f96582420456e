"""A collection, opened: shards that are searched one after the other, as if they were one index."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs
from hnsw_gpu.collection.manifest import (
    MANIFEST,
    PARAMETERS,
    Manifest,
    ShardEntry,
    read_manifest,
)
from hnsw_gpu.engine import Walk, merged
from hnsw_gpu.files import CorruptIndexError, verify_arrays
from hnsw_gpu.index import Index, load_index
from hnsw_gpu.searching import IsNear, Searching

Answers = tuple[np.ndarray, np.ndarray]  # labels, engines' distances


class Collection(Searching):
    """Shards of one kind, searched as one index is; `load` opens it, `hnsw-gpu build` makes it.

    Every shard is asked with the whole ef, and of their answers the nearest are taken: by distance,
    then by label. Distances are the bits that the shard computes, whatever the other shards are.
    Nothing in a collection changes; any method may be called from many threads.
    """

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[Any]) -> None:
        self.path, self.manifest = folder, manifest
        self._shards = tuple(shards)
        for name in PARAMETERS:
            setattr(self, name, getattr(manifest, name))
        self._metric = inputs.METRICS[self.metric]
        self._tuned = {}

    def __len__(self) -> int:
        return self.manifest.rows

    def __contains__(self, label: object) -> bool:
        return any(label in shard for shard in self._shards)

    def __repr__(self) -> str:
        return (
            f"Collection({str(self.path)!r}, metric={self.metric!r}, dim={self.dim}, "
            f"dtype={self.dtype!r}): {len(self):,} vectors in {len(self._shards)} shards"
        )

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,): all labels, ascending."""
        return np.sort(np.concatenate([shard.labels for shard in self._shards]))

    @property
    def nbytes(self) -> int:
        """Bytes that the nodes, links and labels take, mapped rows too."""
        return sum(shard.nbytes for shard in self._shards)

    @property
    def has_deleted(self) -> bool:
        """Is there a node that is walked through and never returned?"""
        return any(shard.has_deleted for shard in self._shards)

    @property
    def device(self) -> str:
        """Where searches run: "cpu" or "cuda"."""
        return self._shards[0].device

    def to(self, device: str) -> "Collection":
        """Search on a device from here on, "cpu", "cuda" or "auto"; returns the collection itself.

        MemoryError where the shards do not all fit the GPU; with "auto" they then stay on the CPU.
        """
        try:
            for shard in self._shards:
                shard.to(device)
        except BaseException:
            self.to("cpu")
            raise
        if any(shard.device != self.device for shard in self._shards):
            self.to("cpu")
        return self

    def compile_kernels(self) -> None:
        """Compile every kernel that a search on the GPU may need, so that none waits for it.

        On the CPU there is nothing to do.
        """
        for shard in self._shards:
            shard.compile_kernels()

    def memory(self, queries: int = 10_000, *, ef: int = 64) -> dict[str, int]:
        """Bytes by name that the shards take on a GPU, and a batch of queries; needs no GPU."""
        parts = [shard.memory(queries, ef=ef) for shard in self._shards]
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        return total | {"queries": max(part["queries"] for part in parts)}  # one after the other

    def vectors(self, labels: ArrayLike) -> np.ndarray:
        """float32 (m, dim) vectors of labels (m,), as stored: unit length under cosine.

        From the refine rows where there are some. KeyError names the first unknown label.
        """
        given = inputs.labels("labels", labels)
        found, is_known = np.empty((len(given), self.dim), np.float32), np.zeros(len(given), bool)
        for shard in self._shards:
            mine = shard.holds(given)
            found[mine] = shard.vectors(given[mine])
            is_known |= mine
        missing = given[~is_known]
        if len(missing):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise KeyError(f"label {missing[0]}{more}: not in the collection")
        return found

    def check(self) -> None:
        """Raise ValueError naming the first shard with something wrong: any byte, link or label."""
        for entry, shard in zip(self.manifest.shards, self._shards, strict=True):
            path = self.path / entry.file
            verify_arrays(path)
            try:
                shard.check()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None

    # ---------------------------------------------------------------- what `Searching` asks

    def _nearest(self, queries: np.ndarray, walk: Walk, allow: ArrayLike | None) -> Answers:
        return _merged([shard._nearest(queries, walk, allow) for shard in self._shards], walk.k)

    def _compared(self, queries: np.ndarray, k: int, threads: int) -> Answers:
        return _merged([shard._compared(queries, k, threads) for shard in self._shards], k)

    def _left_out(self, labels: np.ndarray) -> tuple[np.ndarray, Searching, Searching]:
        parts = [shard._left_out(labels[shard.holds(labels)]) for shard in self._shards]
        own = np.sort(np.concatenate([mine for mine, _, _ in parts]))
        walked, compared = (
            Collection(self.path, self.manifest, shards)
            for shards in ([part[1] for part in parts], [part[2] for part in parts])
        )
        return own, walked, compared

    def _near(
        self, queries: np.ndarray, is_near: IsNear, walk: Walk, allow: ArrayLike | None
    ) -> list[Answers]:
        parts = [shard._near(queries, is_near, walk, allow) for shard in self._shards]
        return [
            _merged(list(answers), sum(labels.shape[1] for labels, _ in answers))
            for answers in zip(*parts, strict=True)
        ]


def load_collection(path: Path, *, mmap: bool = True, device: str = "auto") -> Collection:
    """The collection in a folder. CorruptIndexError names the file that is not what it must be."""
    manifest = read_manifest(path)
    shards = [_opened(path / entry.file, entry, manifest, mmap) for entry in manifest.shards]
    _require_labels_once(path, manifest, shards)
    return Collection(path.absolute(), manifest, shards).to(device)


def saved_checksum(path: Path) -> str:
    """8 hexadecimal digits of a saved collection: equal ones."""
    return read_manifest(path).checksum


def _opened(path: Path, entry: ShardEntry, manifest: Manifest, mmap: bool) -> Index:
    """A shard that is what its entry says."""
    try:
        size = os.stat(path).st_size
        if size != entry.bytes:
            raise CorruptIndexError(f"{path}: {size:,} bytes, and {MANIFEST} says {entry.bytes:,}")
        index = load_index(path, mmap=mmap, device="cpu", checksum=entry.checksum)
    except FileNotFoundError:
        raise CorruptIndexError(f"{path}: is missing, and {MANIFEST} names it") from None
    except IsADirectoryError:
        raise CorruptIndexError(
            f"{path}: is a folder, and {MANIFEST} names it as a shard"
        ) from None
    held: dict[str, Any] = {name: getattr(index, name) for name in PARAMETERS}
    labels = index.labels
    held |= {"rows": len(index), "labels": _ends(labels)}
    said = manifest._asdict() | {"rows": entry.rows, "labels": entry.labels}
    for name, value in held.items():
        if value != said[name]:
            raise CorruptIndexError(f"{path}: {name} {value}, and {MANIFEST} says {said[name]}")
    return index


def _ends(labels: np.ndarray) -> tuple[int, int] | None:
    return (int(labels[0]), int(labels[-1])) if len(labels) else None


def _require_labels_once(path: Path, manifest: Manifest, shards: Sequence[Index]) -> None:
    """CorruptIndexError names a label that two shards have, and both."""
    entries = [(entry, shard) for entry, shard in zip(manifest.shards, shards, strict=True)]
    filled = sorted((e.labels, e.file, shard) for e, shard in entries if e.labels is not None)
    if all(a[0][1] < b[0][0] for a, b in itertools.pairwise(filled)):
        return  # their ranges are apart
    every = np.concatenate([shard.labels for _, _, shard in filled])
    every.sort()
    twice = every[1:][every[1:] == every[:-1]]
    if len(twice):
        where = [file for _, file, shard in filled if twice[0] in shard]
        raise CorruptIndexError(
            f"{path}: label {twice[0]} is in {' and in '.join(sorted(where))} ({len(twice)} are)"
        )


def _merged(answers: Sequence[Answers], k: int) -> Answers:
    """One answer of the shards' (q, m) each, which need not be of one m."""
    queries, most = len(answers[0][0]), max(labels.shape[1] for labels, _ in answers)
    labels = np.full((len(answers), queries, most), -1, np.int64)
    distances = np.full(labels.shape, np.inf, np.float32)
    for s, (mine, far) in enumerate(answers):
        labels[s, :, : mine.shape[1]], distances[s, :, : mine.shape[1]] = mine, far
    found: Answers = merged(labels, distances, k)
    return found
