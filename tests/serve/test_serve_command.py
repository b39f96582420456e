"""`hnsw-gpu serve` as a process: starting, signals, and what keeps it from starting."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import served
from served import QUERIES, VECTORS, Caller

from hnsw_gpu import Index, load
from hnsw_gpu.serve import formats

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals are for POSIX"),
]


def start(*given: object, before: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    command = [*before, sys.executable, "-m", "hnsw_gpu", "serve", *map(str, given)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PORT": "0", **environment}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def until(is_true) -> None:
    for _ in range(500_000):
        if is_true():
            return
    raise AssertionError("it never came")


@contextmanager
def process(*given: object, **how):
    """The process and a caller of it, once it is ready."""
    started = start(*given, **how)
    try:
        first = started.stderr.readline()
        found = re.fullmatch(r"serving .*\.hnsw on http://(127\.0\.0\.1|0\.0\.0\.0):(\d+)\n", first)
        assert found, first + started.stderr.read()
        caller = Caller(int(found[2]))
        until(lambda: caller("GET", "/health/ready").status == 200)
        yield started, caller
        caller.connection.close()
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return served.saved(tmp_path_factory.mktemp("indexes"))


def test_sigterm_lets_what_is_under_way_end(tmp_path):
    """A search that takes long is answered, new ones are refused, and the exit code is 0."""
    index = Index(8, M=4, ef_construction=10)
    index.add(np.random.default_rng(0).normal(size=(30_000, 8)))
    index.save(tmp_path / "large.hnsw")
    with process(tmp_path / "large.hnsw", "--drain", "0.3", "--threads", "1") as (one, call):
        until(lambda: call.metric("canary_recall") > 0)
        until(lambda: call.metric("batches_in_flight") == 0)  # the canary's own batch has ended
        rows = np.tile(QUERIES, (6, 1))
        replies = []

        def ask():
            caller = Caller(call.connection.port)
            replies.append(caller.search(rows, "/v1/search?ef=10000&k=1"))
            caller.connection.close()

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: call.metric("batches_in_flight") == 1)
        one.send_signal(signal.SIGTERM)
        until(lambda: call("GET", "/health/ready").status == 503)
        call.search(QUERIES).refused(503, "the server is stopping")
        thread.join(60)
        assert one.wait(60) == 0
        assert replies[0].status == 200
        expected = index.search(rows, 1, ef=10_000)
        np.testing.assert_array_equal(formats.read_result(replies[0].body)[0], expected.labels)


def test_ctrl_c(path):
    with process(path) as (one, _):
        one.send_signal(signal.SIGINT)
        assert one.wait(30) == 130
        stderr = one.stderr.read()
        ready = r"(.* searching on the CPU: .*\n)?ready after \d+\.\d s: 400 vectors of 8, cosine, "
        ready += r"on the CPU\n\nInterrupted\.\n"
        assert re.fullmatch(ready, stderr), stderr


def test_a_token_and_another_address(path, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    with process(path, "--token-file", tmp_path / "token", "--host", "0.0.0.0") as (_, call):
        call("GET", "/v1/index").refused(401, "Bearer")
        assert call("GET", "/v1/index", Authorization="Bearer s3cret").status == 200


def failed(*given: object) -> str:
    one = start(*given)
    stderr = one.communicate(timeout=60)[1]
    assert one.returncode != 0
    return stderr


def test_what_keeps_it_from_starting(path, tmp_path):
    broken = tmp_path / "broken.hnsw"
    broken.write_bytes(path.read_bytes()[:1000])
    stderr = failed(broken)
    assert re.search(r"Error: .*broken\.hnsw: truncated", stderr) and "Traceback" not in stderr
    (tmp_path / "token").write_text("two words\n")
    assert "token: expected one token" in failed(path, "--token-file", tmp_path / "token")
    assert "is not within --root" in failed(path, "--root", tmp_path)
    assert "cannot listen on 192.0.2.1:0" in failed(path, "--host", "192.0.2.1")
    assert "without --token-file: whoever reaches this port" in failed(broken, "--host", "0.0.0.0")


def test_swaps_stay_in_the_root(path, tmp_path):
    (path.parent / "more").mkdir(exist_ok=True)
    served.saved(path.parent / "more", "b.hnsw", VECTORS[:50])
    with process(path, "--root", path.parent.parent) as (_, call):
        inner = f"{path.parent.name}/more/b.hnsw"
        assert call.as_json({"path": inner}, "/v1/index:swap").json["path"] == inner


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX has it")
@pytest.mark.skipif(
    signal.getsignal(getattr(signal, "SIGHUP", signal.SIGINT)) == signal.SIG_IGN,
    reason="these tests run where SIGHUP is ignored, as under nohup",
)
def test_sighup_drains(path):
    with process(path, "--drain", "0.3") as (one, call):
        one.send_signal(signal.SIGHUP)
        one.send_signal(signal.SIGHUP)  # as from a terminal that is closed
        until(lambda: call("GET", "/health/ready").status == 503)
        assert one.wait(30) == 0


def test_nohup(path):
    with process(path, before=("nohup",)) as (one, call):
        one.send_signal(signal.SIGHUP)
        assert call("GET", "/health/ready").status == 200
        one.send_signal(signal.SIGTERM)
        assert one.wait(30) == 0


def test_hosts(path):
    """One that is this machine's alone knows its names; another one, any or those given."""
    for given, good, bad in (
        ((), ["localhost"], ["evil.example"]),
        (("--host", "0.0.0.0"), ["docs.example"], []),
        (("--host", "0.0.0.0", "--allowed-host", "docs.example"), ["docs.example"], ["a.example"]),
        (("--allowed-host", "*"), ["evil.example"], []),
    ):
        with process(path, *given) as (_, call):
            for host in good:
                assert call("GET", "/v1/index", Host=host).status == 200
            for host in bad:
                call("GET", "/v1/index", Host=host).refused(421, "--allowed-host")


def test_a_log_of_objects(path):
    one = start(path, "--log-format", "json", "--access-log")
    try:
        events = [json.loads(one.stderr.readline())]
        while "ready after" not in events[-1]["message"]:
            events.append(json.loads(one.stderr.readline()))
        assert {event["level"] for event in events} == {"info"}
        port = int(re.search(r":(\d+)$", events[0]["message"])[1])
        assert events[-1]["message"].endswith("400 vectors of 8, cosine, on the CPU")
        caller = Caller(port)
        assert caller.as_json({"path": path.name}, "/v1/index:swap").status == 200
        caller.connection.close()
        one.send_signal(signal.SIGTERM)
        *_, swapped, asked = (json.loads(line) for line in one.stderr.read().splitlines())
        assert one.wait(30) == 0
        assert "version 2" in swapped["message"]
        assert (asked["method"], asked["path"], asked["status"]) == ("POST", "/v1/index:swap", 200)
    finally:
        one.kill()
        one.wait()
        one.stderr.close()


def test_a_read_only_system_and_no_rights(path):
    """As in a container with a read-only root and a user of its own, who has no home."""
    python = Path(sys.executable).resolve()
    is_open = all(folder.stat().st_mode & 0o001 for folder in (*python.parents, *ROOT.parents))
    user = "--reuid 65534 --clear-groups" if is_open else ""  # else root, without root's rights
    command = "mount -o remount,ro,bind / && exec setpriv --bounding-set=-all " + user
    before = ("unshare", "--mount", "sh", "-c", command + ' env PYTHONDONTWRITEBYTECODE=1 "$@"')
    probe = (*before, "sh", "test", "!", "-w", "/tmp")
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("nobody may mount anything here")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(path, folder / "docs.hnsw")
        nowhere = {"HOME": "/nonexistent", "NUMBA_CACHE_DIR": "/nonexistent"}
        with process(folder / "docs.hnsw", before=(*before, "sh"), **nowhere) as (one, call):
            found = formats.read_result(call.search(QUERIES).body)
            np.testing.assert_array_equal(found[0], load(path).search(QUERIES, 10).labels)
            status = Path(f"/proc/{one.pid}/status").read_text()
            assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
            assert not is_open or re.search(r"^Uid:\t65534\t65534", status, re.MULTILINE)
            one.send_signal(signal.SIGTERM)
            assert one.wait(30) == 0
