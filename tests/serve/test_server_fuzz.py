"""Hostile bodies: whatever comes, the answer is a result or a 4xx, on the same connection."""

import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
safetensors = pytest.importorskip("safetensors.numpy")

import served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import DIM, QUERIES, running

from hnsw_gpu.serve import formats

pytestmark = pytest.mark.slow

EXAMPLES = settings(
    max_examples=700,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
GOOD = {
    formats.NPY: formats.write_npy(QUERIES[:3]),
    formats.SAFETENSORS: safetensors.save({"queries": QUERIES[:3], "allow": np.arange(5)}),
    formats.JSON: json.dumps({"queries": QUERIES[:3].tolist(), "allow": [1, 2]}).encode(),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with running(served.saved(tmp_path_factory.mktemp("fuzz")), most_body=100_000) as one:
        yield one
        assert one.server._bodies.held_bytes == 0
        assert one.live.batcher.waiting_rows == 0


@st.composite
def mutated(draw, good: bytes) -> bytes:
    """Good bytes, some of them flipped, cut, repeated or replaced, most often near the front."""
    body = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        front = draw(st.booleans())
        at = draw(st.integers(0, min(len(body), 128) if front else len(body)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "drop"]))
        if kind == "flip" and at < len(body):
            body[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del body[at:]
        elif kind == "insert":
            body[at:at] = draw(st.binary(min_size=1, max_size=12))
        elif kind == "repeat":
            body[at:at] = body[at : at + draw(st.integers(1, 50))]
        else:
            del body[at : at + draw(st.integers(1, 20))]
    return bytes(body)


@st.composite
def npy_with_any_header(draw) -> bytes:
    shape = draw(
        st.one_of(
            st.lists(st.integers(-3, 2**64), max_size=5).map(tuple),
            st.sampled_from(
                [(3, DIM), (DIM,), (2**62, 4), (-1, DIM), (1,) * 70, "(3, 8)", [3, DIM]]
            ),
        )
    )
    dtype = draw(
        st.sampled_from(
            ["<f4", "|O", "<f8", ">f2", "|S3", "<U2", "<M8[s]", "|V0", "<c8", "?", "[('a', '<f4')]"]
        )
    )
    order = draw(st.sampled_from([True, False, 1, None, "C"]))
    text = repr({"descr": dtype, "fortran_order": order, "shape": shape})
    text = draw(st.sampled_from([text, text + "\n", text * 2, "(" * 500, "__import__('os')", "{}"]))
    length = draw(st.sampled_from([len(text), 0, 65535, len(text) - 1]))
    version = draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"]))
    packed = struct.pack("<H", length) if version == b"\x01\x00" else struct.pack("<I", length)
    data = bytes(draw(st.sampled_from([0, 1, 96, 3 * DIM * 4])))
    return b"\x93NUMPY" + version + packed + text.encode() + data


@st.composite
def tensors_with_any_header(draw) -> bytes:
    entry = {
        "dtype": draw(st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "X", 3])),
        "shape": draw(st.lists(st.integers(-2, 2**63), max_size=4)),
        "data_offsets": draw(st.lists(st.integers(-5, 2**64), max_size=3)),
    }
    name = draw(st.sampled_from(["queries", "labels", "allow", "__metadata__", "", "\0"]))
    header = json.dumps({name: draw(st.sampled_from([entry, {}, [], None, "x"]))}).encode()
    length = draw(st.sampled_from([len(header), 0, 2**63, len(header) + 1, 7]))
    return struct.pack("<Q", length) + header + bytes(draw(st.integers(0, 200)))


def any_json():
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from([10**400, 2**63, -(2**63), 1e308, 5e-324]),
    )
    rows = st.lists(st.lists(st.floats(width=32), min_size=DIM, max_size=DIM), max_size=3)
    nested = st.recursive(
        st.one_of(plain, rows),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=12,
    )
    named = st.dictionaries(
        st.sampled_from(["queries", "labels", "allow", "k"]), nested, max_size=3
    )
    return st.one_of(nested, named).map(lambda value: json.dumps(value).encode())


def is_answered(shared, media: str, body: bytes) -> None:
    """A result of the right shape where the body is good by another reader, or a problem."""
    reply = shared.call("POST", "/v1/search?k=2", body, Content_Type=media, Accept=formats.JSON)
    if reply.status == 200:
        rows = len(reply.json["labels"])
        assert rows == len(by_another_reader(media, body))
    else:
        assert 400 <= reply.status < 500, (reply.status, body)
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.json["detail"]


def by_another_reader(media: str, body: bytes) -> np.ndarray:
    if media == formats.NPY:
        read = np.load(io.BytesIO(body), allow_pickle=False)
    else:
        held = safetensors.load(body) if media == formats.SAFETENSORS else json.loads(body)
        read = np.asarray(held["queries" if "queries" in held else "labels"])
        if "labels" in held:
            return read
    read = read.reshape(0, DIM) if read.size == 0 and read.ndim == 1 else np.atleast_2d(read)
    assert read.shape[1] == DIM and np.isfinite(read.astype(np.float64)).all()
    return read


@EXAMPLES
@given(st.one_of(mutated(GOOD[formats.NPY]), npy_with_any_header(), st.binary(max_size=200)))
def test_npy(shared, body):
    is_answered(shared, formats.NPY, body)


@EXAMPLES
@given(
    st.one_of(
        mutated(GOOD[formats.SAFETENSORS]), tensors_with_any_header(), st.binary(max_size=200)
    )
)
def test_safetensors(shared, body):
    is_answered(shared, formats.SAFETENSORS, body)


@EXAMPLES
@given(st.one_of(mutated(GOOD[formats.JSON]), any_json(), st.binary(max_size=200)))
def test_json(shared, body):
    is_answered(shared, formats.JSON, body)


def test_the_openapi_document_is_kept(shared, tmp_path):
    """By schemathesis: whatever its document allows or forbids."""
    pytest.importorskip("schemathesis")
    url = f"http://127.0.0.1:{shared.port}/openapi.json"
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    how = ["--phases", "examples,coverage,fuzzing", "--max-examples", "40", "--seed", "1"]
    # a filter that nobody registered cannot be told from one that somebody did, in a schema
    how += ["--header", "X-Timeout-Ms: 20000"]  # else it asks for answers within 1 ms, and gets 504
    how += ["--exclude-checks", "positive_data_acceptance", "--generation-database", "none"]
    done = subprocess.run(  # which keeps files in the folder that it is run from
        [*command, "run", url, *how], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 selected / 7 total" in done.stdout
