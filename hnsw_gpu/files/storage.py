"""The file of an index: named arrays and a few facts, in one safetensors file.

A safetensors file is `uint64 length | JSON header | data`; the header gives each array's dtype,
shape and place. Any safetensors reader can open ours. What we add sits in the one metadata key
"hnsw_gpu": a JSON text with the format version, the caller's facts (`about`), and dtype, shape and
checksum of each array, closed by a checksum of that text. The bytes are canonical: equal arrays and
facts give equal files, so the reader rebuilds the header from what it understood of it and demands
the same bytes. One comparison finds every flipped bit, duplicate key, overlap and strange space.

We write the header ourselves rather than call `safetensors.numpy.save_file` (0.8.0), which
takes a strided array's memory as if it were contiguous, leaves mode 0600, does not sync, turns
"disk full" into an error without errno, and writes through a hidden name of its own choice that a
kill leaves behind. We read through one descriptor, so a save beside us cannot mix two files.

Alignment: the header is padded with spaces, and each array followed by an array "NAME.pad" where
its bytes do not end at a multiple of 64; hence every array starts at a multiple of 64 in the file.
A map starts at a page, so a mapped array is aligned to 64 bytes in memory too. So is one that is
read: a walk touches fewer cache lines where rows do not straddle them.

Checksum: CRC-32 of each block of 4 MiB, then CRC-32 of those. It finds every single flipped bit
and misses other accidents once in 2**32; it is no defence against a forger. Measured on two cores
(GB/s, 1 / 2 threads): crc32 3.8 / 7.4, adler32 3.5 / 6.8, sha1 2.0 / 2.2, sha256 1.7 / 3.4,
blake2b 0.9 / 1.7. Blocks let threads share one array (zlib releases the GIL) and are summed while
still in cache.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import mmap
import os
import re
import secrets
import shutil
import stat
import struct
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from hnsw_gpu.engine import thread_count

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
ALIGNMENT = 64
BLOCK_BYTES = 1 << 22  # part of the format: the checksum depends on it
HEADER_BYTES_MAX = 1 << 20  # ours take about 2 KB; bounds what a hostile header can cost
METADATA_KEY = "hnsw_gpu"
# safetensors name of a dtype -> numpy's, little-endian
DTYPES = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "F16": "<f2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
CODES = {text: code for code, text in DTYPES.items()}
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # fsync, where there is none
Path: TypeAlias = str | os.PathLike[str]

logger = logging.getLogger("hnsw_gpu")


class CorruptIndexError(ValueError):
    """The file is damaged, from a newer release, or no index at all; the text says which."""


class MappedFile:
    """A file of which bytes are mapped, held open: are they still what they were?

    Another file under its name changes nothing here: the old one stays until nobody holds it.
    """

    def __init__(self, path: Path, file: FileIO, checksum: str) -> None:
        self.path = os.path.abspath(path)
        self.checksum = checksum  # see `arrays_checksum`
        self._path, self._descriptor = path, os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._before = os.fstat(self._descriptor)
        self._reading = Lock()

    def require_unchanged(self) -> None:
        """CorruptIndexError if the file was written to or cut since it was opened.

        Its time of writing can be put back (`cp -p`, `rsync`), that of any change cannot: then all
        is read again, unless the file lost its name, so that nobody can have opened it.
        """
        before, now = self._before, os.fstat(self._descriptor)
        is_as_before = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if is_as_before and now.st_ctime_ns == before.st_ctime_ns:
            return
        if not is_as_before or (now.st_nlink >= before.st_nlink and not self._is_intact()):
            raise CorruptIndexError(
                f"{os.fspath(self._path)}: was changed in place while it is mapped; load it again "
                "(another file renamed over it, as `save` does, would do no harm)"
            )
        self._before = now

    def _is_intact(self) -> bool:
        copy = os.dup(self._descriptor)  # of one place in the file with all others
        with self._reading, open(copy, "rb", buffering=0) as file:
            try:
                return verify_open(file, self.path) == self.checksum
            except CorruptIndexError:
                return False


class Entry(NamedTuple):
    """One array of the file."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    checksum: str  # 8 hexadecimal digits

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` complete, on disk, at the end, or not at all.

    On any exception, Ctrl-C included, `path` keeps what it held and the temporary file is
    removed. A kill leaves ".NAME.RANDOM.tmp" beside it, which the next write to `path` removes. A
    new file has the mode of any new file (umask), a replaced one keeps its mode. A link stays a
    link: the file it leads to is replaced. FileNotFoundError when the folder is missing; ValueError
    when `path` is a device, a pipe or a socket. What fails once the file is in place (the folder
    cannot be synced) is logged.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    os.stat(os.path.join(folder, ""))  # missing, a file, closed to us: said of it, not of ours
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, "cannot write a file over a folder", target)
    if _is_special(target):
        raise ValueError(f"{target}: is a device, a pipe or a socket, not a file")
    short_name = os.fsdecode(os.fsencode(name)[:200])  # with the rest below the usual 255 bytes
    _remove_abandoned(folder, short_name)
    file, temporary = _locked_file(folder, short_name)
    lock = -1 if fcntl is None else os.dup(file.fileno())  # held until the file has its name
    try:
        with file:
            if os.path.exists(target):
                shutil.copymode(target, temporary)
            yield file
            file.flush()
            _sync(file.fileno(), target)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        if lock >= 0:
            os.close(lock)
    if os.name == "posix":
        _sync_folder(folder)


def _locked_file(folder: str, name: str) -> tuple[BinaryIO, str]:
    """A new temporary file and its path. The lock says that its writer lives, and ends with it."""
    while True:
        temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks: nobody removes anything there
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(temporary):
            return file, temporary
        file.close()  # between its creation and its lock it was taken for abandoned


def _remove_abandoned(folder: str, name: str) -> None:
    """Remove the temporary files of writes to `name` that were killed: those without a lock."""
    ours = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):  # a folder that does not list
        for path in [entry.path for entry in os.scandir(folder) if ours.fullmatch(entry.name)]:
            _remove_unlocked(path)


def _remove_unlocked(path: str) -> None:
    """Remove a file, unless it is locked, no plain file, or not ours to write to."""
    if fcntl is None:
        return
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
        finally:
            os.close(descriptor)


def _sync(descriptor: int, path: str) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning("%s: its file system does not sync files: %s", path, error.strerror)


def _sync_folder(folder: str) -> None:
    """The new name is data of the folder. The file is in place: what fails now is only logged."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # a folder that does not list (mode 0333), CIFS, FUSE
        logger.warning(
            "%s: cannot be synced (%s); a power cut may bring back the old file",
            folder,
            error.strerror,
        )


def _is_special(path: Path) -> bool:
    """Opening a pipe would wait for ever; replacing /dev/null would lose it."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def write_arrays(
    path: Path,
    arrays: dict[str, np.ndarray],
    about: dict[str, Any],
    before_replacing: Callable[[], None] = lambda: None,
) -> None:
    """Save `arrays` and the JSON-able facts `about` as one file, atomically (see `atomic_file`).

    Any strides and byte order; dtypes bool, (u)int8-64, float16-64. Nothing is copied but strided
    and big-endian arrays. Names are Python identifiers. TypeError or ValueError on other input,
    OSError of the system; `path` is then as before. So it is if `before_replacing` raises, which is
    called when all is written: the arrays are read twice, and must be the same.
    """
    stored: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if not (name.isascii() and name.isidentifier()) or name.startswith("__"):
            raise ValueError(f"the name of an array must be a plain identifier, not {name!r}")
        dtype = array.dtype.newbyteorder("<")
        if dtype.str not in CODES:
            raise TypeError(f"array {name!r}: a file cannot hold dtype {array.dtype}")
        stored[name] = np.asarray(array, dtype=dtype, order="C")
        if array.nbytes % ALIGNMENT:
            stored[name + ".pad"] = np.zeros(-array.nbytes % ALIGNMENT, np.uint8)
    # "." sorts before all that a name may go on with, so a pad comes right after its array
    stored = dict(sorted(stored.items()))
    with ThreadPoolExecutor(thread_count(None)) as pool:
        entries = {
            name: Entry(CODES[array.dtype.str], array.shape, _checksum(pool, _bytes(array)))
            for name, array in stored.items()
        }
    # through JSON and back: what a reader will see, such as tuples as lists and keys as text
    header = _header(entries, json.loads(json.dumps(about, allow_nan=False)))
    if len(header) > HEADER_BYTES_MAX:
        raise ValueError(f"the header takes {len(header)} bytes, more than {HEADER_BYTES_MAX}")
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for array in stored.values():
            file.write(_bytes(array))
        before_replacing()


def read_arrays(
    path: Path, mapped: tuple[str, ...] = ()
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and facts that `write` saved; every checksum is checked but those of `mapped`.

    Names in `mapped` come back as read-only np.memmap at 64-byte alignment, their bytes not
    looked at; names that the file lacks are ignored. CorruptIndexError on anything `write` cannot
    have written; OSError of the system as it is. No more memory is asked for than the file's size.
    """
    arrays, about, _ = open_arrays(path, lambda names: mapped)
    return arrays, about


def open_arrays(
    path: Path, choose: Callable[[Iterable[str]], Iterable[str]]
) -> tuple[dict[str, np.ndarray], dict[str, Any], MappedFile]:
    """As `read_arrays`, and the file, which says whether what is mapped is still as it was.

    choose: which of the arrays that the file holds, by name, are mapped.
    """
    arrays: dict[str, np.ndarray] = {}
    with open_plain(path) as file, ThreadPoolExecutor(thread_count(None)) as pool, _naming(path):
        about, entries, start = _contents(file)
        opened = MappedFile(path, file, _header_checksum(file, start))
        mapped = set(choose(entries))
        for name, entry in entries.items():
            dtype = np.dtype(DTYPES[entry.dtype])
            if name in mapped:
                arrays[name] = _mapped(file, dtype, start, entry)
            else:
                arrays[name] = _empty(entry, dtype)
                _read_array(pool, file, start, name, entry, _bytes(arrays[name]))
            start += entry.nbytes
    return {name: array for name, array in arrays.items() if "." not in name}, about, opened


def _mapped(file: FileIO, dtype: np.dtype, start: int, entry: Entry) -> np.ndarray:
    """An array of the file, of which the system reads what is asked for and nothing around it."""
    array = np.memmap(file, dtype, "r", start, entry.shape)
    if hasattr(mmap, "MADV_RANDOM"):
        array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return array


def read_some(
    file: BinaryIO, place: str, names: Iterable[str]
) -> tuple[dict[str, np.ndarray], str]:
    """Those arrays of an open file at `place`, their checksums compared; and `arrays_checksum`.

    Of the others nothing is read.
    """
    found, wanted = {}, set(names)
    with ThreadPoolExecutor(thread_count(None)) as pool, _naming(place):
        _, entries, start = _contents(file)
        checksum = _header_checksum(file, start)
        for name, entry in entries.items():
            if name in wanted:
                found[name] = _empty(entry, np.dtype(DTYPES[entry.dtype]))
                _read_array(pool, file, start, name, entry, _bytes(found[name]))
            start += entry.nbytes
    return found, checksum


def verify_arrays(path: Path) -> None:
    """Check all that `read` checks and the checksum of every array, in little memory."""
    with open_plain(path) as file:
        verify_open(file, os.fspath(path))


def verify_open(file: BinaryIO | FileIO, place: str) -> str:
    """The same, of an open file; returns its `arrays_checksum`."""
    with ThreadPoolExecutor(thread_count(None)) as pool, _naming(place):
        _, entries, start = _contents(file)
        checksum = _header_checksum(file, start)
        for name, entry in entries.items():
            _read_array(pool, file, start, name, entry, None)
            start += entry.nbytes
    return checksum


def arrays_checksum(path: Path) -> str:
    """8 hexadecimal digits of the header, which holds the checksum of every array: equal files."""
    with open_plain(path) as file, _naming(path):
        _, _, start = _contents(file)
        return _header_checksum(file, start)


def _header_checksum(file: BinaryIO | FileIO, start: int) -> str:
    file.seek(0)
    return f"{zlib.crc32(file.read(start)):08x}"


def open_plain(path: Path) -> FileIO:
    """A file, to be read; CorruptIndexError where opening it would wait for ever."""
    if _is_special(path):
        raise CorruptIndexError(f"{os.fspath(path)}: is a device, a pipe or a socket, not a file")
    return open(path, "rb", buffering=0)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path before what the functions below say is wrong."""
    try:
        yield
    except CorruptIndexError as error:
        raise CorruptIndexError(f"{os.fspath(path)}: {error}") from error.__cause__


def _header(entries: dict[str, Entry], about: dict[str, Any]) -> bytes:
    """The one header that a file of these entries (sorted by name) has."""
    facts = {
        "about": about,
        "arrays": {name: entry._asdict() for name, entry in entries.items()},
        "format_version": FORMAT_VERSION,
    }
    checksum = f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"
    text = json.dumps(facts | {"checksum": checksum}, sort_keys=True)
    table: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.nbytes
        table[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
    header = json.dumps(table, separators=(",", ":")).encode("ascii")
    return header + b" " * (-(8 + len(header)) % ALIGNMENT)


def _contents(file: BinaryIO | FileIO) -> tuple[dict[str, Any], dict[str, Entry], int]:
    """`about`, the entries in the order of the file, and where the first array starts."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(HEADER_BYTES_MAX, size - 8):
        raise CorruptIndexError(
            f"truncated, or not a saved index: a header of {length} bytes in a file of {size}"
        )
    header = file.read(length)
    try:
        facts = json.loads(json.loads(header.decode("ascii"))["__metadata__"][METADATA_KEY])
        version = facts["format_version"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptIndexError(f"not a saved index, or damaged header: {error!r:.200}") from error
    if version != FORMAT_VERSION:
        raise CorruptIndexError(
            f"format version {version!r:.40}, where this release reads {FORMAT_VERSION}"
        )
    try:
        about = dict(facts["about"])
        entries = {name: _entry(**facts["arrays"][name]) for name in sorted(facts["arrays"])}
        expected = _header(entries, about)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptIndexError(f"damaged header: {error!r:.200}") from error
    if header != expected:
        raise CorruptIndexError(
            "damaged header: its checksum, its facts and its list of arrays do not agree"
        )
    described = 8 + length + sum(entry.nbytes for entry in entries.values())
    if described != size:
        raise CorruptIndexError(
            f"truncated or overwritten: {size} bytes where the header describes {described}"
        )
    return about, entries, 8 + length


def _entry(dtype: str, shape: list[int], checksum: str) -> Entry:
    """The entry of values from a file, any of which may be hostile."""
    # numpy multiplies counts and item size in 63 bits, leaving out zeros
    is_sound = all(type(count) is int and count >= 0 for count in shape) and len(shape) <= 8
    if not is_sound or math.prod(max(count, 1) for count in shape) >= 2**59:
        raise ValueError(f"no array has the shape {shape!r}")
    return Entry(dtype, tuple(shape), checksum)


def _empty(entry: Entry, dtype: np.dtype) -> np.ndarray:
    """Uninitialised, aligned as in the file."""
    memory = np.empty(entry.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + entry.nbytes].view(dtype).reshape(entry.shape)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _combined(block_sums: Iterable[int]) -> str:
    return f"{zlib.crc32(b''.join(total.to_bytes(4, 'little') for total in block_sums)):08x}"


def _on_threads(
    pool: ThreadPoolExecutor, work: Callable[[Any], int], items: Sequence
) -> Iterator[int]:
    try:
        return pool.map(work, items)
    except RuntimeError:  # the interpreter is ending, and starts no more threads
        return map(work, items)


def _checksum(pool: ThreadPoolExecutor, view: memoryview) -> str:
    blocks = [view[start : start + BLOCK_BYTES] for start in range(0, len(view), BLOCK_BYTES)]
    return _combined(_on_threads(pool, zlib.crc32, blocks))


def _read_array(
    pool: ThreadPoolExecutor,
    file: BinaryIO | FileIO,
    start: int,
    name: str,
    entry: Entry,
    into: memoryview | None,
) -> None:
    """Read the bytes at `start` into `into`, or nowhere, and compare their checksum."""
    file_lock = Lock()  # os.preadv would need none, but not every system has it

    def read_block(first: int) -> int:
        count = min(BLOCK_BYTES, entry.nbytes - first)
        view = memoryview(bytearray(count)) if into is None else into[first : first + count]
        with file_lock:
            file.seek(start + first)
            if file.readinto(view) != count:  # type: ignore[union-attr]
                raise CorruptIndexError(f"truncated within array {name!r} while it was read")
        return zlib.crc32(view)

    found = _combined(_on_threads(pool, read_block, range(0, entry.nbytes, BLOCK_BYTES)))
    if found != entry.checksum:
        raise CorruptIndexError(
            f"array {name!r} is damaged: checksum {found}, written as {entry.checksum}"
        )
