"""This process and Ray: a cluster of somebody's, or one of our own on this machine.

Ray knows one connection a process. One that the program made is used and left alone; one that we
made ends with the last of its users, and with it the Ray that we started, if we did.
"""

import contextlib
import ctypes
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from hnsw_gpu import inputs

ACTION_BYTES = 512  # more than the `struct sigaction` of any system
CONNECT_S = 10.0  # to reach an address
CLIENT = "ray://"  # of an address: Ray's client, from outside the cluster
LOCAL = "local"  # as an address: a Ray of our own
HTTP2_SETTINGS = b"\x04"  # the type of the first frame of either side, after the frame's length
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + HTTP2_SETTINGS + b"\0" * 5

_changing = threading.RLock()  # guards the next; a collected Cluster may come in between
_users: list["RayConnection"] = []  # of the connection that we made


class RayConnection(NamedTuple):
    """How this process came to its Ray."""

    ray: Any  # the package
    is_ours: bool  # we connected, rather than the program
    is_started: bool  # and to a Ray that we started
    job: tuple[str, str] | None  # which connection to which Ray it is

    def is_there(self) -> bool:
        """Is this process still connected so? The program may shut Ray down, and begin another."""
        return _job(self.ray) == self.job


def _job(ray: Any) -> tuple[str, str] | None:
    """Of the connection that this process has: the node that it came to, and its job there."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


def imported_ray() -> Any:
    """The package `ray`; ImportError says how to get it."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(f'ray is not installed ({error}): pip install "hnsw-gpu[ray]"') from None
    return ray


@contextlib.contextmanager
def ray_connection(address: str | None = None, *, cpus: int = 2) -> Iterator[RayConnection]:
    """Be connected to Ray until the block ends.

    address: "HOST:PORT" of a cluster's head, "ray://HOST:PORT" of its client server, "auto" for the
        one that runs on this machine. None: the one that the program is connected to, else that of
        RAY_ADDRESS, else one of our own with so many `cpus`, which the block's end stops; "local":
        one of our own.

    ConnectionError: nobody listens there, or no Ray. ValueError: the program is connected to
    another. ImportError: there is no package `ray`.
    """
    connection = _enter(imported_ray(), address, inputs.integer("cpus", cpus, 1))
    try:
        yield connection
    finally:
        _leave(connection)


def _enter(ray: Any, address: str | None, cpus: int) -> RayConnection:
    if address is not None and (not isinstance(address, str) or not address):
        raise ValueError(f"address={address!r}: expected 'HOST:PORT', 'ray://HOST:PORT' or None")
    with _changing:
        _users[:] = [user for user in _users if user.is_there()]  # the program may have ended ours
        if ray.is_initialized():
            if address is not None:
                _require_connected_to(ray, address)
            theirs = RayConnection(ray, False, False, _job(ray))
            connection = _users[0] if _users else theirs
        else:
            place = address or os.environ.get("RAY_ADDRESS") or LOCAL
            _connect(ray, place, cpus)
            connection = RayConnection(ray, True, place == LOCAL, _job(ray))
        if connection.is_ours:
            _users.append(connection)
    return connection


def _leave(connection: RayConnection) -> None:
    if not connection.is_ours:
        return
    with _changing:
        if connection in _users:
            _users.remove(connection)
            if connection not in _users and connection.is_there():
                connection.ray.shutdown()


def ends_with_last_user(connection: RayConnection) -> bool:
    """Whether to leave stops the Ray that we started, and all that runs there."""
    with _changing:
        return connection.is_started and len(_users) == 1


def _connect(ray: Any, place: str, cpus: int) -> None:
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if place == LOCAL:
        with _same_signals():
            ray.init(LOCAL, num_cpus=cpus, include_dashboard=False, **quietly)
        return
    if place != "auto":
        _require_listener(place)
    try:
        with _same_signals():
            ray.init(place, **quietly)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        ray.shutdown()
        raise ConnectionError(f"no Ray at {place}: {error}") from None


def _require_listener(address: str) -> None:
    """ConnectionError where nobody does, or what is no gRPC: Ray itself would try for minutes."""
    place = _place(address)
    try:
        listener = socket.create_connection(place, timeout=CONNECT_S)
    except OSError as error:
        raise ConnectionError(f"no Ray at {address}: nobody listens there ({error})") from None
    with listener:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        try:
            listener.sendall(HTTP2_HELLO)
            is_grpc = listener.recv(4)[3:] == HTTP2_SETTINGS
        except OSError:
            is_grpc = False
    if not is_grpc:
        raise ConnectionError(f"no Ray at {address}: somebody else listens there")


def _place(address: str) -> tuple[str, int]:
    """Host and port of an address."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"address={address!r}: expected 'HOST:PORT', 'ray://HOST:PORT' or None")
    return host, int(port)


def _require_connected_to(ray: Any, address: str) -> None:
    """ValueError where the Ray of this process is not the one of an address."""
    if address == "auto":
        return
    if address == LOCAL and any(user.is_started for user in _users):
        return
    if address.startswith(CLIENT):
        if ray.util.client.ray.is_connected() and _client_is_of(ray, address):
            return
    elif address != LOCAL:
        mine = ray.get_runtime_context().gcs_address
        if _resolved(mine) & _resolved(address):
            return
    raise ValueError(
        f"address={address!r}: this process is connected to another Ray already; address=None "
        "takes that one"
    )


def _client_is_of(ray: Any, address: str) -> bool:
    """Is the server of Ray's client the one of an address? True where this Ray does not tell."""
    worker = getattr(ray.util.client.ray.get_context(), "client_worker", None)
    mine = getattr(worker, "_conn_str", None)
    return not mine or bool(_resolved(mine) & _resolved(address))


def _resolved(address: str) -> set[tuple[str, int]]:
    host, port = _place(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return {(host, port)}
    return {(str(place[0]), port) for *_, place in found}


@contextlib.contextmanager
def _same_signals() -> Iterator[None]:
    """Leave a program its handler of SIGTERM, where it has one: Ray puts its own there.

    From any thread, and that of Ray's C++ too: it calls ours, and aborts the process 3 s later.
    """
    before, action = signal.getsignal(signal.SIGTERM), ctypes.create_string_buffer(ACTION_BYTES)
    sigaction = ctypes.CDLL(None).sigaction if os.name == "posix" else lambda *_: None
    sigaction(signal.SIGTERM, None, action)
    yield
    if before in (signal.SIG_DFL, None):
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
    sigaction(signal.SIGTERM, action, None)
