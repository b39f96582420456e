"""The README is true: its blocks run in order, and its test command is the one that CI runs."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import hnsw_gpu
from hnsw_gpu import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SERVER = ["starlette", "uvicorn", "prometheus_client", "safetensors"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETUP = "python3 -m venv .venv-{0} && .venv-{0}/bin/pip install -q "
DEMO = SETUP.format("demo") + '".[demo]" && .venv-demo/bin/hnsw-gpu demo'
TESTS = SETUP.format("test") + '-e ".[test,toolkit]" && '
TESTS += ".venv-test/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder"


def blocks() -> list[tuple[str, str]]:
    return FENCE.findall(README.read_text())


def shell_lines() -> list[str]:
    return [line for kind, text in blocks() if kind == "sh" for line in text.splitlines() if line]


def test_every_block_is_of_a_kind_that_is_run():
    assert {kind for kind, _ in blocks()} <= {"", "text", "python", "sh"}
    assert [kind for kind, _ in blocks()].count("python") >= 1
    assert {line.split()[0] for line in shell_lines()} <= {"python3", "hnsw-gpu", "curl"}


def test_the_two_commands():
    assert [line for line in shell_lines() if line.startswith("python3")] == [DEMO, TESTS]


def test_the_blocks_run(tmp_path, monkeypatch):
    """Python blocks share their names, all blocks one folder, as for a reader who follows along."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with contextlib.ExitStack() as servers:
        for number, (kind, text) in enumerate(blocks()):
            text = text.replace("8080", port)
            if kind == "python" and can_run(text):
                exec(compile(text, f"README block {number}", "exec"), names)
            for line in text.splitlines() if kind == "sh" else []:
                if line.startswith("hnsw-gpu serve ") and can_run(line):
                    servers.enter_context(serving(line, port))
                elif line.startswith(("hnsw-gpu ", "curl ")) and can_run(line):
                    run(line)
        if can_run("FastAPI"):
            asks_the_service(names)


def can_run(text: str) -> bool:
    """Not the demo, which takes minutes and has tests of its own; the others where they can be."""
    needed = {
        "--plot": ["matplotlib"],
        "hnsw-gpu dedup ": ["pyarrow"],
        "FastAPI": ["fastapi"],
        "hnsw_gpu.Cluster": ["ray", "pyarrow", "pandas"],
        "--ray": ["ray", "pyarrow"],
        **dict.fromkeys(["hnsw-gpu serve", "hnsw_gpu.Client", "curl "], SERVER),
    }
    words = [word for word, modules in needed.items() if not all(map(find_spec, modules))]
    words += [] if shutil.which("curl") else ["curl "]
    if "serve.deployment" in text:  # it has a test of its own
        return False
    return "demo" not in text and not any(word in text for word in words)


def command(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    return [sys.executable, "-m", "hnsw_gpu", *words[1:]] if words[0] == "hnsw-gpu" else words


def run(line: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(line), env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), f"{line}\n{done.stderr}"
    assert done.stdout or " -o " in line


@contextlib.contextmanager
def serving(line: str, port: str):
    """The server of a line, ready, and stopped at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(command(line), env=environment, stderr=subprocess.DEVNULL)
    try:
        client = hnsw_gpu.Client(f"http://127.0.0.1:{port}")
        for _ in range(600):
            try:
                client.index()
                break
            except (ConnectionError, hnsw_gpu.ServerError):
                assert started.poll() is None
        client.close()
        yield
    finally:
        started.terminate()
        assert started.wait(60) == 0


def asks_the_service(names: dict) -> None:
    """The application of the README's block answers as the index does; by FastAPI's own routing."""
    app, index = names["app"], hnsw_gpu.load("docs.hnsw")
    vector = np.load("queries.npy")[0].tolist()
    sent = []

    async def ask() -> None:
        body = json.dumps(vector).encode()
        scope = {
            **{"type": "http", "method": "POST", "path": "/near", "query_string": b"k=3"},
            **{"headers": [(b"content-type", b"application/json")], "http_version": "1.1"},
        }

        async def receive() -> dict:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict) -> None:
            sent.append(message.get("body", b""))

        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(ask())
    assert json.loads(b"".join(sent)) == index.search(vector, 3).labels[0].tolist()


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
