"""A collection, opened: shards that are searched one after the other, as if they were one index."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hnsw_gpu.collection.manifest import (
    MANIFEST,
    PARAMETERS,
    Manifest,
    ShardEntry,
    read_manifest,
)
from hnsw_gpu.collection.sharded import Sharded
from hnsw_gpu.files import CorruptIndexError, verify_arrays
from hnsw_gpu.index import Index, load_index


class Collection(Sharded):
    """Shards of one kind, searched as one index is; `load` opens it, `hnsw-gpu build` makes it.

    Every shard is asked with the whole ef, and of their answers the nearest are taken: by distance,
    then by label. Distances are the bits that the shard computes, whatever the other shards are.
    Nothing in a collection changes; any method may be called from many threads.
    """

    path: Path

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[Index]) -> None:
        super().__init__(folder, manifest)
        self._shards = tuple(shards)

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
            path = self.path / entry.file
            verify_arrays(path)
            try:
                shard.check()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None


def load_collection(path: Path, *, mmap: bool = True, device: str = "auto") -> Collection:
    """The collection in a folder. CorruptIndexError names the file that is not what it must be."""
    manifest = read_manifest(path)
    shards = [open_shard(path / entry.file, entry, manifest, mmap) for entry in manifest.shards]
    opened = Collection(path.absolute(), manifest, shards)
    opened.require_labels_once()
    return opened.to(device)


def saved_checksum(path: Path) -> str:
    """8 hexadecimal digits of a saved collection: equal ones."""
    return read_manifest(path).checksum


def open_shard(path: Path, entry: ShardEntry, manifest: Manifest, mmap: bool) -> Index:
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
