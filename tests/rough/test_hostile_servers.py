"""The client against servers that are hostile or broken, by plain sockets; forks, and Ctrl-C."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import hnsw_gpu
from hnsw_gpu import Client, ServerError
from hnsw_gpu.serve import client as client_module
from hnsw_gpu.serve import formats

DIM = 4
DESCRIPTION = {
    "n": 7, "dim": DIM, "metric": "l2", "dtype": "fp32", "device": "cpu", "parameters": {},
    "checksum": "c", "version": 1, "path": "x.hnsw", "filters": [],
}  # fmt: skip


class Request(NamedTuple):
    """What came over a connection."""

    method: str
    target: str
    headers: dict[str, str]  # names in small letters
    body: bytes

    @property
    def right(self) -> bytes:
        """The body of its right answer: to a search, the first number of each query as label."""
        if not self.target.startswith("/v1/search"):
            return json.dumps(DESCRIPTION).encode()
        queries = formats.read_npy(self.body)
        k = int(dict(urllib.parse.parse_qsl(self.target.partition("?")[2]))["k"])
        labels = np.repeat(queries[:, :1].astype(np.int64), k, axis=1)
        return formats.write_result(formats.NPY, labels, np.zeros(labels.shape, np.float32))


class Peer:
    """A connection as the server sees it."""

    def __init__(self, accepted: socket.socket, asked: list[Request], leaves: threading.Event):
        self._socket, self._file = accepted, accepted.makefile("rb")
        self.asked, self.leaves = asked, leaves  # all requests so far; the test is over

    def read(self) -> Request | None:
        """The next request; None: the client has left."""
        line = "" if self._file.closed else self._file.readline().decode()
        if not line:
            return None
        method, target, _ = line.split()
        headers = {}
        while (line := self._file.readline().decode()).strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = self._file.read(int(headers.get("content-length", "0")))
        self.asked.append(Request(method, target, headers, body))
        return self.asked[-1]

    def send(self, *parts: bytes) -> None:
        self._socket.sendall(b"".join(parts))

    def answer(self, body: bytes, status: str = "200 OK", *headers: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
        self.send("\r\n".join(lines).encode(), b"\r\n\r\n", body)

    def trickle(self, *parts: bytes) -> None:
        """Parts in turn, again and again, each a moment after the other, for a while."""
        for number in range(150):
            if self.leaves.wait(0.01):
                return
            self.send(parts[number % len(parts)])

    def close(self) -> None:
        self._file.close()
        self._socket.close()


Behaviour = Callable[[Peer], None]


@contextmanager
def serving(behave: Behaviour) -> Iterator[tuple[str, list[Request]]]:
    """A server that treats each connection in that way; its address, and what it was asked."""
    listening = socket.create_server(("127.0.0.1", 0))
    asked: list[Request] = []
    leaves = threading.Event()
    threads: list[threading.Thread] = []

    def treat(accepted: socket.socket) -> None:
        peer = Peer(accepted, asked, leaves)
        with suppress(OSError):
            behave(peer)
        peer.close()

    def accept() -> None:
        with suppress(OSError):
            while True:
                accepted, _ = listening.accept()
                if leaves.is_set():
                    accepted.close()
                    return
                threads.append(threading.Thread(target=treat, args=(accepted,)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    port = listening.getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", asked
    finally:
        leaves.set()
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
        accepting.join()
        listening.close()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def replying(make: Callable[[Peer, Request], None]) -> Behaviour:
    """Treats each request in that way, on connections that stay open."""

    def behave(peer: Peer) -> None:
        while (request := peer.read()) is not None:
            make(peer, request)

    return behave


def honest(peer: Peer, request: Request) -> None:
    peer.answer(request.right)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WAITS_S", (0.0,) * len(client_module.WAITS_S))


def query(number: int) -> np.ndarray:
    return np.full((1, DIM), number, np.float32)


def ask(client: Client, number: int) -> int:
    return int(client.search(query(number), 1).labels[0, 0])


# ---------------------------------------------------------------- time

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def after(begin: bytes, *parts: bytes) -> Behaviour:
    def make(peer: Peer, _: Request) -> None:
        peer.send(begin)
        peer.trickle(*parts)
        peer.close()

    return replying(make)


def never_read(peer: Peer) -> None:
    peer.leaves.wait(4)


SLOW = {
    "the status line": after(b"", b"H", *[b"TTP/1.1 200 OK"[i : i + 1] for i in range(14)]),
    "a header": after(OK, b"a"),
    "headers": after(OK, b"A: b\r\n"),
    "continue": after(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "the body": after(OK + b"Content-Length: 400\r\n\r\n", b"x"),
    "a body until the end": after(OK + b"\r\n", b"x"),
    "chunks": after(CHUNKED, b"1\r\nx\r\n"),
    "the size of a chunk": after(CHUNKED, b"0"),
    "trailers": after(CHUNKED + b"0\r\n", b"A: b\r\n"),
    "busy": replying(lambda peer, _: (peer.leaves.wait(0.2), peer.answer(b"", "503 Busy"))),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_byte_a_moment_does_not_outlast_the_timeout(kind: str) -> None:
    with (
        serving(SLOW[kind]) as (url, _),
        Client(url, timeout_s=0.25) as asking,
        pytest.raises(TimeoutError, match=r"^no answer of 127\.0\.0\.1 within 0\.25 s$"),
    ):
        asking.search(query(1), 1)


def test_all_requests_of_a_call_share_the_timeout() -> None:
    def make(peer: Peer, request: Request) -> None:
        peer.leaves.wait(0.1)
        honest(peer, request)

    with (
        serving(replying(make)) as (url, asked),
        Client(url, timeout_s=0.35, batch_rows=1) as asking,
        pytest.raises(TimeoutError, match="within"),
    ):
        asking.search(np.zeros((20, DIM)), 1)
    assert 1 <= len(asked) < 6


def test_a_server_that_does_not_read_does_not_outlast_it() -> None:
    with (
        serving(never_read) as (url, _),
        Client(url, timeout_s=0.2) as asking,
        pytest.raises(TimeoutError, match=r"within 0\.2 s"),
    ):
        asking.search(np.zeros((2000, 1000), np.float32), 1)


@pytest.mark.parametrize("wrong", [0, -1, float("-inf")])
def test_timeouts_are_checked(wrong: float) -> None:
    with pytest.raises(ValueError, match="timeout_s="):
        Client("http://x", timeout_s=wrong)
    with pytest.raises(ValueError, match="timeout_s="):
        Client("http://x").search(query(1), timeout_s=wrong)


def test_no_timeout_at_all() -> None:
    with serving(replying(honest)) as (url, asked), Client(url, timeout_s=float("inf")) as asking:
        found = asking.search(query(3), 1, timeout_s=float("inf"))
    assert found.labels.tolist() == [[3]]
    assert asked[0].headers["x-timeout-ms"] == "3600000"


# ---------------------------------------------------------------- size


def endless(begin: bytes, part: bytes, sent: list[int]) -> Behaviour:
    """Sends on and on, to 48 MiB at most."""

    def make(peer: Peer, _: Request) -> None:
        peer.send(begin)
        for _number in range(48 * 2**20 // len(part)):
            peer.send(part)
            sent[0] += len(part)
        peer.close()

    return replying(make)


ENDLESS = {
    "a body": (OK + b"\r\n", b"x" * 2**16),
    "chunks": (CHUNKED, b"10000\r\n" + b"x" * 2**16 + b"\r\n"),
    "a chunk": (CHUNKED + b"FFFFFFFFFFF\r\n", b"x" * 2**16),
    "a chunk of size -1": (CHUNKED + b"-1\r\n", b"x" * 2**16),
    "trailers": (CHUNKED + b"0\r\n", b"A: b\r\n" * 10_000),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 3_000),
    "an error": (b"HTTP/1.1 500 No\r\n\r\n", b"x" * 2**16),
}


@pytest.mark.parametrize("call", ["search", "index"])
@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_answer_is_not_taken(kind: str, call: str) -> None:
    sent = [0]
    with (
        serving(endless(*ENDLESS[kind], sent)) as (url, _),
        Client(url, retries=0) as asking,
        pytest.raises((ServerError, ConnectionError)),
    ):
        asking.search(query(1), 1) if call == "search" else asking.index()
    most = formats.MOST_NPY_STRINGS if call == "search" else 0  # labels may be long strings
    assert sent[0] < most + 32 * 2**20  # what is not read lies in the system's buffers


@pytest.mark.parametrize("size", ["1000000000000", "9" * 19, "9" * 5000])
def test_a_length_is_not_believed(size: str) -> None:
    head = OK + f"Content-Length: {size}\r\n\r\n".encode()

    def make(peer: Peer, _: Request) -> None:
        peer.send(head, b"x" * 50_000)
        peer.close()

    with serving(replying(make)) as (url, _), Client(url, retries=0) as asking:
        for call in (asking.index, lambda: asking.search(query(1), 1)):
            with pytest.raises(hnsw_gpu.AnswerError, match=r"200: (a body of|not )"):
                call()


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"\x00\xff\x15\x03\x01",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 " + b"x" * 2**17 + b"\r\n\r\n",
        CHUNKED + b"-5\r\nabcde\r\n",
        CHUNKED + b"zz\r\nabcde\r\n",
        OK + b"Content-Length: 20\r\n\r\nshort",
    ],
)
def test_what_is_not_http_is_a_connection_error(sent: bytes) -> None:
    def make(peer: Peer, _: Request) -> None:
        peer.send(sent)
        peer.close()

    with serving(replying(make)) as (url, _), Client(url, retries=1) as asking:
        with pytest.raises(ConnectionError) as failed:
            asking.index()
        assert len(str(failed.value)) < 400


# ---------------------------------------------------------------- content

DESCRIPTIONS = {
    "garbage": b"\xff\xfe\x00garbage",
    "nothing": b"",
    "a page": b"<html>log in</html>",
    "a list": b"[]",
    "null": b"null",
    "an empty object": b"{}",
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "a long number": b'{"n": ' + b"1" * 9_000 + b"}",
    "NaN": json.dumps(DESCRIPTION | {"n": float("nan")}).encode(),
    "a text for a number": json.dumps(DESCRIPTION | {"dim": "4"}).encode(),
    "true for a number": json.dumps(DESCRIPTION | {"version": True}).encode(),
    "a number for a list": json.dumps(DESCRIPTION | {"filters": 3}).encode(),
    "limits of another kind": json.dumps(DESCRIPTION | {"limits": [1]}).encode(),
    "no dim": json.dumps({name: v for name, v in DESCRIPTION.items() if name != "dim"}).encode(),
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_descriptions_that_are_none(kind: str) -> None:
    behave = replying(lambda peer, _: peer.answer(DESCRIPTIONS[kind]))
    with serving(behave) as (url, asked), Client(url) as asking:
        for call in (asking.index, lambda: asking.swap("x.hnsw")):
            with pytest.raises(hnsw_gpu.AnswerError, match=r"^200: ") as failed:
                call()
            assert failed.value.status == 200
    assert len(asked) == 2  # what makes no sense is not asked again


def test_a_long_description() -> None:
    """Of as many filters as an index may have."""
    long = DESCRIPTION | {"filters": [f"customers of {i:,}" for i in range(10_000)]}
    behave = replying(lambda peer, _: peer.answer(json.dumps(long).encode()))
    with serving(behave) as (url, _), Client(url) as asking:
        assert asking.index() == asking.swap("x.hnsw") == long


def result(labels: object, distances: object) -> bytes:
    return formats.write_result(
        formats.NPY, np.array(labels, np.int64), np.array(distances, np.float32)
    )


RESULTS = {
    "garbage": (b"\x93NUMPY garbage", "not a .npy"),
    "nothing": (b"", "not a .npy"),
    "JSON": (b'{"labels": [[1, 2]], "distances": [[0, 0]]}', "not a .npy"),
    "a page": (b"<html>log in</html>", "not a .npy"),
    "numbers": (formats.write_npy(np.zeros((1, 2), np.float32)), "a result of float32"),
    "a deep header": (b"\x93NUMPY\x01\x00\x00\x30" + b"(" * 0x3000, "not a .npy"),
    "more rows": (result([[1, 2]] * 2, [[0, 0]] * 2), r"results \(2, 2\), expected \(1, 2\)"),
    "no rows": (result(np.zeros((0, 2)), np.zeros((0, 2))), r"results \(0, 2\)"),
    "fewer results": (result([[1]], [[0]]), r"results \(1, 1\), expected \(1, 2\)"),
    "turned": (result([[1], [2]], [[0], [0]]), r"results \(2, 1\), expected \(1, 2\)"),
    "labels that are none": (result([[1, -2]], [[0, 0]]), "labels below -1"),
    "NaN": (result([[1, 2]], [[0, np.nan]]), "NaN"),
    "distances of nothing": (result([[1, -1]], [[0, 3]]), "not found"),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_of_another_shape_than_asked(kind: str) -> None:
    body, words = RESULTS[kind]
    behave = replying(lambda peer, _: peer.answer(body))
    with (
        serving(behave) as (url, _),
        Client(url) as asking,
        pytest.raises(hnsw_gpu.AnswerError, match=f"^200: .*{words}"),
    ):
        asking.search(query(1), 2)


def test_missing_results_are_an_answer() -> None:
    behave = replying(lambda peer, _: peer.answer(result([[4, -1]], [[1, np.inf]])))
    with serving(behave) as (url, _), Client(url) as asking:
        assert asking.search(query(1), 2).labels.tolist() == [[4, -1]]


@pytest.mark.parametrize(
    ("detail", "shown"),
    [
        ({"detail": "no\n2026 INFO all is well\x1b[2J"}, r"no\n2026 INFO all is well\x1b[2J"),
        ({"detail": "x" * 100_000}, None),
        ("[" * 60_000, None),
    ],
)
def test_reasons_are_one_short_line(detail: object, shown: str | None) -> None:
    body = detail if isinstance(detail, str) else json.dumps(detail)
    behave = replying(lambda peer, _: peer.answer(body.encode(), "422 No"))
    with (
        serving(behave) as (url, _),
        Client(url) as asking,
        pytest.raises(ServerError) as failed,
    ):
        asking.index()
    assert failed.value.detail.isprintable() and len(failed.value.detail) <= 2_000
    assert shown is None or failed.value.detail == shown


# ---------------------------------------------------------------- whose answer


def test_an_answer_to_another_call_is_refused() -> None:
    def make(peer: Peer, request: Request) -> None:
        call_id = request.headers["x-call-id"] if len(peer.asked) > 1 else "ffff"
        peer.answer(request.right, "200 OK", f"X-Call-Id: {call_id}")

    with serving(replying(make)) as (url, asked), Client(url) as asking:
        with pytest.raises(hnsw_gpu.AnswerError, match="the answer to call 'ffff', not to "):
            ask(asking, 1)
        assert [ask(asking, i) for i in (2, 3)] == [2, 3]
    assert len({request.headers["x-call-id"] for request in asked}) == 3


def test_an_answer_that_nobody_asked_for_is_nobodys() -> None:
    is_sent = threading.Event()
    surplus = Request("POST", "/v1/search?k=1", {}, formats.write_npy(query(99))).right

    def make(peer: Peer, request: Request) -> None:
        honest(peer, request)
        if not is_sent.is_set():
            peer.leaves.wait(0.1)  # so that it does not come with the first
            peer.answer(surplus)
            is_sent.set()

    with serving(replying(make)) as (url, _), Client(url) as asking:
        assert ask(asking, 1) == 1
        assert is_sent.wait(10)
        assert [ask(asking, i) for i in (2, 3)] == [2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are for POSIX")
def test_both_sides_of_a_fork_get_their_own_answers() -> None:
    """The kept connection stays the parent's, and goes on in use there."""
    program = """
import os, sys
import numpy as np
from hnsw_gpu import Client
client = Client(sys.argv[1], retries=0)
def ask(numbers):
    for i in numbers:
        assert client.search(np.full((1, 4), i), 1).labels[0, 0] == i, i
ask([1])
children = []
for side in range(1, 4):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ask(range(1000 * side, 1000 * side + 200))
            code = 0
        finally:
            os._exit(code)
    children.append(child)
ask(range(200))
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
ask(range(200))
print("done")
"""
    sides: list[set[int]] = []  # of each connection, who asked over it

    def behave(peer: Peer) -> None:
        mine: set[int] = set()
        sides.append(mine)
        while (request := peer.read()) is not None:
            mine.add(int(formats.read_npy(request.body)[0, 0]) // 1000)
            honest(peer, request)

    with serving(behave) as (url, _):
        done = subprocess.run(
            [sys.executable, "-c", program, url], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": str(Path(hnsw_gpu.__file__).parents[1])},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert sorted(map(sorted, sides)) == [[0], [1], [2], [3]]


signals_only = pytest.mark.skipif(
    not hasattr(signal, "pthread_kill")
    or threading.current_thread() is not threading.main_thread(),
    reason="signals reach the main thread, on POSIX",
)


@signals_only
def test_after_a_ctrl_c_the_next_call_has_a_connection_of_its_own() -> None:
    main = threading.main_thread().ident
    assert main is not None

    def make(peer: Peer, request: Request) -> None:
        if len(peer.asked) == 1:
            signal.pthread_kill(main, signal.SIGINT)
            peer.leaves.wait(0.2)
        honest(peer, request)

    with serving(replying(make)) as (url, asked), Client(url) as asking:
        with pytest.raises(KeyboardInterrupt):
            ask(asking, 1)
        assert asking.swap("x.hnsw") == DESCRIPTION  # never sent twice, so nothing is hidden
    assert len(asked) == 2


@signals_only
def test_a_call_within_a_call_has_a_connection_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a signal handler, while the first waits for its answer."""
    is_asked = threading.Event()
    within = []

    def make(peer: Peer, request: Request) -> None:
        if request.body and formats.read_npy(request.body)[0, 0] == 1 and len(peer.asked) == 2:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            is_asked.wait(10)
        honest(peer, request)
        is_asked.set()

    def handle(*_: object) -> None:
        is_asked.set()
        within.append(ask(asking, 5))

    with serving(replying(make)) as (url, _), Client(url, retries=0) as asking:
        before = signal.signal(signal.SIGUSR1, handle)
        try:
            assert ask(asking, 0) == 0
            assert ask(asking, 1) == 1
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert within == [5]


# ---------------------------------------------------------------- closed while idle


def test_a_connection_that_was_closed_while_idle_is_made_again() -> None:
    """Nothing was sent, so even a swap goes on; nothing is sent twice."""
    is_closed = threading.Event()

    def behave(peer: Peer) -> None:
        request = peer.read()
        if request is not None:
            honest(peer, request)
        peer.close()
        is_closed.set()

    with serving(behave) as (url, asked), Client(url) as asking:
        for name in ("x.hnsw", "y.hnsw"):
            is_closed.clear()
            assert asking.swap(name) == DESCRIPTION
            assert is_closed.wait(10)
    assert [json.loads(request.body)["path"] for request in asked] == ["x.hnsw", "y.hnsw"]


def test_a_swap_waits_for_a_server_that_is_not_there_yet() -> None:
    """It is tried again while nothing could be sent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    tries = []

    def connect(target: object, deadline: float) -> socket.socket:
        tries.append(target)
        raise ConnectionRefusedError("nobody")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hnsw_gpu.serve.connection._connected", connect)
        with pytest.raises(ConnectionError, match="nobody"):
            Client(f"http://127.0.0.1:{port}", retries=3).swap("x.hnsw")
    assert len(tries) == 4


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("dim", "k", "rows", "limits"),
    [
        (4096, 10, 4100, None),
        (4, 1025, 4100, None),
        (4, 10_000, 450, None),
        (256, 10, 3000, {"body_bytes": 2**20, "results": 2**22}),
        (8, 100, 3000, {"body_bytes": 2**26, "results": 5_000}),
        (8, 100, 3000, {"body_bytes": -1, "results": True, "more": {}}),
    ],
)
def test_batches_fit_the_limits_of_the_server(
    dim: int, k: int, rows: int, limits: dict[str, int] | None
) -> None:
    is_sane = limits is not None and limits["body_bytes"] > 0
    most = limits if is_sane else {"body_bytes": 2**26, "results": 2**22}  # the server's defaults
    assert most is not None

    def make(peer: Peer, request: Request) -> None:
        if request.method == "GET":
            peer.answer(json.dumps(DESCRIPTION | {"limits": limits or most}).encode())
        elif len(request.body) > most["body_bytes"]:
            peer.answer(b"", "413 Too large")
        elif len(formats.read_npy(request.body)) * k > most["results"]:
            peer.answer(b"", "422 Wrong")
        else:
            honest(peer, request)

    queries = np.zeros((rows, dim), np.float32)
    queries[:, 0] = np.arange(rows)
    with serving(replying(make)) as (url, asked), Client(url) as asking:
        found = asking.search(queries, k)
        asking.search(queries[:9], 2)
    np.testing.assert_array_equal(found.labels, np.arange(rows)[:, None].repeat(k, axis=1))
    assert [request.method for request in asked].count("GET") == 1  # asked for them once


def test_small_searches_ask_for_no_limits() -> None:
    with serving(replying(honest)) as (url, asked), Client(url) as asking:
        asking.search(np.zeros((100, DIM)), 10)
    assert [request.method for request in asked] == ["POST"]


# ---------------------------------------------------------------- the token


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_token_stays_with_its_host(status: int) -> None:
    with serving(replying(honest)) as (other, strayed):
        behave = replying(
            lambda peer, _: peer.answer(b"", f"{status} Moved", f"Location: {other}/v1/index")
        )
        with serving(behave) as (url, asked), Client(url, token="s3cret") as asking:
            for call in (asking.index, lambda: ask(asking, 1), lambda: asking.swap("x")):
                with pytest.raises(ServerError, match=f"{status}: a redirect to '{other}"):
                    call()
        assert len(asked) == 3 and strayed == []
        assert all(request.headers["authorization"] == "Bearer s3cret" for request in asked)


def test_proxies_of_the_environment_do_not_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(replying(honest)) as (proxy, strayed), serving(replying(honest)) as (url, _):
        monkeypatch.setenv("http_proxy", proxy)
        with Client(url, token="s3cret") as asking:
            assert asking.index() == DESCRIPTION
        assert strayed == []


def test_tokens_and_addresses_are_checked() -> None:
    with serving(replying(honest)) as (url, asked), Client(url, token="s3cret\n") as asking:
        asking.index()
    assert asked[0].headers["authorization"] == "Bearer s3cret"
    for token in ("a\nX-Evil: 1", "", "two words", "gehe\u00efm"):
        with pytest.raises(ValueError, match=r"^token: expected one word of printable ASCII$"):
            Client(url, token=token)
    for wrong in (
        "http://x:99999", "http://x:port", "http://[::1", "http://user:word@x", "http://x/#a",
        "http://x/a b", "http://x/\u00e9", "http://x/?a=1", "http://",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected such as"):
            Client(wrong)
