"""A folder that files are written into and read from: on this machine, or at a URL.

What lies behind a URL is fsspec's to know. A file appears under its name whole or not at all, in
both. A broken connection is tried again, a part of a file at a time; then it is a ConnectionError.
"""

import contextlib
import errno
import io
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar, cast

from hnsw_gpu.files.storage import CorruptIndexError, atomic_file, open_plain

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")  # two letters at least: C:\ is none
OURS = re.compile(r"file://|local://")  # this machine's files, by a URL
ATTEMPTS = 4
FIRST_WAIT_S = 0.5  # then twice as long, each time
PART_BYTES = 1 << 25  # that one request asks for
# They put an object whole, and know no folders; elsewhere a file is written beside, and moved.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss"}
FOR_GOOD = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError),
    *(NotImplementedError, ImportError, ValueError, TypeError),
)  # no further attempt would do better
CACHE = "HNSW_GPU_SHARD_CACHE"  # names the folder of copies

Result = TypeVar("Result")


class LocalFolder:
    """A folder of this machine's file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return LocalFolder, (self.path.absolute(),)

    def __str__(self) -> str:
        return str(self.path)

    def place(self, name: str) -> str:
        """Of a file, for people."""
        return str(self.path / name)

    def within(self, name: str) -> "LocalFolder":
        """A folder in it."""
        return LocalFolder(self.path / name)

    def names(self) -> list[str]:
        """Of what lies in it, ascending; none where there is no such folder."""
        try:
            return sorted(path.name for path in self.path.iterdir())
        except FileNotFoundError:
            return []

    def is_there(self) -> bool:
        """Is there anything of its name?"""
        return os.path.lexists(self.path)

    def has(self, name: str) -> bool:
        """Is there such a file?"""
        return os.path.lexists(self.path / name)  # a link that leads nowhere is told when opened

    def make(self) -> None:
        """Make it, unless it is there."""
        self.path.mkdir(parents=True, exist_ok=True)

    def open(self, name: str) -> BinaryIO:
        """A file, to be read at any place; CorruptIndexError where that is no file."""
        return cast(BinaryIO, open_plain(self.path / name))

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a file, up to so many."""
        path = self.path / name
        if not path.is_file() and os.path.lexists(path):
            raise CorruptIndexError(f"{path}: is not a file")
        with open(path, "rb") as file:  # of what is not there no buffer is made
            return file.read(min(most, os.fstat(file.fileno()).st_size + 1))

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""
        with atomic_file(self.path / name) as file:
            file.write(data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write a file at, whole or not at all, that is then this one."""
        yield self.path / name

    def copy(self, name: str, known_as: str, verify: Callable[[Path], object]) -> Path:
        """The file itself: it is here."""
        return self.path / name

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.path / name).unlink()

    def remove_itself(self) -> None:
        """Remove the folder; OSError where anything is left in it."""
        self.path.rmdir()


class RemoteFolder:
    """What lies under a URL that fsspec knows.

    options: of its file system, such as `key`, `secret` and `endpoint_url` of S3: fsspec's
    `storage_options`. They are in no message, and in each pickle.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self._url, self._options = url.rstrip("/"), dict(options or {})

    def __str__(self) -> str:
        return self._url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._url.rpartition("/")[2]

    @property
    def parent(self) -> "RemoteFolder":
        """The folder that it lies in."""
        return RemoteFolder(self._url.rpartition("/")[0], self._options)

    def place(self, name: str) -> str:
        return f"{self._url}/{name}"

    def within(self, name: str) -> "RemoteFolder":
        return RemoteFolder(self.place(name), self._options)

    def names(self) -> list[str]:
        def look() -> list[str]:
            system, path = self._at()
            try:
                found = system.ls(path, detail=False)
            except FileNotFoundError:
                return []
            here = path.strip("/")
            inside = [str(name).strip("/") for name in found]
            return sorted(name.rpartition("/")[2] for name in inside if name != here)

        return self._tried("", look)

    def is_there(self) -> bool:
        return bool(self.names())

    def has(self, name: str) -> bool:
        try:
            self._size(name)
        except FileNotFoundError:
            return False
        return True

    def make(self) -> None:
        def make() -> None:
            system, path = self._at()
            if not _is_object_store(system):
                system.makedirs(path, exist_ok=True)

        self._tried("", make)

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, _RemoteFile(self, name, self._size(name)))

    def read(self, name: str, most: int) -> bytes:
        with self.open(name) as file:
            return file.read(most)

    def write(self, name: str, data: bytes) -> None:
        self._put(name, lambda system, path: system.pipe_file(path, data))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            file = Path(place) / name
            yield file
            self._put(name, lambda system, path: system.put_file(str(file), path))

    def copy(self, name: str, known_as: str, verify: Callable[[Path], object]) -> Path:
        """A copy of a file on this machine, made once and kept.

        known_as: changes when the file does. verify: told the path of a new copy, and raises where
        it is not to be kept.
        """
        of = blake2b(f"{self.place(name)} {known_as}".encode(), digest_size=8).hexdigest()
        path = _cache_folder() / f"{of}-{name}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as into, self.open(name) as file:
                while part := file.read(PART_BYTES):
                    into.write(part)
                into.flush()
                verify(Path(into.name))
        return path

    def remove(self, name: str) -> None:
        def remove() -> None:
            system, path = self._at(name)
            system.rm_file(path)

        self._tried(name, remove)

    def remove_itself(self) -> None:
        def remove() -> None:
            system, path = self._at()
            if not _is_object_store(system):
                system.rmdir(path)

        self._tried("", remove)

    # ---------------------------------------------------------------- fsspec

    def _at(self, name: str = "") -> tuple[Any, str]:
        """The file system, and the path there of a file, or of the folder."""
        place = self.place(name) if name else self._url
        try:
            from fsspec.core import url_to_fs

            system, path = url_to_fs(place, **self._options)
        except ImportError as error:
            raise ImportError(f'{place}: {error}: pip install "hnsw-gpu[remote]"') from None
        system.invalidate_cache()  # of listings: others write there too
        return system, path

    def _size(self, name: str) -> int:
        def look() -> int:
            system, path = self._at(name)
            return int(system.info(path)["size"])

        return self._tried(name, look)

    def _bytes(self, name: str, start: int, stop: int) -> bytes:
        def look() -> bytes:
            system, path = self._at(name)
            found = bytes(system.cat_file(path, start=start, end=stop))
            if len(found) != stop - start:
                raise ConnectionError(f"{len(found)} bytes came of {stop - start}")
            return found

        return self._tried(name, look)

    def _put(self, name: str, put: Callable[[Any, str], object]) -> None:
        def write() -> None:
            system, path = self._at(name)
            if _is_object_store(system):
                put(system, path)
                return
            folder, _, last = path.rpartition("/")
            beside = f"{folder}/.{last}.{secrets.token_hex(8)}.tmp"
            system.makedirs(folder, exist_ok=True)
            put(system, beside)
            system.mv(beside, path)

        self._tried(name, write)

    def _tried(self, name: str, do: Callable[[], Result]) -> Result:
        """What `do` returns, tried again where that may help."""
        place = self.place(name) if name else self._url
        for attempt in range(ATTEMPTS):
            try:
                return do()
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place) from None
            except PermissionError as error:
                raise PermissionError(f"{place}: {_told(error)}") from None
            except FOR_GOOD:
                raise
            except Exception as error:  # each file system has errors of its own
                if attempt == ATTEMPTS - 1:
                    raise ConnectionError(
                        f"{place}: no answer, tried {ATTEMPTS} times: {_told(error)}"
                    ) from error
            time.sleep(FIRST_WAIT_S * 2**attempt)
        raise AssertionError


class _RemoteFile(io.RawIOBase):
    """A file at a URL, of which each part that is read is asked for by itself."""

    def __init__(self, folder: RemoteFolder, name: str, size: int) -> None:
        self._folder, self._name, self._size, self._place = folder, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._place))
        for start in range(0, count, PART_BYTES):
            part = min(PART_BYTES, count - start)
            at = self._place + start
            view[start : start + part] = self._folder._bytes(self._name, at, at + part)
        self._place += count
        return count


Folder: TypeAlias = LocalFolder | RemoteFolder
Place: TypeAlias = str | os.PathLike[str] | Folder


def is_url(place: object) -> bool:
    """Is it a URL, rather than a path?"""
    return isinstance(place, str) and URL.match(place) is not None


def folder_at(place: Place, storage_options: Mapping[str, Any] | None = None) -> Folder:
    """The folder of a path or a URL; a Folder itself. Nothing is looked at yet."""
    if isinstance(place, (LocalFolder, RemoteFolder)):
        return place
    if isinstance(place, str) and is_url(place) and not OURS.match(place):
        return RemoteFolder(place, storage_options)
    if storage_options:
        raise ValueError(f"storage_options are of a URL, such as s3://..., not of {place}")
    return LocalFolder(Path(OURS.sub("", os.fspath(place), count=1)))


def _is_object_store(system: Any) -> bool:
    names = system.protocol
    return not OBJECT_STORES.isdisjoint([names] if isinstance(names, str) else names)


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _cache_folder() -> Path:
    """Of the copies on this machine."""
    given = os.environ.get(CACHE)
    if given:
        return Path(given)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "hnsw_gpu" / "shards"
