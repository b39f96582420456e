"""The caller's arrays in the GPU's memory: taken where they are, on the caller's stream."""

from typing import Any

import numpy as np

from hnsw_gpu.gpu.device_index import end_of_work

CUDA_MEMORY = (2, 13)  # device types of DLPack: plain, managed


class DeviceArrays:
    """Takes queries (q, dim) and gives results on one GPU.

    Queries are CuPy arrays, or offer DLPack or `__cuda_array_interface__`. A stream has
    `__cuda_stream__`; None is CuPy's current one. CuPy's arrays do not know which stream writes
    them: they are taken to be ready when CuPy's current stream has come so far.
    """

    def __init__(self, cupy: Any, device: Any, dim: int) -> None:
        self._cupy, self._device, self._dim = cupy, device, dim

    def stream(self, given: Any) -> Any:
        """CuPy's stream for the caller's, which has `__cuda_stream__`; None: CuPy's current.

        It waits for what is on CuPy's current stream now.
        """
        cupy = self._cupy
        current = cupy.cuda.get_current_stream(self._device.id)
        stream = current if given is None else cupy.cuda.Stream.from_external(given)
        if stream.is_capturing():
            raise RuntimeError(
                "stream: is capturing a CUDA graph, and a search cannot be captured: it allocates "
                "as it goes"
            )
        if stream.ptr != current.ptr:
            with self._device:
                written = end_of_work(cupy)
                written.record(current)
                stream.wait_event(written)
        return stream

    def vectors(self, queries: Any) -> Any:
        """float32 (q, dim) in C order, in place where they are that already."""
        array = self._taken("queries", queries)
        if array.ndim != 2 or array.shape[1] != self._dim:
            raise ValueError(f"queries: shape {array.shape}, expected (q, {self._dim})")
        return self._cupy.ascontiguousarray(array, np.float32)

    def result(self, out: tuple[Any, Any] | None, shape: tuple[int, int]) -> tuple[Any, Any]:
        """Labels int64 and distances float32 of a shape: the caller's, or new ones."""
        if out is None:
            return self._cupy.empty(shape, np.int64), self._cupy.empty(shape, np.float32)
        labels, distances = (self._taken("out", array) for array in out)
        for array, dtype in ((labels, np.int64), (distances, np.float32)):
            if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(
                    f"out: {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}, C order"
                )
        return labels, distances

    def _taken(self, name: str, given: Any) -> Any:
        """A CuPy array of what lies on this GPU; the current stream waits for its producer."""
        cupy = self._cupy
        if not isinstance(given, cupy.ndarray):
            if hasattr(given, "__dlpack_device__") and given.__dlpack_device__()[0] in CUDA_MEMORY:
                given = cupy.from_dlpack(given)
            elif hasattr(given, "__cuda_array_interface__"):
                given = cupy.asarray(given)
            else:
                raise TypeError(f"{name}: {type(given).__name__}, expected an array on the GPU")
        if given.device.id != self._device.id:
            raise ValueError(
                f"{name}: on GPU {given.device.id}, and the index is on GPU {self._device.id}"
            )
        return given

    def to_host(self, queries: Any, stream: Any = None) -> np.ndarray:
        """A copy of an array on this GPU, when `stream` has come so far."""
        with self._device, self.stream(stream) as current:
            return np.asarray(self._taken("queries", queries).get(current))

    def to_device(
        self, labels: np.ndarray, distances: np.ndarray, stream: Any, out: tuple[Any, Any] | None
    ) -> tuple[Any, Any]:
        """CuPy copies of a result (q, k), or `out` with its values, in the order of `stream`."""
        with self._device, self.stream(stream) as current:
            found = self.result(out, labels.shape)
            for array, values in zip(found, (labels, distances), strict=True):
                array.set(values, current)
            current.synchronize()  # the host's copies end here
        return found
