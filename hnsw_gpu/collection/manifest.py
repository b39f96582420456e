"""The manifest of a collection: how its shards were built, and what each file must be.

`manifest.json` is written when all shards are, and its bytes are canonical: the reader rebuilds
them from what it understood and demands the same. So a flipped bit, a key given twice and a number
that is none are found by one comparison, and what a person edits must be made by `hnsw-gpu build`.
Values are taken as hostile: names of shards lead nowhere but into the folder of the manifest.
"""

import errno
import json
import os
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hnsw_gpu import inputs, tuning
from hnsw_gpu.engine import STORAGE
from hnsw_gpu.files import CorruptIndexError, Folder, Place, folder_at, read_some
from hnsw_gpu.string_labels import LABEL_ARRAYS, saved_labels

MANIFEST = "manifest.json"
COLLECTION_VERSION = 1
MOST_BYTES = 1 << 24  # some 100,000 shards; bounds what a hostile file can cost
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")  # of a file beside the manifest
CHECKSUM = re.compile(r"[0-9a-f]{8}")
Ends = tuple[int, int] | tuple[str, str]


class ShardEntry(NamedTuple):
    """What the manifest says of one shard."""

    file: str  # its name, beside the manifest
    rows: int  # vectors, each with a label
    labels: Ends | None  # the least and the largest; None: there are none
    bytes: int  # of the file
    checksum: str  # `files.arrays_checksum`, which covers the checksum of every array


class Manifest(NamedTuple):
    """What a collection is."""

    metric: str
    dim: int
    dtype: str
    refine: str  # "", "fp32" or "fp16"
    M: int
    ef_construction: int
    seed: int
    rows: int
    shards: tuple[ShardEntry, ...]
    tuned: tuple[tuple[float, ...], ...] = ()  # recall, k, ef, vectors of each; not written if none

    @property
    def checksum(self) -> str:
        """8 hexadecimal digits: equal collections."""
        return f"{zlib.crc32(_text_of(self).encode()):08x}"


PARAMETERS = Manifest._fields[:7]  # as `Index` takes them


def write_manifest(place: Place, manifest: Manifest) -> None:
    """Write a collection's manifest, whole or not at all; its shards are there already."""
    folder_at(place).write(MANIFEST, _text_of(manifest).encode())


def read_manifest(place: Place) -> Manifest:
    """The manifest in a folder.

    IsADirectoryError where there is none; CorruptIndexError where it is damaged, of another
    version, or describes what no collection is.
    """
    folder = folder_at(place)
    path = folder.place(MANIFEST)
    try:
        given = folder.read(MANIFEST, MOST_BYTES + 1)
    except FileNotFoundError:
        raise _no_manifest(folder) from None
    if len(given) > MOST_BYTES:
        raise CorruptIndexError(f"{path}: longer than the {MOST_BYTES:,} bytes of any manifest")
    try:
        facts = json.loads(given)
        version = facts["format_version"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptIndexError(f"{path}: damaged, or no manifest: {error!r:.200}") from None
    if version != COLLECTION_VERSION:
        raise CorruptIndexError(
            f"{path}: format version {version!r:.40}, where this release reads {COLLECTION_VERSION}"
        )
    try:
        manifest = _manifest(facts)
        is_canonical = given == _text_of(manifest).encode()
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptIndexError(f"{path}: {error!s:.200}") from None
    if not is_canonical:
        raise CorruptIndexError(f"{path}: damaged: its checksum and what it says do not agree")
    return manifest


def is_collection(place: Place) -> bool:
    """Does a manifest lie in this folder?"""
    return folder_at(place).has(MANIFEST)


def entry_of(place: Place, name: str) -> ShardEntry:
    """The entry of a shard that was written; nothing but its labels is read."""
    folder = folder_at(place)
    with folder.open(name) as file:
        size = file.seek(0, os.SEEK_END)
        arrays, checksum = read_some(file, folder.place(name), LABEL_ARRAYS)
    labels = saved_labels(arrays)
    return ShardEntry(name, len(labels), ends_of(labels), size, checksum)


def ends_of(labels: np.ndarray) -> Ends | None:
    """The least and the largest label."""
    if not len(labels):
        return None
    if labels.dtype.kind == "T":
        given = labels.tolist()
        return min(given), max(given)
    return int(labels.min()), int(labels.max())


def _no_manifest(folder: Folder) -> OSError:
    if not folder.is_there():
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    what = f"a folder without {MANIFEST}: no collection, or one whose build is not finished"
    return IsADirectoryError(errno.EISDIR, what, str(folder))


def _text_of(manifest: Manifest) -> str:
    facts: dict[str, Any] = {"format_version": COLLECTION_VERSION} | manifest._asdict()
    facts["shards"] = [entry._asdict() for entry in manifest.shards]
    if not manifest.tuned:
        del facts["tuned"]
    total = f"{zlib.crc32(json.dumps(facts).encode()):08x}"
    return json.dumps(facts | {"checksum": total}, indent=1) + "\n"


def _manifest(facts: dict[str, Any]) -> Manifest:
    """The manifest of values from a file; KeyError, TypeError, ValueError say what is wrong."""
    entries = facts["shards"]
    if not isinstance(entries, list) or not entries:
        raise ValueError("no shards: the collection is empty")
    shards = tuple(_entry(place, entry) for place, entry in enumerate(entries))
    names = [entry.file for entry in shards]
    if len(set(names)) < len(names):
        raise ValueError(f"shard {max(names, key=names.count)} is there twice")
    rows = inputs.integer("rows", facts["rows"], 0)
    if rows != sum(entry.rows for entry in shards):
        raise ValueError(f"rows={rows}, and the shards have {sum(e.rows for e in shards)}")
    if len({type(entry.labels[0]) for entry in shards if entry.labels is not None}) > 1:
        raise ValueError("shards of integer labels, and of strings")
    tuned = tuple(map(tuple, tuning.written(tuning.read(facts.get("tuned", ())))))
    return Manifest(
        inputs.one_of("metric", facts["metric"], inputs.METRICS),
        inputs.integer("dim", facts["dim"], 1, 65536),
        inputs.one_of("dtype", facts["dtype"], STORAGE),
        inputs.one_of("refine", facts["refine"], ("", "fp32", "fp16")),
        inputs.integer("M", facts["M"], 2, 128),
        inputs.integer("ef_construction", facts["ef_construction"], 1, 65536),
        inputs.integer("seed", facts["seed"], 0, 2**64 - 1),
        rows,
        shards,
        tuned,
    )


def _entry(place: int, given: dict[str, Any]) -> ShardEntry:
    file, checksum = given["file"], given["checksum"]
    if not isinstance(file, str) or not NAME.fullmatch(file) or file == MANIFEST:
        raise ValueError(f"shard {place}: {file!r:.80} is no name of a file beside the manifest")
    if not isinstance(checksum, str) or not CHECKSUM.fullmatch(checksum):
        raise ValueError(f"shard {place}: checksum {checksum!r:.40}, expected 8 hexadecimal digits")
    rows = inputs.integer(f"shard {place}: rows", given["rows"], 0, inputs.MOST_NODES)
    size = inputs.integer(f"shard {place}: bytes", given["bytes"], 1)
    return ShardEntry(file, rows, _ends(place, rows, given["labels"]), size, checksum)


def _ends(place: int, rows: int, given: Sequence[Any] | None) -> Ends | None:
    if given is None and not rows:
        return None
    if not isinstance(given, list) or len(given) != 2 or not rows:
        raise ValueError(f"shard {place}: {rows} rows of labels {given!r:.80}")
    if all(isinstance(label, str) for label in given):
        if not "" < given[0] <= given[1]:
            raise ValueError(f"shard {place}: labels {given!r:.80}")
        return given[0], given[1]
    least = inputs.integer(f"shard {place}: labels", given[0], 0, inputs.LARGEST_LABEL)
    largest = inputs.integer(f"shard {place}: labels", given[1], least, inputs.LARGEST_LABEL)
    if largest - least + 1 < rows:
        raise ValueError(f"shard {place}: {rows} rows of labels {least} to {largest}")
    return least, largest
