"""The server's process: uvicorn, its listening socket, and the drain on a signal."""

import asyncio
import signal
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from hnsw_gpu.serve.protocol import Protocol
from hnsw_gpu.serve.served_index import ServedIndex
from hnsw_gpu.serve.server import Server
from hnsw_gpu.serve.settings import ServerSettings

SIGHUP = getattr(signal, "SIGHUP", None)  # POSIX
GRACE_S = 30  # for running requests, once the server stops listening


class Process(uvicorn.Server):
    """Uvicorn that drains on the first SIGTERM, SIGINT or SIGHUP.

    It exits at once on a second one, but SIGHUP: who closes a terminal sends several.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(
            uvicorn.Config(
                server.app(),
                http=partial(Protocol, timeout_s=server.settings.timeout_s),  # type: ignore[arg-type]
                log_level="warning",
                access_log=False,
                log_config=None,
                server_header=False,
                ws="none",
                lifespan="on",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._live, self._drain_s = server.live, server.settings.drain_s
        self._signals: list[int] = []
        self._live.on_failure = self._stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == SIGHUP and self._signals:
            return
        self._signals.append(sig)
        if len(self._signals) > 1:
            self.force_exit = True
            self._stop()
        elif self._live.served is None:
            self._stop()
        else:
            self._drain()

    def _drain(self) -> None:
        """Be not ready for `drain_s`, so that load balancers notice; then stop listening."""
        self._live.drain()
        asyncio.get_running_loop().call_later(self._drain_s, self._stop)

    def _stop(self) -> None:
        self.should_exit = True

    @property
    def was_interrupted(self) -> bool:
        return signal.SIGINT in self._signals


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Not `socket.create_server`: unless the protocol is named, asyncio does not set TCP_NODELAY,
    # and an answer, written in two parts, waits 40 ms for the acknowledgement of the first.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        listening.close()
        raise OSError(f"cannot listen on {host}:{port}: {error}") from None
    return listening


def serve(
    settings: ServerSettings, listening: socket.socket, on_ready: Callable[[ServedIndex], None]
) -> None:
    """Serve until SIGTERM, SIGHUP unless it is ignored (nohup), or Ctrl-C (KeyboardInterrupt).

    Raises the error that keeps the index from loading.
    """
    server = Server(settings)
    server.live.on_ready = on_ready
    process = Process(server)
    if SIGHUP is not None and signal.getsignal(SIGHUP) != signal.SIG_IGN:
        signal.signal(SIGHUP, process.handle_exit)
    process.run(sockets=[listening])
    if server.live.error is not None:
        raise server.live.error
    if process.was_interrupted:
        raise KeyboardInterrupt
