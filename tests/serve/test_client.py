"""The client: against the server, and against servers that misbehave."""

import http.server
import itertools
import threading
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
safetensors = pytest.importorskip("safetensors.numpy")

import served
from served import QUERIES, ROWS, running

from hnsw_gpu import Client, Index, ServerError, load
from hnsw_gpu.inputs import RowsError
from hnsw_gpu.serve import client, formats, request
from hnsw_gpu.tuning import Tuning


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("indexes")
    served.saved(made)
    (made / "docs.filters").mkdir()
    np.save(made / "docs.filters" / "even.npy", np.arange(ROWS) % 2 == 0)
    return made


@pytest.fixture(scope="module")
def shared(folder):
    with running(folder / "docs.hnsw", token="s3cret") as one:
        yield one


@pytest.fixture
def asking(shared):
    with Client(f"http://127.0.0.1:{shared.port}", token="s3cret") as one:
        yield one


def equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_labels_that_are_strings(tmp_path):
    """In every format, by filters and as queries; none of an index of numbers without a word."""
    names = [f'vector {i} \u00e4"' for i in range(ROWS)]
    index = Index(served.DIM, M=8, ef_construction=40)
    index.add(served.VECTORS, names)
    index.save(tmp_path / "docs.hnsw")
    served.saved(tmp_path, "numbers.hnsw")
    (tmp_path / "docs.filters").mkdir()
    np.save(tmp_path / "docs.filters" / "few.npy", np.array(names[:3]))
    with (
        running(tmp_path / "docs.hnsw") as one,
        Client(f"http://127.0.0.1:{one.port}", batch_rows=30) as asking,
    ):
        expected = index.search(QUERIES, 7)
        equal(asking.search(QUERIES, 7), expected)
        few = index.search(QUERIES, 4, allow=names[:3])
        equal(asking.search(QUERIES, 4, allow="few"), few)
        assert (few.labels[:, 3] == "").all()
        equal(asking.search(QUERIES, 4, allow=names[:3]), few)
        equal(asking.search(QUERIES, 4, allow=np.array([*names[:3], "nobody"])), few)
        assert asking.index()["labels"] == "strings"
        body = formats.write_npy(QUERIES)
        for accept in (formats.JSON, formats.SAFETENSORS):
            reply = one.call(
                "POST", "/v1/search?k=4&allow=few", body, Content_Type=formats.NPY, Accept=accept
            )
            if accept == formats.JSON:
                told = reply.json["labels"]
                assert reply.json["distances"][0][3] is None
            else:
                tensors = safetensors.load(reply.body)
                text, ends = tensors["labels"].tobytes(), tensors["label_offsets"]
                texts = [text[a:b].decode() for a, b in itertools.pairwise(ends)]
                told = np.array(texts, object).reshape(len(QUERIES), 4).tolist()
            assert told == few.labels.tolist()
        near = index.search(served.VECTORS[:5], 2, allow=names)
        for padding in (0, 2**17):  # of short JSON, and of long
            asked = {"labels": names[:5], "allow": names + ["nobody" * 9] * (padding // 56)}
            reply = one.call.as_json(asked, "/v1/search?k=2").json
            assert reply["labels"] == near.labels.tolist()
        for wrong, words in (
            ({"labels": ["nobody"]}, "label 'nobody': not in the index"),
            ({"labels": [3]}, "labels: integers, and the labels of this index are strings"),
            ({"labels": names[:1], "allow": [3]}, "allow: integers, and the labels of this index"),
            ({"labels": ["\ud800"]}, "labels: lone surrogates in row 0"),
        ):
            one.call.as_json(wrong).refused(422, words)
        with pytest.raises(ServerError, match="labels that are integers instead of strings"):
            asking.swap("numbers.hnsw")
        asking.swap("numbers.hnsw", force=True)
        assert asking.search(QUERIES, 7).labels.dtype == np.int64


def test_a_long_string_does_not_widen_a_npy(monkeypatch):
    labels = np.array([["a", "b" * 200]], np.dtypes.StringDType())
    far = np.zeros((1, 2), np.float32)
    monkeypatch.setattr(formats, "MOST_NPY_STRINGS", 1600)
    with pytest.raises(formats.TooLargeError, match=r"one of 200 characters: a \.npy would"):
        formats.write_result(formats.NPY, labels, far)
    monkeypatch.setattr(formats, "MOST_NPY_STRINGS", 1608)
    equal(formats.read_result(formats.write_result(formats.NPY, labels, far)), (labels, far))


@pytest.mark.parametrize("number", [0xD800, 0x110000, 0xFFFFFFFF])
def test_numbers_that_are_no_characters(number):
    dtype = np.dtype([("labels", "<U1"), ("distances", "<f4")])
    body = formats.write_npy(np.zeros((1, 1), dtype))
    with pytest.raises(formats.MalformedError, match="labels: numbers that are no"):
        formats.read_result(body[:-8] + np.uint32(number).tobytes() + body[-4:])


def test_recall_in_place_of_ef(tmp_path):
    index = load(served.saved(tmp_path), device="cpu")
    found = index.tune(0.9, k=3, queries=QUERIES)
    precise = 0.012345678901234567
    index._tuned = {
        **index._tuned,
        (0.5, 3): Tuning(request.MOST_EF + 1),
        (precise, 3): Tuning(found.ef),
    }
    index.save(tmp_path / "docs.hnsw")
    expected = index.search(QUERIES, 3, ef=found.ef)
    assert (expected.distances != index.search(QUERIES, 3).distances).any()
    with (
        running(tmp_path / "docs.hnsw") as one,
        Client(f"http://127.0.0.1:{one.port}", retries=0) as asking,
    ):
        for recall in (0.9, precise):
            equal(asking.search(QUERIES, 3, recall=recall), expected)
        with pytest.raises(ServerError, match=r"recall=0\.9, k=4: .* so far: .*0\.9 at k=3"):
            asking.search(QUERIES, 4, recall=0.9)
        with pytest.raises(ValueError, match=r"ef=65, recall=0\.9: expected one of the two"):
            asking.search(QUERIES, 3, ef=65, recall=0.9)
        with pytest.raises(ServerError, match=r"recall=0\.5: takes ef=10,001, at most 10,000"):
            asking.search(QUERIES, 3, recall=0.5)


def test_allowed_labels(shared, folder):
    index = load(folder / "docs.hnsw", device="cpu")
    with Client(f"http://127.0.0.1:{shared.port}", token="s3cret", batch_rows=2) as asking:
        for allow in ([5, 3, 10**6], np.arange(0, ROWS, 3, np.uint64), [], (7,)):
            equal(asking.search(QUERIES, 4, allow=allow), index.search(QUERIES, 4, allow=allow))
        few = np.float16(QUERIES[0])
        equal(asking.search(few, 4, ef=9, allow=[1]), index.search(few, 4, ef=9, allow=[1]))
        for wrong in (np.arange(ROWS) % 2 == 0, np.zeros(9, np.uint8), [True]):
            with pytest.raises(
                TypeError, match=r"allow: a mask, .*; expected the name of a filter"
            ):
                asking.search(QUERIES, allow=wrong)
        with pytest.raises(ValueError, match=r"allow: label -1, expected 0 or more"):
            asking.search(QUERIES, allow=[-1])
        with pytest.raises(ServerError, match=r"allow: strings, and the labels of this index"):
            asking.search(QUERIES, allow=["a"])
        with pytest.raises(RowsError, match=r"queries: NaN or infinite values in row 1"):
            asking.search(np.where(np.arange(3) == 1, np.nan, QUERIES[:3].T).T, allow=[1])


def test_requests_with_labels_stay_within_the_limits(shared, monkeypatch):
    """Of JSON, where a number takes more than four bytes."""
    rows = np.float32(-1.2345678e-30) * np.arange(1, 65, dtype=np.float32)[:, None]
    queries = np.tile(rows, QUERIES.shape[1])
    monkeypatch.setattr(client, "BODY_BYTES", 16 * 26 * QUERIES.shape[1])
    monkeypatch.setattr(client, "ANY_BODY_BYTES", 1000)
    sent = []
    body = client._body
    monkeypatch.setattr(client, "_body", lambda *given: sent.append(body(*given)) or sent[-1])
    with Client(f"http://127.0.0.1:{shared.port}", token="s3cret") as asking:
        assert asking.search(queries, 1, allow=[4]).labels.tolist() == [[4]] * 64
    assert len(sent) > 4 and max(map(len, sent)) <= client.BODY_BYTES


def test_rerank(tmp_path):
    index = Index(QUERIES.shape[1], "l2", "int4", M=8, ef_construction=40)
    rows = np.random.default_rng(6).normal(size=(900, QUERIES.shape[1])) + 9  # coarse codes
    index.add(rows)
    index.save(tmp_path / "docs.hnsw")
    with (
        running(tmp_path / "docs.hnsw") as one,
        Client(f"http://127.0.0.1:{one.port}") as asking,
    ):
        answers = {
            rerank: asking.search(rows[:50], 4, ef=99, rerank=rerank)
            for rerank in ("auto", None, 1, 9)
        }
    for rerank, found in answers.items():
        equal(found, index.search(rows[:50], 4, ef=99, rerank=rerank))
    assert len({found.labels.tobytes() for found in answers.values()}) == 4


def test_it_answers_as_the_index_does(asking, folder):
    index = load(folder / "docs.hnsw", device="cpu")
    equal(asking.search(QUERIES, 7, ef=20), index.search(QUERIES, 7, ef=20))
    equal(asking.search(QUERIES[0]), index.search(QUERIES[0]))
    equal(asking.search(QUERIES.tolist(), 3), index.search(QUERIES, 3))
    equal(asking.search(np.float16(QUERIES)), index.search(np.float16(QUERIES)))
    even = np.arange(ROWS) % 2 == 0
    equal(asking.search(QUERIES, allow="even"), index.search(QUERIES, allow=even))
    equal(asking.search(QUERIES[:0], 3), index.search(QUERIES[:0], 3))
    assert (asking.index()["n"], asking.index()["filters"]) == (ROWS, ["even"])
    assert asking.swap("docs.hnsw")["version"] == 2


def test_large_batches_are_split(shared, folder):
    before = shared.server.metrics.request_seconds._sum.get()
    url = f"http://127.0.0.1:{shared.port}/"
    with Client(url, token="s3cret", batch_rows=10) as asking:
        equal(asking.search(QUERIES, 5), load(folder / "docs.hnsw").search(QUERIES, 5))
    assert shared.server.metrics.request_seconds._sum.get() > before


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_batches_fit_the_limits_of_the_server(folder, dtype):
    """It counts numbers as float32, whatever they are sent as."""
    queries = np.tile(QUERIES, (100, 1)).astype(dtype)
    with (
        running(folder / "docs.hnsw", most_body=100_000) as fresh,
        Client(f"http://127.0.0.1:{fresh.port}", batch_rows=10_000) as asking,
    ):
        equal(asking.search(queries, 5), load(folder / "docs.hnsw").search(queries, 5))


def test_a_swap_to_another_dim_is_forced(tmp_path):
    served.saved(tmp_path, "wide.hnsw", np.random.default_rng(3).normal(size=(50, 12)))
    with (
        running(served.saved(tmp_path)) as fresh,
        Client(f"http://127.0.0.1:{fresh.port}") as asking,
    ):
        with pytest.raises(ServerError, match=r"422: the index has dim 12 instead of 8: .*force"):
            asking.swap("wide.hnsw")
        assert asking.swap("wide.hnsw", force=True)["dim"] == 12


def test_refusals_are_said(asking, shared):
    with pytest.raises(
        ServerError, match=r"422: queries: shape \(64, 3\), expected \(n, 8\)"
    ) as no:
        asking.search(QUERIES[:, :3])
    assert no.value.status == 422
    with pytest.raises(ServerError, match="404: no index at"):
        asking.swap("../x")
    with (
        Client(f"http://127.0.0.1:{shared.port}") as stranger,
        pytest.raises(ServerError, match="401: expected the header"),
    ):
        stranger.index()
    with shared.busy(), pytest.raises(ServerError, match=r"504: no answer within 0\.02 s"):
        asking.search(QUERIES, timeout_s=0.02)
    for wrong, words in [
        ({"url": "ftp://x"}, "url='ftp://x'"),
        ({"url": "localhost:80"}, "url='localhost:80'"),
        ({"retries": 6}, "retries=6"),
        ({"batch_rows": 0}, "batch_rows=0"),
    ]:
        with pytest.raises(ValueError, match=words):
            Client(**{"url": "http://x", **wrong})
    with pytest.raises(TypeError, match="queries"):
        asking.search(["a"])


def test_threads_may_share_one(asking, folder):
    index, wrong = load(folder / "docs.hnsw", device="cpu"), []

    def ask(i):
        found = asking.search(QUERIES[i : i + 4], 3)
        if (found.labels != index.search(QUERIES[i : i + 4], 3).labels).any():
            wrong.append(i)
        asking.close()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@contextmanager
def misbehaving(answers):
    """A server that gives `answers` in turn: a status, or "hang up"; notes what it was asked."""
    asked = []
    body = formats.write_result(
        formats.NPY, np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32)
    )

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            answer = answers[len(asked)]
            asked.append(self.path)
            if answer == "hang up":
                self.close_connection = True
                return
            content = body if answer == 200 else b"<html>proxy</html>"
            self.send_response(answer)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", asked
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(client, "WAITS_S", (0.0,) * len(client.WAITS_S))


def test_it_tries_again_where_that_is_safe():
    with (
        misbehaving([503, "hang up", 429, 200]) as (url, asked),
        Client(url) as asking,
    ):
        assert asking.search(QUERIES[:1], 1).labels.tolist() == [[0]]
        assert len(asked) == 4


@pytest.mark.parametrize(
    ("answers", "error", "words", "calls"),
    [
        ([500], ServerError, "500: <html>proxy</html>", 1),
        ([503] * 9, ServerError, "503", 3),
        (["hang up"] * 9, ConnectionError, "127.0.0.1", 3),
    ],
)
def test_it_gives_up(answers, error, words, calls):
    with misbehaving(answers) as (url, asked), Client(url, retries=2) as asking:
        with pytest.raises(error, match=words):
            asking.search(QUERIES[:1], 1)
        assert len(asked) == calls


def test_a_swap_is_never_sent_twice():
    with misbehaving(["hang up"] * 9) as (url, asked), Client(url) as asking:
        with pytest.raises(ConnectionError):
            asking.swap("x.hnsw")
        assert asked == ["/v1/index:swap"]


def test_nobody_is_there():
    asking = Client("http://127.0.0.1:9", retries=1)
    with pytest.raises(ConnectionError, match=r"^127\.0\.0\.1:9: \[Errno \d+\] Connection refused"):
        asking.index()


def test_no_answer_in_time(shared):
    url = f"http://127.0.0.1:{shared.port}"
    asking = Client(url, token="s3cret", timeout_s=0.05)
    with shared.busy(), pytest.raises(TimeoutError, match=r"no answer of 127.0.0.1 within 0.05 s"):
        asking.search(QUERIES)
