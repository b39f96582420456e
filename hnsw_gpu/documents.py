"""Texts and metadata beside an index: what the vector stores of LangChain and LlamaIndex share.

A saved store is a folder of two files:

    documents.3.hnsw  the index, as `Index.save` writes it; 3: of the third save
    documents.jsonl   which index it belongs to; a document a line; a checksum of all that

`documents.jsonl` is written last, and appears whole or not at all: until then the folder holds what
it held before, and from then on the new store. A third file is there while they are written,
`documents.saving`: it names the indexes that a save which was killed may have left, so that the
next one removes those and nothing else. All of it is JSON and arrays: to open a folder runs
nobody's code.
"""

import errno
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu.engine import ChangeLock
from hnsw_gpu.files import (
    CorruptIndexError,
    Folder,
    Place,
    arrays_checksum,
    atomic_file,
    folder_at,
    held,
    verify_arrays,
)
from hnsw_gpu.index import PARAMETERS, Index, load_index

DOCUMENTS = "documents.jsonl"
DOCUMENTS_VERSION = 1
READ_BYTES = 1 << 20  # at a time: of a URL each is a request
SAVING = "documents.saving"
SAVING_BYTES = 1 << 16  # at most: some thousand saves that were killed
INDEX = re.compile(r"documents\.([0-9]{1,18})\.hnsw")


class Record(NamedTuple):
    """What is kept of a document."""

    text: str
    metadata: dict[str, Any]  # that JSON can hold


class Found(NamedTuple):
    """One result of a search."""

    id: str
    record: Record
    distance: float


class Documents:
    """Records by id, and an index whose labels are these ids.

    options: of `Index`, but for `dim`, which the first vectors say.

    Any method may be called from many threads. A search beside a change may see a document's new
    vector with its old text, or leave it out.
    """

    def __init__(self, **options: Any) -> None:
        self.metric = Index(1, **options | {"device": "cpu"}).metric
        self.index: Index | None = None  # until there is a vector
        self._options = options
        self._records: dict[str, Record] = {}
        self._changing = ChangeLock()

    def __len__(self) -> int:
        return len(self._records)

    def __getstate__(self) -> dict[str, Any]:
        with self._changing.lock:
            return vars(self) | {"_records": self._records.copy(), "_changing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _changing=ChangeLock())

    # ---------------------------------------------------------------- what is in it

    def records(self, ids: Sequence[str]) -> list[tuple[str, Record]]:
        """Those of the ids that are here, in this order."""
        _refuse_string("ids", ids)
        found = [(id, self._records.get(id)) for id in dict.fromkeys(ids)]
        return [(id, record) for id, record in found if record is not None]

    def ids_where(
        self, is_meant: Callable[[str, Record], bool], among: Sequence[str] | None = None
    ) -> list[str]:
        """The ids of the documents of which that is true, in the order they first came in.

        among: ids, in place of all, and in their order.
        """
        pairs = self._records.copy().items() if among is None else self.records(among)
        return [id for id, record in pairs if is_meant(id, record)]

    def search(
        self, query: ArrayLike, k: int, allow: list[str] | None = None, **how: Any
    ) -> list[Found]:
        """The k documents nearest to a vector (dim,), nearest first; fewer where there are fewer.

        allow: the ids of those that may be returned. how: see `Index.search`.
        """
        index = self.index
        if index is None or not len(index) or allow == []:
            return []
        labels, distances = index.search(query, min(k, len(index)), allow=allow, **how)
        nearest = zip(labels[0].tolist(), distances[0].tolist(), strict=True)
        found = [(id, self._records.get(id), distance) for id, distance in nearest]
        return [Found(id, record, distance) for id, record, distance in found if record is not None]

    def search_vectors(
        self, query: ArrayLike, k: int, allow: list[str] | None = None, **how: Any
    ) -> tuple[list[Found], np.ndarray]:
        """As `search`, and the vectors float32 (results, dim) of what was found, as stored."""
        while True:
            index, found = self.index, self.search(query, k, allow, **how)
            if index is None or not found:
                return [], np.empty((0, 0), np.float32)
            with suppress(KeyError):  # one was deleted meanwhile
                return found, index.vectors([id for id, _, _ in found])

    # ---------------------------------------------------------------- changing it

    def add(self, ids: Sequence[str], vectors: ArrayLike, records: Sequence[Record]) -> None:
        """Add documents with their vectors (m, dim), or replace those whose ids are here.

        Of an id that is given twice the last counts. ValueError and TypeError as of `Index.add`;
        nothing is added then, nor after KeyboardInterrupt.
        """
        _refuse_string("ids", ids)
        rows = np.asarray(vectors)
        if not len(ids) == len(rows) == len(records):
            raise ValueError(f"{len(ids)} ids, {len(rows)} vectors and {len(records)} documents")
        if not len(ids):
            return
        if not all(isinstance(id, str) for id in ids):
            raise TypeError("ids: expected strings")
        last = {id: place for place, id in enumerate(ids)}
        with self._changing.lock:
            index = self.index
            if index is None:
                if rows.ndim != 2:
                    raise ValueError(f"vectors: shape {rows.shape}, expected (m, dim)")
                index = Index(rows.shape[1], **self._options)
            new = [id for id in last if id not in self._records]
            known = [id for id in last if id in self._records][:1]
            before = index.vectors(known)

            def keep() -> None:
                self.index = index
                self._records.update({id: records[place] for id, place in last.items()})

            try:
                index.add(rows[list(last.values())], list(last), replace=True)
            except KeyboardInterrupt:  # of all or nothing, which was it?
                if new[0] in index if new else (index.vectors(known) != before).any():
                    keep()
                raise
            keep()

    def delete(self, ids: Sequence[str]) -> None:
        """Remove documents. Ids that are not here are passed over."""
        _refuse_string("ids", ids)
        with self._changing.lock:
            known = [id for id in dict.fromkeys(ids) if id in self._records]
            if self.index is not None and known:
                self.index.delete(known)
            for id in known:
                del self._records[id]

    def clear(self) -> None:
        """Remove all documents; the next vectors may be of another dim."""
        with self._changing.lock:
            self.index, self._records = None, {}

    # ---------------------------------------------------------------- keeping it

    def save(self, place: Place) -> None:
        """Write a folder, or save over the store in one; a crash leaves the old or the new one.

        TypeError names a document whose metadata JSON cannot hold; ValueError where another process
        writes into the folder, or somebody changed the index but not the documents;
        CorruptIndexError where the folder has a `documents.jsonl` or a `documents.saving` that no
        store wrote.
        """
        folder = folder_at(place)
        with self._changing.lock, held(folder):
            index = Index(1, **self._options) if self.index is None else self.index
            _require_one_store(index, self._records)
            name = f"documents.{1 + max(_numbers(folder), default=0)}.hnsw"
            ours = {name, _named_index(folder) or name, *_left(folder)}
            folder.write(SAVING, json.dumps(sorted(ours)).encode())
            try:
                with folder.writing(name) as path:
                    index.save(path)
                    checksum = arrays_checksum(path)
                head = {
                    "format_version": DOCUMENTS_VERSION, "index": name,
                    "index_checksum": checksum, "documents": len(self._records),
                }  # fmt: skip
                with folder.writing(DOCUMENTS) as path, atomic_file(path) as file:
                    for line in _lines(head, self._records):
                        file.write(line)
            finally:  # the store before, or what there is of this one if it failed
                ours.discard(_named_index(folder) or "")
                with suppress(OSError):  # the next save will
                    for left in ours.intersection(folder.names()):
                        folder.remove(left)
                    folder.remove(SAVING)

    @classmethod
    def load(cls, place: Place, *, mmap: bool = False, device: str = "auto") -> "Documents":
        """The store that was saved in a folder. mmap, device: see `hnsw_gpu.load`.

        FileNotFoundError where there is none; CorruptIndexError where it is damaged, or its two
        files do not belong together.
        """
        folder = folder_at(place)
        while True:
            head, records = _read(folder)
            name, checksum = head["index"], head["index_checksum"]
            try:
                path = folder.copy(name, checksum, verify_arrays)
                index = load_index(path, mmap=mmap, device=device, checksum=checksum)
                break
            except FileNotFoundError:
                if _named_index(folder) == name:  # else another save removed it meanwhile
                    raise CorruptIndexError(f"{folder.place(name)}: is missing") from None
        try:
            _require_one_store(index, records)
        except ValueError as error:
            raise CorruptIndexError(f"{folder}: {error}") from None
        loaded = cls(**{key: getattr(index, key) for key in PARAMETERS if key != "dim"})
        loaded._options["device"] = device
        loaded.index, loaded._records = (index if records else None), records
        return loaded


def with_ef(ef: int, how: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Index.search`, with an ef where they name neither one nor a recall."""
    return how if how.get("recall") is not None else {"ef": ef} | how


def _refuse_string(name: str, given: object) -> None:
    """TypeError for a string where strings are asked for: its characters are meant by nobody."""
    if isinstance(given, (str, bytes)):
        raise TypeError(f"{name}: {given!r:.80}, expected a list of strings")


def _require_one_store(index: Index, records: Mapping[str, Record]) -> None:
    """ValueError where labels and ids are not the same."""
    if set(index.labels.tolist()) != records.keys():
        raise ValueError(
            f"an index of {len(index)} labels and {len(records)} documents that do not belong "
            "together"
        )


def _numbers(folder: Folder) -> list[int]:
    """Of saves, by the names of files in a folder."""
    found = [INDEX.fullmatch(name) for name in folder.names()]
    return [int(name[1]) for name in found if name]


def _left(folder: Folder) -> list[str]:
    """The files of indexes that saves which did not end may have left."""
    try:
        names = json.loads(folder.read(SAVING, SAVING_BYTES))
    except FileNotFoundError:
        return []
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(INDEX.fullmatch(str(name)) for name in names):
        raise CorruptIndexError(f"{folder.place(SAVING)}: is not of a store of documents")
    return names


def _named_index(folder: Folder) -> str | None:
    """The file of the index that the documents in a folder belong to; None where there are none."""
    try:
        head, file = _read_head(folder)
    except FileNotFoundError:
        return None
    file.close()
    return str(head["index"])


def _lines(head: dict[str, Any], records: Mapping[str, Record]) -> Iterator[bytes]:
    """The file of documents, line by line."""
    line = _line(head)
    checksum = zlib.crc32(line)
    yield line
    for id, record in records.items():
        try:
            problem = not_json(record.metadata)
            line = b"" if problem else _line({"id": id} | record._asdict())
        except (TypeError, ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise TypeError(f"document {id!r}: JSON cannot hold its metadata: {problem}")
        checksum = zlib.crc32(line, checksum)
        yield line
    yield _line({"checksum": f"{checksum:08x}"})


def not_json(value: Any) -> str:
    """What in a value JSON cannot hold, or would change; "" where there is nothing."""
    if isinstance(value, dict):
        keys = [key for key in value if not isinstance(key, str)]
        if keys:
            return f"the key {keys[0]!r:.60}, which is no string"
        return next(filter(None, map(not_json, value.values())), "")
    if isinstance(value, list):
        return next(filter(None, map(not_json, value)), "")
    if value is None or isinstance(value, (str, int, float)):
        return ""
    return f"{value!r:.60}, a {type(value).__name__}"


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _read(folder: Folder) -> tuple[dict[str, Any], dict[str, Record]]:
    """The head of a file of documents, and those; CorruptIndexError on what none can be."""
    head, file = _read_head(folder)
    checksum, records = zlib.crc32(_line(head)), {}
    with file:
        try:
            for _ in range(head["documents"]):
                line = file.readline()
                checksum = zlib.crc32(line, checksum)
                given = json.loads(line)
                records[given["id"]] = Record(given["text"], given["metadata"])
            is_sound = file.read() == _line({"checksum": f"{checksum:08x}"})
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise CorruptIndexError(f"{folder.place(DOCUMENTS)}: damaged: {error!r:.200}") from None
    if not is_sound:
        raise CorruptIndexError(
            f"{folder.place(DOCUMENTS)}: damaged, or changed by hand: its checksum and what it "
            "says do not agree"
        )
    return head, records


def _read_head(folder: Folder) -> tuple[dict[str, Any], BinaryIO]:
    """The first line of a file of documents, and the file, open behind it."""
    try:
        raw = folder.open(DOCUMENTS)
    except FileNotFoundError:
        what = f"no saved store: there is no {DOCUMENTS}"
        raise FileNotFoundError(errno.ENOENT, what, str(folder)) from None
    file = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw), READ_BYTES))
    try:
        head = json.loads(file.readline())
        version = head["format_version"]
        if version != DOCUMENTS_VERSION:
            raise ValueError(
                f"format version {version!r:.40}, where this release reads {DOCUMENTS_VERSION}"
            )
        if not INDEX.fullmatch(head["index"]):
            raise ValueError(f"{head['index']!r:.80} is no name of an index beside it")
        _ = head["index_checksum"], head["documents"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        file.close()
        raise CorruptIndexError(
            f"{folder.place(DOCUMENTS)}: damaged, or written by no store: {error!s:.200}"
        ) from None
    return head, file
