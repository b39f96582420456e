"""The house stays in order: layers, vocabulary, what an import may do, habits said once."""

import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hnsw_gpu

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hnsw_gpu"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

# A room is a folder of the package, or these modules beside the folders.
ON_THE_GROUND = {
    "cli": {"__main__", "cli", "terminal", "doctor"},
    "langchain": {"langchain"},
    "llama_index": {"llama_index"},
    "documents": {"documents"},
    "hnswlib": {"hnswlib"},
    "sklearn": {"sklearn"},
    "index": {
        *("index", "searching", "inputs", "results", "exhaustive", "recall", "progress"),
        *("conversion", "label_inputs", "string_labels", "tuning", "warming"),
    },
}
EVERYWHERE = {"__init__", "lazy_names"}  # the package itself: its public names, version and this
DRAWING = re.compile(r"^\| \[`(\w+)\S* \| .+? \|(.*)\|$", re.M)
# What `pip install hnsw-gpu` brings; anything else is imported inside the function that needs it.
CORE = {"click", "llvmlite", "numba", "numpy", "tqdm"}
# Modules that are nothing without an extra, and are imported by each other and by `cli` inside it.
EXTRAS = {
    "disconnect": {"starlette"},
    "middleware": {"starlette"},
    "problem": {"starlette"},
    "request": {"starlette"},
    "request_body": {"starlette"},
    "server": {"starlette"},
    "process": {"uvicorn"},
    "protocol": {"httptools", "uvicorn"},
    "metrics": {"prometheus_client"},
    "sklearn": {"joblib", "scipy", "sklearn"},
}

BANNED_FILES = {"utils", "util", "helpers", "common", "base", "types", "config", "manager"}
SIMILARITY = r"(?<![a-z])similarit"
SCORE = r"(?<![a-z])scores?(?![a-z])"
# users think in it, of duplicates
SIMILAR = {"cli", "README", "dedup", "test_cli"}  # and all of deduplication/
# another library's words, which its users know
SCORES = {"langchain", "llama_index", "llama-index", "test_langchain", "test_llama_index"}
BANNED_WORDS = {
    r"beam[ _-]?width": "ef, or expand",
    r"prun(e|es|ed|ing)\b": "select",
    SCORE: "distance",
    SIMILARITY: "distance",
}
BANNED_TRACES = {
    r"/(work|root|home|Users)/": "an absolute path of one machine",
    r"\bsessions?\b": "how the code came to be",
    r"\bissue #?\d": "a number that means nothing to a reader",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """The room of a module of the package by its dotted name, such as "engine.beam"."""
    first = module.partition(".")[0]
    if (PACKAGE / first).is_dir():
        return first
    return next(name for name, members in ON_THE_GROUND.items() if first in members)


def dotted(path: Path) -> str:
    """The name of a module within the package: "engine.beam", of a front door "engine"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def texts() -> list[Path]:
    """Every file that a person writes and reads."""
    found = [*PACKAGE.rglob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    found += [*ROOT.glob("kernels/*"), *ROOT.glob("tests/gpu/emulator/*.[hc]*")]
    found += [*ROOT.glob("tests/ptx/executor/*")]
    found += [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/*.py")]
    found += [ROOT / "docs" / "llms.txt", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    return sorted(path for path in found if path != Path(__file__))


def imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of all that a module imports of the package, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            root, _, module = str(node.module).partition(".")
            if root == "hnsw_gpu":
                found |= {_imported(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            dotted_names = [alias.name.partition(".") for alias in node.names]
            found |= {
                (rest or "__init__", "") for root, _, rest in dotted_names if root == "hnsw_gpu"
            }
    return {(module, name) for module, name in found if module not in EVERYWHERE}


def _imported(module: str, name: str) -> tuple[str, str]:
    """What `from hnsw_gpu.<module> import <name>` means: a module of ours, or a name in one."""
    inner = f"{module}.{name}".strip(".")
    place = PACKAGE.joinpath(*inner.split("."))
    if place.with_suffix(".py").exists() or place.is_dir():
        return inner, ""
    return (module, name) if module else (hnsw_gpu._HOME.get(name, "__init__"), name)


def arrows(paths: list[Path]) -> dict[str, set[str]]:
    """Room to room: which others each imports."""
    found: dict[str, set[str]] = {}
    for path in paths:
        mine = dotted(path)
        if mine in EVERYWHERE:
            continue
        here = found.setdefault(room(mine), set())
        here |= {room(module) for module, _ in imports(path)} - {room(mine)}
    return found


def past_the_door(paths: list[Path]) -> list[str]:
    """Imports of another room's insides, or of a name that its front door does not offer."""
    found = []
    for path in paths:
        mine = dotted(path)
        for module, name in imports(path):
            is_folder = (PACKAGE / module.partition(".")[0]).is_dir()
            if mine == "__init__" or not is_folder or room(module) == room(mine):
                continue
            if "." in module or name not in offered(module):
                found.append(f"{mine} -> {module} {name}".rstrip())
    return found


def offered(folder: str) -> list[str]:
    """`__all__` of a room's front door."""
    for node in ast.parse((PACKAGE / folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{folder}: no __all__")


def test_the_rooms_are_drawn():
    """Every room is there with all the rooms that it imports, and each only from further down."""
    drawn = {
        name: set(re.findall(r"`(\w+)`", uses)) for name, uses in DRAWING.findall(CONTRIBUTING)
    }
    assert arrows(modules()) == drawn
    order = list(drawn)
    upwards = [(a, b) for a in order for b in drawn[a] if order.index(b) <= order.index(a)]
    assert upwards == []


def test_rooms_meet_at_their_front_doors():
    assert past_the_door(modules()) == []
    for folder in (path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()):
        door = f"hnsw_gpu.{folder}"
        used = {name for path in modules() for module, name in imports(path) if module == folder}
        assert set(offered(folder)) == used | set(
            name for name, home in hnsw_gpu._HOME.items() if home == folder
        ), f"{door} offers what nobody takes, or not what somebody does"


def circle(paths: list[Path]) -> list[str]:
    """Modules of one room that import each other in a circle, the first of them twice; or none."""
    inside: dict[str, set[str]] = {}
    for path in paths:
        mine = dotted(path)
        if mine not in EVERYWHERE:
            inside[mine] = {
                module
                for module, _ in imports(path)
                if module not in EVERYWHERE and room(module) == room(mine)
            }
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_room_imports_in_a_circle():
    assert circle(modules()) == []


def test_the_tests_of_rooms_can_fail(tmp_path, monkeypatch):
    (tmp_path / "engine").mkdir()
    (tmp_path / "files").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("__all__ = ['Graph']\n")
    (tmp_path / "files" / "__init__.py").write_text("__all__ = []\n")
    (tmp_path / "engine" / "beam.py").write_text("from hnsw_gpu.engine.graph import Graph\n")
    (tmp_path / "engine" / "graph.py").write_text(
        "def f():\n    from hnsw_gpu.index import Index\n    import hnsw_gpu.files.storage\n"
    )
    (tmp_path / "index.py").write_text("from hnsw_gpu.engine import Graph, beam, graph_of\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert arrows(modules()) == {"engine": {"index", "files"}, "files": set(), "index": {"engine"}}
    assert sorted(past_the_door(modules())) == [
        "engine.graph -> files.storage",
        "index -> engine graph_of",
        "index -> engine.beam",
    ]
    assert circle(modules()) == []
    (tmp_path / "engine" / "graph.py").write_text("from hnsw_gpu.engine.beam import insert\n")
    assert sorted(set(circle(modules()))) == ["engine.beam", "engine.graph"]


def test_optional_packages_are_imported_where_used():
    wrong = []
    for path in modules():
        name = path.stem
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
    if path.stem in SIMILAR or path.parent.name == "deduplication":
        del words[SIMILARITY]
    if path.stem in SCORES:
        del words[SIMILARITY], words[SCORE]
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
        *("scipy", "sklearn", "tokenizers", "torch", "usearch", "wordllama"),
    ]
    code = WITHOUT_EXTRAS.format(banned=set(banned))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_linters_are_said_once():
    """CI, pre-commit and CONTRIBUTING.md name the same ones; the first two run them."""
    ci = re.findall(r"^\.venv-test/bin/(.+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    hooks = re.findall(r"entry: ([^,]+),", (ROOT / ".pre-commit-config.yaml").read_text())
    assert ci == hooks == ["ruff check", "ruff format --check", "mypy"]
    assert all(f"`{command}`" in CONTRIBUTING for command in ci)


def test_the_test_command_is_said_once():
    command = re.search(r"^python3 -m venv \.venv-test .+$", README, re.M)
    assert command is not None
    assert command[0] in CONTRIBUTING
