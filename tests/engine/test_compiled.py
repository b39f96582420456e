"""Machine code on disk is never stale, and no trouble with the disk is one with the answer."""

import ast
import compileall
import contextlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from numba_ready import NumbaReady

from hnsw_gpu.engine import compiled

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DOUBLED = (
    "- _products(queries, q, rows, i)",
    "- np.float32(2) * _products(queries, q, rows, i)",
)

# The product of (3, 4, 0, ...) with itself; `exact.py` inlines `distance.py` for it.
JOB = """
import numpy as np
from hnsw_gpu.engine.exact import own_keys
from hnsw_gpu.engine.keys import key_distances
from hnsw_gpu.engine.vectors import encode
vectors = np.zeros((2, 20), np.float32)
vectors[1, :2] = 3, 4
for dtype in {dtypes}:
    keys = own_keys(encode(vectors, "ip", dtype), np.array([1]), "ip")
    print(round(-key_distances(keys)[0]))
"""
FP32 = JOB.format(dtypes=["fp32"])


def one_daily(cases):
    """The first case, and the others marked slow."""
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.slow) for case in others)]


class Copy:
    """The package in a folder of its own, run in processes of their own."""

    def __init__(self, folder: Path, ready: NumbaReady) -> None:
        self.folder = folder
        self.ready = ready
        self.engine = folder / "hnsw_gpu" / "engine"
        shutil.copytree(
            ROOT / "hnsw_gpu",
            folder / "hnsw_gpu",
            ignore=shutil.ignore_patterns("__pycache__", "*.nb[ic]"),
        )
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "HOME": str(folder / "home")}
        self.environment["PYTHONDONTWRITEBYTECODE"] = "1"  # two edits may fall into one second
        for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
            self.environment.pop(name, None)

    def start(self, job: str = FP32) -> subprocess.Popen:
        command = [sys.executable, "-c", job]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, job: str = FP32) -> tuple[str, str]:
        """What a new process prints, and says on the logger."""
        status, printed, said = self.ready.run(job, self.folder, self.environment)
        assert status == 0, said
        return printed.strip(), said.strip()

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.engine / name).read_text()
        assert text.count(old) == 1
        (self.engine / name).write_text(text.replace(old, new))

    def kept(self) -> dict[Path, int]:
        """The files of the cache, and when each was written."""
        return {path: path.stat().st_mtime_ns for path in self.folder.rglob("*.nb[ic]*")}

    def forbid_the_room(self) -> None:
        """Nothing can be written beside the sources, whoever runs this."""
        (self.engine / "__pycache__").write_text("")

    def forbid_the_home(self) -> None:
        (self.folder / "home").write_text("")


@pytest.fixture(scope="module")
def ready() -> Iterator[NumbaReady]:
    started = NumbaReady()
    yield started
    started.close()


@pytest.fixture
def copy(tmp_path, ready) -> Copy:
    return Copy(tmp_path / "copy", ready)


def in_cache_dir(copy: Copy) -> None:
    copy.environment["NUMBA_CACHE_DIR"] = str(copy.folder / "chosen")


PLACES = {
    "beside the sources": lambda copy: None,
    "in NUMBA_CACHE_DIR": in_cache_dir,
    "in the user's folder": Copy.forbid_the_room,
}


@pytest.mark.parametrize("place", one_daily(PLACES))
def test_an_edit_of_an_inlined_file_is_seen(copy, place):
    PLACES[place](copy)
    assert copy.run() == ("25", "")
    kept = copy.kept()
    assert kept
    assert {path.parent.parent for path in kept} == {
        "beside the sources": {copy.engine},
        "in NUMBA_CACHE_DIR": {copy.folder / "chosen"},
        "in the user's folder": {copy.folder / "home" / ".cache" / "hnsw_gpu"},
    }[place]
    assert copy.run() == ("25", "")
    assert copy.kept() == kept  # nothing was compiled
    copy.edit("distance.py", *DOUBLED)
    assert copy.run() == ("50", "")
    assert set(copy.kept()) == set(kept)  # what is stale is replaced, and does not pile up
    if place == "beside the sources":
        assert copy.run() == ("50", "")
        copy.edit("distance.py", *reversed(DOUBLED))
        assert copy.run() == ("25", "")


def test_an_edit_after_the_import_is_seen_by_the_next_process(copy):
    """A process that compiles the old sources must not keep them under the name of the new."""
    path = copy.engine / "distance.py"
    edit = f"import pathlib\npath = pathlib.Path({str(path)!r})\n"
    edit += f"path.write_text(path.read_text().replace{DOUBLED})\n"
    job = FP32.replace("for dtype", edit + "for dtype")
    assert copy.run(job) == ("25", "")
    assert copy.run() == ("50", "")


@pytest.mark.slow
def test_a_file_outside_the_room_is_in_its_own_stamp(copy):
    outside = copy.folder / "outside.py"
    outside.write_text(
        "from hnsw_gpu.engine import jit\n\n\n@jit\ndef g(x):\n    return x + 1\n\n\n"
        "@jit\ndef f(x):\n    return g(x)\n"
    )
    job = "import outside; print(outside.f(1))"
    assert [copy.run(job), copy.run(job)] == [("2", ""), ("2", "")]
    outside.write_text(outside.read_text().replace("x + 1", "x + 2"))
    assert copy.run(job) == ("3", "")


@pytest.mark.slow
def test_versions_and_processors_have_their_own_code(copy):
    assert copy.run()[0] == "25"
    kept = copy.kept()
    copy.environment["NUMBA_CPU_NAME"] = "generic"  # which numba asks for once
    assert copy.start().communicate() == ("25\n", "")
    with_generic = copy.kept()
    assert len(with_generic) == 2 * len(kept)
    assert kept.items() < with_generic.items()
    del copy.environment["NUMBA_CPU_NAME"]
    assert copy.run("import numba\nnumba.__version__ += '.1'\n" + FP32) == ("25", "")
    assert set(copy.kept()) == set(with_generic)
    changed = copy.kept().items() - with_generic.items()
    assert len(changed) == len(kept)


def only_warning(said: str, kind: str) -> None:
    assert len(said.splitlines()) == 1, said
    assert said.startswith(kind.partition(":")[0]), said


def test_no_place_to_write(copy):
    copy.forbid_the_room()
    copy.forbid_the_home()
    printed, said = copy.run()
    assert printed == "25"
    only_warning(said, compiled.NOT_KEPT)
    assert str(copy.engine / "__pycache__") in said
    assert copy.kept() == {}


@pytest.mark.slow
def test_a_chosen_place_that_cannot_be_written(copy):
    copy.forbid_the_home()
    copy.environment["NUMBA_CACHE_DIR"] = str(copy.folder / "home")
    printed, said = copy.run()
    assert printed == "25"
    only_warning(said, compiled.NOT_KEPT)
    assert copy.kept() == {}


def test_no_home(monkeypatch):
    """A number of a user that nobody knows, as containers have them."""
    source = Path(compiled.__file__)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(compiled.numba.config, "CACHE_DIR", "")
    pwd = pytest.importorskip("pwd")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert list(compiled.places(source)) == [source.parent / "__pycache__"]


DAMAGES = {
    "truncated": lambda content, other: content[:-1],
    "empty": lambda content, other: b"",
    "half a header": lambda content, other: content[:40],
    "header only": lambda content, other: content[:64],
    "another byte": lambda content, other: content[:-100] + b"x" + content[-99:],
    "longer": lambda content, other: content + b"x",
    "of another function": lambda content, other: other,
    "text": lambda content, other: b"hello " * 100,
}


def test_damaged_files(copy):
    """Said once, and mended. Text looks like code of other sources, which is not worth a word."""
    job = FP32 + 'encode(vectors, "l2", "int8")'
    copy.run(job)
    kept = sorted(copy.kept())
    assert len(kept) > 1
    for name, damage in DAMAGES.items():
        contents = [path.read_bytes() for path in kept]
        for path, content, other in zip(kept, contents, contents[1:] + contents[:1], strict=True):
            path.write_bytes(damage(content, other))
        printed, said = copy.run(job)
        assert printed == "25", name
        if name == "text":
            assert said == ""
        else:
            only_warning(said, compiled.DAMAGED)
        assert copy.run(job) == (printed, ""), name
        assert sorted(copy.kept()) == kept


@pytest.mark.slow
def test_a_file_that_cannot_be_replaced(copy):
    """The next place takes the code, and gives it."""
    copy.run()
    kept = list(copy.kept())
    for path in kept:
        path.unlink()
        path.mkdir()
    assert copy.run() == ("25", "")
    elsewhere = copy.kept().keys() - set(kept)
    assert {path.name for path in elsewhere} == {path.name for path in kept}
    before = copy.kept()
    assert copy.run() == ("25", "")
    assert copy.kept() == before


# A file of more than 4 kB cannot be written: as on a full disk, in the middle of it.
FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
"""


def test_a_full_disk(copy):
    pytest.importorskip("resource")
    printed, said = copy.run(FULL + FP32)
    assert printed == "25"
    only_warning(said, compiled.NOT_KEPT)
    assert copy.kept() == {}  # no halves are left
    assert copy.run() == ("25", "")
    kept = copy.kept()
    assert copy.run(FULL + FP32) == ("25", "")  # reading needs no room
    assert copy.kept() == kept


@pytest.mark.slow
def test_several_processes_fill_the_cache(copy):
    """In different orders of types: numba numbers its files, and one would name another's code."""
    dtypes = ["fp32", "int8", "fp16"]
    orders = [dtypes, dtypes[::-1], dtypes[1:] + dtypes[:1], dtypes]
    for process in [copy.start(JOB.format(dtypes=order)) for order in orders]:
        printed, said = process.communicate()
        assert (process.returncode, said, printed.split()) == (0, "", ["25"] * 3)
    kept = copy.kept()
    assert {path.suffix for path in kept} == {".nbc"}
    assert copy.run(JOB.format(dtypes=dtypes)) == ("25\n25\n25", "")
    assert copy.kept() == kept


# numba without one of its parts; those that numba itself needs are given back after our import.
FUTURES = {
    "no class to inherit": "numba.core.caching.NullCache",
    "no pickler": "numba.core.serialize.dumps",
    "no parts of a result": "numba.core.compiler.CompileResult._reduce",
}
WITHOUT = """
import numba.core.caching, numba.core.serialize, numba.core.compiler
kept = {whole}.{part}
del {whole}.{part}
import hnsw_gpu.engine.compiled
"""
GIVEN_BACK = "{whole}.{part} = kept\n"


@pytest.mark.parametrize("future", one_daily(FUTURES))
def test_a_numba_whose_insides_are_others(copy, future):
    whole, _, part = FUTURES[future].rpartition(".")
    job = WITHOUT.format(whole=whole, part=part)
    if "Result" not in whole:
        job += GIVEN_BACK.format(whole=whole, part=part)
    for _ in range(2):
        printed, said = copy.run(job + FP32)
        assert printed == "25"
        only_warning(said, compiled.NOT_KEPT)
    assert copy.kept() == {}


def test_a_numba_whose_code_is_kept_elsewhere(copy):
    """Inner functions are compiled alone too; answers are the same, and the code is kept."""
    whole, part = "numba.core.codegen.CPUCodeLibrary", "_finalize_dynamic_globals"
    job = "import numba.core.codegen\n" + WITHOUT.format(whole=whole, part=part)
    job += GIVEN_BACK.format(whole=whole, part=part)
    job += "assert hnsw_gpu.engine.compiled.PartCompiler is None\n"
    assert copy.run(job + FP32) == ("25", "")
    kept = copy.kept()
    assert kept
    assert copy.run(job + FP32) == ("25", "")
    assert copy.kept() == kept


def on_a_terminal(copy: Copy, job: str) -> list[str]:
    """The lines that a process writes on stderr where that is a terminal."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", job]
    subprocess.run(command, cwd=copy.folder, env=copy.environment, stderr=theirs, check=True)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # what Linux raises at the end
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    return said.decode().split("\r\n")[:-1]


def test_compiling_is_said_once(copy):
    """On a terminal, else on the logger, and not where code was kept."""
    job = JOB.format(dtypes=["fp32", "int8"])
    assert on_a_terminal(copy, job) == [f"hnsw_gpu: {compiled.COMPILING}"]
    assert on_a_terminal(copy, job) == []
    shutil.rmtree(copy.engine / "__pycache__")
    logged = "import logging; logging.basicConfig(level=logging.INFO)\n" + FP32
    assert copy.run(logged)[1] == f"INFO:hnsw_gpu:{compiled.COMPILING}"
    assert copy.run(logged)[1] == ""
    shutil.rmtree(copy.engine / "__pycache__")
    closed = "import sys; sys.stderr.close(); sys.stderr = None\n" + FP32
    assert copy.run(closed)[0] == "25"


def test_compiling_is_said_again_after_a_while(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(compiled.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(compiled, "_said_compiling", float("-inf"))
    caplog.set_level("INFO", "hnsw_gpu")
    for moment in (100, 101, 159, 161, 200):
        now[0] = moment
        compiled._say_compiling()
    assert caplog.messages == [compiled.COMPILING] * 2


# What compiles nothing after `warm`: the events of numba's compiler are counted.
WARMED = """
import sys
import numpy as np
from numba.core import event

names = []


class Compiled(event.Listener):
    def on_start(self, begun):
        names.append(begun.data["dispatcher"].py_func.__qualname__)

    def on_end(self, ended):
        pass


event.register("numba:compile", Compiled())
import hnsw_gpu

vectors = np.random.default_rng(1).normal(size=(500, 40)).astype(np.float32)
from hnsw_gpu.engine import candidates
candidates.LEAST_LENGTH = candidates.LEAST_NUMBERS = 0  # so that builds walk on codes
index = hnsw_gpu.Index(40, "l2", "fp16", refine=True)
index.add(vectors[:400])
index.add(vectors[400:])
allow = np.arange(500) % 2 == 0
index.search(vectors[:9], 5)
index.search(vectors[:9], 5, allow=allow)
index.search(vectors[:9], 5, allow=[1, 2, 3])
index.search_radius(vectors[:9], radius=20)
index.neighbor_graph(3)
index.delete([1, 2])
index.update([3], vectors[:1] + 1)
index.add(vectors[:1] + 1)
index.tune(0.5, k=1)
index.compact()
index.save("i.hnsw")
hnsw_gpu.load("i.hnsw", device="cpu").check()
hnsw_gpu.load("i.hnsw", device="cpu", mmap=True).search(vectors[:9], 5)
other = hnsw_gpu.Index(40, "l2", "fp16", refine=True)
other.add(vectors[:100] + 2, np.arange(1000, 1100))
index.merge(other)
print(names)
"""


def test_nothing_is_compiled_after_warm(copy):
    """The command line, which calls the library."""
    warm = "hnsw_gpu.cli.main(['warm', 'fp16', '--metric', 'l2'], standalone_mode=False)"
    printed, said = copy.run(f"import hnsw_gpu.cli\n{warm}")
    assert re.search(r"fp16\b.* \d", printed), printed
    assert said == ""
    assert copy.run(WARMED) == ("[]", "")


INTERRUPTED = """
import sys, threading

class Pressed(BaseException):
    pass

def press(frame, event, _):
    \"\"\"Raise where the lock was just taken, once.\"\"\"
    if frame.f_code.co_filename.endswith("compiler_lock.py") and frame.f_code.co_name == "acquire":
        if event == "return":
            sys.settrace(None)
            raise Pressed
        return press
    return press if event == "call" else None

def work():
    global keys
{indented}

sys.settrace(press)
try:
    work()
except Pressed:
    print("pressed")
finally:
    sys.settrace(None)
other = threading.Thread(target=work, daemon=True)
other.start()
other.join(60)
print("waits" if other.is_alive() else "done")
"""


def test_an_interrupt_while_compiling_leaves_no_lock_held(copy):
    """It is raised in the main thread, which does not compile."""
    job = INTERRUPTED.format(indented=textwrap.indent(FP32, "    "))
    assert copy.run(job)[0].split() == ["25", "25", "done"]


def test_a_numba_without_a_place_for_a_cache(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "SAID", set())
    monkeypatch.setattr(compiled, "njit", lambda **options: lambda function: function.__call__)
    assert [compiled.jit(len)("abc"), compiled.jit(abs)(-1)] == [3, 1]
    only_warning(caplog.messages[0], compiled.NOT_KEPT)
    assert len(caplog.messages) == 1


@pytest.mark.slow
def test_a_numba_that_cannot_load(copy):
    assert copy.run() == ("25", "")
    job = "from numba.core.compiler import CompileResult\ndel CompileResult._rebuild\n" + FP32
    printed, said = copy.run(job)
    assert printed == "25"
    only_warning(said, compiled.DAMAGED)


@pytest.mark.slow
def test_without_sources(copy):
    """Bytecode alone says nothing of what it was made from."""
    compileall.compile_dir(copy.folder / "hnsw_gpu", quiet=2, legacy=True)
    for path in copy.engine.glob("*.py"):
        path.unlink()
    printed, said = copy.run()
    assert printed == "25"
    only_warning(said, compiled.NOT_KEPT)
    assert copy.kept() == {}


@pytest.mark.slow
def test_a_closure_is_not_kept(copy):
    """Its values are no part of the stamp."""
    job = """
from add import adder
print(adder(1)(1), adder(2)(1))
"""
    (copy.folder / "add.py").write_text(
        "from hnsw_gpu.engine import jit\n\n\ndef adder(n):\n    @jit\n    def add(x):\n"
        "        return x + n\n\n    return add\n"
    )
    assert copy.run(job) == ("2 3", "")
    assert copy.run(job) == ("2 3", "")
    assert copy.kept() == {}


def compiled_in(path: Path) -> tuple[ast.Module, list[ast.FunctionDef]]:
    """A module, and its functions that run compiled."""
    tree = ast.parse(path.read_text())
    marks = ("jit", "intrinsic", "overload")
    return tree, [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(d).partition("(")[0] in marks for d in node.decorator_list)
    ]


def strangers(path: Path) -> list[str]:
    """What the compiled functions of a module take from our files outside of the engine room."""
    tree, functions = compiled_in(path)
    homes = {
        alias.asname or alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    used = {n.id for f in functions for n in ast.walk(f) if isinstance(n, ast.Name)}
    ours = re.compile(r"hnsw_gpu(?!\.engine\b)|benchmarks")
    return sorted(
        f"{name} of {homes[name]}" for name in used & set(homes) if ours.match(homes[name])
    )


@pytest.mark.parametrize(
    "path",
    [p for room in ("hnsw_gpu", "benchmarks") for p in sorted((ROOT / room).rglob("*.py"))],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_the_stamp_covers_what_is_inlined(path):
    assert strangers(path) == []


def test_only_jit_compiles():
    """numba's own decorators would keep code under a stamp of its own."""
    numbas = re.compile(r"\b(njit|vectorize|guvectorize|cfunc|generated_jit)\b|cache=True")
    found = [p for room in ("hnsw_gpu", "benchmarks") for p in (ROOT / room).rglob("*.py")]
    users = [p.name for p in found if numbas.search(p.read_text())]
    assert users == ["compiled.py"]


def test_the_tests_of_sources_can_fail(tmp_path):
    path = tmp_path / "linkage.py"
    path.write_text(
        "from hnsw_gpu.deduplication.limit import LIMIT\nfrom hnsw_gpu.engine import jit\n\n\n"
        "@jit(allocates=True)\ndef f(x):\n    return x + LIMIT\n"
    )
    assert strangers(path) == ["LIMIT of hnsw_gpu.deduplication.limit"]
