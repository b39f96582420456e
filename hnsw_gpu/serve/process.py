"""The process: uvicorn, the listening socket, and a drain on SIGTERM."""

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from hnsw_gpu.serve.served_index import ServedIndex
from hnsw_gpu.serve.server import Server, ServerSettings

GRACE_S = 30  # for what is under way when the server is told to stop


class Process(uvicorn.Server):
    """Uvicorn, which on SIGTERM is first not ready, then stops when all is answered."""

    def __init__(self, server: Server) -> None:
        super().__init__(
            uvicorn.Config(
                server.app(),
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._server = server
        self._told: list[int] = []
        server.stop = self._stop

    def _stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._told.append(sig)
        if len(self._told) > 1 or self._server.served is None:
            self.should_exit = True
            self.force_exit = len(self._told) > 1
            return
        self._server.drain()
        asyncio.get_running_loop().call_later(self._server.settings.drain_s, self._stop)

    @property
    def was_interrupted(self) -> bool:
        return signal.SIGINT in self._told


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError says which address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # not `socket.create_server`: where the protocol is not named, asyncio leaves out TCP_NODELAY,
    # and an answer, written in two parts, waits 40 ms for the acknowledgement of the first
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
    """Serve until SIGTERM, or Ctrl-C (KeyboardInterrupt).

    Raises what keeps the index from loading.
    """
    server = Server(settings)
    server.on_ready = on_ready
    process = Process(server)
    process.run(sockets=[listening])
    if server.error is not None:
        raise server.error
    if process.was_interrupted:
        raise KeyboardInterrupt
