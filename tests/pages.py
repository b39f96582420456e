"""The blocks of a page of the README or the manual, and how they run."""

import ast
import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import hnsw_gpu

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MANUAL = sorted((ROOT / "docs").rglob("*.md"))
SERVER = ["starlette", "uvicorn", "prometheus_client", "safetensors"]
RUN = ("hnsw-gpu ", "curl ")  # not what begins with python3: the demo and the tests
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def shell_lines(page: Path) -> list[str]:
    return [line for kind, text in blocks(page) if kind == "sh" for line in text.splitlines()]


def run_page(page: Path) -> None:
    """Python blocks share their names, all blocks one folder, as for a reader who follows along.

    Skips the rest of a page whose Python needs what is not installed.
    """
    names: dict[str, object] = {}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with contextlib.ExitStack() as servers, undisturbed():
        for number, (kind, text) in enumerate(blocks(page)):
            text = text.replace("8080", port)
            if kind == "python" and "serve.deployment" not in text:  # that has a test of its own
                if absent := missing(text, imported(text)):
                    pytest.skip(f"block {number} and those after it need {', '.join(absent)}")
                exec(compile(text, f"{page.name}, block {number}", "exec"), names)
            for line in text.splitlines() if kind == "sh" else []:
                if line.startswith(RUN) and "--ray" not in line and not missing(line):
                    if line.startswith("hnsw-gpu serve "):
                        servers.enter_context(serving(line, port))
                    else:
                        run(line)
        if "app" in names:
            asks_the_service(names)


@contextlib.contextmanager
def undisturbed():
    """What other packages warn of is not ours, nor may one that is imported set up logging."""
    root = logging.getLogger()
    before = list(root.handlers), root.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="umap|pynndescent")
        yield
    root.handlers[:], root.level = before


def missing(text: str, modules: Iterable[str] = ()) -> list[str]:
    """What a block or a line needs and is not here."""
    needed = {
        "hnsw-gpu dedup ": ["pyarrow"],
        ".parquet": ["pyarrow"],
        "hnsw_gpu.Cluster": ["ray", "pyarrow", "pandas"],
        **dict.fromkeys(["hnsw-gpu serve", "hnsw_gpu.Client(", "curl "], SERVER),
    }
    found = {*modules, *(name for word, of in needed.items() if word in text for name in of)}
    absent = sorted(name for name in found if not find_spec(name))
    return absent + ["curl"] * ("curl " in text and not shutil.which("curl"))


def imported(code: str) -> set[str]:
    """The modules that a Python block imports, by the first part of their names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


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
    """The application of a page answers as the index does; by FastAPI's own routing."""
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
