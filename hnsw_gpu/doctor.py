"""What this machine offers: versions, threads, SIMD, the compile cache, GPUs."""

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import hnsw_gpu

PACKAGES = ("numpy", "numba", "llvmlite")
CUPY = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
NVRTC = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")
# the processor's features that the distance kernels gain from, widest first
SIMD = ("avx512vnni", "avx512bf16", "avx512f", "avxvnni", "avx2", "fma", "f16c", "sve", "neon")


def examine() -> dict[str, Any]:
    """All facts by name; values are texts, numbers or lists of texts."""
    from hnsw_gpu.engine import thread_count

    return {
        "hnsw-gpu": hnsw_gpu.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: installed(name) for name in PACKAGES},
        "processors": os.cpu_count(),
        "threads": thread_count(None),
        "simd": simd(),
        "compile_cache": compile_cache(),
        "gpus": gpus(),
        "cupy": cupy(),
        "nvrtc": nvrtc(),
        "gpu_search": gpu_search(),
    }


def cupy() -> str:
    """CuPy's distribution and version, and of NVRTC, which compiles the kernels at first use."""
    names = [name for name in CUPY if installed(name) != "not installed"]
    if not names:
        return 'not installed: pip install "hnsw-gpu[cuda12]", or [cuda13] for a driver of CUDA 13'
    nvrtc = [name for name in NVRTC if installed(name) != "not installed"]
    said = " ".join(f"{name} {installed(name)}" for name in names + nvrtc)
    return (
        said if nvrtc else f"{said}, NVRTC from the system or missing: pip install [ctk] brings it"
    )


def nvrtc() -> str:
    """The versions of NVRTC and of the driver, and whether they go together."""
    from hnsw_gpu.gpu import nvrtc_and_driver

    return nvrtc_and_driver()


def gpu_search() -> str:
    """Whether `device="cuda"` works, or what is missing."""
    from hnsw_gpu.gpu import unavailable_reason

    return unavailable_reason() or "ready"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def simd() -> str:
    """The features of `SIMD` that LLVM finds on this processor."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    found = " ".join(name for name in SIMD if features.get(name))
    return f"{found or 'none known'} ({llvm.get_host_cpu_name()})"


def compile_cache() -> str:
    """Where compiled code is kept, or why every process compiles."""
    from hnsw_gpu.engine import cache_folder

    return str(cache_folder() or "none that can be written: every process compiles again")


def gpus() -> list[str]:
    """One line a GPU, or one that says why none is seen."""
    try:
        import pynvml
    except ImportError:
        return ["unknown: pip install nvidia-ml-py shows them"]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [f"none: {error}"]
    try:
        driver = _answer(pynvml, "driver", lambda: f"driver {pynvml.nvmlSystemGetDriverVersion()}")
        count = pynvml.nvmlDeviceGetCount()
        return [f"{_describe(pynvml, i)}, {driver}" for i in range(count)] or ["none"]
    except pynvml.NVMLError as error:
        return [f"unknown: {error}"]
    finally:
        pynvml.nvmlShutdown()


def _describe(nvml: Any, number: int) -> str:
    """Name, memory and architecture; each may be what this GPU does not tell."""

    def handle() -> Any:
        return nvml.nvmlDeviceGetHandleByIndex(number)

    def memory() -> str:
        told = nvml.nvmlDeviceGetMemoryInfo(handle())
        return f"{told.total / 2**30:.0f} GiB ({told.free / 2**30:.1f} free)"

    def architecture() -> str:
        return "sm_{}{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle()))

    name = _answer(nvml, "name", lambda: nvml.nvmlDeviceGetName(handle()))
    said = [_answer(nvml, "memory", memory), _answer(nvml, "architecture", architecture)]
    return ", ".join([name, *said])


def _answer(nvml: Any, what: str, ask: Callable[[], str]) -> str:
    """What NVML says, or that it does not: of some GPUs it is asked in vain."""
    try:
        return str(ask())
    except nvml.NVMLError as error:
        return f"{what} unknown ({error})"
