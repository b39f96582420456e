"""The installed CuPy, which imports where there is no driver: what the stand-in pretends is so."""

import inspect
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import emulator
import numpy as np
import pytest
from emulator import cupy_stand_in

import hnsw_gpu
from hnsw_gpu.gpu import cupy_driver, kernel_source
from hnsw_gpu.gpu.gpu_engine import GpuEngine

with warnings.catch_warnings():  # CuPy looks for CUDA, and says that there is none
    warnings.simplefilter("ignore")
    cupy = pytest.importorskip(
        "cupy", reason="the real CuPy comes with the extra `toolkit`, `cuda12` or `cuda13`"
    )
    from cupy.cuda import compiler

ERRORS = {
    "out of memory": lambda: cupy.cuda.memory.OutOfMemoryError(1 << 30, 1 << 20, 0),
    "runtime": lambda: cupy.cuda.runtime.CUDARuntimeError(2),
    "compiler": lambda: compiler.CompileException("no kernel", "", "search", ()),
    "nvrtc": lambda: cupy.cuda.nvrtc.NVRTCError(5),
}


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out of memory", "runtime"])
def test_an_error_of_cupy_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes are made of numbers: who raises one again with a text gets a TypeError."""
    error = ERRORS[name]()
    kind = MemoryError if name == "out of memory" else RuntimeError
    if emulator.missing():
        pytest.skip(emulator.missing())

    def fails(*given: Any) -> None:
        raise error

    monkeypatch.setattr(GpuEngine, "bring", fails)
    index = hnsw_gpu.Index(4, "l2")
    index.add(np.eye(4))
    with cupy_stand_in.installed():
        with pytest.raises(kind, match=r"^device='cuda': ") as raised:
            index.to("cuda")
        assert type(raised.value) is kind and str(error) in str(raised.value)
        assert index.to("auto").device == "cpu"
    assert index.search(np.eye(4), 1).labels[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["compiler", "nvrtc"])
def test_a_kernel_that_cannot_be_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ERRORS[name]()

    def fails(**given: Any) -> None:
        raise error

    if emulator.missing():
        pytest.skip(emulator.missing())
    monkeypatch.setattr(cupy_stand_in, "RawModule", fails)
    with cupy_stand_in.installed(), pytest.raises(RuntimeError) as raised:
        hnsw_gpu.Index(4, "l2", device="cuda")
    assert type(raised.value) is RuntimeError
    assert f"kernels cannot be compiled here: {error}" in str(raised.value)


@pytest.mark.parametrize(
    ("ours", "real"),
    [
        (cupy_stand_in.OutOfMemoryError(7, 5, 3), lambda: cupy.cuda.memory.OutOfMemoryError),
        (cupy_stand_in.CUDARuntimeError(35), lambda: cupy.cuda.runtime.CUDARuntimeError),
    ],
    ids=["memory", "runtime"],
)
def test_errors_are_of_the_same_kind(ours: Exception, real: Callable[[], type]) -> None:
    assert type(ours).__name__ == real().__name__
    assert type(ours).__mro__[1:] == real().__mro__[1:]
    with pytest.raises(TypeError):
        real()("a text")
    with pytest.raises((TypeError, KeyError)):
        type(ours)("a text")  # type: ignore[arg-type]


# --- signatures -----------------------------------------------------------------------------------


def parameters(function: Any) -> dict[str, bool]:
    """Names, each with whether it can be given by place; of compiled code from its docstring."""
    try:
        known = inspect.signature(function).parameters.values()
        if not {"args", "kwargs"} <= {one.name for one in known}:
            return {
                one.name: one.kind is not one.KEYWORD_ONLY
                for one in known
                if one.name not in ("self", "cls") and one.kind is not one.VAR_KEYWORD
            }
    except ValueError:
        pass
    found = re.findall(r"^[\w.]+\((.*?)\)", function.__doc__.replace("\\", ""), re.MULTILINE)
    assert found, function
    names: dict[str, bool] = {}
    for text in found:  # what Cython writes, and what CuPy does
        by_place = True
        for part in text.split(","):
            name = part.split("=")[0].split()[-1] if part.strip() else ""
            if name == "*":
                by_place = False
            elif name not in ("", "self", "cls") and not name.startswith("*"):
                names.setdefault(name, by_place)
    return names


MODULE = ["empty", "zeros", "asarray", "from_dlpack", "ascontiguousarray", "concatenate"]
METHODS = {
    "ndarray": ["set", "get", "sort", "copy"],
    "RawModule": ["get_function"],
    "RawKernel": ["__call__"],
    "cuda.Stream": ["from_external", "is_capturing", "synchronize", "wait_event", "record"],
    "cuda.Event": ["record", "synchronize"],
    "cuda.Device": ["synchronize"],
}
CONSTRUCTORS = ["RawModule", "cuda.Stream", "cuda.Event", "cuda.Device"]
FUNCTIONS = [
    *MODULE,
    *("get_default_memory_pool", "cuda.get_current_stream", "cuda.is_available"),
    "cuda.alloc_pinned_memory",
    *("cuda.nvrtc.getVersion", "cuda.nvrtc.getSupportedArchs"),
    *("cuda.runtime.driverGetVersion", "cuda.runtime.getDeviceCount"),
    "cuda.runtime.getDeviceProperties",
]


def named(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def stood_in_for() -> list[tuple[str, Any, Any]]:
    both = (cupy_stand_in, cupy)
    pairs = [(name, *(named(one, name) for one in both)) for name in FUNCTIONS]
    for kind, methods in METHODS.items():
        pairs += [
            (f"{kind}.{name}", *(getattr(named(one, kind), name) for one in both))
            for name in methods
        ]
    for kind in CONSTRUCTORS:
        ours, real = (named(one, kind) for one in both)
        compiled = isinstance(real.__init__, type(object.__init__))
        pairs.append((kind, ours.__init__, real if compiled else real.__init__))
    return pairs


@pytest.mark.parametrize(
    ("name", "ours", "real"), [pytest.param(*one, id=one[0]) for one in stood_in_for()]
)
def test_the_stand_in_takes_what_cupy_takes(name: str, ours: Any, real: Any) -> None:
    taken, offered = parameters(ours), parameters(real)
    if set(offered) in ({"args"}, set()) and taken:
        pytest.fail(f"{name}: what CuPy takes is not known: {real.__doc__!r}")
    by_place = [one for one, can in taken.items() if can]
    if name not in ("cuda.nvrtc.getVersion", "cuda.runtime.getDeviceProperties"):
        assert set(taken) <= set(offered)
        order = [one for one in offered if one in by_place]
        # what we give by place lies at the same place
        positions = min(len(by_place), 2)
        assert by_place[:positions] == order[:positions]
    assert all(offered.get(one, True) for one in by_place[:1])


@pytest.mark.parametrize(
    "name",
    [
        *("num_regs", "max_dynamic_shared_size_bytes", "preferred_shared_memory_carveout"),
        *(f"Device.{name}" for name in ("id", "mem_info", "compute_capability")),
        *(f"Event.{name}" for name in ("done",)),
        *(f"ndarray.{name}" for name in ("data", "device", "flags", "nbytes", "ndim", "shape")),
        *(f"ndarray.{name}" for name in ("__cuda_array_interface__", "__dlpack_device__")),
        *(f"MemoryPool.{name}" for name in ("free_bytes", "free_all_blocks")),
        "Stream.__cuda_stream__",
    ],
)
def test_what_is_looked_up_is_there(name: str) -> None:
    kind, _, attribute = name.rpartition(".")
    holder = {"": cupy.RawKernel, "ndarray": cupy.ndarray}.get(kind)
    assert hasattr(getattr(cupy.cuda, kind, None) if holder is None else holder, attribute)


# --- compiling ------------------------------------------------------------------------------------


def test_what_nvrtc_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our options, and those that the proofs suppose CuPy to add; and the real NVRTC takes them."""
    import cuda_toolkit

    told: list[tuple[str, ...]] = []
    made: list[bytes] = []

    class Program(compiler._NVRTCProgram):
        def compile(self, options: tuple[str, ...] = (), log_stream: Any = None) -> Any:
            told.append(options)
            return super().compile(options, log_stream)

    class Module:
        def load(self, cubin: bytes) -> None:
            made.append(cubin)

        def _set_mapping(self, mapping: Any) -> None:
            pass

    try:
        major, _ = cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    monkeypatch.setattr(compiler, "_NVRTCProgram", Program)
    for name in ("_get_nvrtc_version", "_get_cupy_cache_key", "_get_max_compute_capability",
                 "_get_arch_for_options_for_nvrtc"):  # fmt: skip
        function = getattr(compiler, name)  # kept for each device, of which there is none
        monkeypatch.setattr(compiler, name, getattr(function, "__wrapped__", function))
    monkeypatch.setattr(compiler, "_preprocess", lambda *given: "")
    monkeypatch.setattr(compiler.function, "Module", Module)
    definitions = kernel_source.definitions("l2", "fp32", 100, 16, 1)
    options = kernel_source.options(definitions)
    source = kernel_source.source("keys_to_labels")
    compiler._compile_module_with_cache(source, options, arch="90")
    extra = {"-arch=sm_90", *cuda_toolkit.CUPY_OPTIONS}
    assert told[0][: len(options)] == options
    assert set(told[0][len(options) :]) - {"--pch"} == extra
    assert made[0][:4] == b"\x7fELF" and major >= 12


# --- without a driver, and at home nowhere --------------------------------------------------------


def test_what_is_missing_is_said() -> None:
    if cupy.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match=r"NVIDIA.*driver"):
        cupy_driver.cupy_with_a_gpu()
    assert cupy_driver.nvrtc_and_driver().startswith(("NVRTC ", "unknown: "))


PROGRAM = """
import numpy as np
import hnsw_gpu
rows = np.eye(8, dtype=np.float32)
index = hnsw_gpu.Index(8, "l2", device="auto")
index.add(rows)
index.save("docs.hnsw")
found = hnsw_gpu.load("docs.hnsw").search(rows, 1)
assert found.labels[:, 0].tolist() == list(range(8)), found
try:
    index.to("cuda")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("home", ["/dev/null/nowhere", "/proc/nowhere"])
def test_an_unwritable_home(home: str, tmp_path: Any) -> None:
    """CuPy makes a folder there while it is imported, and the CPU has nothing to do with it."""
    environment = {name: value for name, value in os.environ.items() if name != "CUPY_CACHE_DIR"}
    path = os.pathsep.join(str(place) for place in sys.path if place)
    environment |= {"HOME": home, "PYTHONPATH": path}
    command = [sys.executable, "-c", PROGRAM]

    def said(**more: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "CuPy, whose import fails" in said() and "CUPY_CACHE_DIR" in said()
    assert "import fails" not in said(CUPY_CACHE_DIR=str(tmp_path / "kernels"))


def test_the_wheels_are_of_one_cuda() -> None:
    """NVRTC is of the CUDA that CuPy is made for: it takes the newest that is installed."""
    built_for = cupy.cuda.runtime.runtimeGetVersion() // 1000
    try:
        major, _ = cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")
    assert major == built_for
    assert isinstance(cupy.cuda.nvrtc, types.ModuleType)
