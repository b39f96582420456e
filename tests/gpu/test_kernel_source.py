"""Kernels as text: pasted headers, specialisation, and structs laid out as C lays them out."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="properties are tested with the extra `test`")

from hypothesis import given
from hypothesis import strategies as st

from hnsw_gpu.engine import vectors
from hnsw_gpu.gpu import kernel_source, kernel_structs

FILES = {
    "search.cu": """// opening comment
#include <cuda_fp16.h>
#include "beam.cuh"
#include "warp.cuh"

extern "C" __global__ void search() {}
""",
    "beam.cuh": """#pragma once
  #  include "warp.cuh"
// #include "absent.cuh"
int beam;
""",
    "warp.cuh": """#pragma once
int warp;
""",
    "labels.cu": "int labels;\n",
}


@pytest.fixture
def kernels(tmp_path, monkeypatch) -> Path:
    """A folder of small kernels, in place of the real ones."""
    monkeypatch.setattr(kernel_source, "folder", lambda: tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def positions(text: str) -> list[tuple[str, int, str]]:
    """(file, line, text) as a compiler counts them; the `#line` lines themselves are left out."""
    found, file, number = [], "", 0
    for line in text.splitlines():
        directive = re.fullmatch(r'#line (\d+) "(.+)"', line)
        if directive:
            number, file = int(directive[1]), directive[2]
            continue
        found.append((file, number, line))
        number += 1
    return found


def is_own_directive(line: str) -> bool:
    """Lines of a file that its pasted text has no use for."""
    return line.lstrip().startswith("#") and "<" not in line


# --- pasting --------------------------------------------------------------------------------------


def test_every_line_keeps_its_file_and_number(kernels):
    pasted = positions(kernel_source.source("search"))
    kept = {(file, number): text for file, number, text in pasted if text}
    expected = {
        (file, number): line
        for file in ("search.cu", "beam.cuh", "warp.cuh")
        for number, line in enumerate(FILES[file].splitlines(), 1)
        if line and not is_own_directive(line)
    }
    assert kept == expected


def test_headers_come_once_and_before_their_users(kernels):
    order = [text for _, _, text in positions(kernel_source.source("search")) if text]
    assert order == [
        "// opening comment",
        "#include <cuda_fp16.h>",
        "int warp;",
        '// #include "absent.cuh"',
        "int beam;",
        'extern "C" __global__ void search() {}',
    ]


def test_headers_that_include_each_other_end(kernels):
    (kernels / "warp.cuh").write_text('#include "beam.cuh"\nint warp;\n')
    assert kernel_source.source("search").count("int warp;") == 1


def test_an_edited_header_changes_the_source(kernels):
    before = kernel_source.source("search")
    (kernels / "warp.cuh").write_text("int other;\n")
    assert kernel_source.source("search") != before


@pytest.mark.parametrize("name", ["search", "compare", "encode", "keys_to_labels"])
def test_the_kernels_define_what_they_are_named_after(name):
    text = kernel_source.source(name)
    assert re.search(rf'extern "C" __global__\s[^;]*?\b{name}\(', text)
    assert '#include "' not in text
    assert text.count("#pragma once") == 0


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_package_folder_comes_before_the_checkout(is_installed, tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "hnsw_gpu").mkdir()
    monkeypatch.setattr(
        kernel_source, "__file__", str(tmp_path / "hnsw_gpu" / "gpu" / "kernel_source.py")
    )
    expected = tmp_path / "kernels"
    if is_installed:
        expected = tmp_path / "hnsw_gpu" / "kernels"
        expected.mkdir()
    assert kernel_source.folder() == expected


# --- specialisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dim", [1, 7, 16, 20, 21, 100, 768])
def test_definitions(dim, metric, dtype):
    row = vectors.encode(np.ones((1, dim), np.float32), metric, dtype)
    assert kernel_source.definitions(metric, dtype, dim, 12, 4, 32, True) == {
        "METRIC": ["l2", "ip", "cosine"].index(metric),
        "DTYPE": ["fp32", "fp16", "int8", "int4"].index(dtype),
        "DIM": dim,
        "ROW_BYTES": row.nbytes,
        "M": 12,
        "WARPS": 4,
        "TAG_BITS": 32,
        "HAS_ALLOWED_KEYS": 1,
    }
    assert row.nbytes % 32 == 0


def test_options_do_not_depend_on_the_order_of_definitions():
    definitions = kernel_source.definitions("ip", "int8", 20, 8, 1, 16, False)
    options = kernel_source.options(definitions)
    assert options == (
        *("-DDIM=20", "-DDTYPE=2", "-DHAS_ALLOWED_KEYS=0", "-DM=8", "-DMETRIC=1", "-DROW_BYTES=32"),
        *("-DTAG_BITS=16", "-DWARPS=1", "--std=c++17"),
    )
    assert kernel_source.options(dict(reversed(definitions.items()))) == options


# --- structs --------------------------------------------------------------------------------------

C_TYPES = {
    "int": (ctypes.c_int, np.int32),
    "unsigned": (ctypes.c_uint, np.uint32),
    "unsigned int": (ctypes.c_uint, np.uint32),
    "long long": (ctypes.c_longlong, np.int64),
    "unsigned long long": (ctypes.c_ulonglong, np.uint64),
    "float": (ctypes.c_float, np.float32),
    "const unsigned char*": (ctypes.c_void_p, np.uint64),
    "const int *": (ctypes.c_void_p, np.uint64),
    "long long* __restrict__": (ctypes.c_void_p, np.uint64),
}


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def struct_of(folder: Path, text: str, name: str = "Example") -> np.dtype:
    """struct_dtype where `text` is the only kernel."""
    (folder / "search.cu").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_source, "folder", lambda: folder)
        return kernel_structs.struct_dtype(name)


@given(kinds=st.lists(st.sampled_from(sorted(C_TYPES)), min_size=1, max_size=12))
def test_structs_are_laid_out_as_in_c(kinds, empty_folder):
    """ctypes follows the C compiler's rules for offsets, padding and the size of the whole."""
    fields = {f"field{i}": kind for i, kind in enumerate(kinds)}
    lines = [f"    {kind} {name};  // (n,) a; b" for name, kind in fields.items()]
    text = "struct Example {  // {what follows}\n" + "\n".join(lines) + "\n};\n"
    c_fields = [(name, C_TYPES[kind][0]) for name, kind in fields.items()]
    twin = type("Twin", (ctypes.Structure,), {"_fields_": c_fields})
    made = struct_of(empty_folder, text)
    assert made.names == tuple(fields)
    for name, kind in fields.items():
        assert made[name] == C_TYPES[kind][1]
        assert made.fields[name][1] == getattr(twin, name).offset
    assert made.itemsize == ctypes.sizeof(twin)


def test_structs_are_found_in_headers_and_comments_are_not_fields(kernels):
    (kernels / "beam.cuh").write_text(
        "// struct Beam { int wrong; };\n"
        "struct Beam {\n"
        "    unsigned long long* keys;  // (ef,)\n"
        "    /* int gone; */\n"
        "    int size, capacity;\n"
        "};\n"
        "struct BeamOfAnotherName { float x; };\n"
    )
    with pytest.raises(ValueError, match=r"struct Beam: not a field .*'int size, capacity'"):
        kernel_structs.struct_dtype("Beam")
    text = (kernels / "beam.cuh").read_text().replace("size, capacity", "size")
    (kernels / "beam.cuh").write_text(text)
    made = kernel_structs.struct_dtype("Beam")
    assert made == np.dtype([("keys", np.uint64), ("size", np.int32)], align=True)
    assert made.itemsize == 16


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("double x;", "struct Example: x is of type 'double', which has no dtype here"),
        ("int x[4];", r"struct Example: not a field with a type and a name: 'int x\[4\]'"),
        ("int first, second;", "not a field with a type and a name: 'int first, second'"),
        ("int first; Example(int x) : first(x) {}", "not a field"),
    ],
)
def test_fields_that_have_no_dtype_are_refused(body, message, empty_folder):
    with pytest.raises(ValueError, match=message):
        struct_of(empty_folder, "struct Example { " + body + " };")


@pytest.mark.parametrize(("times", "text"), [(0, ""), (2, "struct Example { int x; };\n" * 2)])
def test_a_struct_is_defined_once(times, text, empty_folder):
    with pytest.raises(ValueError, match=f"struct Example is defined {times} times"):
        struct_of(empty_folder, text)
