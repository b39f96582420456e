"""How late `/health/live` answers while one caller abuses the server.

    python -m benchmarks.serve_abuse

writes `results/serve-abuse.json`: of each abuse, how it was answered, and the slowest of the checks
that a process of its own made meanwhile, one every 2 ms, beside those of an idle server. On a
machine with other work to do, a check waits for that too.
"""

import contextlib
import http.client
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from safetensors.numpy import save

import hnsw_gpu
from benchmarks.record import RESULTS, about, rounded
from benchmarks.serve import Host
from hnsw_gpu.serve import formats

DIM = 256
ROUNDS = 5
IDLE_S = 3.0


def posted(body: bytes, media: str, target: str = "/v1/search") -> Callable[[int], str]:
    """What posts the body and tells the status of the answer."""

    def post(port: int) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            connection.request("POST", target, body, {"Content-Type": media})
        try:
            answer = connection.getresponse()
            answer.read()
            return str(answer.status)
        except ConnectionError:
            return "closed"

    return post


def sent(head: bytes) -> Callable[[int], str]:
    """What sends bytes as they are and tells the status line's status."""

    def send(port: int) -> str:
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head)
            try:
                return connection.recv(100).split()[1].decode()
            except (ConnectionError, IndexError):
                return "closed"

    return send


def unread(rows: np.ndarray) -> Callable[[int], str]:
    """What asks six times for answers of some megabytes, and reads none for two seconds."""

    def ask(port: int) -> str:
        body = formats.write_npy(rows)
        head = (
            f"POST /v1/search?k=1000 HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: {formats.NPY}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        open_ones = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(6)]
        for connection in open_ones:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head + body)
        time.sleep(2)
        for connection in open_ones:
            connection.close()
        return "not read"

    return ask


def idle() -> str:
    time.sleep(IDLE_S)
    return "not asked"


def abuses() -> dict[str, Callable[[int], str]]:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(62_000, DIM)).astype(np.float32)  # 63 MB
    numbers = json.dumps({"queries": rng.normal(size=(13_000, DIM)).round(15).tolist()}).encode()
    empty = b'{"queries": [' + b"[]," * 2_666_000 + b"[]]}"
    tensors = save({f"t{i}": np.empty(0, np.float32) for i in range(200_000)})
    headers = b"".join(b"x%d: 1\r\n" % i for i in range(20_000))
    start = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    return {
        "8 MB of empty lists": posted(empty, formats.JSON),
        "64 MB of JSON numbers": posted(numbers, formats.JSON),
        "200,000 empty tensors": posted(tensors, formats.SAFETENSORS),
        "200 kB of labels, k=1000": posted(
            json.dumps({"labels": [1] * 65_000}).encode(), formats.JSON, "/v1/search?k=1000"
        ),
        "npy of 63 MB": posted(formats.write_npy(rows), formats.NPY, "/v1/search?k=1"),
        "20,000 rows, k=100": posted(
            formats.write_npy(rows[:20_000]), formats.NPY, "/v1/search?k=100"
        ),
        "150 MB of head": sent(start + b"x: " + b"a" * 150_000_000),
        "20,000 headers": sent(start + headers + b"\r\n"),
        "six who do not read": unread(rows[:4_000]),
    }  # fmt: skip


def check(port: int, is_over: Any, found: Any) -> None:
    """Put the seconds that each check of `/health/live` took, until told to stop."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    seconds = []
    while not is_over.is_set():
        began = time.perf_counter()
        connection.request("GET", "/health/live")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        seconds.append(time.perf_counter() - began)
        time.sleep(0.002)
    found.put(seconds)


def checked(port: int, work: Callable[[], str]) -> dict[str, Any]:
    """How `work` was answered, and milliseconds of the checks meanwhile."""
    spawn = multiprocessing.get_context("spawn")
    is_over, found = spawn.Event(), spawn.Queue()
    checks = spawn.Process(target=check, args=(port, is_over, found))
    checks.start()
    time.sleep(1.5)  # a process begins
    answered = work()
    is_over.set()
    seconds = found.get()
    checks.join()
    return {
        "answered": answered,
        "checks": len(seconds),
        "median_ms": median(seconds) * 1e3,
        "slowest_ms": max(seconds) * 1e3,
    }


@click.command()
@click.option("--rounds", default=ROUNDS, show_default=True, help="Turns of each abuse.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RESULTS / "serve-abuse.json",
    show_default="results/serve-abuse.json",
)
def main(rounds: int, out: Path) -> None:
    """How late /health/live answers while one caller abuses the server."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "docs.hnsw"
        index = hnsw_gpu.Index(DIM, "cosine")
        index.add(np.random.default_rng(1).normal(size=(20_000, DIM)), progress=True)
        index.save(path)
        host = Host(path, "batched")
        try:
            while (
                sent(b"GET /health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")(host.port) != "200"
            ):
                time.sleep(0.1)
            results = {"nothing": checked(host.port, idle)}
            for name, abuse in abuses().items():
                turns = [checked(host.port, lambda: abuse(host.port)) for _ in range(rounds)]  # noqa: B023
                slowest = sorted(turn["slowest_ms"] for turn in turns)
                results[name] = {
                    "answered": sorted({turn["answered"] for turn in turns}),
                    "checks": sum(turn["checks"] for turn in turns),
                    "median_ms": median(turn["median_ms"] for turn in turns),
                    "slowest_ms": {"median": median(slowest), "most": slowest[-1]},
                }
                click.echo(f"{name}: {json.dumps(rounded(results[name]))}")
        finally:
            host.stop()
    found = {"about": about([]), "results": results}
    out.write_text(json.dumps(rounded(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
