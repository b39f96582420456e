"""Kernels launched on a GPU, called as the emulator's library is: pointers to the host's arrays."""

from typing import Any

import numpy as np

from hnsw_gpu.gpu import kernel_source


class Library:
    """A kernel compiled by CuPy. Arrays go up before a launch; what may be written comes back."""

    def __init__(self, kernel: str, definitions: dict[str, int], source: str | None) -> None:
        import cupy

        code = kernel_source.source(kernel) if source is None else source
        module = cupy.RawModule(code=code, options=kernel_source.options(definitions))
        self._kernel = module.get_function(kernel)
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self._kernel.max_dynamic_shared_size_bytes = properties["sharedMemPerBlockOptin"]

    def launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[np.ndarray, ...],
        memory: list[np.ndarray],
        *,
        shared_mem: int = 0,
        seed: int | None = None,  # a GPU chooses the order of lanes itself
    ) -> None:
        import cupy

        held = {array.ctypes.data: (array, cupy.asarray(array)) for array in memory if array.size}
        given = tuple(_on_device(argument, held) for argument in args)
        self._kernel(grid, block, given, shared_mem=shared_mem)
        cupy.cuda.Device().synchronize()
        for array, copy in held.values():
            if array.flags.writeable:
                array[...] = copy.get()


def _on_device(struct: np.ndarray, held: dict[int, tuple[np.ndarray, Any]]) -> np.ndarray:
    """The struct with addresses on the GPU in place of the host's."""
    copy = struct.copy()
    for name in struct.dtype.names or ():
        address = int(struct[name][0])
        if struct.dtype[name] == np.uint64 and address:
            copy[name] = held[address][1].data.ptr if address in held else 0
    return copy
