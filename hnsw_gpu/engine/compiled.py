"""The one place that compiles: `jit`, and its cache of machine code on disk, which is never stale.

Compiled functions are inlined into each other across files, so the code of one is fresh only while
every source of this room is unchanged. numba's own cache looks at a function's own file.

A file of the cache holds one function for one signature and one processor, in its name:

    stamp    32 bytes, of the sources and of the versions of what compiles them
    digest   32 bytes, of name, stamp and code
    code     as numba pickles it

Another stamp means stale, another digest damaged; either is compiled anew and replaced. A file is
written beside and moved into place, so processes that fill the cache at once do not meet. Where
nothing can be read or written, code is compiled in memory, and a warning says so once.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import njit
from tqdm import tqdm

from hnsw_gpu.engine.workers import run_to_a_stop

try:  # without it inner functions are compiled alone too, which takes longer and gives the same
    from hnsw_gpu.engine.parts import PartCompiler
except ImportError:
    PartCompiler = None  # type: ignore[assignment, misc]

try:  # what is used of numba's insides for the cache, beside `_cache` of a compiled function
    from numba.core.caching import NullCache
    from numba.core.compiler import CompileResult
    from numba.core.serialize import dumps
except ImportError as error:
    NullCache, CompileResult, dumps = object, None, None
    MISSING = str(error)
else:
    MISSING = ""

ENGINE = Path(__file__).parent
VERSIONS = (numba.__version__, llvmlite.__version__, np.__version__)
PYTHON = (sys.implementation.cache_tag, getattr(sys, "abiflags", ""))
HASH_BYTES = 32
NOT_KEPT = "compiled code is not kept on disk, so every process compiles again: %s"
DAMAGED = "compiled code on disk cannot be used and is compiled again: %s"
COMPILING = (
    "compiling for this processor, some seconds; the code is kept for later processes, and "
    "`hnsw-gpu warm` makes it beforehand"
)
SAID: set[str] = set()  # warnings that this process has given
QUIET_S = 60  # after it was said that something is compiled
INNER: dict[str, Any] = {
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}  # numba's options of inner functions
if PartCompiler is not None:
    INNER["pipeline_class"] = PartCompiler

logger = logging.getLogger("hnsw_gpu")
_said_compiling = float("-inf")  # when


def _let_forks_wait() -> None:
    """No process is forked while a thread compiles: in it numba's lock would stay locked."""
    try:
        from numba.core.compiler_lock import global_compiler_lock as lock
    except ImportError:
        return
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )


_let_forks_wait()


def jit(
    function: Any = None,
    *,
    allocates: bool = False,
    is_inner: bool = False,
    is_inlined: bool = False,
    fastmath: Any = False,
) -> Any:
    """Decorator: compile at the first call with new types, without the GIL, and keep the code.

    A function may inline whatever lies in this room or in its own file. One that makes arrays says
    `allocates=True`; the others do without counted references. A closure is not kept. fastmath: as
    in numba; where the order of a sum may differ from machine to machine (so of no distance).

    `is_inner=True`: called from compiled code only, of which it becomes a part, so that no machine
    code is made of it alone. `is_inlined=True`: so too, and inlined, however long it is.
    """
    if function is None:
        return functools.partial(
            jit, allocates=allocates, is_inner=is_inner, is_inlined=is_inlined, fastmath=fastmath
        )
    is_inner |= is_inlined
    options = INNER if is_inner else {"no_cfunc_wrapper": True}
    options = options | ({} if allocates else {"_nrt": False})
    compiled = njit(nogil=True, fastmath=fastmath, forceinline=is_inlined, **options)(function)
    if is_inner:
        compiled.__class__ = _inner(compiled.__class__)
        return compiled
    if hasattr(compiled, "_compile_for_args"):  # else numba is made otherwise
        compiled.__class__ = _outer(compiled.__class__)
    if MISSING or not hasattr(compiled, "_cache"):
        _say_once(NOT_KEPT, MISSING or f"numba {numba.__version__} has no place for a cache")
    elif function.__closure__ is None:
        compiled._cache = DiskCache(function)
    return compiled


def has_feature(context: Any, name: str) -> bool:
    """Has the processor that an intrinsic is compiled for "avx2", "f16c", ...?"""
    return f"+{name}" in context.codegen().magic_tuple()[2].split(",")


@functools.cache
def _outer(kind: type) -> type:
    """A kind of compiled function that the main thread has another one compile, and waits for it.

    Else what a signal handler raises, KeyboardInterrupt for one, may leave numba's lock held, for
    which everybody else would wait, or LLVM with half of its work.
    """

    def _compile_for_args(self: Any, *arguments: Any, **named: Any) -> Any:
        compile_it = functools.partial(kind._compile_for_args, self, *arguments, **named)  # type: ignore[attr-defined]
        if threading.current_thread() is not threading.main_thread():
            return compile_it()
        found: list[Any] = []
        run_to_a_stop(lambda _: found.append(compile_it()))
        return found[0]

    return type("Outer", (kind,), {"_compile_for_args": _compile_for_args})


@functools.cache
def _inner(kind: type) -> type:
    """A kind of compiled function that has no code for callers in Python, and says so."""

    def __call__(self: Any, *_arguments: Any) -> None:
        raise TypeError(f"{self.__name__} is called from compiled code only")

    return type("Inner", (kind,), {"__call__": __call__})


class DiskCache(NullCache):  # type: ignore[misc]
    """What numba asks for a function's code before it compiles, and gives the code to after."""

    def __init__(self, function: Any) -> None:
        self._source = Path(function.__code__.co_filename)
        self._function = f"{self._source.stem}.{function.__qualname__}".replace("<locals>", "")
        self._stamp = source_stamp(self._source)  # now: of the sources that are being imported

    @property
    def cache_path(self) -> str:
        return str(next(places(self._source), ""))

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The code of a signature, or None."""
        try:
            target.refresh()
            name = self._file_name(signature, target.codegen())
            for place in places(self._source) if self._stamp else ():
                code = self._read(place / name)
                if code is not None:
                    return CompileResult._rebuild(target, *code)
        except Exception as error:  # whatever it is, the function can be compiled
            _say_once(DAMAGED, repr(error))
        _say_compiling()
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep compiled code in the first place that takes it."""
        try:
            if result.library.has_dynamic_globals or result.lifted:
                return  # it holds addresses of this process
            if self._stamp != source_stamp(self._source):
                return  # the sources have changed since they were imported
            if not self._stamp:
                raise FileNotFoundError(f"no sources in {ENGINE}")
            name = self._file_name(signature, result.codegen)
            code = dumps(result._reduce())
            self._write(name, self._stamp + self._digest(name, code) + code)
        except Exception as error:  # the code itself is sound, and in memory
            _say_once(NOT_KEPT, error if isinstance(error, OSError) else repr(error))

    def _file_name(self, signature: Any, codegen: Any) -> str:
        """Of the function, the types, the processor and the settings that change the code."""
        settings = [str(getattr(numba.config, name, "")) for name in ("OPT", "BOUNDSCHECK")]
        key = repr((signature, codegen.magic_tuple(), PYTHON, settings))
        return f"{self._function}-{_hash(key.encode()).hex()[:24]}.nbc"

    def _digest(self, name: str, code: bytes) -> bytes:
        return _hash(name.encode() + self._stamp + code)

    def _read(self, path: Path) -> Any:
        """What numba pickled into a file that is fresh and sound, or None."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        stamp, digest = content[:HASH_BYTES], content[HASH_BYTES : 2 * HASH_BYTES]
        code = content[2 * HASH_BYTES :]
        if digest != self._digest(path.name, code):
            if stamp == self._stamp or len(content) < 2 * HASH_BYTES:
                _say_once(DAMAGED, path)
            return None
        return pickle.loads(code)

    def _write(self, name: str, content: bytes) -> None:
        troubles = []
        for place in places(self._source):
            beside = place / f"{name}.{secrets.token_hex(8)}"
            try:
                place.mkdir(parents=True, exist_ok=True)
                try:
                    beside.write_bytes(content)
                    beside.replace(place / name)
                    return
                finally:
                    with contextlib.suppress(OSError):
                        beside.unlink(missing_ok=True)
            except OSError as error:
                troubles.append(str(error))
        raise OSError("; ".join(troubles) or "there is no place for it")


def cache_folder() -> Path | None:
    """Where the code is kept that is compiled next; None: no folder for it can be written."""
    for place in places(Path(__file__)):
        there = place
        while not there.exists():
            there = there.parent
        if os.access(there, os.W_OK):
            return place
    return None


def places(source: Path) -> Iterator[Path]:
    """Folders for the code of one source file: $NUMBA_CACHE_DIR, or beside it, or the user's."""
    folder = f"{source.parent.name}_{_hash(str(source.parent).encode()).hex()[:24]}"
    if numba.config.CACHE_DIR:
        yield Path(numba.config.CACHE_DIR) / folder
        return
    yield source.parent / "__pycache__"
    with contextlib.suppress(RuntimeError):  # there is no home
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        yield caches / "hnsw_gpu" / folder


def source_stamp(source: Path) -> bytes:
    """Hash of all sources of this room, of `source` and of the compilers; empty without sources."""
    try:
        names = [os.path.join(ENGINE, name) for name in os.listdir(ENGINE) if name.endswith(".py")]
        hashes = [_file_hash(name, _state(name)) for name in sorted({*names, str(source)})]
    except OSError:
        return b""
    return _hash(repr((VERSIONS, hashes)).encode())


@functools.lru_cache(256)
def _file_hash(file: str, state: tuple[int, ...]) -> tuple[str, bytes]:
    """Name and hash of a file, which is read again where its `state` is another."""
    return os.path.basename(file), _hash(Path(file).read_bytes())


def _state(file: str) -> tuple[int, ...]:
    facts = os.stat(file)
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _say_compiling() -> None:
    """One line for all that is compiled in a minute, on stderr if that is a terminal."""
    global _said_compiling
    now = time.monotonic()
    if now - _said_compiling < QUIET_S:
        return
    _said_compiling = now
    with contextlib.suppress(Exception):  # there is no stderr, or nobody behind it
        if sys.stderr.isatty():
            tqdm.write(f"hnsw_gpu: {COMPILING}", file=sys.stderr)  # above a bar that is drawn
            return
    logger.info(COMPILING)


def _say_once(message: str, what: object) -> None:
    if message not in SAID:
        SAID.add(message)
        logger.warning(message, what)
