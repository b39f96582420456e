"""One HTTP/1.1 connection whose every wait ends at a deadline, and whose every answer has a bound.

The standard library's timeouts begin again with every byte that comes, and its bodies are of any
length. Here it only reads the answer, from a file that keeps both.
"""

import contextlib
import http.client
import io
import selectors
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

HEAD_BYTES = 2**17  # most that an answer may bring beside its body
DETAIL_BYTES = 2**16  # of an error's body; the rest is not read
PIECE = 2**20
LONGEST_S = 1e8  # that a socket takes; longer is for ever


class UnsentError(ConnectionError):
    """Not a byte of the request left: nobody can have acted on it."""


class DeadlineError(TimeoutError):
    """The deadline passed."""


class TooLongError(Exception):
    """A body beyond the bound."""


class Target(NamedTuple):
    """The server that a connection is to."""

    host: str
    port: int
    is_https: bool

    @property
    def name(self) -> str:
        """As the header Host has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_https else 80) else f"{host}:{self.port}"


class Answer(NamedTuple):
    status: int
    headers: Any  # of email.message.Message: `get` knows any capitals
    body: bytes  # of an error only the first DETAIL_BYTES


class Connection:
    """A connection that `exchange` asks; `is_reusable` says whether it may ask again.

    UnsentError: it cannot be made. DeadlineError: not in time.
    """

    def __init__(self, target: Target, deadline: float) -> None:
        self._target = target
        self._sent = 0  # bytes of this request
        self.is_reusable = False
        try:
            self._socket = _connected(target, deadline)
        except DeadlineError:
            raise
        except OSError as error:
            raise UnsentError(str(error)) from error

    def close(self) -> None:
        self._socket.close()

    @property
    def is_quiet(self) -> bool:
        """Nothing came since the last answer: neither bytes that nobody asked for, nor the end."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            return not selector.select(0)

    def exchange(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        *,
        deadline: float,
        most_bytes: int,
    ) -> Answer:
        """Ask once. most_bytes: of the body of an answer of status 200.

        DeadlineError. TooLongError. UnsentError; other OSErrors and HTTPException: it broke, or
        what came is not HTTP.
        """
        self.is_reusable = False
        named = {"Host": self._target.name, "Accept-Encoding": "identity", **headers}
        if method == "POST":
            named["Content-Length"] = str(len(body))
        head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        head = f"{method} {path} HTTP/1.1\r\n{head}\r\n"
        is_whole = self._send(head.encode("ascii"), body, deadline)
        file = _Incoming(self._socket, deadline, most_bytes + HEAD_BYTES)
        response = http.client.HTTPResponse(file, method=method)  # type: ignore[arg-type]
        try:
            response.begin()
            is_good = response.status == 200
            content = _read(response, most_bytes if is_good else DETAIL_BYTES, cuts=not is_good)
        except ValueError as error:  # a length of a chunk that is none
            raise http.client.HTTPException(str(error)) from None
        self.is_reusable = (
            is_whole and response.isclosed() and not response.will_close and response.status >= 200
        )
        return Answer(response.status, response.headers, content)

    def _send(self, head: bytes, body: bytes, deadline: float) -> bool:
        """Send the request; False if the server stopped listening before it had all of it.

        It may have refused the request by then: its answer may already be there.
        """
        self._sent = 0
        # one packet, unless it takes several anyway
        parts = (head + body,) if len(body) < PIECE else (head, body)
        try:
            for part in parts:
                left = memoryview(part)
                while left:
                    with _waiting(self._socket, deadline):
                        count = self._socket.send(left[:PIECE])
                    self._sent += count
                    left = left[count:]
        except (BrokenPipeError, ConnectionResetError) as error:
            if not self._sent:
                raise UnsentError(str(error)) from error
            return False
        return True


class _Incoming(io.RawIOBase):
    """What the socket brings for one answer, until the deadline and up to a bound."""

    def __init__(self, connected: socket.socket, deadline: float, room: int) -> None:
        self._socket, self._deadline, self._room = connected, deadline, room

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What HTTPResponse asks of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _waiting(self._socket, self._deadline):
            count = self._socket.recv_into(buffer)
        self._room -= count
        if self._room < 0:
            raise http.client.HTTPException("an answer without end")
        return count


def _read(response: http.client.HTTPResponse, most: int, *, cuts: bool) -> bytes:
    """The body of at most `most` bytes; of a longer one the first, if `cuts`."""
    if not cuts and (response.length or 0) > most:
        raise TooLongError(f"a body of {response.length:,} bytes: at most {most:,}")
    pieces, left = [], most
    while piece := response.read(min(PIECE, left + 1)):
        left -= len(piece)
        pieces.append(piece)
        if left < 0:
            if cuts:
                return b"".join(pieces)[:most]
            raise TooLongError(f"a body of more than {most:,} bytes")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


def _connected(target: Target, deadline: float) -> socket.socket:
    """A connected socket; resolving the name is the system's, which has timeouts of its own."""
    error: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(
        target.host, target.port, type=socket.SOCK_STREAM
    ):
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with _waiting(made, deadline):
                made.connect(address)
            if target.is_https:
                context = ssl.create_default_context()
                context.set_alpn_protocols(["http/1.1"])
                with _waiting(made, deadline):
                    return context.wrap_socket(made, server_hostname=target.host)
            return made
        except BaseException as failed:
            made.close()
            if not isinstance(failed, OSError) or isinstance(failed, DeadlineError):
                raise
            error = failed
    raise error if error is not None else OSError(f"no address of {target.host}")


@contextlib.contextmanager
def _waiting(connected: socket.socket, deadline: float) -> Iterator[None]:
    """Let one step of the socket wait until the deadline; DeadlineError: it is past."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineError
    connected.settimeout(left if left < LONGEST_S else None)
    try:
        yield
    except TimeoutError as error:
        if error.errno is None:  # ours, not the network's
            raise DeadlineError from None
        raise
