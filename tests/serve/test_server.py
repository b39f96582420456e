"""The server over real sockets: answers, refusals, swaps, who leaves, what it counts."""

import asyncio
import contextlib
import io
import json
import os
import socket
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
safetensors = pytest.importorskip("safetensors.numpy")

import served
from served import QUERIES, ROWS, VECTORS, running

from hnsw_gpu import load
from hnsw_gpu.serve import formats, live_index, metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved index, filters, and others to swap to."""
    made = tmp_path_factory.mktemp("indexes")
    served.saved(made)
    served.saved(made, "other.hnsw", VECTORS[::-1] + 1)
    served.saved(made, "wide.hnsw", np.random.default_rng(3).normal(size=(50, 12)))
    (made / "docs.filters").mkdir()
    np.save(made / "docs.filters" / "even.npy", np.arange(ROWS) % 2 == 0)
    np.save(made / "docs.filters" / "few.npy", np.array([3, 5, 8]))
    (made / "broken.hnsw").write_bytes((made / "docs.hnsw").read_bytes()[:-9])
    return made


@pytest.fixture(scope="module")
def index(folder):
    return load(folder / "docs.hnsw", device="cpu")


@pytest.fixture(scope="module")
def shared(folder):
    with running(folder / "docs.hnsw") as one:
        yield one


@pytest.fixture
def fresh(folder):
    """A server that this test alone talks to, with a queue of 100 rows."""
    with running(folder / "docs.hnsw", queue_rows=100, timeout_s=5.0, most_body=100_000) as one:
        yield one


# ------------------------------------------------------------------ searching


@pytest.mark.parametrize("accept", formats.FORMATS)
@pytest.mark.parametrize("sent", formats.FORMATS)
def test_every_format_both_ways(shared, index, sent, accept):
    expected = index.search(QUERIES, 7, ef=40)
    if sent == formats.NPY:
        body = formats.write_npy(QUERIES)
    elif sent == formats.SAFETENSORS:
        body = safetensors.save({"queries": QUERIES})
    else:
        body = json.dumps({"queries": QUERIES.tolist()})
    reply = shared.call("POST", "/v1/search?k=7&ef=40", body, Content_Type=sent, Accept=accept)
    assert (reply.status, reply.headers["content-type"]) == (200, accept)
    if accept == formats.NPY:
        found = np.load(io.BytesIO(reply.body))
    elif accept == formats.SAFETENSORS:
        found = safetensors.load(reply.body)
    else:
        found = {name: np.array(value) for name, value in reply.json.items()}
    np.testing.assert_array_equal(found["labels"], expected.labels)
    np.testing.assert_array_equal(np.float32(found["distances"]), expected.distances)
    assert reply.headers["x-index-version"] == "1"


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", "<i4", "u1"])
def test_dtypes_and_orders(shared, index, dtype):
    rows = np.asfortranarray((np.abs(QUERIES) * 50).astype(dtype))
    found = formats.read_result(shared.call.search(rows).body)
    for a, b in zip(found, index.search(rows, 10), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_query_and_none(shared, index):
    one = shared.call.as_json({"queries": QUERIES[0].tolist()}, "/v1/search?k=2").json
    assert one["labels"] == index.search(QUERIES[0], 2).labels.tolist()
    assert shared.call.as_json({"queries": []}).json == {"labels": [], "distances": []}


def test_stored_vectors_as_queries(shared, index):
    found = shared.call.as_json({"labels": [7, 3]}, "/v1/search?k=3").json
    assert found["labels"] == index.search(VECTORS[[7, 3]], 3).labels.tolist()
    shared.call.as_json({"labels": [7, 999]}).refused(422, "label 999: not in the index")


def test_filters(shared, index):
    even = formats.read_result(shared.call.search(QUERIES, "/v1/search?allow=even").body)
    expected = index.search(QUERIES, 10, allow=np.arange(ROWS) % 2 == 0)
    np.testing.assert_array_equal(even[0], expected.labels)
    few = shared.call.as_json({"queries": QUERIES.tolist()}, "/v1/search?allow=few").json
    assert set(np.ravel(few["labels"])) == {3, 5, 8, -1}
    assert few["distances"][0][3:] == [None] * 7  # none found: infinite
    given = shared.call.as_json({"queries": QUERIES.tolist(), "allow": [8, 3, 5]}).json
    assert given == few
    none = shared.call.as_json({"queries": QUERIES[:1].tolist(), "allow": []}).json
    assert none["labels"] == [[-1] * 10]
    mask = np.random.default_rng(0).random((64, ROWS)) < 0.5  # a row a query
    body = safetensors.save({"queries": QUERIES, "allow": mask})
    reply = shared.call("POST", "/v1/search", body, Content_Type=formats.SAFETENSORS)
    np.testing.assert_array_equal(
        safetensors.load(reply.body)["labels"], index.search(QUERIES, 10, allow=mask).labels
    )


@pytest.mark.parametrize(
    ("target", "body", "status", "words"),
    [
        ("?k=0", QUERIES, 422, "k='0': expected a whole number from 1 to 10,000"),
        ("?k=1e3", QUERIES, 422, "k='1e3'"),
        ("?ef=99999999999999999999999", QUERIES, 422, "ef="),
        ("?kk=3", QUERIES, 422, "'kk': expected k, ef, recall, rerank or allow"),
        (
            "?rerank=0",
            QUERIES,
            422,
            "rerank='0': expected a whole number from 1 to 10,000, auto or",
        ),
        ("?rerank=some", QUERIES, 422, "rerank='some': expected a whole number"),
        ("?rerank=5&rerank=5", QUERIES, 422, "rerank: given more than once"),
        ("?recall=1.5", QUERIES, 422, "recall: 1.5, expected above 0 and at most 1"),
        ("?recall=nan", QUERIES, 422, "recall='nan': expected a share such as 0.95"),
        ("?recall=.5&ef=64", QUERIES, 422, "ef, recall: expected one of the two"),
        ("?recall=.5", QUERIES, 422, "recall=0.5, k=10: call tune(recall=0.5, k=10) first"),
        ("?k=3&k=4", QUERIES, 422, "k: given more than once"),
        ("?allow=odd", QUERIES, 422, "allow='odd': no filter of that name"),
        ("", QUERIES[:, :3], 422, "queries: shape (64, 3), expected (n, 8)"),
        ("", np.ones((2, 8), complex), 422, "dtype complex128, expected real numbers"),
        ("", np.full((3, 8), np.nan), 422, "NaN or infinite values in rows 0, 1, 2"),
        ("", np.zeros((1, 8)), 422, "zero vectors"),
        ("?k=10000", np.ones((500, 8)), 422, "at most 4,194,304 results"),
    ],
)
def test_wrong_searches(shared, target, body, status, words):
    shared.call.search(body, "/v1/search" + target).refused(status, words)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe{}", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"queries": [[NaN]]}', 400, "NaN is not a JSON number"),
        (b'{"queries": [[1e999,1,1,1,1,1,1,1]]}', 422, "infinite values in row 0"),
        (b"3", 422, "expected a JSON object"),
        (b"{}", 422, "either queries or labels"),
        (b'{"queries": [[1]], "labels": [1]}', 422, "either queries or labels"),
        (b'{"queries": [[1]], "kk": 1}', 422, "'kk': expected allow, labels, queries"),
        (b'{"queries": [[1,2],[3]]}', 422, "rows of different lengths"),
        (b'{"queries": [["a"]]}', 422, "queries: expected numbers"),
        (b'{"queries": [[true]]}', 422, "queries: expected numbers"),
        (b'{"queries": null}', 422, "queries: expected numbers"),
        (b'{"labels": [-1]}', 422, "label -1"),
        (b'{"labels": [1.5]}', 422, "labels: expected integers or strings"),
        (b'{"labels": [[1]]}', 422, "labels: shape (1, 1)"),
        (b'{"queries": [[1,1,1,1,1,1,1,1]], "allow": ["even"]}', 422, "allow: strings, and"),
    ],
)
def test_wrong_json(shared, body, status, words):
    shared.call("POST", "/v1/search", body, Content_Type=formats.JSON).refused(status, words)


def test_wrong_npy_and_safetensors(shared):
    good = formats.write_npy(QUERIES)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], object), allow_pickle=True)
    for body in (b"", good[:-1], good + b"x", good[:50], b"PK\x03\x04", pickled.getvalue()):
        shared.call("POST", "/v1/search", body, Content_Type=formats.NPY).refused(400, "not a .npy")
    huge = good.replace(b"(64, 8), }", b"(2**40, 8), }"[:10])
    shared.call("POST", "/v1/search", huge, Content_Type=formats.NPY).refused(400, "not a .npy")
    good = safetensors.save({"queries": QUERIES})
    for body in (b"", good[:-1], b"\xff" * 8 + good[8:], good[:20]):
        reply = shared.call("POST", "/v1/search", body, Content_Type=formats.SAFETENSORS)
        reply.refused(400, "not safetensors")


def test_headers(shared):
    body = formats.write_npy(QUERIES)
    call = shared.call
    call("POST", "/v1/search", body).refused(415, "Content-Type ''")
    call("POST", "/v1/search", body, Content_Type="text/csv").refused(415, "Content-Type 'text/csv")
    coded = {"Content_Type": formats.NPY, "Content_Encoding": "gzip"}
    call("POST", "/v1/search", body, **coded).refused(415, "Content-Encoding")
    call.search(QUERIES, Accept="text/html").refused(406, "Accept: expected one of")
    reply = call.search(QUERIES, Accept="text/html, application/json;q=0.5, application/*;q=0.1")
    assert reply.headers["content-type"] == formats.JSON
    for wrong in ("0", "-5", "soon", "1.5", "9999999"):
        call.search(QUERIES, X_Timeout_Ms=wrong).refused(422, "X-Timeout-Ms")
    assert call.search(QUERIES, X_Timeout_Ms="20000").status == 200


def test_other_paths_and_methods(shared):
    shared.call("GET", "/nothing").refused(404, "GET /nothing")
    for method, path in [("GET", "/v1/search"), ("PUT", "/v1/index"), ("DELETE", "/")]:
        reply = shared.call(method, path)
        reply.refused(405, f"{method} {path}")
        assert reply.headers["allow"]


def test_about(shared, index):
    info = shared.call("GET", "/v1/index").json
    assert (info["n"], info["dim"], info["metric"], info["dtype"]) == (ROWS, 8, "cosine", "fp32")
    assert info["parameters"] == {"M": 8, "ef_construction": 40, "refine": "", "seed": 0}
    assert (info["path"], info["filters"]) == ("docs.hnsw", ["even", "few"])
    assert shared.call("GET", "/health/live").json == {"state": "live"}
    assert shared.call("GET", "/health/ready").json == {"state": "ready"}


# ------------------------------------------------------------------ too much, too late, gone


def test_bodies_that_are_too_large(fresh):
    large = formats.write_npy(np.ones((5000, 8), np.float32))
    assert len(large) > 100_000
    fresh.caller()("POST", "/v1/search", large, Content_Type=formats.NPY).refused(
        413, "at most 100,000"
    )
    caller = fresh.caller()  # chunked: nobody says how long it will be
    chunks = (large[i : i + 1000] for i in range(0, len(large), 1000))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # while we were still sending
        caller("POST", "/v1/search", chunks, Content_Type=formats.NPY).refused(
            413, "at most 100,000"
        )
    assert fresh.server._bodies.held_bytes == 0
    assert fresh.call.search(QUERIES).status == 200


def test_a_body_that_does_not_come(folder):
    with running(folder / "docs.hnsw", timeout_s=0.2) as fresh:
        with socket.create_connection(("127.0.0.1", fresh.port), timeout=20) as slow:
            head = "POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\n"
            slow.sendall((head + "Content-Length: 500\r\n\r\nabc").encode())
            said = b""
            while part := slow.recv(4096):  # to the end: the connection is closed
                said += part
        assert said.startswith(b"HTTP/1.1 408 ") and b"did not come within 0.2 s" in said
        assert fresh.server._bodies.held_bytes == 0


def test_past_the_deadline(fresh):
    with fresh.busy():
        fresh.call.search(QUERIES, X_Timeout_Ms="30").refused(504, "no answer within 0.03 s")
    assert fresh.live.batcher.waiting_rows == 0
    assert fresh.call.metric("rejected_total") == 1
    assert fresh.call.search(QUERIES).status == 200


def test_a_full_queue(fresh):
    """429 with Retry-After, and those who wait are answered."""
    replies = []

    def ask():
        replies.append(fresh.caller().search(QUERIES[:45]))

    with fresh.busy():
        threads = [threading.Thread(target=ask) for _ in range(3)]
        threads[0].start()
        fresh.wait(lambda: fresh.live.batcher.in_flight)
        for thread in threads[1:]:
            thread.start()
        fresh.wait(lambda: fresh.live.batcher.waiting_rows == 90)
        full = fresh.caller().search(QUERIES[:11])
        full.refused(429, "90 rows wait and 11 more")
        assert int(full.headers["retry-after"]) >= 1
        assert fresh.caller().metric("queue_rows") == 90
    for thread in threads:
        thread.join()
    assert [reply.status for reply in replies] == [200] * 3
    assert fresh.call.metric("rejected_total") == 1


def test_callers_who_leave(fresh):
    """Their rows leave the queue while the engine is still busy."""
    body = formats.write_npy(QUERIES[:1])
    head = f"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Type: {formats.NPY}\r\n"
    asked = (head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body
    with fresh.busy():
        callers = []
        for _ in range(80):
            callers.append(socket.create_connection(("127.0.0.1", fresh.port)))
            callers[-1].sendall(asked)
            fresh.wait(lambda: fresh.live.batcher.in_flight)  # with the first one alone
        fresh.wait(lambda: fresh.live.batcher.waiting_rows == 79)
        for caller in callers:
            caller.close()
        fresh.wait(lambda: fresh.live.batcher.waiting_rows == 0)
    fresh.wait(lambda: fresh.call.metric("cancelled_total") == 80)
    assert fresh.server._bodies.held_bytes == 0
    assert fresh.call.search(QUERIES).status == 200


# ------------------------------------------------------------------ swapping


def test_swap(folder):
    with running(folder / "docs.hnsw") as fresh:
        call = fresh.call
        before = formats.read_result(call.search(QUERIES).body)
        info = call.as_json({"path": "other.hnsw"}, "/v1/index:swap").json
        assert (info["path"], info["version"], info["filters"]) == ("other.hnsw", 2, [])
        after = call.search(QUERIES)
        assert after.headers["x-index-version"] == "2"
        other = load(folder / "other.hnsw").search(QUERIES, 10)
        np.testing.assert_array_equal(formats.read_result(after.body)[0], other.labels)
        assert (before[0] != other.labels).any()
        call.as_json({"path": "wide.hnsw"}, "/v1/index:swap?force=true")
        call.search(QUERIES).refused(422, "expected (n, 12)")
        assert call("GET", "/v1/index").json["dim"] == 12
        assert call.metric("swaps_total") == 2
        for path, status, words in [
            ("broken.hnsw", 422, "truncated"),
            ("missing.hnsw", 404, "no index at 'missing.hnsw'"),
            ("../docs.hnsw", 404, "no index at"),
            ("/etc/passwd", 404, "no index at"),
            ("a\0b", 404, "no index at"),
            ("x" * 5000, 404, "no index at"),
            ("", 404, "no index at"),
        ]:
            call.as_json({"path": path}, "/v1/index:swap").refused(status, words)
        for content in ([], {}, {"path": 3}, {"path": "a", "b": 1}):
            call.as_json(content, "/v1/index:swap").refused(422, 'expected {"path": "..."}')
        assert call("GET", "/v1/index").json["path"] == "wide.hnsw"  # as it was


def test_a_link_does_not_lead_out_of_the_root(folder, tmp_path):
    outside = served.saved(tmp_path, "secret.hnsw")
    link = folder / "link.hnsw"
    link.symlink_to(outside)
    try:
        with running(folder / "docs.hnsw") as fresh:
            fresh.call.as_json({"path": "link.hnsw"}, "/v1/index:swap").refused(404, "link.hnsw")
    finally:
        link.unlink()


@pytest.mark.parametrize("change", ["in place", "cut"])
def test_a_mapped_file_that_is_changed_is_not_served(tmp_path, change, caplog):
    """And neither another file in its place, nor a swap, is kept from being served."""
    path = served.saved(tmp_path)
    with running(path, mmap=True) as fresh:
        expected = load(path).search(QUERIES, 10).labels
        held = path.rename(tmp_path / "held")
        served.saved(tmp_path, vectors=-VECTORS)  # another file of its name
        reply = fresh.call.search(QUERIES)
        np.testing.assert_array_equal(formats.read_result(reply.body)[0], expected)
        with held.open("r+b") as file:
            if change == "cut":
                file.truncate(held.stat().st_size // 2)
            else:
                file.seek(held.stat().st_size // 2)
                file.write(b"\0" * 1000)
        os.utime(held, ns=(1, 1))  # whatever the clock of the file system
        for _ in range(2):
            fresh.call.search(QUERIES).refused(503, "the file of the index was changed: swap it")
        fresh.call.as_json({"labels": [1]}).refused(503, "the file of the index was changed")
        assert "was changed in place while it is mapped" in caplog.text
        assert fresh.call.as_json({"path": path.name}, "/v1/index:swap").status == 200
        expected = load(path).search(QUERIES, 10).labels
        reply = fresh.call.search(QUERIES)
        np.testing.assert_array_equal(formats.read_result(reply.body)[0], expected)


def test_one_swap_at_a_time_and_only_where_memory_holds_both(folder, monkeypatch):
    with running(folder / "docs.hnsw") as fresh:
        at_work, go_on = threading.Event(), threading.Event()
        loading = live_index.LiveIndex._load

        def slow(self, *given):
            at_work.set()
            assert go_on.wait(20)
            return loading(self, *given)

        monkeypatch.setattr(live_index.LiveIndex, "_load", slow)
        swapped = []

        def swap():
            swapped.append(fresh.caller().as_json({"path": "other.hnsw"}, "/v1/index:swap"))

        thread = threading.Thread(target=swap)
        thread.start()
        assert at_work.wait(20)
        fresh.call.as_json({"path": "wide.hnsw"}, "/v1/index:swap").refused(409, "wait until")
        assert fresh.call.search(QUERIES).headers["x-index-version"] == "1"  # answers meanwhile
        go_on.set()
        thread.join()
        assert swapped[0].status == 200
        monkeypatch.setattr(live_index, "memory_free", lambda: 1000)
        fresh.call.as_json({"path": "docs.hnsw"}, "/v1/index:swap").refused(507, "1,000 are free")
        assert fresh.call("GET", "/v1/index").json["path"] == "other.hnsw"


def test_swaps_under_load(folder):
    """Not one failed request, and each answer is wholly of the index that its header names."""
    truth = {}
    for name in ("docs", "other"):
        truth[load(folder / f"{name}.hnsw")] = name
    expected = {name: one.search(QUERIES, 10).labels for one, name in truth.items()}
    with running(folder / "docs.hnsw", batch_rows=16) as fresh:  # 64 rows: four batches each
        wrong, counts = [], []
        done = threading.Event()

        def ask():
            call, answers = fresh.caller(), set()
            while not done.is_set():
                reply = call.search(QUERIES)
                if reply.status != 200:
                    wrong.append(reply)
                    return
                version = int(reply.headers["x-index-version"])
                answers.add(version)
                name = ("other", "docs")[version % 2]
                if (formats.read_result(reply.body)[0] != expected[name]).any():
                    wrong.append(version)
            counts.append(answers)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for version in range(2, 12):
            name = ("other", "docs")[version % 2]
            reply = fresh.call.as_json({"path": f"{name}.hnsw"}, "/v1/index:swap")
            assert (reply.json["path"], reply.json["version"]) == (f"{name}.hnsw", version)
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(set().union(*counts)) > 3


# ------------------------------------------------------------------ what else it says and counts


def test_metrics(folder):
    with running(folder / "docs.hnsw") as fresh:
        call = fresh.call
        for rows in (1, 1, 64):
            call.search(QUERIES[:rows])
        call.search(QUERIES[:, :3])
        fresh.wait(lambda: call.metric("batch_rows_count") >= 4)  # the canary's too
        assert call.metric("rows_total") == 66
        assert call.metric("batch_rows_sum") == 66 + 64
        assert call.metric("request_seconds_count") == 3
        assert call.metric("index_vectors") == ROWS
        assert call.metric("index_bytes") == fresh.live.served.index.nbytes
        assert call.metric("engine_errors_total") == 0
        assert 0.95 < call.metric("canary_recall") <= 1
        text = call("GET", "/metrics").body.decode()
        assert 'hnsw_gpu_requests_total{code="200",path="/v1/search"} 3.0' in text
        assert 'hnsw_gpu_requests_total{code="422",path="/v1/search"} 1.0' in text
        assert f'checksum="{fresh.live.served.checksum}"' in text
        assert "process_resident_memory_bytes" in text


class Driver:
    """NVIDIA's library as it answers on a machine with two GPUs, one of which is lost later."""

    class NVMLError(Exception):
        pass

    lost = False

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, number):
        return number

    def nvmlDeviceGetUtilizationRates(self, handle):
        if handle and self.lost:
            raise self.NVMLError
        return SimpleNamespace(gpu=25 * (handle + 1))

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=10**9 * (handle + 1))


def test_gpu_use(monkeypatch):
    """Where there are GPUs; none without the library."""
    monkeypatch.setitem(sys.modules, "pynvml", driver := Driver())
    counted = metrics.Metrics()
    text = counted.text().decode()
    assert 'hnsw_gpu_gpu_busy_share{gpu="0"} 0.25\n' in text
    assert 'hnsw_gpu_gpu_busy_share{gpu="1"} 0.5\n' in text
    assert 'hnsw_gpu_gpu_memory_bytes{gpu="1"} 2e+09\n' in text
    driver.lost = True
    text = counted.text().decode()
    assert 'busy_share{gpu="0"} 0.25' in text and 'busy_share{gpu="1"}' not in text
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "gpu_busy" not in metrics.Metrics().text().decode()


def test_the_canary_sees_a_bad_index(folder, tmp_path):
    """Queries of one's own; and an index whose links lead nowhere finds less."""
    path = served.saved(tmp_path)
    np.save(tmp_path / "docs.canary.npy", QUERIES[:20])
    with running(path) as fresh:
        fresh.wait(lambda: fresh.call.metric("canary_recall") > 0)
        assert len(fresh.live.served.canary.queries) == 20
        fresh.live.served.index._state.graph.neighbors0[:] = -1
        fresh.wait(lambda: fresh.call.search(QUERIES[:1]).status == 200)
        asking = fresh.live.measure_canary()
        loop = fresh.process.servers[0].get_loop()
        asyncio.run_coroutine_threadsafe(asking, loop).result(20)
        assert fresh.call.metric("canary_recall") < 0.2


def test_the_token(folder):
    with running(folder / "docs.hnsw", token="s3cret") as fresh:
        for path in ("/", "/health/live", "/health/ready"):
            assert fresh.call("GET", path).status == 200
        for path in ("/v1/index", "/metrics", "/openapi.json", "/nothing"):
            for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}):
                reply = fresh.caller()("GET", path, **headers)
                reply.refused(401, "Authorization: Bearer TOKEN")
                assert reply.headers["www-authenticate"] == "Bearer"
        assert fresh.call("GET", "/v1/index", Authorization="Bearer s3cret").status == 200
        assert fresh.caller().search(QUERIES).status == 401
        found = fresh.call.search(QUERIES, Authorization="Bearer s3cret")
        assert found.status == 200


def test_stopping(fresh):
    """While it drains: not ready, no new searches; those under way end."""
    replies = []
    thread = threading.Thread(target=lambda: replies.append(fresh.caller().search(QUERIES)))
    with fresh.busy():
        thread.start()
        fresh.wait(lambda: fresh.live.batcher.in_flight)
        fresh.live.drain()
        fresh.call("GET", "/health/ready").refused(503, "the server is stopping")
        assert fresh.call("GET", "/health/live").status == 200
        refused = fresh.call.search(QUERIES)
        refused.refused(503, "the server is stopping")
        assert refused.headers["retry-after"] == "1"
    thread.join()
    assert replies[0].status == 200


def test_filters_that_are_wrong(tmp_path):
    path = served.saved(tmp_path)
    (tmp_path / "docs.filters").mkdir()
    np.save(tmp_path / "docs.filters" / "bad.npy", np.ones(7, bool))
    with running(path) as fresh:
        assert isinstance(fresh.live.error, ValueError)
        assert "bad.npy: allow: a mask of 7" in str(fresh.live.error)
        fresh.wait(lambda: fresh.process.should_exit)


def test_an_empty_index(tmp_path):
    with running(served.saved(tmp_path, vectors=np.empty((0, 8), np.float32))) as fresh:
        labels, distances = formats.read_result(fresh.call.search(QUERIES).body)
        assert (labels == -1).all() and np.isinf(distances).all()


def test_a_mistake_of_ours_is_a_500(fresh, monkeypatch):
    def fail(*_given, **_how):
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(formats, "write_result", fail)
    fresh.caller().search(QUERIES).refused(500, "the log of the server says more")


@pytest.mark.parametrize("target", ["/v1/index", "/v1/none", "/health/live", "/metrics"])
def test_a_call_id_is_repeated(shared, target):
    assert shared.call("GET", target, X_Call_Id="a1-b.c_D").headers["x-call-id"] == "a1-b.c_D"
    for odd in ("", "a b", "x" * 65, "\xe4", "a\tb"):
        assert "x-call-id" not in shared.call("GET", target, X_Call_Id=odd).headers
