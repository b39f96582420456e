"""CuPy and the driver: are they there, and what is missing?"""

import os
from typing import Any

_cuda_process = 0  # that first found a GPU here: CUDA works in no fork of it


def imported_cupy() -> Any:
    """CuPy; RuntimeError says why it cannot be had. It makes a folder while it is imported."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            'a GPU search needs CuPy: pip install "hnsw-gpu[cuda12]", or "hnsw-gpu[cuda13]" where '
            f"the driver is of CUDA 13 ({error})"
        ) from error
    except Exception as error:
        raise RuntimeError(
            f"a GPU search needs CuPy, whose import fails: {error}; it keeps kernels in the home "
            "folder, or in the one that CUPY_CACHE_DIR names"
        ) from error
    return cupy


def cupy_with_a_gpu(number: int | None = None) -> Any:
    """CuPy, with a GPU to use: that of a number, or any; RuntimeError says what is missing."""
    global _cuda_process
    cupy = imported_cupy()
    runtime = cupy.cuda.runtime
    if _cuda_process not in (0, os.getpid()):
        raise RuntimeError(
            "CUDA was started by the process that forked this one, and works in no forked process: "
            'start processes by "spawn"'
        )
    if cupy.cuda.is_available():
        _cuda_process = os.getpid()
        count = runtime.getDeviceCount()
        if number is not None and number >= count:
            known = ", ".join(f"cuda:{i}" for i in range(count))
            raise RuntimeError(f"there is no GPU {number}: the driver knows of {known}")
        return cupy
    version = runtime.driverGetVersion()
    if not version:
        raise RuntimeError("a GPU search needs NVIDIA's driver, and there is none here")
    driver = f"the NVIDIA driver (CUDA {_version(version)})"
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"{driver} offers no GPU to CuPy {cupy.__version__}: {error}; is CUDA_VISIBLE_DEVICES "
            "right, and is CuPy made for this CUDA?"
        ) from error
    raise RuntimeError(f"{driver} knows of no GPU")


def require_capability(cupy: Any, properties: Any, least_major: int) -> None:
    """RuntimeError where the kernels, or this NVRTC, are not for a GPU of such properties."""
    major, minor = properties["major"], properties["minor"]
    capability = f"the GPU's compute capability is {major}.{minor}"
    if major < least_major:
        raise RuntimeError(f"{capability}, and the kernels need {least_major}.0 or more")
    try:
        least = min(cupy.cuda.nvrtc.getSupportedArchs())
    except Exception:  # no NVRTC: who compiles says what is missing
        return
    if 10 * major + minor < least:
        raise RuntimeError(
            f"{capability}, and NVRTC {_nvrtc(cupy)} compiles for {least // 10}.{least % 10} or "
            'more: use CUDA 12, pip install "hnsw-gpu[cuda12]" in an environment without CUDA 13'
        )


def nvrtc_and_driver() -> str:
    """Versions of NVRTC, which compiles the kernels, and of the driver; which one is too new."""
    try:
        cupy = imported_cupy()
        nvrtc = _nvrtc(cupy)
    except Exception as error:  # of CuPy, of a library that is not there
        return f"unknown: {error}"
    driver = cupy.cuda.runtime.driverGetVersion()
    said = f"NVRTC {nvrtc}, driver for CUDA {_version(driver)}" if driver else f"NVRTC {nvrtc}"
    return f"{said}{newer_nvrtc(cupy)}"


def newer_nvrtc(cupy: Any) -> str:
    """What to do where NVRTC is newer than the driver; empty where it is not."""
    try:
        nvrtc, driver = cupy.cuda.nvrtc.getVersion(), cupy.cuda.runtime.driverGetVersion()
    except Exception:  # one of them is not there, which others say
        return ""
    if not driver or nvrtc <= (driver // 1000, driver % 1000 // 10):
        return ""
    if nvrtc[0] == driver // 1000:
        return "; NVRTC is newer than the driver, of the same major version: that works"
    return (
        f"; NVRTC {_nvrtc(cupy)} is newer than the driver, which loads nothing that it compiles: "
        f'update the driver, or pip install "hnsw-gpu[cuda{driver // 1000}]" in an environment '
        "without wheels of another CUDA"
    )


def _nvrtc(cupy: Any) -> str:
    return ".".join(map(str, cupy.cuda.nvrtc.getVersion()))


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
