"""The same search by CUDA kernels. CuPy is imported when a GPU is asked for."""

from hnsw_gpu.gpu.cupy_driver import nvrtc_and_driver
from hnsw_gpu.gpu.gpu_engine import GpuEngine, on_gpu, unavailable_reason
from hnsw_gpu.gpu.launch_plan import bytes_a_query, index_bytes

__all__ = [
    "GpuEngine",
    "bytes_a_query",
    "index_bytes",
    "nvrtc_and_driver",
    "on_gpu",
    "unavailable_reason",
]
