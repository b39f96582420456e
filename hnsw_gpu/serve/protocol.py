"""HTTP/1 on a connection: uvicorn's, with bounds on what a caller may send and leave unread.

What RFC 9112 wants refused is refused, in the form of RFC 9457, and the connection closes.
"""

import asyncio
import http
import re
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hnsw_gpu.serve.problem import Problem

MOST_HEAD = 2**16  # bytes of names and values, of a URL, or between two callbacks of the parser
MOST_HEADERS = 100
LINGER_S = 1.0  # what still comes after a refusal is read: else the refusal would be lost
HOST = re.compile(rb"([\w.~%!$&'()*+,;=-]+|\[[0-9a-fA-F:.]+\])(:[0-9]*)?", re.ASCII)
ABORT = "hnsw_gpu.abort"  # in the scope's extensions: closes the connection at once


class Protocol(HttpToolsProtocol):
    """A connection. `timeout_s`: for each head to come, and for a full buffer to be read."""

    def __init__(self, *given: Any, timeout_s: float, **named: Any) -> None:
        super().__init__(*given, **named)
        self._timeout_s = timeout_s
        self._head_bytes = 0
        self._silent_bytes = 0  # since the parser last told of anything
        self._is_in_head = self._is_refused = self._is_pipelined = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    # ---------------------------------------------------------------- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # an answer counts as read when none is left
        self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self._head_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._silent_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return  # the request is answered, and the connection closed
        except httptools.HttpParserError as error:
            known = error.__context__
            self._refuse(known if isinstance(known, Problem) else Problem(400, "not HTTP/1.1"))
            return
        if self._silent_bytes > MOST_HEAD:
            self._refuse(_too_long())
        elif self._is_in_head:
            self._expect_head()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to keep the connection: for who sent several requests at once, and no more.

        Who sent one and says no more has left: nothing tells the two apart.
        """
        is_answering = self._is_pipelined and not self._is_idle and not self.cycle.more_body
        if is_answering:
            self.cycle.keep_alive = False  # the last one
        return is_answering

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._timeout_s, self._on_late_head)

    def _on_late_head(self) -> None:
        late = f"the head of the request did not come within {self._timeout_s:g} s"
        self._refuse(Problem(408, late))

    # ---------------------------------------------------------------- who does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self._timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()

    # ---------------------------------------------------------------- the parser's callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._is_in_head = True
        self._head_bytes = self._silent_bytes = 0
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._silent_bytes = 0
        if len(self.url) > MOST_HEAD:
            raise Problem(414, f"a URL of more than {MOST_HEAD:,} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._silent_bytes = 0
        self._head_bytes += len(name) + len(value)
        if len(self.headers) > MOST_HEADERS or self._head_bytes > MOST_HEAD:
            raise _too_long()

    def on_headers_complete(self) -> None:
        self._silent_bytes = 0
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            status = 505 if version > "1.1" else 400
            raise Problem(status, f"HTTP/{version}: expected HTTP/1.1")
        self._check_host(version)
        super().on_headers_complete()
        self._is_in_head = False
        if self.parser.should_upgrade():  # not to anything: the parser reads no further
            self.cycle.keep_alive = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._is_pipelined = self._is_pipelined or len(self.pipeline) > 0

    def _check_host(self, version: str) -> None:
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (version == "1.1" and not hosts):
            raise Problem(400, f"{len(hosts)} headers Host, expected one")
        if hosts and not HOST.fullmatch(hosts[0]):
            raise Problem(400, "Host: expected NAME or NAME:PORT")
        absolute = re.match(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)", self.url)
        if absolute:  # its host is the one that counts
            if not HOST.fullmatch(absolute[1]):
                raise Problem(400, "the URL names no host")
            kept = [pair for pair in self.headers if pair[0] != b"host"]
            self.headers[:] = [*kept, (b"host", absolute[1])]

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    # ---------------------------------------------------------------- refusing

    def _refuse(self, problem: Problem) -> None:
        """Answer what cannot be read as a request, unless others come first; then close."""
        self._is_refused = True
        if self.transport.is_closing():
            return
        if not self._is_idle:
            self.cycle.keep_alive = False
            if not self.cycle.more_body:  # it is whole, and answered; the next one is not
                return
            is_begun = self.cycle.response_started or len(self.pipeline) > 0
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if is_begun:
                self.transport.close()
                return
        content = bytes(problem.response().body)
        phrase = http.HTTPStatus(problem.status).phrase
        head = (
            f"HTTP/1.1 {problem.status} {phrase}\r\nContent-Type: application/problem+json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def _too_long() -> Problem:
    most = f"at most {MOST_HEADERS} headers of {MOST_HEAD:,} bytes in all"
    return Problem(431, f"the head of the request is too long: {most}")
