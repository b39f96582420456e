"""Whose Ray it is: what we started ends with us, what others started stays; clear errors."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading

import pytest

from hnsw_gpu.cluster import ray_connection as room


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ImportError, match=r'pip install "hnsw-gpu\[ray\]"'),
        room.ray_connection(),
    ):
        pass


ray = pytest.importorskip("ray", reason="needs the extra `ray`")


@pytest.fixture(autouse=True)
def no_ray_is_left():
    assert not ray.is_initialized()
    yield
    was_left = ray.is_initialized()
    ray.shutdown()
    assert not was_left


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with (
            pytest.raises(ConnectionError, match=rf"no Ray at {address}: nobody listens there"),
            room.ray_connection(address),
        ):
            pass


def answer(listener, says):
    with listener.accept()[0] as caller, contextlib.suppress(ConnectionError):
        caller.sendall(says)
        caller.recv(1000)
        caller.recv(1)  # until it leaves


def test_somebody_else_listens(monkeypatch):
    """One that says nothing, and one that speaks HTTP/1.1."""
    monkeypatch.setattr(room, "CONNECT_S", 0.2)
    for says in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as other:
            answering = threading.Thread(target=answer, args=(other, says))
            answering.start()
            address = f"127.0.0.1:{other.getsockname()[1]}"
            with (
                pytest.raises(ConnectionError, match=rf"no Ray at {address}: somebody else"),
                room.ray_connection(address),
            ):
                pass
            answering.join()


@pytest.mark.parametrize("address", ["", "somewhere", "host:", "host:x", ":6379", "h:70000", 6379])
def test_what_is_no_address(address):
    with pytest.raises(ValueError, match="expected 'HOST:PORT'"), room.ray_connection(address):
        pass
    with pytest.raises(ValueError, match="cpus=0"), room.ray_connection(cpus=0):
        pass


def test_ours_ends_with_its_last_user(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    one, other = room.ray_connection(cpus=2), room.ray_connection("local")
    first = one.__enter__()
    assert (first.is_ours, first.is_started) == (True, True)
    assert ray.cluster_resources()["CPU"] == 2
    assert other.__enter__() == first
    with pytest.raises(ValueError, match="connected to another Ray"):
        room.ray_connection("10.0.0.1:6379").__enter__()
    one.__exit__(None, None, None)
    assert ray.is_initialized()
    other.__exit__(None, None, None)
    assert not ray.is_initialized()


def test_one_that_the_program_made_after_ours_stays():
    """Ours was ended by somebody else: who leaves it touches no other."""
    one, other = room.ray_connection(cpus=1), room.ray_connection()
    first = one.__enter__()
    assert first.is_there()
    ray.shutdown()
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        assert not first.is_there()
        second = other.__enter__()
        assert (second.is_ours, second.is_there()) == (False, True)
        one.__exit__(None, None, None)
        assert second.is_there()
        other.__exit__(None, None, None)
        assert second.is_there()
    finally:
        ray.shutdown()


def test_a_cluster_of_others_stays():
    """A head that another process started: we connect, leave, and it goes on."""
    code = "import ray; print(ray.init('local', num_cpus=1, include_dashboard=False)"
    code += ".address_info['gcs_address'], flush=True); input()"
    head = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = head.stdout.readline().split()[-1]
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        for _ in range(2):
            with room.ray_connection(address) as found:
                assert (found.is_ours, found.is_started) == (True, False)
                assert ray.cluster_resources()["CPU"] == 1
                assert signal.getsignal(signal.SIGTERM).__name__ == "<lambda>"
            assert not ray.is_initialized() and head.poll() is None

        ray.init(address, log_to_driver=False)  # the program's own connection stays
        for given in (None, address, "auto"):
            with room.ray_connection(given) as found:
                assert (found.is_ours, found.is_started) == (False, False)
            assert ray.is_initialized()
        for other in ("local", "10.0.0.1:6379", "ray://10.0.0.1:10001"):
            with (
                pytest.raises(ValueError, match="connected to another"),
                room.ray_connection(other),
            ):
                pass
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)
    finally:
        head.communicate("\n")
    assert head.returncode == 0
