"""Programs of their own around a cluster: what they leave behind, and what they hold."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason="needs the extra `ray`")

from callers import sixteen_callers
from collections_of import make, manifest_of
from processes import wait

import hnsw_gpu
from hnsw_gpu.collection.manifest import entry_of, write_manifest

ROOT = Path(__file__).parents[2]
ROWS = np.random.default_rng(3).normal(size=(600, 8)).astype(np.float32)
FOREVER = """
import sys, time
import hnsw_gpu
try:
    with hnsw_gpu.Cluster(sys.argv[1], replicas=1, address="local") as cluster:
        pids = [r["pid"] for shard in cluster.status()["shards"] for r in shard["replicas"]]
        print(*pids, flush=True)
        while True:
            cluster.search([[1.0] * 8])
except KeyboardInterrupt:
    sys.exit(130)
"""
SLOW_TO_END = """
import os, signal, sys, threading, time
import hnsw_gpu
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
def use():
    with hnsw_gpu.Cluster(sys.argv[1], replicas=1, address="local") as cluster:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        cluster.search([[1.0] * 8])
thread = threading.Thread(target=use)
thread.start()
while thread.is_alive():
    thread.join(0.1)
print("told", told.is_set())
"""
DEPLOYED = """
import json, urllib.request
import ray
from ray import serve
import hnsw_gpu
ray.init("local", num_cpus=2, include_dashboard=False)
serve.start(http_options={{"port": {port}}})
{block}
rows = [[float(i == j) for j in range(8)] for i in range(8)]
asked = urllib.request.Request("http://127.0.0.1:{port}/", json.dumps(rows).encode())
answer = urllib.request.urlopen(asked, timeout=60).read().decode()
serve.shutdown()
ray.shutdown()
print(answer)
"""
PEAKS = """
import sys, tracemalloc
import numpy as np, ray
import hnsw_gpu
ray.init("local", num_cpus=2, include_dashboard=False)
queries = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
tracemalloc.start()
for path in sys.argv[1:]:
    tracemalloc.reset_peak()
    with hnsw_gpu.Cluster(path, replicas=1) as cluster:
        for _ in range(3):
            cluster.search(queries, 10)
        assert cluster.is_ready()
        print(len(cluster), tracemalloc.get_traced_memory()[1])
ray.shutdown()
"""


@pytest.fixture
def started():
    """What starts a program, which does not outlive the test."""
    programs = []

    def start(code, *arguments, **how):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        programs.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **how)
        )
        return programs[-1]

    yield start
    for program in programs:
        program.kill()
        program.communicate()


def is_alive(pid):
    with contextlib.suppress(OSError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_program_that_ends_leaves_nothing(started, tmp_path, sign):
    """Neither actors nor the Ray that it started."""
    make(tmp_path / "c", ROWS, shards=2)
    program = started(FOREVER, tmp_path / "c", stderr=subprocess.DEVNULL)
    pids = list(map(int, program.stdout.readline().split()))
    assert len(pids) == 2 and all(map(is_alive, pids))
    own = {
        int(place.name)
        for place in Path("/proc").iterdir()
        if place.name.isdecimal() and f") S {program.pid} " in stat_of(place)
    }
    assert own  # Ray's own processes
    program.send_signal(sign)
    program.communicate(timeout=60)
    if sign == signal.SIGINT:
        assert program.returncode == 130
    wait(lambda: not any(map(is_alive, [*pids, *own])))


def test_a_program_ends_in_its_own_time(started, tmp_path):
    """With its own handler of SIGTERM, wherever it made its cluster: Ray's aborts it after 3 s."""
    make(tmp_path / "c", ROWS, shards=1)
    program = started(SLOW_TO_END, tmp_path / "c", stderr=subprocess.PIPE)
    told, said = program.communicate(timeout=120)
    assert (program.returncode, told) == (0, "told True\n"), said
    assert "SIGTERM" not in said


def stat_of(place):
    with contextlib.suppress(OSError):
        return (place / "stat").read_text()
    return ""


def test_the_driver_holds_nothing_of_the_size_of_the_data(started, tmp_path):
    """Ten times as many rows of other labels: the same memory, but for the shards' answers."""
    for shards, count in ((1, 10_000), (2, 50_000)):
        rows = np.random.default_rng(1).normal(size=(count, 4)).astype(np.float32)
        folder = tmp_path / str(shards)
        folder.mkdir()
        for s in range(shards):
            index = hnsw_gpu.Index(4, M=4, ef_construction=8)
            index.add(rows, np.arange(len(rows)) + s * len(rows))
            index.save(folder / f"shard-{s:04}.hnsw")
        entries = [entry_of(folder, f"shard-{s:04}.hnsw") for s in range(shards)]
        write_manifest(folder, manifest_of(index, entries))
    program = started(
        PEAKS, *(tmp_path / name for name in ("1", "1", "2"))
    )  # code is loaded, first
    told, _ = program.communicate(timeout=300)
    assert program.returncode == 0
    (few, less), (many, more) = (map(int, line.split()) for line in told.splitlines()[-2:])
    assert (few, many) == (10_000, 100_000)
    answers = 2000 * 10 * (8 + 4)  # bytes of a shard's
    assert more < less + 2.5 * 2 * answers


def test_the_command(started, tmp_path):
    """`hnsw-gpu serve --ray local`: searches, and ends with all that it started."""
    for extra in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(extra, reason="needs the extra `serve`")
    make(tmp_path / "docs", ROWS, shards=2)
    code = "from hnsw_gpu.cli import main; main()"
    refused = started(code, "serve", tmp_path / "docs", "--replicas", 2, stderr=subprocess.PIPE)
    assert "--ray says on which" in refused.communicate()[1]
    refused = started(
        code, "serve", tmp_path / "docs", "--port", 0, "--ray", "127.0.0.1:1",
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert "no Ray at 127.0.0.1:1: nobody listens there" in refused.communicate()[1]
    assert refused.returncode == 1
    program = started(
        code, "serve", tmp_path / "docs", "--port", 0, "--ray", "local", stderr=subprocess.PIPE
    )
    said = ""
    while "ready after" not in said:
        line = program.stderr.readline()
        assert line, said
        said += line
    url = next(word for word in said.split() if word.startswith("http://"))
    with hnsw_gpu.Client(url) as client:
        found = client.search(ROWS[:9], 5)
    expected = hnsw_gpu.load(tmp_path / "docs").search(ROWS[:9], 5)
    assert (found.labels == expected.labels).all()
    assert (found.distances == expected.distances).all()
    program.send_signal(signal.SIGTERM)
    said += program.communicate(timeout=60)[1]
    assert program.returncode == 0, said


def test_a_node_that_is_lost(tmp_path):
    """Under 16 callers: its actors are made on another one, and nobody notices but by the time."""
    from ray.cluster_utils import Cluster as Nodes

    make(tmp_path / "c", ROWS, shards=2)
    expected = hnsw_gpu.load(tmp_path / "c").search(ROWS[:50], 5)
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        lost = nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        with hnsw_gpu.Cluster(tmp_path / "c", replicas=2, address=nodes.address) as cluster:
            raylet = lost.all_processes["raylet"][0].process.pid
            there = []
            for shard in cluster.status()["shards"]:  # has a replica on each of the two nodes
                pids = [replica["pid"] for replica in shard["replicas"]]
                there += [pid for pid in pids if parent_of(pid) == raylet]
            assert len(there) == 2
            with sixteen_callers(cluster, ROWS[:50], expected) as (failed, differing, asked):
                wait(lambda: min(asked) > 3)
                for pid in (raylet, *there):  # without its raylet an actor lives on for a while
                    os.kill(pid, signal.SIGKILL)
                wait(lambda: states(cluster) == ["live"] * 4)
                assert not any(map(is_alive, (raylet, *there)))
                before = min(asked)
                wait(lambda: min(asked) > before + 3)
            assert (failed, differing) == ([], [])
    finally:
        nodes.shutdown()


def parent_of(pid):
    return int(stat_of(Path(f"/proc/{pid}")).rpartition(")")[2].split()[1])


def states(cluster):
    return [replica["state"] for s in cluster.status()["shards"] for replica in s["replicas"]]


def test_the_deployment_of_the_manual(started, tmp_path):
    """Fifteen lines, asked over HTTP, in a program of their own."""
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    make(tmp_path / "docs.collection", ROWS, shards=2)
    text = (ROOT / "docs" / "clusters.md").read_text()
    [block] = [part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "bind(" in part]
    assert len([line for line in block.splitlines() if line]) <= 15
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = DEPLOYED.format(port=port, block=block)
    program = started(code, cwd=tmp_path)
    told, _ = program.communicate(timeout=120)
    expected = hnsw_gpu.load(tmp_path / "docs.collection").search(np.eye(8), 3)
    assert (json.loads(told.splitlines()[-1]), program.returncode) == (expected.labels.tolist(), 0)
