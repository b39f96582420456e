"""CuPy and the driver: are they there, and what is missing?"""

from typing import Any


def cupy_with_a_gpu() -> Any:
    """CuPy, with a GPU to use; RuntimeError says what is missing."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            'a GPU search needs CuPy: pip install "hnsw-gpu[cuda12]", or "hnsw-gpu[cuda13]" where '
            f"the driver is of CUDA 13 ({error})"
        ) from error
    if cupy.cuda.is_available():
        return cupy
    runtime = cupy.cuda.runtime
    version = runtime.driverGetVersion()
    if not version:
        raise RuntimeError("a GPU search needs NVIDIA's driver, and there is none here")
    driver = f"the NVIDIA driver (CUDA {version // 1000}.{version % 1000 // 10})"
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"{driver} offers no GPU to CuPy {cupy.__version__}: {error}; is CUDA_VISIBLE_DEVICES "
            "right, and is CuPy made for this CUDA?"
        ) from error
    raise RuntimeError(f"{driver} knows of no GPU")
