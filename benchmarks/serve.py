"""The server under load: curves to saturation, batching against none, swaps, cancelled callers.

    python -m benchmarks.serve run --out benchmarks/results/serve.json

Arrivals are open-loop (Poisson, seeded): a request's latency counts from when it was due, however
busy the server is. The load comes from one other process on the same machine, over loopback. With
and without batching are two servers that take turns; the second gives every request a call of its
own, on one engine thread. Queries are verses of the demo (256-d), the index holds 100,000 others.
"""

import asyncio
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import numpy as np

import hnsw_gpu
from benchmarks.record import about
from hnsw_gpu.demo import verses
from hnsw_gpu.serve import formats
from hnsw_gpu.serve.batcher import Batch

ROWS = (1, 16, 256)  # queries a request
LOADS = (0.2, 0.4, 0.6, 0.8, 0.95, 1.2)  # of what closed-loop callers get from the batching server
INDEXED = 100_000
MODES = ("batched", "unbatched")
STEPS = (
    *("cold_start_s", "lone_caller", "64_callers_of_one_row", "256_rows_over_direct", "curves"),
    *("past_saturation", "swaps", "cancelled", "soak"),
)
MOST_CONNECTIONS = 500
UNSENT = -1  # instead of a status: all connections were waiting for answers


@click.group()
def main() -> None:
    """The server under load."""


# ------------------------------------------------------------------ the two servers


class Unbatched:
    """The face of a Batcher, with a call of the engine for every request."""

    def __init__(
        self, index: hnsw_gpu.Index, *, on_batch: Callable[[Batch], None], **_: Any
    ) -> None:
        self._pool, self._on_batch = ThreadPoolExecutor(1), on_batch
        self.waiting_rows = self.in_flight = 0
        self.swap(index)

    def swap(self, index: hnsw_gpu.Index) -> None:
        self.index = index

    async def search(self, queries: np.ndarray, k: int = 10, **how: Any) -> hnsw_gpu.SearchResult:
        how.pop("timeout_s", None)
        arrived, index = time.perf_counter(), self.index

        def one() -> hnsw_gpu.SearchResult:
            started = time.perf_counter()
            found = index.search(queries, k, **how)
            seconds = time.perf_counter() - started
            self._on_batch(Batch(len(queries), [started - arrived], seconds, True))
            return found

        return await asyncio.get_running_loop().run_in_executor(self._pool, one)

    def close(self) -> None:
        self._pool.shutdown()


@main.command()
@click.argument("path", type=Path)
@click.argument("mode", type=click.Choice(MODES))
def host(path: Path, mode: str) -> None:
    """Serve PATH on a free port, which is printed."""
    from hnsw_gpu.serve import ServerSettings, listen
    from hnsw_gpu.serve.process import Process
    from hnsw_gpu.serve.server import Server

    listening = listen("127.0.0.1", 0)
    click.echo(listening.getsockname()[1])
    settings = ServerSettings(path.resolve(), path.resolve().parent, device="cpu", drain_s=0)
    make: Any = Unbatched if mode == "unbatched" else hnsw_gpu.Batcher
    Process(Server(settings, make)).run(sockets=[listening])


@main.command()
@click.argument("path", type=Path)
@click.argument("queries", type=Path)
@click.argument("rows", type=int)
@click.argument("seconds", type=float)
def direct(path: Path, queries: Path, rows: int, seconds: float) -> None:
    """Rows/s of `Index.search` itself, a batch of ROWS a call."""
    index, asked = hnsw_gpu.load(path, device="cpu"), np.load(queries)
    starts = itertools.cycle(range(0, len(asked) - rows + 1, rows))
    index.search(asked[:rows])
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        start = next(starts)
        index.search(asked[start : start + rows])
        calls += 1
    click.echo(calls * rows / (time.perf_counter() - began))


class Host:
    """A server process."""

    def __init__(self, path: Path, mode: str) -> None:
        command = [sys.executable, "-m", "benchmarks.serve", "host", str(path), mode]
        self._began = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    async def ready(self) -> float:
        """Seconds from the start of the process until it answers searches."""
        while (await get(self.port, "/health/ready"))[0] != 200:
            await asyncio.sleep(0.005)
        return time.perf_counter() - self._began

    async def metric(self, name: str) -> float:
        text = (await get(self.port, "/metrics"))[1].decode()
        return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


# ------------------------------------------------------------------ callers


Done = Callable[[int, bytes], None]  # status (0: the connection was lost) and body


class Connection(asyncio.Protocol):
    """One kept-alive connection, with callbacks: tasks would cost as much as the server does."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._length = 0  # of the answer, once its head is there
        self._done: Done | None = None
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._length:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            at = self._received.lower().find(b"content-length: ", 0, end) + 16
            self._length = end + 4 + int(self._received[at : self._received.find(b"\r", at)])
        if len(self._received) >= self._length:
            status, body = int(self._received[9:12]), bytes(self._received[: self._length])
            self._received.clear()
            self._length = 0
            self._answered(status, body)

    def connection_lost(self, error: Exception | None) -> None:
        self._answered(0, b"")

    def _answered(self, status: int, received: bytes) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(status, received.partition(b"\r\n\r\n")[2])

    def send(self, request: bytes, done: Done) -> None:
        self._done = done
        self.transport.write(request)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self.send(request, lambda status, body: answer.set_result((status, body)))
        return await answer


async def connect(port: int) -> Connection:
    loop = asyncio.get_running_loop()
    _, made = await loop.create_connection(Connection, "127.0.0.1", port)
    return made


async def get(port: int, path: str) -> tuple[int, bytes]:
    connection = await connect(port)
    found = await connection.ask(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    connection.transport.close()
    return found


class Load(NamedTuple):
    """What a server is asked: requests of one size, made before the clock starts."""

    rows: int
    requests: list[bytes]

    @staticmethod
    def of(queries: np.ndarray, rows: int) -> "Load":
        requests = []
        for start in range(0, len(queries) - rows + 1, rows):
            body = formats.write_npy(queries[start : start + rows])
            head = f"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: {formats.NPY}\r\n"
            requests.append((head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body)
        return Load(rows, requests[:256])


class Answer(NamedTuple):
    due: float
    latency: float
    status: int


async def closed_loop(port: int, load: Load, callers: int, seconds: float) -> list[Answer]:
    """Each caller asks again as soon as it is answered."""
    answers: list[Answer] = []
    requests = itertools.cycle(load.requests)
    connections = [await connect(port) for _ in range(callers)]
    left, ended = callers, asyncio.Event()
    until = time.perf_counter() + seconds

    def ask(connection: Connection) -> None:
        began = time.perf_counter()

        def done(status: int, _body: bytes) -> None:
            nonlocal left
            answers.append(Answer(began, time.perf_counter() - began, status))
            if status and time.perf_counter() < until:
                ask(connection)
                return
            left -= 1
            if not left:
                ended.set()

        connection.send(next(requests), done)

    for connection in connections:
        ask(connection)
    await ended.wait()
    for connection in connections:
        connection.transport.close()
    return answers


async def open_loop(port: int, load: Load, rate: float, seconds: float, seed: int) -> list[Answer]:
    """`rate` requests/s whatever the server does."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(1, int(rate * seconds)))
    answers: list[Answer] = []
    requests = itertools.cycle(load.requests)
    count = min(MOST_CONNECTIONS, max(64, int(rate)))
    connections = [await connect(port) for _ in range(count)]
    idle = deque(connections)  # in turns: the server closes one that is silent for 75 s

    def send(due: float) -> None:
        if not idle:
            answers.append(Answer(due, time.perf_counter() - due, UNSENT))
            return
        connection = idle.popleft()

        def done(status: int, _body: bytes) -> None:
            answers.append(Answer(due, time.perf_counter() - due, status))
            idle.append(connection)

        connection.send(next(requests), done)

    for due in (time.perf_counter() + np.cumsum(gaps)).tolist():
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        send(due)
    while len(answers) < len(gaps):
        await asyncio.sleep(0.01)
    for connection in connections:
        connection.transport.close()
    return answers


def figures(answers: list[Answer], rows: int) -> dict[str, Any]:
    """Rows/s that were answered, latency percentiles of these in ms, and shares of the others."""
    good = np.array([answer.latency for answer in answers if answer.status == 200])
    ends = [answer.due + answer.latency for answer in answers]
    seconds = max(ends) - min(answer.due for answer in answers)
    shown = {
        f"p{p:g}_ms": round(1000 * float(np.percentile(good, p)), 3) for p in (50, 95, 99, 99.9)
    }
    refused = sum(answer.status == 429 for answer in answers)
    unsent = sum(answer.status == UNSENT for answer in answers)
    return {
        "rows_per_s": round(len(good) * rows / seconds),
        **shown,
        "refused_share": round(refused / len(answers), 4),
        "unsent_share": round(unsent / len(answers), 4),
        "failed": len(answers) - len(good) - refused - unsent,
    }


# ------------------------------------------------------------------ what is measured


async def cold_start(path: Path, rounds: int) -> dict[str, float]:
    """Seconds from the start of the process until it is ready, compiled code being cached."""
    seconds = []
    for _ in range(rounds):
        one = Host(path, "batched")
        seconds.append(await one.ready())
        one.stop()
    return spread(seconds)


async def curves(hosts: dict[str, Host], loads: list[Load], seconds: float) -> dict[str, Any]:
    """Throughput and latency at several loads, of both servers in turns."""
    found: dict[str, Any] = {}
    for load in loads:
        answers = await closed_loop(hosts["batched"].port, load, 16, seconds)
        capacity = figures(answers, load.rows)["rows_per_s"] / load.rows
        points = []
        for number, share in enumerate(LOADS):
            point: dict[str, Any] = {"load": share, "requests_per_s": round(share * capacity, 1)}
            for mode in MODES:
                rate = share * capacity
                measured = await open_loop(hosts[mode].port, load, rate, seconds, number)
                point[mode] = figures(measured, load.rows)
            points.append(point)
            click.echo(f"{load.rows} rows a request: {json.dumps(point)}")
        found[str(load.rows)] = points
    return found


async def lone_caller(hosts: dict[str, Host], load: Load, rounds: int) -> dict[str, Any]:
    """Latency of one caller with batching, as a multiple of that without."""
    ratios = []
    for _ in range(rounds):
        times = {}
        for mode in MODES:
            measured = await closed_loop(hosts[mode].port, load, 1, 1.0)
            times[mode] = median(answer.latency for answer in measured)
        ratios.append(times["batched"] / times["unbatched"])
    return {"rows": load.rows, "latency_over_unbatched": spread(ratios)}


async def many_callers(hosts: dict[str, Host], load: Load, rounds: int) -> dict[str, Any]:
    """64 callers of one row each: throughput over that without batching, rows a call."""
    ratios, batches = [], []
    for _ in range(rounds):
        rates = {}
        for mode in MODES:
            before = await hosts[mode].metric("hnsw_gpu_batch_rows_count")
            measured = await closed_loop(hosts[mode].port, load, 64, 2.0)
            rates[mode] = figures(measured, load.rows)["rows_per_s"]
            calls = await hosts[mode].metric("hnsw_gpu_batch_rows_count") - before
            if mode == "batched":
                batches.append(len(measured) * load.rows / calls)
        ratios.append(rates["batched"] / rates["unbatched"])
    return {"throughput_over_unbatched": spread(ratios), "rows_a_batch": spread(batches)}


async def beside_direct(host: Host, path: Path, queries: Path, load: Load, rounds: int) -> Any:
    """Rows/s through the server as a share of those of `Index.search` itself, by callers."""
    command = [sys.executable, "-m", "benchmarks.serve", "direct", str(path), str(queries)]
    shares: dict[int, list[float]] = {1: [], 4: [], 16: []}
    for _ in range(rounds):
        for callers, held in shares.items():
            done = subprocess.run(
                [*command, str(load.rows), "2"], capture_output=True, text=True, check=True
            )
            measured = figures(await closed_loop(host.port, load, callers, 2.0), load.rows)
            held.append(measured["rows_per_s"] / float(done.stdout))
    return {f"{callers} callers": spread(held) for callers, held in shares.items()}


async def past_saturation(host: Host, load: Load, seconds: float) -> dict[str, Any]:
    """Twice what it can do: refusals, latency of what was accepted, memory."""
    measured = figures(await closed_loop(host.port, load, 16, 2.0), load.rows)
    rate = 2 * measured["rows_per_s"] / load.rows
    await open_loop(host.port, load, rate, seconds / 2, 0)  # buffers grow to their size
    before = await host.metric("process_resident_memory_bytes")
    measured = figures(await open_loop(host.port, load, rate, seconds, 1), load.rows)
    after = await host.metric("process_resident_memory_bytes")
    return {**measured, "memory_over_before": round(after / before, 3)}


async def swaps(host: Host, load: Load, names: list[str], count: int) -> dict[str, Any]:
    """Swaps under half of the load that it can carry."""
    measured = figures(await closed_loop(host.port, load, 16, 2.0), load.rows)
    rate, spans = 0.5 * measured["rows_per_s"] / load.rows, []
    loading = asyncio.create_task(open_loop(host.port, load, rate, 2.0 * count, 2))
    for number in range(count):
        await asyncio.sleep(1.0)
        body = json.dumps({"path": names[number % 2]}).encode()
        head = "POST /v1/index:swap HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: application/json\r\n"
        connection, began = await connect(host.port), time.perf_counter()
        request = (head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body
        status, _ = await connection.ask(request)
        assert status == 200
        spans.append((began, time.perf_counter()))
        connection.transport.close()
    answers = await loading
    during = [a for a in answers if any(s - 0.05 < a.due < e + 0.05 for s, e in spans)]
    others = [a for a in answers if a not in set(during)]
    return {
        "swaps": count,
        "swap_s": spread([end - start for start, end in spans]),
        "requests": len(answers),
        "failed": sum(answer.status != 200 for answer in answers),
        "during": figures(during, load.rows),
        "otherwise": figures(others, load.rows),
    }


async def cancelled(host: Host, load: Load, count: int) -> dict[str, Any]:
    """Callers who hang up as soon as they have asked."""
    requests = itertools.cycle(load.requests)

    async def leave() -> None:
        connection = await connect(host.port)
        connection.transport.write(next(requests))
        await asyncio.sleep(0.005)
        connection.transport.abort()

    before = await host.metric("hnsw_gpu_cancelled_total")
    for _ in range(count // 200):
        await asyncio.gather(*(leave() for _ in range(200)))
    for _ in range(1000):
        if not await host.metric("hnsw_gpu_queue_rows"):
            break
        await asyncio.sleep(0.01)
    connection = await connect(host.port)
    status, _ = await connection.ask(load.requests[0])
    connection.transport.close()
    return {
        "callers": count,
        "left_the_queue": await host.metric("hnsw_gpu_cancelled_total") - before,
        "queue_rows_afterwards": await host.metric("hnsw_gpu_queue_rows"),
        "batches_in_flight_afterwards": await host.metric("hnsw_gpu_batches_in_flight"),
        "next_answer": status,
    }


async def soak(host: Host, loads: list[Load], seconds: float) -> dict[str, Any]:
    """Requests of all sizes at a third of what the server can carry; memory in between."""
    memory = []
    rates = []
    for load in loads:
        measured = figures(await closed_loop(host.port, load, 16, 2.0), load.rows)
        rates.append(measured["rows_per_s"] / load.rows / 3 / len(loads))
    work = [
        asyncio.create_task(open_loop(host.port, load, rate, seconds, seed))
        for seed, (load, rate) in enumerate(zip(loads, rates, strict=True))
    ]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        await asyncio.sleep(5)
        memory.append(await host.metric("process_resident_memory_bytes"))
    answers = [answer for done in await asyncio.gather(*work) for answer in done]
    part = max(1, len(memory) // 10)
    return {
        "seconds": seconds,
        "requests": len(answers),
        "failed": sum(answer.status != 200 for answer in answers),
        "memory_last_tenth_over_second": round(
            median(memory[-part:]) / median(memory[part : 2 * part]), 4
        ),
    }


def spread(values: list[float]) -> dict[str, float]:
    """The median of several rounds, the lowest and the highest."""
    return {
        "median": round(median(values), 3),
        "lowest": round(min(values), 3),
        "highest": round(max(values), 3),
    }


@main.command()
@click.option("--seconds", default=5.0, show_default=True, help="A point of the curves.")
@click.option("--rounds", default=5, show_default=True, help="Of each ratio.")
@click.option("--soak-seconds", default=600.0, show_default=True)
@click.option("--rows", default=INDEXED, show_default=True, help="Vectors in the index.")
@click.option("--only", default=",".join(STEPS), show_default=True, help="Steps to measure.")
@click.option("--out", type=Path, help="Where to save the figures as JSON, and a plot beside them.")
def run(
    seconds: float, rounds: int, soak_seconds: float, rows: int, only: str, out: Path | None
) -> None:
    """Everything, some seventeen minutes. What is not measured stays in the file as it was."""
    vectors = verses.load_verses().vectors
    with tempfile.TemporaryDirectory() as folder:
        names = ["a.hnsw", "b.hnsw"]
        for name, part in zip(names, (vectors[:rows], vectors[-rows:]), strict=True):
            index = hnsw_gpu.Index(vectors.shape[1])
            index.add(part)
            index.save(Path(folder) / name)
        queries = np.ascontiguousarray(np.random.default_rng(0).permutation(vectors)[:8192])
        results = asyncio.run(
            _all(Path(folder), names, queries, seconds, rounds, soak_seconds, only.split(","))
        )
    click.echo(json.dumps(results, indent=1))
    if out is not None:
        facts = about([]) | {"rows": rows, "dim": int(vectors.shape[1])}
        if out.exists():
            results = json.loads(out.read_text())["results"] | results
        out.write_text(json.dumps({"about": facts, "results": results}, indent=1) + "\n")
        draw(results, out.with_suffix(".png"))


async def _all(
    folder: Path,
    names: list[str],
    queries: np.ndarray,
    seconds: float,
    rounds: int,
    soaking: float,
    only: list[str],
) -> dict[str, Any]:
    path, asked = folder / names[0], folder / "queries.npy"
    np.save(asked, queries)
    loads = [Load.of(queries, rows) for rows in ROWS]
    hosts = {mode: Host(path, mode) for mode in MODES}
    for one in hosts.values():
        await one.ready()
    await asyncio.sleep(1)
    found: dict[str, Any] = {}
    steps = {
        "cold_start_s": lambda: cold_start(path, rounds),
        "lone_caller": lambda: lone_caller(hosts, loads[0], rounds),
        "64_callers_of_one_row": lambda: many_callers(hosts, loads[0], rounds),
        "256_rows_over_direct": lambda: beside_direct(
            hosts["batched"], path, asked, loads[2], rounds
        ),
        "curves": lambda: curves(hosts, loads, seconds),
        "past_saturation": lambda: past_saturation(hosts["batched"], loads[2], 2 * seconds),
        "swaps": lambda: swaps(hosts["batched"], loads[1], names[::-1], 10),
        "cancelled": lambda: cancelled(hosts["batched"], loads[1], 10_000),
        "soak": lambda: soak(hosts["batched"], loads, soaking),
    }
    try:
        for name in only:
            found[name] = await steps[name]()
            click.echo(f"{name}: {json.dumps(found[name])[:600]}")
    finally:
        for one in hosts.values():
            one.stop()
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Latency over throughput, with and without batching."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(ROWS), figsize=(12, 4), sharey=True)
    for axis, rows in zip(axes, ROWS, strict=True):
        points = results["curves"][str(rows)]
        for mode, colour in zip(MODES, ("tab:blue", "tab:orange"), strict=True):
            rates = [point[mode]["rows_per_s"] for point in points]
            for name, line in (("p50_ms", "-"), ("p99_ms", ":")):
                label = f"{mode}, {name.removesuffix('_ms')}"
                values = [point[mode][name] for point in points]
                axis.plot(rates, values, line, marker="o", ms=3, color=colour, label=label)
        axis.set(title=f"{rows} queries a request", xlabel="queries/s", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("latency, ms")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
