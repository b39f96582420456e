"""A collection, opened: shards that are searched one after the other, as if they were one index."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hnsw_gpu import tuning
from hnsw_gpu.collection.manifest import (
    MANIFEST,
    PARAMETERS,
    Manifest,
    ShardEntry,
    ends_of,
    read_manifest,
    write_manifest,
)
from hnsw_gpu.collection.sharded import Sharded
from hnsw_gpu.files import (
    CorruptIndexError,
    Folder,
    LocalFolder,
    Place,
    folder_at,
    read_some,
    verify_arrays,
    verify_open,
)
from hnsw_gpu.index import Index, load_index
from hnsw_gpu.searching import Searching


class Collection(Sharded):
    """Shards of one kind, searched as one index is; `load` opens it, `hnsw-gpu build` makes it.

    Every shard is asked with the whole ef, and of their answers the nearest are taken: by distance,
    then by label. Distances are the bits that the shard computes, whatever the other shards are.
    Nothing in a collection changes; any method may be called from many threads.
    """

    path: Path | str  # a URL, where it lies at one

    def __init__(self, folder: Folder, manifest: Manifest, shards: Sequence[Any]) -> None:
        if isinstance(folder, LocalFolder):
            folder = LocalFolder(folder.path.absolute())
        super().__init__(folder.path if isinstance(folder, LocalFolder) else str(folder), manifest)
        self._shards, self._folder = tuple(shards), folder

    def _of_each(self, ask: Callable[..., Any], *what: Any) -> list[Any]:
        return [ask(shard, *what) for shard in self._shards]

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

    def memory(self, queries: int = 10_000, *, ef: int = 64) -> dict[str, int]:
        """Bytes by name that the shards take on a GPU, and a batch of queries; needs no GPU."""
        parts = [shard.memory(queries, ef=ef) for shard in self._shards]
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        return total | {"queries": max(part["queries"] for part in parts)}  # one after the other

    def check(self) -> None:
        """Raise ValueError naming the first shard with something wrong: any byte, link or label."""
        for entry, shard in zip(self.manifest.shards, self._shards, strict=True):
            place = self._folder.place(entry.file)
            with self._folder.open(entry.file) as file:
                verify_open(file, place)
            try:
                shard.check()
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None

    def save_tuned(self) -> None:
        """Keep in the manifest what `tune` found, so that whoever loads the collection has it.

        CorruptIndexError where the manifest is another one by now; it stays as it is then.
        """
        now = read_manifest(self._folder)
        if now._replace(tuned=()) != self.manifest._replace(tuned=()):
            raise CorruptIndexError(
                f"{self._folder.place(MANIFEST)}: has changed since it was read"
            )
        tuned = tuple(map(tuple, tuning.written(self._tuned)))
        self.manifest = self.manifest._replace(tuned=tuned)
        write_manifest(self._folder, self.manifest)

    def _left_out(self, labels: np.ndarray) -> tuple[np.ndarray, Searching, Searching]:
        parts = [shard._left_out(labels[shard.holds(labels)]) for shard in self._shards]
        own = np.sort(np.concatenate([mine for mine, _, _ in parts]))
        walked, compared = (
            Collection(self._folder, self.manifest, shards)
            for shards in ([part[1] for part in parts], [part[2] for part in parts])
        )
        return own, walked, compared


def load_collection(place: Place, *, mmap: bool = True, device: str = "auto") -> Collection:
    """The collection in a folder. CorruptIndexError names the file that is not what it must be."""
    folder = folder_at(place)
    manifest = read_manifest(folder)
    shards = [
        open_shard(shard_path(folder, entry), entry, manifest, mmap) for entry in manifest.shards
    ]
    opened = Collection(folder, manifest, shards)
    opened.require_labels_once()
    return opened.to(device)


def shard_path(place: Place, entry: ShardEntry) -> Path:
    """Where a shard lies on this machine: one at a URL is copied, unless a copy is there.

    CorruptIndexError where it is not, or no longer, what its entry says: that is asked each time.
    """
    folder = folder_at(place)
    if isinstance(folder, LocalFolder):
        return folder.path / entry.file
    told = folder.place(entry.file)
    try:
        with folder.open(entry.file) as file:
            _require_same(told, entry, file.seek(0, os.SEEK_END))
            _, checksum = read_some(file, told, ())
    except FileNotFoundError:
        raise _missing(told) from None
    if checksum != entry.checksum:
        raise CorruptIndexError(
            f"{told}: checksum {checksum}, and {MANIFEST} says {entry.checksum}"
        )
    return folder.copy(entry.file, f"{entry.checksum} {entry.bytes}", verify_arrays)


def saved_checksum(place: Place) -> str:
    """8 hexadecimal digits of a saved collection: equal ones."""
    return read_manifest(folder_at(place)).checksum


def open_shard(path: Path, entry: ShardEntry, manifest: Manifest, mmap: bool) -> Index:
    """A shard that is what its entry says."""
    try:
        _require_same(str(path), entry, os.stat(path).st_size)
        index = load_index(path, mmap=mmap, device="cpu", checksum=entry.checksum)
    except FileNotFoundError:
        raise _missing(str(path)) from None
    except IsADirectoryError:
        raise CorruptIndexError(
            f"{path}: is a folder, and {MANIFEST} names it as a shard"
        ) from None
    held: dict[str, Any] = {name: getattr(index, name) for name in PARAMETERS}
    held |= {"rows": len(index), "labels": ends_of(index.labels)}
    said = manifest._asdict() | {"rows": entry.rows, "labels": entry.labels}
    for name, value in held.items():
        if value != said[name]:
            raise CorruptIndexError(f"{path}: {name} {value}, and {MANIFEST} says {said[name]}")
    return index


def _require_same(place: str, entry: ShardEntry, size: int) -> None:
    if size != entry.bytes:
        raise CorruptIndexError(f"{place}: {size:,} bytes, and {MANIFEST} says {entry.bytes:,}")


def _missing(place: str) -> CorruptIndexError:
    return CorruptIndexError(f"{place}: is missing, and {MANIFEST} names it")
