"""The house stays in order: layers, vocabulary, what an import may do, lint and types."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hnsw_gpu

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hnsw_gpu"

# From top to bottom. A module may import from lower rows, and within its row as ARROWS says.
LAYERS = {
    "programs": ["__main__", "cli", "demo"],
    "servers": ["server"],
    "what they say": ["http_request", "openapi", "server_metrics"],
    "jobs": ["batching", "client", "dedup_files", "dedup_preview", "deduplication", "sharding"],
    "their parts": [
        "against",
        "edition",
        "wire",
        "shards",
        "pairs",
        "linkage",
        "report_page",
        "verses",
    ],
    "and these": ["recall", "doctor", "terminal"],
    "public": ["__init__", "index"],
    "its parts": ["inputs", "labels", "copies"],
    "files": ["sources", "storage", "hnswlib_format", "vector_files"],
    "answers": ["answer"],
    "engines": ["build", "cpu", "search", "exact", "gpu", "device", "launch", "kernel_source"],
    "data": ["beam", "distance", "vectors", "graph"],
    "threads": ["workers"],
}
ARROWS = {
    ("__main__", "cli"),
    ("cli", "demo"),
    ("__init__", "batching"),  # public names, brought when they are first used
    ("__init__", "client"),
    ("__init__", "index"),
    ("http_request", "openapi"),
    ("against", "pairs"),
    ("shards", "pairs"),
    ("dedup_files", "deduplication"),
    ("dedup_preview", "deduplication"),
    ("__init__", "deduplication"),  # a public name, brought when it is first used
    ("build", "search"),
    ("cpu", "exact"),
    ("cpu", "search"),
    ("gpu", "device"),
    ("gpu", "launch"),
    ("device", "launch"),
    ("device", "kernel_source"),
    ("launch", "kernel_source"),
    ("sources", "vector_files"),
    ("vector_files", "storage"),
    ("vectors", "distance"),
}
# What `pip install hnsw-gpu` brings; anything else is imported inside the function that needs it.
CORE = {"click", "llvmlite", "numba", "numpy", "tqdm"}
# Modules that are nothing without an extra, and are imported by each other and by `cli` inside it.
EXTRAS = {
    "http_request": {"starlette"},
    "server": {"starlette", "uvicorn"},
    "server_metrics": {"prometheus_client"},
}

BANNED_FILES = {"utils", "util", "helpers", "common", "base", "types", "config", "manager"}
SIMILARITY = r"(?<![a-z])similarit"
# users think in it, of duplicates
SIMILAR = {"cli", "README", "dedup", "deduplication", "dedup_files", "dedup_preview", "report_page"}
BANNED_WORDS = {
    r"beam[ _-]?width": "ef, or expand",
    r"prun(e|es|ed|ing)\b": "select",
    r"(?<![a-z])scores?(?![a-z])": "distance",
    SIMILARITY: "distance",
}
BANNED_TRACES = {
    r"/(work|root|home|Users)/": "an absolute path of one machine",
    r"\bsessions?\b": "how the code came to be",
    r"\bissue #?\d": "a number that means nothing to a reader",
}


def modules() -> dict[str, Path]:
    return {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}


def texts() -> list[Path]:
    """Every file that a person writes and reads."""
    found = [*PACKAGE.rglob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    found += [*ROOT.glob("kernels/*"), *ROOT.glob("tests/emulator/*.[hc]*")]
    found += [*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    return sorted(path for path in found if path != Path(__file__))


def imports(path: Path) -> set[str]:
    """The package's modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            for alias in node.names:
                found.add(module_of(f"{node.module}.{alias.name}"))
        elif isinstance(node, ast.Import):
            found |= {module_of(alias.name) for alias in node.names}
    return found - {""}


def module_of(name: str) -> str:
    """The package's module that the dotted `name` lies in; "" for other packages."""
    root, _, rest = name.partition(".")
    if root != "hnsw_gpu":
        return ""
    first = rest.partition(".")[0]
    return first if first in modules() else "__init__"


def row(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS.values()) if module in names)


def is_downwards(importer: str, imported: str) -> bool:
    return row(importer) < row(imported) or (importer, imported) in ARROWS


def test_every_module_has_a_place():
    known = [name for names in LAYERS.values() for name in names]
    assert len(known) == len(set(known))
    assert set(modules()) - set(known) == set()
    folders = [path.name for path in PACKAGE.iterdir() if path.is_dir()]
    assert set(folders) <= {"__pycache__"}


def test_imports_go_downwards_only():
    wrong = [
        f"{name} -> {imported}"
        for name, path in modules().items()
        for imported in imports(path)
        if not is_downwards(name, imported)
    ]
    assert wrong == []


def test_the_layer_test_can_fail(tmp_path):
    upwards = tmp_path / "beam.py"
    upwards.write_text(
        "def f():\n    from hnsw_gpu.index import Index\n    import hnsw_gpu.graph\n"
    )
    assert imports(upwards) == {"index", "graph"}
    assert not is_downwards("beam", "index")
    assert not is_downwards("beam", "graph")
    assert is_downwards("index", "beam")


def test_optional_packages_are_imported_where_used():
    wrong = []
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                found = [str(node.module)]
            roots = {dotted.partition(".")[0] for dotted in found}
            wrong += [
                f"{name}: {root}"
                for root in roots - sys.stdlib_module_names - CORE - EXTRAS.get(name, set())
                if root != "hnsw_gpu"
            ]
    assert wrong == []


def test_file_names():
    code = [path for path in texts() if path.suffix == ".py"]
    assert [path for path in code if path.stem in BANNED_FILES] == []


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_vocabulary(path):
    words = dict(BANNED_WORDS)
    if path.stem.removeprefix("test_") in SIMILAR:
        del words[SIMILARITY]
    assert offences(path.read_text(), words | BANNED_TRACES) == []


def offences(text: str, banned: dict[str, str]) -> list[str]:
    """The lines that hold a banned word; a table row of prose (the glossary) may name it."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        plain = line.replace('scope="session"', "")
        if line.startswith("|"):
            continue
        for pattern, instead in banned.items():
            if re.search(pattern, plain, re.IGNORECASE):
                found.append(f"line {number}: {line.strip()!r}: say {instead}")
    return found


def test_the_vocabulary_test_can_fail():
    text = "beam_width = 3\nx = pruned(a)\n| not score |\nbest_score = 1\nunderscore\n/root/x\n"
    lines = [offence.partition(":")[0] for offence in offences(text, BANNED_WORDS | BANNED_TRACES)]
    assert lines == ["line 1", "line 2", "line 4", "line 6"]


def test_public_names_are_one_list():
    """`__all__`, the table of homes, `dir()` and what type checkers see name the same things."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen_by_types = {
        alias.name: str(node.module).removeprefix("hnsw_gpu.")
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen_by_types == hnsw_gpu._HOME
    assert {*seen_by_types, "__version__"} == set(hnsw_gpu.__all__) == set(dir(hnsw_gpu))
    for name in hnsw_gpu.__all__:
        assert getattr(hnsw_gpu, name).__class__ is not None
    with pytest.raises(AttributeError, match="no attribute 'Indexes'"):
        hnsw_gpu.Indexes  # noqa: B018


IMPORT = """
import json, sys
before = set(sys.modules)
import {what}
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(loaded - sys.stdlib_module_names)))
"""


@pytest.mark.parametrize(
    ("what", "loads"), [("hnsw_gpu", ["hnsw_gpu"]), ("hnsw_gpu.cli", ["click", "hnsw_gpu"])]
)
def test_import_loads_nothing_and_says_nothing(what, loads, tmp_path):
    """Neither numpy nor numba nor anything optional; so nothing is compiled either."""
    code = ["-W", "error", "-c", IMPORT.format(what=what)]
    done = subprocess.run([sys.executable, *code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert json.loads(done.stdout) == loads


WITHOUT_EXTRAS = """
import sys
from importlib.abc import MetaPathFinder

class OnlyCore(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {banned}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, OnlyCore())
import numpy as np
import hnsw_gpu
rows = np.eye(8, dtype=np.float32)
index = hnsw_gpu.Index(8, "l2")
index.add(rows)
assert index.search(rows, 1).labels[:, 0].tolist() == list(range(8))
"""


def test_works_without_the_extras():
    banned = [
        *("cupy", "faiss", "hnswlib", "hypothesis", "matplotlib", "psutil", "pyarrow", "pynvml"),
        *("scipy", "tokenizers", "torch", "usearch", "wordllama"),
    ]
    code = WITHOUT_EXTRAS.format(banned=set(banned))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join
)
def test_lint_and_types(command):
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed: it comes with the extra `test`")
    run = [sys.executable, "-m", *command]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
