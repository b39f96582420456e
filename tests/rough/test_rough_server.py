"""A server among rough callers: too much at once, odd heads, other origins, damaged files."""

import contextlib
import json
import logging
import os
import re
import socket
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
safetensors = pytest.importorskip("safetensors.numpy")
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

import served
from served import DIM, QUERIES, VECTORS, running

from hnsw_gpu import Index, load
from hnsw_gpu.serve import formats, logs, long_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("indexes")
    served.saved(made)
    return made


@pytest.fixture(scope="module")
def shared(folder):
    with running(folder / "docs.hnsw") as one:
        yield one


@contextlib.contextmanager
def held(monkeypatch, owner, name):
    """Calls of owner.name wait until the block ends; yields an event: one has begun."""
    begun, goes_on = threading.Event(), threading.Event()
    real = getattr(owner, name)

    def waiting(*given, **named):
        begun.set()
        assert goes_on.wait(30)
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, waiting)
        try:
            yield begun
        finally:
            goes_on.set()


def in_background(work) -> tuple[threading.Thread, list]:
    replies = []
    thread = threading.Thread(target=lambda: replies.append(work()))
    thread.start()
    return thread, replies


# ---------------------------------------------------------------- one caller, and everybody


def long_bodies(dim=DIM):
    rows = np.random.default_rng(0).normal(size=(6000, dim)).astype(np.float32)
    return {
        formats.JSON: json.dumps({"queries": rows.tolist()}).encode(),
        formats.SAFETENSORS: safetensors.save({"queries": rows}),
    }


@pytest.mark.parametrize("media", [formats.JSON, formats.SAFETENSORS])
def test_a_long_body_is_read_beside_the_others(shared, monkeypatch, media):
    ask, other = shared.caller(), shared.caller()
    body = long_bodies()[media]
    with held(monkeypatch, formats, "read_search") as begun:
        thread, replies = in_background(
            lambda: ask("POST", "/v1/search?k=2", body, Content_Type=media)
        )
        assert begun.wait(20)
        assert other("GET", "/health/live").status == 200
    thread.join()
    assert replies[0].status == 200


def test_many_rows_are_gathered_beside_the_others(shared, monkeypatch):
    ask, other = shared.caller(), shared.caller()
    labels = [int(label) for label in np.arange(20_000) % 400]
    with held(monkeypatch, shared.live.served.index, "vectors") as begun:
        thread, replies = in_background(lambda: ask.as_json({"labels": labels}, "/v1/search?k=1"))
        assert begun.wait(20)
        assert other("GET", "/health/live").status == 200
    thread.join()
    assert np.ravel(replies[0].json["labels"]).tolist() == labels


def test_many_rows_are_checked_beside_the_others(shared, monkeypatch):
    ask, other = shared.caller(), shared.caller()
    rows = np.tile(VECTORS, (25, 1))
    with held(monkeypatch, shared.live.served.index, "checked_queries") as begun:
        thread, replies = in_background(lambda: ask.search(rows, "/v1/search?k=1"))
        assert begun.wait(20)
        assert other("GET", "/health/live").status == 200
    thread.join()
    assert replies[0].status == 200


def refused_untouched(shared, monkeypatch, body, media, status, words, target="/v1/search"):
    """The body is refused before any row of it is gathered or converted."""
    with monkeypatch.context() as patch:
        for name in ("vectors", "checked_queries"):
            patch.setattr(shared.live.served.index, name, None)
        shared.caller()("POST", target, body, Content_Type=media).refused(status, words)


def test_elements_are_counted_before_objects_are_built(shared, monkeypatch):
    most = formats.MOST_JSON_ELEMENTS
    monkeypatch.setattr(long_json, "read_long_json", None)
    for body in (
        b'{"queries": [' + b"[]," * (most // 2) + b"[]]}",
        b'{"queries": [' + b"1," * most + b"1]}",
        b'{"a":' + b'{"a":' * most + b"1",
    ):
        words = "numbers and lists: at most 4,194,304"
        shared.caller()("POST", "/v1/search", body, Content_Type=formats.JSON).refused(413, words)


def test_many_empty_tensors(shared, monkeypatch):
    monkeypatch.setattr(safetensors, "load", None)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": empty for i in range(20_000)}).encode()
    body = struct.pack("<Q", len(header)) + header
    reply = shared.caller()("POST", "/v1/search", body, Content_Type=formats.SAFETENSORS)
    reply.refused(413, "a header of 1,")


def test_results_are_counted_before_the_rows_are_gathered(shared, monkeypatch):
    body = json.dumps({"labels": [0] * 50_000}).encode()
    refused_untouched(
        shared, monkeypatch, body, formats.JSON, 422,
        "50,000 queries of k=1,000: at most 4,194,304 results", "/v1/search?k=1000",
    )  # fmt: skip


def test_numbers_are_counted_before_the_rows_are_gathered(folder, monkeypatch):
    """Neither few bytes of labels nor of small dtypes become more than a body may hold."""
    with running(folder / "docs.hnsw", most_body=100_000) as fresh:
        labels = json.dumps({"labels": [0] * 4000}, separators=(",", ":")).encode()
        words = "4,000 queries of 8 numbers: at most 25,000 numbers"
        refused_untouched(fresh, monkeypatch, labels, formats.JSON, 413, words, "/v1/search?k=1")
        body = formats.write_npy(np.ones((4000, 8), np.uint8))
        refused_untouched(fresh, monkeypatch, body, formats.NPY, 413, words, "/v1/search?k=1")
        assert fresh.server._bodies.held_bytes == 0


def test_small_searches_pass_a_large_one(folder):
    """They neither find the queue full nor wait for its end."""
    index = load(folder / "docs.hnsw")
    with running(folder / "docs.hnsw", queue_rows=100, batch_rows=16) as fresh:
        batcher = fresh.live.batcher
        with fresh.busy():
            large = np.tile(VECTORS, (10, 1))
            bulk, bulk_replies = in_background(lambda: fresh.caller().search(large))
            fresh.wait(lambda: batcher.in_flight and batcher.waiting_rows == 4000 - 16)
            fresh.caller().search(large).refused(429, "3,984 rows wait and 4,000 more")
            small = [in_background(lambda: fresh.caller().search(QUERIES[:5])) for _ in range(20)]
            fresh.wait(lambda: batcher.waiting_requests == 21)
            fresh.caller().search(QUERIES[:5]).refused(429, "4,084 rows wait and 5 more")
            order = []
            batcher._on_batch = lambda batch: order.append(batch.rows)
        for thread, replies in small:
            thread.join()
            found = formats.read_result(replies[0].body)
            np.testing.assert_array_equal(found[0], index.search(QUERIES[:5], 10).labels)
        bulk.join()
        found = formats.read_result(bulk_replies[0].body)
        np.testing.assert_array_equal(found[0], index.search(large, 10).labels)
        assert order[1:13] == [16, 15] * 6  # in turns


def test_small_bodies_pass_large_ones(folder):
    with running(folder / "docs.hnsw", most_body=10_000) as fresh:
        fresh.server._bodies.held_bytes = 40_000  # four bodies that wait
        fresh.call.search(VECTORS[:50]).refused(429, "too many large bodies at once")
        assert fresh.caller().search(QUERIES[:5]).status == 200


@pytest.mark.parametrize("seed", range(8))
def test_long_json_is_what_json_reads(seed, monkeypatch):
    """In pieces of any length, whatever the spaces and the ways to write a number."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(long_json, "PIECE", int(rng.integers(3, 200)))
    made = {
        "queries": (rng.normal(size=(20, 7)) * 10.0 ** rng.integers(-30, 30, (20, 7))).tolist(),
        "labels": rng.integers(0, 2**63, 50).tolist(),
        "allow": [],
    }
    if seed % 2:
        made["queries"] = rng.integers(-9, 9, 30).tolist()
    text = json.dumps(made, indent=seed if seed > 3 else None)
    read = long_json.read_long_json(text.encode())
    assert list(read) == list(made)
    for name, array in read.items():
        np.testing.assert_array_equal(array, np.array(made[name]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"queries": [1, 2,]}', "not JSON"),
        ('{"queries": [1 2]}', "not JSON"),
        ('{"queries": [1, 2}', "not JSON"),
        ('{"queries": [[1], [2],]}', "not JSON"),
        ('{"queries": [[1] [2]]}', "not JSON"),
        ('{"queries": [[1], 2]}', "not JSON"),
        ('{"queries": [1]} 3', "not JSON"),
        ('{"queries": [1]]', "not JSON"),
        ('{"queries": [1],', "not JSON"),
        ('{"queries" [1]}', "not JSON"),
        ('{"queries": [NaN]}', "NaN is not a JSON number"),
        ('{"queries": [01, 2]}', "not JSON"),
        ('{"queries": [' + "1" * 200_000 + "]}", "a number of 200,000 characters"),
        ('{"queries": [\u00e9]}', "not JSON"),
        ('{"labels": ["a", 1]}', "labels: expected strings"),
        ('{"labels": [1, "a"]}', "labels: expected numbers"),
        ('{"labels": ["a" "b"]}', "not JSON"),
        ('{"labels": ["a}', "not JSON: Unterminated string"),
        ('{"labels": ["a"}', "not JSON"),
        ('{"queries": [[1, 2], [3]]}', "queries: rows of different lengths"),
        ('{"queries": [[], []]}', "queries: an empty list"),
        ('{"queries": ["a"]}', "queries: expected numbers"),
        ('{"queries": [1, [2]]}', "queries: expected numbers"),
        ('{"queries": 3}', "queries: expected numbers"),
    ],
)
def test_wrong_long_json(text, words):
    with pytest.raises((ValueError, TypeError), match=words):
        long_json.read_long_json(text.encode())


def test_long_answers_in_json(shared):
    """Many pieces, with a row of none found."""
    rows = np.tile(QUERIES, (40, 1))
    body = safetensors.save({"queries": rows, "allow": np.array([3, 5, 8])})
    ask = {"Content_Type": formats.SAFETENSORS, "Accept": formats.JSON}
    found = shared.caller()("POST", "/v1/search?k=50", body, **ask).json
    expected = shared.live.served.index.search(rows, 50, allow=np.array([3, 5, 8]))
    np.testing.assert_array_equal(found["labels"], expected.labels)
    distances = np.array(found["distances"], float)
    np.testing.assert_array_equal(np.isnan(distances), np.isinf(expected.distances))
    np.testing.assert_array_equal(distances[:, :3].astype(np.float32), expected.distances[:, :3])


# ---------------------------------------------------------------- swaps


@pytest.fixture
def swapping(tmp_path):
    """A folder of indexes, and a server of one of them."""
    with running(served.saved(tmp_path)) as fresh:
        yield tmp_path, fresh


def swap(fresh, path, query=""):
    return fresh.call.as_json({"path": path}, "/v1/index:swap" + query)


def test_an_index_that_differs_is_not_served_unless_it_is_forced(swapping):
    folder, fresh = swapping
    rows = np.random.default_rng(3).normal(size=(50, 12)).astype(np.float32)
    served.saved(folder, "wide.hnsw", rows)
    other = Index(12, metric="l2", M=8)
    other.add(rows)
    other.save(folder / "l2.hnsw")
    swap(fresh, "wide.hnsw").refused(422, "the index has dim 12 instead of 8: ?force=true")
    both = "dim 12 instead of 8 and metric l2 instead of cosine"
    swap(fresh, "l2.hnsw", "?force=false").refused(422, both)
    for query in ("?force=1", "?force=", "?force=true&force=true", "?forced=true"):
        swap(fresh, "l2.hnsw", query).refused(422, "expected force=true or force=false")
    assert fresh.call("GET", "/v1/index").json["version"] == 1
    assert swap(fresh, "l2.hnsw", "?force=true").json["metric"] == "l2"
    assert swap(fresh, "l2.hnsw").json["version"] == 3
    half = Index(12, metric="l2", dtype="fp16", M=4)
    half.add(rows)
    half.save(folder / "half.hnsw")
    assert swap(fresh, "half.hnsw").json["dtype"] == "fp16"  # callers see no difference


GOOD_HEADER = "{'descr': '|b1', 'fortran_order': False, 'shape': (400,), }"


@pytest.mark.parametrize(
    "header",
    [
        GOOD_HEADER[:-4],  # unclosed
        "'" * 3 + GOOD_HEADER,  # tokens that do not end
        "(" * 5000 + GOOD_HEADER,
        GOOD_HEADER.replace("400", str(2**62)),
        GOOD_HEADER.replace("400", str(10**4000)),
        GOOD_HEADER.replace("(400,)", "(2**62,)"),
        GOOD_HEADER.replace("(400,)", f"(400, 0, {2**62})"),
        GOOD_HEADER.replace("|b1", "|O"),
        "\0",
    ],
)
def test_damaged_filters_do_not_become_500(swapping, header):
    folder, fresh = swapping
    served.saved(folder, "next.hnsw")
    (folder / "next.filters").mkdir()
    text = header.encode()
    packed = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    (folder / "next.filters" / "bad.npy").write_bytes(packed + bytes(400))
    reply = swap(fresh, "next.hnsw")
    reply.refused(422, "next.filters/bad.npy: not a .npy")
    assert str(folder) not in reply.json["detail"]


@pytest.mark.parametrize("kind", ["folder", "loop", "pipe"])
@pytest.mark.parametrize("name", ["next.filters/bad.npy", "next.canary.npy"])
def test_what_is_no_file_beside_an_index(swapping, kind, name):
    folder, fresh = swapping
    served.saved(folder, "next.hnsw")
    (folder / "next.filters").mkdir()
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "loop":
        (folder / name).symlink_to(folder / name)
    else:
        os.mkfifo(folder / name)
    swap(fresh, "next.hnsw").refused(422, f"{name}: is not a file")


def test_paths_of_swaps(swapping):
    folder, fresh = swapping
    (folder / "loop.hnsw").symlink_to(folder / "loop.hnsw")
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    os.mkfifo(folder / "pipe.hnsw")
    for path in (
        "loop.hnsw", "a/docs.hnsw", "docs.hnsw/", "docs.hnsw//", "docs.hnsw/.", "none/../docs.hnsw",
        "pipe.hnsw", ".", "/", "\ud800", "a\nb",
    ):  # fmt: skip
        swap(fresh, path).refused(404, f"no index at {path!r}")
    strange = os.fsdecode(b"caf\xe9\n.hnsw")
    served.saved(folder, strange)
    assert swap(fresh, strange).json["path"] == "caf\\udce9\n.hnsw"


def test_errors_name_files_relative_to_the_root(swapping):
    folder, fresh = swapping
    (folder / "deep").mkdir()
    (folder / "deep" / "broken.hnsw").write_bytes((folder / "docs.hnsw").read_bytes()[:-9])
    reply = swap(fresh, "deep/broken.hnsw")
    reply.refused(422, "deep/broken.hnsw: truncated")
    assert str(folder) not in reply.json["detail"]


# ---------------------------------------------------------------- heads


HOST = b"Host: 127.0.0.1\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\n" + HOST
END = b"Connection: close\r\n\r\n"


def answers(port: int, sent: bytes, is_half_closed: bool = False) -> list[tuple[int, bytes]]:
    """(status, body) of each answer to these bytes, until the server closes."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as caller:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            caller.sendall(sent)
        if is_half_closed:
            caller.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while part := caller.recv(2**16):
                said += part
    found = []
    while said:
        head, _, said = said.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
        found.append((int(head.split()[1]), said[:length]))
        said = said[length:]
    return found


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (LIVE + b"A: b\r\n" * 101 + END, 431, "at most 100 headers"),
        (LIVE + b"A: " + b"b" * 70_000 + b"\r\n" + END, 431, "at most 100 headers of 65,536"),
        (LIVE + b"A: " + b"b" * 3_000_000, 431, "at most 100 headers of 65,536"),
        (LIVE + b"A" * 3_000_000, 431, "at most 100 headers of 65,536"),
        (b"GET /" + b"a" * 3_000_000, 414, "a URL of more than 65,536 bytes"),
        (b"\r\n" * 1_000_000, 431, "too long"),
        (b"GET /health/live\r\n\r\n", 400, "HTTP/0.9: expected HTTP/1.1"),
        (b"GET /health/live HTTP/0.9\r\n\r\n", 400, "HTTP/0.9: expected HTTP/1.1"),
        (LIVE.replace(b"1.1", b"2.0") + END, 505, "HTTP/2.0: expected HTTP/1.1"),
        (b"GET /health/live HTTP/1.1\r\n" + END, 400, "0 headers Host, expected one"),
        (LIVE + HOST + END, 400, "2 headers Host, expected one"),
        (LIVE.replace(b"127.0.0.1", b"a b/c") + END, 400, "Host: expected NAME"),
        (LIVE.replace(b"127.0.0.1", b"") + END, 400, "Host: expected NAME"),
        (LIVE + b"A : b\r\n" + END, 400, "not HTTP/1.1"),
        (LIVE + b"Content-Length: 1\r\nContent-Length: 2\r\n" + END, 400, "not HTTP/1.1"),
        (b"hello\r\n\r\n", 400, "not HTTP/1.1"),
    ],
)
def test_bad_heads(shared, sent, status, words):
    [(found, body)] = answers(shared.port, sent)
    problem = json.loads(body)
    assert (found, problem["status"]) == (status, status) and words in problem["detail"]
    assert shared.call("GET", "/health/live").status == 200


def post(chunks: bytes) -> bytes:
    media = f"Content-Type: {formats.JSON}\r\nTransfer-Encoding: chunked\r\n".encode()
    return b"POST /v1/search HTTP/1.1\r\n" + HOST + media + b"\r\n" + chunks


@pytest.mark.parametrize(
    ("chunks", "status"),
    [
        (b"2;" + b"a" * 3_000_000, 431),  # an extension of a chunk
        (b"2\r\n{}\r\n0\r\nA: " + b"b" * 3_000_000, 431),  # a trailer
        (b"2\r\n{}\r\n0\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"2\r\n{}\r\nx\r\n", 400),
    ],
)
def test_bad_chunks(shared, chunks, status):
    assert [found for found, _ in answers(shared.port, post(chunks))] == [status]
    shared.wait(lambda: shared.server._bodies.held_bytes == 0)


def test_good_heads(shared):
    for sent in (
        b"GET /health/live HTTP/1.0\r\n\r\n",
        b"GET http://localhost/health/live HTTP/1.1\r\n" + HOST + END,
        LIVE + b"A: b\r\n" * 90 + END,
        LIVE + b"A: " + b"b" * 60_000 + b"\r\n" + END,
        LIVE + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ):
        assert answers(shared.port, sent) == [(200, b'{"state":"live"}')]


@pytest.mark.parametrize("is_half_closed", [False, True])
def test_pipelined_requests_are_all_answered(shared, is_half_closed):
    """In their order, also where the caller has said that no more will come."""
    sent, expected = b"", []
    for rows in (64, 1, 30):
        body = formats.write_npy(QUERIES[:rows])
        about = f"Content-Type: {formats.NPY}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        sent += b"POST /v1/search HTTP/1.1\r\n" + HOST + about + body
        expected.append(shared.live.served.index.search(QUERIES[:rows], 10))
    found = answers(shared.port, sent + LIVE + b"\r\n" + LIVE + END, is_half_closed)
    assert [status for status, _ in found] == [200] * 5
    for (_, body), truth in zip(found[:3], expected, strict=True):
        np.testing.assert_array_equal(formats.read_result(body)[0], truth.labels)


def test_a_bad_head_behind_good_requests(shared):
    """Those are answered, and nothing is put between."""
    sent = LIVE + b"\r\n" + LIVE + b"\r\n" + b"hello\r\n\r\n"
    assert [status for status, _ in answers(shared.port, sent)] == [200, 200]


def test_a_head_that_does_not_come(folder):
    with running(folder / "docs.hnsw", timeout_s=0.2) as fresh:
        for sent in (b"", b"GET /health", LIVE + b"\r\n" + LIVE):
            found = answers(fresh.port, sent)
            assert found[-1][0] == 408 and b"did not come within 0.2 s" in found[-1][1]
            assert len(found) == sent.count(b"\r\n\r\n") + 1


def test_answers_that_nobody_reads(folder):
    """Their connections are closed once the time is up, and the answers are gone."""
    with running(folder / "docs.hnsw", timeout_s=3.0) as fresh:
        body = formats.write_npy(np.tile(QUERIES, (40, 1)))
        about = f"Content-Type: {formats.NPY}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        sent = b"POST /v1/search?k=1000 HTTP/1.1\r\n" + HOST + about + body
        connections = fresh.process.server_state.connections
        callers = []
        for _ in range(3):
            caller = socket.socket()
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            caller.connect(("127.0.0.1", fresh.port))
            caller.sendall(sent)
            callers.append(caller)
        fresh.wait(lambda: fresh.call.metric("request_seconds_count") == 3)
        fresh.call.connection.close()
        fresh.wait(lambda: len(connections) == 0)
        assert not fresh.process.server_state.tasks
        for caller in callers:
            caller.close()


# ---------------------------------------------------------------- other hosts, other origins


def test_hosts(folder):
    """A name that leads here is not enough: a page may have made it (DNS rebinding)."""
    allowed = frozenset({"localhost", "docs.example"})
    with running(folder / "docs.hnsw", allowed_hosts=allowed) as fresh:
        for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil"):
            for path in ("/", "/v1/index", "/health/live"):
                reply = fresh.caller()("GET", path, Host=host)
                reply.refused(421, "--allowed-host NAME")
        for host in (
            "localhost:1",
            "LOCALHOST",
            "docs.example.",
            "127.0.0.1",
            "[::1]:80",
            "10.1.2.3",
        ):
            assert fresh.caller()("GET", "/v1/index", Host=host).status == 200
        absolute = b"GET http://evil.example/ HTTP/1.1\r\n" + HOST + END
        assert answers(fresh.port, absolute)[0][0] == 421
        paths = fresh.caller()("GET", "/openapi.json").json["paths"]
        assert all("421" in one["responses"] for each in paths.values() for one in each.values())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site", "Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec_Fetch_Site": "same-origin", "Origin": "https://docs.example"}, 200),
        ({"Origin": "https://docs.example"}, 200),
        ({"Origin": "ours"}, 200),
        ({}, 200),
    ],
)
def test_origins_of_a_swap(folder, headers, status):
    with running(folder / "docs.hnsw", allowed_hosts=frozenset({"docs.example"})) as fresh:
        if headers.get("Origin") == "ours":
            headers = {"Origin": f"http://127.0.0.1:{fresh.port}"}
        body = json.dumps({"path": "docs.hnsw"})
        headers = {"Content_Type": formats.JSON, **headers}
        reply = fresh.call("POST", "/v1/index:swap", body, **headers)
        assert reply.status == status
        if status == 403:
            reply.refused(403, "asked by a page of another origin")
        simple = fresh.call("POST", "/v1/index:swap", body, Content_Type="text/plain")
        assert simple.status == 415  # what a form can send


# ---------------------------------------------------------------- the log


def record(message, **extra):
    made = logging.makeLogRecord({"msg": message, "levelname": "INFO", **extra})
    made.created = 0.0
    return made


def test_log_lines_cannot_be_forged():
    forged = "serving a\nERROR b\x1b[31m\u2028c\r\udce9.hnsw"
    written = logs.TextLines().format(record(forged))
    assert written == (
        "1970-01-01T00:00:00.000+00:00 INFO serving a\\nERROR b\\x1b[31m\\u2028c\\r\\udce9.hnsw"
    )
    read = json.loads(logs.JsonLines().format(record(forged)))
    assert read["message"] == forged and read["level"] == "info"
    try:
        raise ValueError("x\nERROR forged")
    except ValueError:
        caught = record("failed", exc_info=sys.exc_info())
    for line in logs.TextLines().format(caught).split("\n")[1:]:
        assert line.startswith("    ")
    assert "\n" not in logs.JsonLines().format(caught)


def test_the_access_log(folder, caplog):
    caplog.set_level(logging.INFO, "hnsw_gpu.access")
    with running(folder / "docs.hnsw", has_access_log=True) as fresh:
        caplog.clear()
        fresh.call.search(QUERIES, "/v1/search?k=2")
        fresh.call("GET", "/no%0Athing")
        fresh.wait(lambda: len(caplog.records) == 2)
    first, second = caplog.records
    expected = {"client": "127.0.0.1", "method": "POST", "path": "/v1/search?k=2", "status": 200}
    assert first.event.items() >= expected.items() and first.event["bytes"] > 1000
    assert second.getMessage().startswith("127.0.0.1 GET /no%0Athing 404 ")
    assert json.loads(logs.JsonLines().format(second))["path"] == "/no%0Athing"
