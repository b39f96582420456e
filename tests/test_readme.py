"""The README is true: its blocks run in order, and its test command is the one that CI runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import MANUAL, README, ROOT, blocks, run_page, shell_lines

from hnsw_gpu import cli

pytestmark = pytest.mark.slow

SETUP = "python3 -m venv .venv-{0} && .venv-{0}/bin/pip install -q "
DEMO = SETUP.format("demo") + '".[demo]" && .venv-demo/bin/hnsw-gpu demo'
TESTS = SETUP.format("test") + '-e ".[test,toolkit]" && '
TESTS += ".venv-test/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder"


def test_it_is_short():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [README, *MANUAL], ids=lambda page: page.stem)
def test_every_block_is_of_a_kind_that_is_run(page):
    """Or of one that no reader would type in: texts, and what Sphinx is told."""
    kinds = {kind for kind, _ in blocks(page)}
    assert kinds <= {"text", "python", "sh", "{toctree}", "{eval-rst}"}
    assert {line.split()[0] for line in shell_lines(page)} <= {"python3", "hnsw-gpu", "curl"}


def test_the_two_commands():
    assert [line for line in shell_lines(README) if line.startswith("python3")] == [DEMO, TESTS]


def test_the_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(README)


def test_every_command_is_shown():
    lines = [line for page in (README, *MANUAL) for line in shell_lines(page)]
    shown = {line.split()[1] for line in lines if line.startswith("hnsw-gpu ")}
    assert shown | {"demo"} == set(cli.main.commands)


def test_links_lead_somewhere():
    """Those to files of the checkout, of the pages that Sphinx does not see."""
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"):
        page = ROOT / name
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = page.parent / path if path else page
            assert target.exists(), f"{name}: {link}"
            assert not anchor or anchor in anchors(target), f"{name}: {link}"


def anchors(page: Path) -> list[str]:
    """Of its headings, as GitHub and Sphinx make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w\s-]", "", text).strip().lower().replace(" ", "-") for text in headings]


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
