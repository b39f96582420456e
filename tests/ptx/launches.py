"""Kernels compiled to PTX, and launches of them."""

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cuda_toolkit
import emulator
import numpy as np
from emulator import KernelError

from hnsw_gpu.gpu import kernel_source
from ptx.executor_library import ALLOCATION, BUILD, COUNT, SPECIAL, Launch, library
from ptx.program import Program

STEPS_LIMIT = 2_000_000_000


@functools.cache
def missing() -> str:
    """What this machine lacks; empty when nothing."""
    if not emulator.compiler():
        return emulator.missing()
    try:
        cuda_toolkit.find()
    except LookupError as reason:
        return str(reason)
    return ""


def compile(
    name: str, definitions: dict[str, int], *, arch: int, source: str | None = None
) -> "Library":
    """The kernel `name`, specialised, as PTX for compute capability `arch` (90 is 9.0).

    Without `source`, the text is that of the package's kernel.
    """
    toolkit = cuda_toolkit.find()
    options = cuda_toolkit.options(toolkit, kernel_source.options(definitions))
    job = cuda_toolkit.Job(source or kernel_source.source(name), name, options, arch)
    return compile_text(_kept_text(toolkit, job))


def _kept_text(toolkit: cuda_toolkit.Toolkit, job: cuda_toolkit.Job) -> str:
    """The PTX of a job, which is kept in a file named by the hash of all that it is made of."""
    origin = repr((job, toolkit.version))
    path = BUILD / f"{job.kernel}-{hashlib.sha256(origin.encode()).hexdigest()[:16]}.ptx"
    if not path.exists():
        log, text = cuda_toolkit.compile_ptx(str(toolkit.nvrtc), job)
        if not text:
            raise KernelError(log)
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / path.name
            made.write_text(text)
            os.replace(made, path)
    return path.read_text()


@functools.lru_cache(64)
def compile_text(text: str) -> "Library":
    """A kernel given as PTX."""
    return Library(Program(text))


class Profile(NamedTuple):
    """Of a launch: what was read of each array, and counts of each instruction.

    What is read, and units (32-byte sectors of global memory, wavefronts of shared memory), is
    counted in the converged schedule only.
    """

    program: Program
    memory: list[np.ndarray]
    bytes_read: np.ndarray  # of each array in `memory`
    sectors_read: np.ndarray
    executions: np.ndarray  # by a group of lanes together
    lanes: np.ndarray
    units: np.ndarray

    def read_of(self, array: np.ndarray) -> tuple[int, int]:
        """Bytes and sectors."""
        (i,) = (i for i, one in enumerate(self.memory) if one is array)
        return int(self.bytes_read[i]), int(self.sectors_read[i])


class Library:
    """A kernel, launched as the emulator's are."""

    def __init__(self, program: Program):
        self.program = program
        self.profile: Profile | None = None  # of the last launch that was right

    def launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[np.ndarray, ...],
        *,
        memory: Iterable[np.ndarray],
        shared_mem: int = 0,
        seed: int | None = 0,
        resident: int = 3,
    ) -> None:
        """Run the grid; KernelError says what the kernel did that it may not.

        memory: the arrays that may be touched, and written to where they are writable.
        seed: of a random schedule; None is the converged one. resident: blocks that run at once.
        """
        grid_x, grid_y = (*grid, 1)[:2]
        parameters = self._parameters(args)
        arrays = list(memory)
        allocations = np.array(
            [(one.ctypes.data, one.nbytes, one.flags.writeable, 0, 0) for one in arrays], ALLOCATION
        )
        program, counts = self.program, np.zeros(len(self.program.code), COUNT)
        launch = Launch(
            code=program.code.ctypes.data,
            length=len(program.code),
            slots=program.slots,
            constants=program.constants.ctypes.data,
            constant_count=len(program.constants),
            special=(ctypes.c_int * len(SPECIAL))(*program.special.values()),
            grid_x=grid_x,
            grid_y=grid_y,
            block=block[0],
            shared_bytes=shared_mem,
            parameter_bytes=len(parameters),
            parameters=parameters.ctypes.data,
            allocations=allocations.ctypes.data,
            allocation_count=len(allocations),
            is_converged=seed is None,
            resident=resident,
            seed=seed or 0,
            steps_limit=STEPS_LIMIT,
            counts=counts.ctypes.data,
        )
        said = library().execute_launch(ctypes.byref(launch)).decode()
        if said:
            raise KernelError("\n".join(map(self._in_words, said.splitlines())))
        read = allocations["bytes_read"], allocations["sectors_read"]
        self.profile = Profile(program, arrays, *read, *(counts[name] for name in COUNT.names))

    def _parameters(self, args: tuple[np.ndarray, ...]) -> np.ndarray:
        """The arguments, each in its place."""
        expected = [one.size for one in self.program.parameters.values()]
        sizes = [arg.nbytes for arg in args]
        assert sizes == expected, f"arguments of {sizes} bytes, the kernel takes {expected}"
        found = np.full(self.program.parameter_bytes, 0xEE, np.uint8)
        for arg, (offset, size) in zip(args, self.program.parameters.values(), strict=True):
            found[offset : offset + size] = np.frombuffer(arg.tobytes(), np.uint8)
        return found

    def _in_words(self, line: str) -> str:
        number, times, words = line.split("\t")
        place = ", inlined by ".join(f"{f}:{n}" for f, n in self.program.place[int(number)])
        return f"{words} ({times} times): {self.program.text[int(number)]}  of {place or '?'}"
