"""The README is true: its blocks run in order, and its test command is the one that CI runs."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hnsw_gpu import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETUP = "python3 -m venv .venv-{0} && .venv-{0}/bin/pip install -q "
DEMO = SETUP.format("demo") + '".[demo]" && .venv-demo/bin/hnsw-gpu demo'
TESTS = SETUP.format("test") + '-e ".[test]" && .venv-test/bin/python -m pytest'


def blocks() -> list[tuple[str, str]]:
    return FENCE.findall(README.read_text())


def shell_lines() -> list[str]:
    return [line for kind, text in blocks() if kind == "sh" for line in text.splitlines() if line]


def test_every_block_is_of_a_kind_that_is_run():
    assert {kind for kind, _ in blocks()} <= {"", "text", "python", "sh"}
    assert [kind for kind, _ in blocks()].count("python") >= 1
    assert {line.split()[0] for line in shell_lines()} <= {"python3", "hnsw-gpu"}


def test_the_two_commands():
    assert [line for line in shell_lines() if line.startswith("python3")] == [DEMO, TESTS]


def test_the_blocks_run(tmp_path, monkeypatch):
    """Python blocks share their names, all blocks one folder, as for a reader who follows along."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, (kind, text) in enumerate(blocks()):
        if kind == "python":
            exec(compile(text, f"README block {number}", "exec"), names)
        elif kind == "sh":
            for line in text.splitlines():
                if line.startswith("hnsw-gpu ") and can_run(line):
                    run(line)


def can_run(line: str) -> bool:
    """Not the demo, which takes minutes and has tests of its own; the others where they can be."""
    needed = {"--plot": "matplotlib", "hnsw-gpu dedup ": "pyarrow"}
    missing = [word for word, module in needed.items() if find_spec(module) is None]
    return "demo" not in line and not any(word in line for word in missing)


def run(line: str) -> None:
    command = [sys.executable, "-m", "hnsw_gpu", *shlex.split(line, comments=True)[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), f"{line}\n{done.stderr}"
    assert done.stdout


def test_every_command_is_shown():
    shown = {line.split()[1] for line in shell_lines() if line.startswith("hnsw-gpu ")}
    assert shown | {"demo"} == set(cli.main.commands)


@pytest.mark.skipif(sys.platform == "win32", reason="the script is for bash")
def test_ci_runs_the_readme_command(tmp_path):
    """The script, in a copy of the tree where python3 only says how it was called."""
    (tmp_path / ".ci").mkdir()
    for name in ("README.md", ".ci/run"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv-test").mkdir()
    (tmp_path / ".venv-test" / "stale").touch()
    said = run_ci(tmp_path, 'echo "python3 $*"; mkdir -p .venv-test/bin; ls .venv-test')
    assert said.stdout.splitlines() == [f"+ {TESTS}", "python3 -m venv .venv-test", "bin"]
    assert said.returncode != 0  # for there is no pip
    assert run_ci(tmp_path, "exit 7").returncode == 7


def run_ci(folder: Path, python3: str) -> subprocess.CompletedProcess[str]:
    for name, text in (("python3", python3), ("chromium", "exit")):
        stub = folder / name
        stub.write_text(f"#!/bin/sh\n{text}\n")
        stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(folder / ".ci" / "run")]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
