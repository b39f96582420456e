"""NVIDIA's compiler and disassembler out of their PyPI wheels: no driver, no GPU, no CuPy.

NVRTC compiles one program at a time in a process, whatever the threads, so many programs are
compiled by several processes. nvdisasm takes a third of a second to start: the machine code of many
kernels goes through it in one piece.
"""

import ctypes
import multiprocessing
import os
import re
import struct
import subprocess
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

WHEELS = {
    "nvidia-cuda-nvrtc": r"libnvrtc\.so\.\d+",
    "nvidia-cuda-runtime": r"cuda_fp16\.h",
    "nvidia-cuda-crt": r"host_defines\.h",
    "nvidia-cuda-nvdisasm": r"nvdisasm",
}
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # that CuPy adds by itself
INSTRUCTION_BYTES = 16


class Toolkit(NamedTuple):
    version: str  # of all wheels
    nvrtc: Path
    nvdisasm: Path
    include: Path


class Job(NamedTuple):
    """A kernel to compile: its pasted source, name and options, the number of an architecture."""

    source: str
    kernel: str
    options: tuple[str, ...]
    arch: int


class Compiled(NamedTuple):
    """What became of a job; the figures are those of a thread, and none where there is an error."""

    error: str
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    static_shared: int = 0
    code: bytes = b""


def find() -> Toolkit:
    """The installed wheels; LookupError says what is missing."""
    files, versions = {}, {}
    for wheel, pattern in WHEELS.items():
        try:
            found = metadata.distribution(wheel)
        except metadata.PackageNotFoundError:
            raise LookupError(f"{wheel} is not installed") from None
        versions[wheel] = found.version
        paths = [file for file in found.files or [] if re.fullmatch(pattern, file.name)]
        if not paths:
            raise LookupError(f"{wheel} {found.version} has no file {pattern} here")
        files[wheel] = Path(str(found.locate_file(min(paths, key=lambda path: len(path.parts)))))
    if len(set(versions.values())) > 1:
        raise LookupError(f"the wheels are of different versions: {versions}")
    return Toolkit(
        version=versions["nvidia-cuda-nvrtc"],
        nvrtc=files["nvidia-cuda-nvrtc"],
        nvdisasm=files["nvidia-cuda-nvdisasm"],
        include=files["nvidia-cuda-runtime"].parent,
    )


def options(toolkit: Toolkit, kernel_options: tuple[str, ...]) -> tuple[str, ...]:
    """What CuPy's RawModule tells NVRTC when it is given `kernel_options`, and to report."""
    return (*kernel_options, *CUPY_OPTIONS, f"-I{toolkit.include}", "--ptxas-options=-v")


def compile_all(toolkit: Toolkit, jobs: list[Job]) -> list[Compiled]:
    """Every job, in order, by as many processes as there are processors."""
    library = [str(toolkit.nvrtc)] * len(jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        return list(pool.map(compile_one, library, jobs, chunksize=4))


def compile_one(library: str, job: Job) -> Compiled:
    log, cubin = compile_cubin(library, job)
    if not cubin:
        return Compiled(error=log)
    return _report(log, job.kernel)._replace(code=section(cubin, f".text.{job.kernel}"))


def compile_cubin(library: str, job: Job) -> tuple[str, bytes]:
    """The compiler's log, and what it made of a job: nothing where there is an error."""
    return _compiled(library, job, f"-arch=sm_{job.arch}", "CUBIN")


def compile_ptx(library: str, job: Job) -> tuple[str, str]:
    """The log, and the PTX with its lines."""
    lined = job._replace(options=(*job.options, "-lineinfo"))
    log, text = _compiled(library, lined, f"-arch=compute_{job.arch}", "PTX")
    return log, text.decode().rstrip("\0")


def _compiled(library: str, job: Job, arch: str, what: str) -> tuple[str, bytes]:
    nvrtc = ctypes.CDLL(library)
    program = ctypes.c_void_p()
    text, file = job.source.encode(), f"{job.kernel}.cu".encode()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, file, 0, None, None)
    assert status == 0, f"nvrtcCreateProgram: error {status}"
    given = [option.encode() for option in (*job.options, arch)]
    status = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    log = _output(nvrtc, program, "ProgramLog").decode().rstrip("\0")
    made = b"" if status else _output(nvrtc, program, what)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log, made


def _output(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    memory = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc, f"nvrtcGet{what}")(program, memory) == 0
    return memory.raw


def _report(log: str, kernel: str) -> Compiled:
    """The figures in what ptxas says of a kernel, which must be the only function."""
    functions = re.findall(r"Function properties for (\S+)", log)
    if functions != [kernel]:
        return Compiled(error=f"functions {functions} instead of {kernel} alone: {log}")
    frame = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    registers = re.search(r"Used (\d+) registers", log)
    assert frame and registers, log
    shared = re.search(r"(\d+) bytes smem", log)
    return Compiled(
        error="\n".join(line for line in log.splitlines() if "warning" in line),
        registers=int(registers[1]),
        stack_bytes=int(frame[1]),
        spill_bytes=int(frame[2]) + int(frame[3]),
        static_shared=int(shared[1]) if shared else 0,
    )


def section(elf: bytes, name: str) -> bytes:
    """A section of a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_at = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = headers[names_at][4]
    for header in headers:
        start = names + header[0]
        if elf[start : elf.index(b"\0", start)].decode() == name:
            return elf[header[4] : header[4] + header[5]]
    raise ValueError(f"no section {name}")


def disassemble(toolkit: Toolkit, codes: Iterable[bytes], arch: int, folder: Path) -> list[str]:
    """The instructions of every piece of machine code, a line each; `folder` is for a file."""
    codes = list(codes)
    raw = folder / f"sm_{arch}.bin"
    raw.write_bytes(b"".join(codes))
    command = [toolkit.nvdisasm, f"--binary=SM{arch}", raw]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in listing.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    assert len(lines) == sum(map(len, codes)) // INSTRUCTION_BYTES
    texts, start = [], 0
    for code in codes:
        end = start + len(code) // INSTRUCTION_BYTES
        texts.append("\n".join(lines[start:end]))
        start = end
    return texts
