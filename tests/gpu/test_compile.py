"""The kernels compile for every GPU: no spills, registers as planned, rows by 16-byte loads.

Needs the wheels nvidia-cuda-nvrtc, -runtime, -crt and -nvdisasm, but neither a GPU nor a driver.
What the compiler makes of them is kept in `baselines/compile.txt`, to be reviewed as a diff:

    HNSW_GPU_WRITE_BASELINES=1 python -m pytest tests/gpu/test_compile.py
"""

import ctypes
import difflib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import cuda_toolkit
import pairwise
import pytest
from cuda_toolkit import Compiled, Job

from hnsw_gpu.gpu import kernel_source, kernel_structs, launch_plan

pytestmark = pytest.mark.slow

try:
    TOOLKIT = cuda_toolkit.find()
except LookupError as reason:
    pytest.skip(str(reason), allow_module_level=True)

ARCHS = (75, 80, 86, 89, 90, 100, 120)
KERNELS = {  # and the structs they are given
    "search": ("Graph", "Task"),
    "compare": ("Comparison",),
    "encode": ("Encoding",),
    "keys_to_labels": ("KeysToLabels",),
}
READ_ROWS = ("search", "compare")
FACTORS = {
    "dim": (1, 31, 100, 128, 768, 1536, 4096),
    "metric": ("l2", "ip", "cosine"),
    "dtype": ("fp32", "fp16", "int8", "int4"),
    "M": (8, 16, 32),
    "warps": (1, 4, 8),
    "tag_bits": (16, 32),
    "has_allowed_keys": (False, True),
    "arch": ARCHS,
}
# What the model of the manual reckons with (H100, L40S and 4090, A10, T4), beside the covering.
MODELLED = [
    {"dim": dim, "metric": "cosine", "dtype": "int4", "M": 16, "warps": 1, "tag_bits": 16}
    | {"has_allowed_keys": False, "arch": arch}
    for dim in (100, 128, 768)
    for arch in (75, 86, 89, 90)
]
EFS = (64, 128, 512)
K = 10
NODES = {16: 10**6, 32: 10**9}  # by the width of a tag
BASELINE = Path(__file__).parent / "baselines" / "compile.txt"
HOW_TO_WRITE = "HNSW_GPU_WRITE_BASELINES=1 python -m pytest tests/gpu/test_compile.py"
DESCRIPTION = f"""\
# What NVRTC makes of the kernels, for each compute capability (sm_90 is 9.0).
#
# The list of specialisations holds every pair of values of metric, dtype, dim, M, warps, tag bits,
# "an allowed list is kept" and compute capability, and what the model of the manual is made of; a
# kernel is named with the constants that its text makes use of, and has a number where it was
# compiled. The second table is of the launch
# plan, k = {K}, {NODES[16]:,} nodes (16-bit tags) or {NODES[32]:,}; it has no line where the plan
# takes another number of warps for a query.
#
# Written by   {HOW_TO_WRITE}
# Another compiler gives other numbers: they are compared by this version alone.
#
# compiler: NVRTC {TOOLKIT.version}
"""


class Unit(NamedTuple):
    """A kernel with the definitions that its text uses, and an architecture."""

    kernel: str
    definitions: tuple[tuple[str, int], ...]
    arch: int


def covered() -> list[dict]:
    rows = pairwise.every_row(FACTORS)
    return pairwise.covering(lambda: rows, pairwise.all_pairs(FACTORS))


def used(text: str, definitions: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """The definitions that occur in a kernel's text: the others cannot change it."""
    return tuple((name, v) for name, v in definitions.items() if re.search(rf"\b{name}\b", text))


def job(kernel: str, definitions: dict[str, int], arch: int, text: str = "") -> Job:
    """`kernel`, or `text` in its place, as CuPy would compile it."""
    options = cuda_toolkit.options(TOOLKIT, kernel_source.options(definitions))
    return Job(text or kernel_source.source(kernel), kernel, options, arch)


def compile_text(
    text: str, kernel: str = "search", definitions: dict[str, int] | None = None, arch: int = 90
) -> Compiled:
    """One kernel, in this process."""
    return cuda_toolkit.compile_one(str(TOOLKIT.nvrtc), job(kernel, definitions or {}, arch, text))


@pytest.fixture(scope="module")
def specialised() -> dict[Unit, dict]:
    """Every unit to compile, with the arguments of the first specialisation that it belongs to."""
    units: dict[Unit, dict] = {}
    for kernel, row in itertools.product(KERNELS, covered() + MODELLED):
        text, arguments = kernel_source.source(kernel), dict(row)
        arch = arguments.pop("arch")
        definitions = used(text, kernel_source.definitions(**arguments))
        units.setdefault(Unit(kernel, definitions, arch), arguments)
    return units


@pytest.fixture(scope="module")
def compiled(specialised) -> dict[Unit, Compiled]:
    jobs = [job(unit.kernel, dict(unit.definitions), unit.arch) for unit in specialised]
    return dict(zip(specialised, cuda_toolkit.compile_all(TOOLKIT, jobs), strict=True))


@pytest.fixture(scope="module")
def instructions(compiled, tmp_path_factory) -> dict[Unit, str]:
    folder, listed = tmp_path_factory.mktemp("code"), {}
    for arch in ARCHS:
        units = [unit for unit, made in compiled.items() if unit.arch == arch and made.code]
        codes = [compiled[unit].code for unit in units]
        texts = cuda_toolkit.disassemble(TOOLKIT, codes, arch, folder)
        listed |= dict(zip(units, texts, strict=True))
    return listed


# --- every kernel ---------------------------------------------------------------------------------


def offences(kernel: str, made: Compiled) -> list[str]:
    """What the compiler's report has against a kernel."""
    cap = kernel_source.REGISTERS_CAP[kernel]
    if made.error:
        return [made.error]
    found = {
        f"{made.spill_bytes} bytes of spills": made.spill_bytes,
        f"a stack frame of {made.stack_bytes} bytes": made.stack_bytes,
        f"{made.static_shared} bytes of static shared memory": made.static_shared,
        f"{made.registers} registers, the plan reckons with {cap}": made.registers > cap,
    }
    return [words for words, is_so in found.items() if is_so]


def code_offences(kernel: str, text: str) -> list[str]:
    """What the machine code of a kernel has against it."""
    found = {
        "local memory is read or written": re.search(r"\b(LDL|STL)\b", text),
        "no row is read by 16-byte loads": kernel in READ_ROWS
        and not re.search(r"\bLDG\.E\.(\w+\.)*(128|256)\b", text),
        # (Division and square root, which only the others use, keep them on their way.)
        "subnormal numbers are kept": kernel in READ_ROWS
        and re.search(r"\bF(ADD|MUL|FMA)\b(?!\.FTZ)", text),
    }
    return [words for words, is_so in found.items() if is_so]


def named(unit: Unit) -> str:
    return f"{unit.kernel} sm_{unit.arch} {label(unit.definitions)}"


def label(definitions: tuple[tuple[str, int], ...]) -> str:
    """Definitions as a person reads them."""
    names = {"METRIC": FACTORS["metric"], "DTYPE": FACTORS["dtype"]}
    return " ".join(
        names[name][value] if name in names else f"{name if name == 'M' else name.lower()}={value}"
        for name, value in definitions
    )


def test_the_compiler_has_nothing_against_the_kernels(compiled):
    assert {
        named(unit): found for unit, made in compiled.items() if (found := offences(unit[0], made))
    } == {}


def test_machine_code(instructions):
    assert {
        named(unit): found
        for unit, text in instructions.items()
        if (found := code_offences(unit.kernel, text))
    } == {}


def test_every_pair_of_values_is_compiled(specialised):
    covered = [
        arguments | {"arch": unit.arch}
        for unit, arguments in specialised.items()
        if unit.kernel == "search"
    ]
    for (a, values), (b, others) in itertools.combinations(FACTORS.items(), 2):
        assert {(c[a], c[b]) for c in covered} == set(itertools.product(values, others))
    for kernel in KERNELS:
        assert {unit.arch for unit in specialised if unit.kernel == kernel} == set(ARCHS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_structs_are_laid_out_as_the_compiler_does(kernel):
    """What `struct_dtype` says of sizes and offsets, asserted in the kernel itself."""
    text = kernel_source.source(kernel)
    for struct in KERNELS[kernel]:
        dtype = kernel_structs.struct_dtype(struct)
        facts = [f"sizeof({struct}) == {dtype.itemsize}"]
        for name, (kind, offset) in dtype.fields.items():
            facts.append(f"__builtin_offsetof({struct}, {name}) == {offset}")
            facts.append(f"sizeof({struct}::{name}) == {kind.itemsize}")
        text += "".join(f"\nstatic_assert({fact});" for fact in facts)
    definitions = kernel_source.definitions("l2", "fp32", 100, 16, 1)
    assert compile_text(text, kernel, definitions).error == ""
    wrong = compile_text(text + f"\nstatic_assert(!({facts[0]}));", kernel, definitions)
    assert "static assertion failed" in wrong.error


def test_flags_are_those_of_cupy():
    """C++17 and flushed subnormals; what CuPy adds by itself is read in its text, where it is."""
    options = job("search", kernel_source.definitions("l2", "fp32", 1, 8, 1), 90).options
    assert {"--std=c++17", "-ftz=true"} < set(options)
    assert compile_text(f"static_assert(__cplusplus == 201703L);\n{SMALL}").error == ""
    found = importlib.util.find_spec("cupy")
    if found is not None and found.origin is not None:
        compiler = (Path(found.origin).parent / "cuda" / "compiler.py").read_text()
        for option in cuda_toolkit.CUPY_OPTIONS:
            assert f"options += ('{option}',)" in compiler


# --- a check that cannot fail proves nothing ------------------------------------------------------

SMALL = """extern "C" __global__ void search(const uint4* rows, float* out) {
    const uint4 row = rows[threadIdx.x];
    out[threadIdx.x] = __uint_as_float(row.x ^ row.y ^ row.z ^ row.w) * 3.0f;
}
"""
MANY_VALUES = """extern "C" __global__ void BOUNDS search(const uint4* rows, uint4* out) {
    uint4 held[48];
#pragma unroll
    for (int i = 0; i < 48; i++) held[i] = rows[i * 32 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 48; i++) out[i * 32 + threadIdx.x] = held[47 - i];
}
"""
INDEXED = """extern "C" __global__ void search(const uint4* rows, const int* at, unsigned* out) {
    unsigned held[64];
    for (int i = 0; i < 64; i++) held[at[i] & 63] = rows[i].x ^ rows[i].y ^ rows[i].z ^ rows[i].w;
    for (int i = 0; i < 64; i++) out[i] = held[at[i + 64] & 63];
}
"""
STATIC = SMALL.replace("{\n", "{\n    __shared__ float kept[64];\n").replace(
    "out[threadIdx.x] =", "kept[threadIdx.x] = 1; __syncthreads(); out[threadIdx.x] = kept[at] *"
)
FAULTS = {
    "": SMALL,
    "bytes of spills": MANY_VALUES.replace("BOUNDS", "__launch_bounds__(1024, 1)"),
    "a stack frame of 256 bytes": INDEXED,
    "registers, the plan reckons with 128": MANY_VALUES.replace(
        "BOUNDS", "__launch_bounds__(32, 1)"
    ),
    "bytes of static shared memory": STATIC.replace("at]", "out[0] > 0]"),
    'identifier "rowz" is undefined': SMALL.replace("row.w", "rowz.w"),
    "instead of search alone": SMALL + SMALL.replace(" search", " other"),
    'warning #177-D: variable "unused" was declared': SMALL.replace("{\n", "{\n    int unused;\n"),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported(fault, arch):
    found = offences("search", compile_text(FAULTS[fault], arch=arch))
    assert any(fault in words for words in found) if fault else found == []


CODE_FAULTS = {
    "": SMALL,
    "local memory is read or written": INDEXED,
    "no row is read by 16-byte loads": SMALL.replace("uint4", "uint2").replace(
        "^ row.z ^ row.w", ""
    ),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_faults_of_machine_code_are_reported(fault, arch, tmp_path):
    """Each in its place, among pieces of code that have no fault."""
    codes = [compile_text(text, arch=arch).code for text in (SMALL, CODE_FAULTS[fault], SMALL)]
    texts = cuda_toolkit.disassemble(TOOLKIT, codes, arch, tmp_path)
    expected = [[], [fault] if fault else [], []]
    assert [code_offences("search", text) for text in texts] == expected


def test_kept_subnormal_numbers_are_reported(tmp_path):
    given = job("search", {}, 90, SMALL)
    without = given._replace(options=tuple(o for o in given.options if o != "-ftz=true"))
    codes = [cuda_toolkit.compile_one(str(TOOLKIT.nvrtc), made).code for made in (given, without)]
    texts = cuda_toolkit.disassemble(TOOLKIT, codes, 90, tmp_path)
    found = [code_offences("search", text) for text in texts]
    assert found == [[], ["subnormal numbers are kept"]]


def test_errors_keep_their_position(tmp_path, monkeypatch):
    """NVRTC names the header and the line that the mistake is in, though all is one text."""
    for path in kernel_source.folder().iterdir():
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(kernel_source, "folder", lambda: tmp_path)
    lines = (tmp_path / "beam.cuh").read_text().splitlines()
    lines[30] += " int mistake = nothing;"
    (tmp_path / "beam.cuh").write_text("\n".join(lines))
    definitions = kernel_source.definitions("l2", "fp32", 100, 16, 1)
    error = compile_text(kernel_source.source("search"), "search", definitions).error
    assert re.search(r'beam\.cuh\(31\): error: identifier "nothing" is undefined', error)


# --- occupancy ------------------------------------------------------------------------------------

OCCUPANCY = """
#include <cstring>
#include <climits>
#include <cuda_occupancy.h>

struct Limits { int sms, block, sm, reserved, registers, threads, blocks; };

// Blocks of `threads` that an SM holds; negative: the header's error.
extern "C" int resident(int arch, Limits limits, int threads, int registers, int shared) {
    cudaOccDeviceProp device;
    device.computeMajor = arch / 10;
    device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = limits.threads;
    device.regsPerBlock = device.regsPerMultiprocessor = limits.registers;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = limits.sm;
    device.numSms = limits.sms;
    device.sharedMemPerBlockOptin = limits.block;
    device.reservedSharedMemPerBlock = limits.reserved;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = threads;
    function.numRegs = registers;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = shared;
    function.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    int error = cudaOccMaxActiveBlocksPerMultiprocessor(
        &result, &device, &function, &state, threads, shared);
    return error ? -error : result.activeBlocksPerMultiprocessor;
}
"""


class CLimits(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in launch_plan.Limits._fields]


@pytest.fixture(scope="module")
def occupancy(tmp_path_factory) -> ctypes.CDLL:
    """NVIDIA's own arithmetic, compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no g++ to compile cuda_occupancy.h with")
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "occupancy.cpp").write_text(OCCUPANCY)
    command = [compiler, "-shared", "-fPIC", f"-I{TOOLKIT.include}", "occupancy.cpp", "-o", "it.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "it.so"))


@pytest.mark.parametrize("arch", ARCHS)
def test_resident_blocks_are_those_of_cuda_occupancy(arch, occupancy):
    limits = launch_plan.of_arch(arch)
    sizes = [*range(0, limits.shared_per_block, 997), limits.shared_per_block]
    sizes += [limits.shared_per_block + 1, *(1 << bit for bit in range(8, 16))]
    for threads, registers, shared in itertools.product(
        (32, 64, 96, 128, 256), (16, 32, 40, 63, 64, 65, 80, 96, 105, 128, 168, 255), sizes
    ):
        made = launch_plan.resident_blocks(threads, shared, limits, registers)
        expected = occupancy.resident(arch, CLimits(*limits), threads, registers, shared)
        assert made == expected, (threads, registers, shared)


def plan_of(arguments: dict, ef: int, arch: int, registers: int) -> launch_plan.Plan | None:
    """The plan of a search that takes this specialisation; None where the plan takes another."""
    limits, warps = launch_plan.of_arch(arch), arguments["warps"]
    chosen = {name: arguments[name] for name in ("metric", "dtype", "dim", "M")}
    made = launch_plan.plan(
        **chosen,
        walk=launch_plan.BeamShape(ef, K, has_allowed_keys=arguments["has_allowed_keys"]),
        queries={8: limits.sms, 4: launch_plan.QUERIES_PER_BLOCK * limits.sms, 1: 10**6}[warps],
        nodes=NODES[arguments["tag_bits"]],
        limits=limits,
        registers=registers,
    )
    return made if made.definitions == kernel_source.definitions(**arguments) else None


def test_the_plan_keeps_its_promise(specialised, compiled, occupancy):
    """A plan made with the cap names no more blocks than cuda_occupancy.h finds room for."""
    cap, plans = kernel_source.REGISTERS_CAP["search"], 0
    for (unit, arguments), ef in itertools.product(specialised.items(), EFS):
        plan = plan_of(arguments, ef, unit.arch, cap) if unit.kernel == "search" else None
        if plan is None:
            continue
        limits, registers = launch_plan.of_arch(unit.arch), compiled[unit].registers
        room = occupancy.resident(
            unit.arch, CLimits(*limits), plan.block, registers, plan.shared_mem
        )
        assert room * limits.sms >= plan.resident > 0, (named(unit), ef)
        plans += 1
    assert plans > len(EFS) * len(ARCHS)


# --- the table ------------------------------------------------------------------------------------


def table(specialised: dict[Unit, dict], compiled: dict[Unit, Compiled]) -> str:
    """What `baselines/compile.txt` holds."""
    rows = sorted({(unit.kernel, unit.definitions) for unit in specialised})
    lines = [DESCRIPTION, heading("Registers of a thread")]
    for kernel, definitions in rows:
        made = [compiled.get(Unit(kernel, definitions, arch)) for arch in ARCHS]
        counts = ["" if unit is None else unit.registers for unit in made]
        lines.append(line(f"{kernel} {label(definitions)}", counts))
    lines.append(
        f"\n{heading('Queries that an SM holds at once, and bytes of shared memory of each')}"
    )
    for (kernel, definitions), ef in itertools.product(rows, EFS):
        if kernel != "search":
            continue
        cells, sizes = [], set()
        for arch in ARCHS:
            unit = Unit(kernel, definitions, arch)
            plan = None
            if unit in compiled:
                plan = plan_of(specialised[unit], ef, arch, compiled[unit].registers)
            if plan is None:
                cells.append("")
                continue
            blocks = plan.resident // launch_plan.of_arch(arch).sms
            cells.append(blocks * plan.queries_per_block)
            sizes.add(plan.shared_mem // plan.queries_per_block)
        if sizes:
            (size,) = sizes
            lines.append(line(f"{label(definitions)} ef={ef}: {size} bytes", cells))
    return "\n".join(lines) + "\n"


def heading(title: str) -> str:
    return line(title, [f"sm_{arch}" for arch in ARCHS])


def line(title: str, cells: list) -> str:
    return (title.ljust(82) + "".join(str(cell).rjust(7) for cell in cells)).rstrip()


def test_baseline(specialised, compiled):
    made = table(specialised, compiled)
    if os.environ.get("HNSW_GPU_WRITE_BASELINES"):
        BASELINE.parent.mkdir(exist_ok=True)
        BASELINE.write_text(made)
    kept = BASELINE.read_text()
    version = re.search(r"# compiler: NVRTC (\S+)", kept)
    if version is None or version[1] != TOOLKIT.version:
        pytest.skip(f"the baseline is of {version and version[0]}, here is {TOOLKIT.version}")
    changes = difflib.unified_diff(
        kept.splitlines(), made.splitlines(), "baseline", "now", lineterm="", n=0
    )
    assert "\n".join(changes) == "", f"to accept it: {HOW_TO_WRITE}"
