"""Execute the CUDA kernels, unmodified, on the CPU.

    library = emulator.compile("search", definitions)
    library.launch(grid, block, args, shared_mem=4096, seed=1)

The call is CuPy's (`RawKernel(grid, block, args, shared_mem=...)`), and `seed` draws the order in
which lanes run: a kernel that is right gives the same bits for every seed. Whatever a kernel may
not do - a collective with absent lanes, a deadlock, shared memory the device does not have - is a
`KernelError` that names block, thread and line. `cuda_emulator.h` has the words, `scheduler.cpp`
the fibers: about 37 million steps of a thread (from one collective to the next) a second and core.

Builds: plain; "address" (AddressSanitizer and UndefinedBehaviorSanitizer) and "thread"
(ThreadSanitizer: lanes are ordered by `__syncthreads` and `__syncwarp` alone, blocks by nothing),
both within `run_sanitized`.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "emulator"

SANITIZERS = (None, "address", "thread")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
INSTRUMENT = {
    None: [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
TELL = {
    "address": ["-DEMULATE_ADDRESS"],
    "thread": ["-DEMULATE_THREAD"],
}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}

SCALARS = {
    "unsigned char": np.uint8,
    "int": np.int32,
    "unsigned": np.uint32,
    "unsigned int": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
}

MAX_THREADS = 1024  # of a block
MAX_SHARED = 227 * 1024  # bytes a block, compute capability 9.0


class KernelError(Exception):
    """The kernel did, or was launched with, what CUDA does not allow."""


class Parameter(NamedTuple):
    """Of a kernel: `const float* x` is `Parameter("x", "float", True, True)`."""

    name: str
    type: str
    is_pointer: bool
    is_const: bool


# --- compilers ---


@functools.cache
def compiler() -> tuple[str, ...]:
    """The command of a C++20 compiler; empty where there is none."""
    if os.environ.get("CXX"):
        return tuple(shlex.split(os.environ["CXX"]))
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return (name,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    return ()


@functools.cache
def missing(sanitizer: str | None = None) -> str:
    """What this machine lacks for a build; empty when nothing."""
    if not compiler():
        return "no C++ compiler: set CXX, or install g++, clang++ or the package ziglang"
    if sanitizer and "clang" in _version()[-1]:
        return "the sanitizers are gcc's, and the compiler is clang"
    if sanitizer in RUNTIMES and not runtime(sanitizer):
        return f"{compiler()[0]} has no {RUNTIMES[sanitizer]}"
    if sanitizer == "thread" and _run([*_fixed_addresses(), "true"]).returncode != 0:
        return "setarch -R is refused, which the thread sanitizer needs"
    return ""


def runtime(sanitizer: str) -> str:
    """Path of a sanitizer's library; empty where the compiler has none."""
    answer = _run([*compiler(), f"-print-file-name={RUNTIMES[sanitizer]}"])
    path = answer.stdout.strip()
    return path if answer.returncode == 0 and os.path.isabs(path) else ""


def _run(command: list[str], **settings) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **settings)


def _fixed_addresses() -> list[str]:
    """The prefix of a command that gets no random addresses."""
    setarch = shutil.which("setarch")
    return [setarch, os.uname().machine, "-R"] if setarch else ["false"]


# --- builds ---


def compile(
    name: str,
    definitions: dict[str, int] | None = None,
    *,
    sanitizer: str | None = None,
    source: str | None = None,
) -> "Library":
    """The kernel `name`, specialised and loaded; compiled where that was not done before.

    Without `source`, the text is that of the package's kernel. The "address" and "thread" builds
    load only in a process that `run_sanitized` started.
    """
    if sanitizer not in SANITIZERS:
        raise ValueError(f"sanitizer is one of {SANITIZERS}, not {sanitizer!r}")
    if missing(sanitizer):
        raise FileNotFoundError(missing(sanitizer))
    if source is None:
        from hnsw_gpu.gpu import kernel_source

        source = kernel_source.source(name)
    else:
        source = f'#line 1 "{name}.cu"\n{source}'
    parameters, bounds = signature(source, name)
    text = f'#include "cuda_emulator.h"\n{source}\n{_entry(name, parameters, bounds)}'
    macros = [f"-D{key}={value}" for key, value in sorted((definitions or {}).items())]
    return Library(name, _built(name, text, macros, sanitizer), parameters, sanitizer)


def signature(source: str, name: str) -> tuple[list[Parameter], str]:
    """Parameters of a kernel, and the text of its launch bounds."""
    found = re.search(
        r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\((?P<bounds>[^{;]*?)\)\s*)?'
        rf"{name}\s*\((?P<parameters>[^)]*)\)",
        re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL),
    )
    if found is None:
        raise ValueError(f'the source has no extern "C" __global__ void {name}(...)')
    texts = [text.strip() for text in found["parameters"].split(",") if text.strip()]
    return [_parameter(text) for text in texts], found["bounds"] or str(MAX_THREADS)


def _parameter(text: str) -> Parameter:
    kind, parameter = re.fullmatch(r"(.*?)(\w+)", text, re.DOTALL).groups()
    words = re.sub(r"\bconst\b|__restrict__|\*", " ", kind).split()
    return Parameter(parameter, " ".join(words), "*" in kind, kind.startswith("const"))


def _entry(name: str, parameters: list[Parameter], bounds: str) -> str:
    """C++ that calls the kernel with an array of pointers to its arguments, and tells of it."""
    types = [f"{parameter.type}{'*' * parameter.is_pointer}" for parameter in parameters]
    values = ", ".join(f"*({kind}*)arguments[{i}]" for i, kind in enumerate(types))
    sizes = ", ".join([*(f"sizeof({kind})" for kind in types), "0"])
    return f"""#line 1 "the entry of {name}"
extern "C" void emulator_entry(void** arguments) {{ {name}({values}); }}
extern "C" {{ extern const unsigned long long emulator_sizes[], emulator_bounds[]; }}
const unsigned long long emulator_sizes[] = {{{sizes}}};
const unsigned long long emulator_bounds[] = {{{bounds}}};
"""


def _built(name: str, text: str, macros: list[str], sanitizer: str | None) -> Path:
    """Path of the library of a kernel."""
    # The scheduler is not instrumented, only told of the sanitizer.
    scheduler = _object(_text("scheduler.cpp"), [*FLAGS, *TELL.get(sanitizer, [])], "scheduler")
    flags = [*FLAGS, *_processor_flags(), *INSTRUMENT[sanitizer], *macros]
    objects = [scheduler, _object(text, flags, name)]
    # -Bsymbolic: a kernel may be named like a function that the process has already.
    link = ["-shared", "-Wl,-Bsymbolic", *INSTRUMENT[sanitizer]]
    return _made([*link, *map(str, objects)], f"{name}-{sanitizer or 'plain'}", ".so")


def _text(part: str) -> str:
    return f'#line 1 "{HERE / part}"\n' + (HERE / part).read_text(encoding="utf-8")


def _object(text: str, flags: list[str], name: str) -> Path:
    return _made(["-c", f"-I{HERE}", *flags], name, ".o", text)


def _made(arguments: list[str], name: str, suffix: str, text: str = "") -> Path:
    """What the compiler makes of its arguments and of the C++ `text`, made once.

    Files are named by the hash of all that they are made of.
    """
    headers = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.h"))]
    origin = "\0".join([text, *headers, *_version(), *arguments])
    path = BUILD / f"{name}-{hashlib.sha256(origin.encode()).hexdigest()[:16]}{suffix}"
    if path.exists():
        return path
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        if text:
            (Path(folder) / f"{name}.cpp").write_text(text, encoding="utf-8")
            arguments = [*arguments, f"{name}.cpp"]
        command = [*compiler(), *arguments, "-o", path.name]
        # a compiler with a sanitizer under it takes several times as long
        plainly = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = _run(command, cwd=folder, env=plainly)
        if done.returncode != 0:
            raise KernelError(f"{shlex.join(command)}\n{done.stderr}")
        os.replace(Path(folder) / path.name, path)
    return path


@functools.cache
def _version() -> tuple[str, ...]:
    return (*compiler(), _run([*compiler(), "--version"]).stdout)


@functools.cache
def _processor_flags() -> tuple[str, ...]:
    """Instructions that make fmaf and halves fast, and change no bit."""
    flags = []
    if sys.platform == "linux":
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        flags = [f"-m{word}" for word in ("fma", "f16c") if word in words]
    return tuple(flags)


# --- launches ---


@functools.cache
def _lock_of(path: Path) -> threading.Lock:
    """One for all that load this file: its scheduler's state is global."""
    return threading.Lock()


class Library:
    """A compiled kernel.

    steps: how often a lane met others in the last launch, summed over lanes.
    max_shared: bytes of dynamic shared memory that the pretended device gives to a block.
    limit_s: seconds of processor time after which a plain launch is given up.
    """

    def __init__(
        self, name: str, path: Path, parameters: list[Parameter], sanitizer: str | None
    ) -> None:
        self.name = name
        self.path = path
        self.parameters = parameters
        self.sanitizer = sanitizer
        self.steps = 0
        self.max_shared = MAX_SHARED
        self.limit_s = 300
        self._lock = _lock_of(path)
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_launch.restype = ctypes.c_char_p
        sizes = (ctypes.c_uint64 * len(parameters)).in_dll(self._library, "emulator_sizes")
        self._sizes = list(sizes)
        self._bounds = ctypes.c_uint64.in_dll(self._library, "emulator_bounds").value

    def launch(self, grid, block, args, shared_mem: int = 0, seed: int = 0) -> None:
        """Run the kernel on `grid` blocks of `block` threads (tuples of up to three).

        args: for a pointer an array; for a struct a structured array of one element; for a number
        a numpy scalar. Raises TypeError where that is not what the signature says, and KernelError.
        """
        sizes = [*_three("grid", grid), *_three("block", block)]
        threads = sizes[3] * sizes[4] * sizes[5]
        most = min(self._bounds, MAX_THREADS)
        if threads > most:
            raise KernelError(f"{self.name}: {threads} threads a block, of at most {most}")
        if not 0 <= shared_mem <= self.max_shared:
            raise KernelError(
                f"{self.name}: {shared_mem} bytes of shared memory a block; the device has "
                f"{self.max_shared}"
            )
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, not {len(args)}")
        values = [self._value(i, argument) for i, argument in enumerate(args)]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(v.ctypes.data for v in values))
        steps = ctypes.c_uint64()
        with self._lock:
            message = self._library.emulator_launch(
                (ctypes.c_uint * 6)(*sizes),
                pointers,
                ctypes.c_size_t(shared_mem),
                ctypes.c_uint64(seed),
                ctypes.c_uint(self.limit_s),
                ctypes.byref(steps),
            ).decode()
        self.steps = steps.value
        if message:
            raise KernelError(f"{self.name}: {message}")

    def _value(self, i: int, argument) -> np.ndarray:
        """What the kernel's parameter `i` is made of: an array of its bytes."""
        parameter, given = self.parameters[i], getattr(argument, "dtype", type(argument))
        what = f"{self.name}: {parameter.name}"
        expected = SCALARS.get(parameter.type)
        if parameter.is_pointer:
            if not isinstance(argument, np.ndarray) or not argument.flags.c_contiguous:
                raise TypeError(f"{what} is a pointer: a contiguous array is expected, not {given}")
            if expected is not None and argument.dtype != expected:
                raise TypeError(f"{what} is {parameter.type}*, not an array of {given}")
            if not parameter.is_const and not argument.flags.writeable:
                raise TypeError(f"{what} is written to, and the array is read-only")
            return np.array(argument.ctypes.data, np.uint64)
        if expected is not None:
            if not isinstance(argument, np.generic) or argument.dtype != expected:
                raise TypeError(f"{what} is {parameter.type}: a numpy scalar, not {given}")
            return np.array(argument)
        if not isinstance(argument, np.ndarray) or argument.shape != (1,):
            raise TypeError(f"{what} is a struct: an array of one element is expected, not {given}")
        if argument.dtype.itemsize != self._sizes[i] or not _is_struct(parameter.type, given):
            raise TypeError(
                f"{what} is a {parameter.type} of {self._sizes[i]} bytes, not {given}"
                f" of {argument.dtype.itemsize}"
            )
        return argument.copy()


def _three(what: str, sizes) -> list[int]:
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    largest = [2**31 - 1, 65535, 65535] if what == "grid" else [1024, 1024, 64]
    sizes += [1] * (3 - len(sizes))
    if len(sizes) != 3 or not all(1 <= a <= b for a, b in zip(sizes, largest, strict=True)):
        raise KernelError(f"a {what} of {sizes}, where CUDA takes 1 to {largest}")
    return sizes


def _is_struct(name: str, dtype: np.dtype) -> bool:
    """Whether a dtype is that of the package's struct; of another's, only the size is known."""
    from hnsw_gpu.gpu import kernel_structs

    try:
        return dtype == kernel_structs.struct_dtype(name)
    except ValueError:
        return True


# --- sanitizers ---


def run_sanitized(sanitizer: str, *arguments: str, timeout_s: float = 600) -> str:
    """Run Python with `arguments` ("-c", code, or a file) under a sanitizer; returns its output.

    There, `emulator.compile(..., sanitizer=sanitizer)` works. Raises KernelError with the
    sanitizer's report, or with whatever else ended the process.
    """
    options = "abort_on_error=0:exitcode=66:"
    settings = {
        "LD_PRELOAD": runtime(sanitizer),
        "ASAN_OPTIONS": options + "detect_leaks=0",
        "UBSAN_OPTIONS": options + "print_stacktrace=1",
        "TSAN_OPTIONS": options + "halt_on_error=1:history_size=5",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *HERE.parents[:2]))),
    }
    prefix = _fixed_addresses() if sanitizer == "thread" else []
    done = _run(
        [*prefix, sys.executable, *arguments],
        env={**os.environ, **settings},
        timeout=timeout_s,
    )
    if done.returncode != 0:
        raise KernelError(done.stderr or f"exit status {done.returncode}")
    return done.stdout
