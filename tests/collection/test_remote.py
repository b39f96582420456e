"""Collections at URLs: S3 as `moto` serves it on this machine, by way of lines that break."""

import contextlib
import json
import re
import socket
import threading
from urllib.request import Request, urlopen

import numpy as np
import pytest
from click.testing import CliRunner
from collections_of import make

import hnsw_gpu
from hnsw_gpu import CorruptIndexError, cli
from hnsw_gpu.collection.building import WORK, build_collection
from hnsw_gpu.collection.manifest import MANIFEST
from hnsw_gpu.files import folders
from hnsw_gpu.files.folders import CACHE, folder_at

fsspec = pytest.importorskip("fsspec", reason="needs the extra `remote`")
pytest.importorskip("s3fs", reason="needs the extra `remote`")
moto_server = pytest.importorskip("moto.server", reason="needs moto[s3] and flask-cors")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of moto and botocore

ROWS = np.random.default_rng(5).normal(size=(600, 12)).astype(np.float32)
HOW = {"shard_rows": 200, "M": 8, "ef_construction": 40}
SECRET = "open sesame"
CHUNK = 1 << 16


class Line:
    """Every connection to a server, which can be broken."""

    def __init__(self, port):
        self._port, self.breaks, self.sent, self.asked = port, 0, 0, bytearray()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            near, _ = self._listening.accept()
            threading.Thread(target=self._connected, args=(near,), daemon=True).start()

    def _connected(self, near):
        with near, socket.create_connection(("127.0.0.1", self._port)) as far:
            asking = threading.Thread(target=self._carry, args=(near, far, True), daemon=True)
            asking.start()
            self._carry(far, near, False)
            asking.join()

    def _carry(self, one, other, is_asking):
        try:
            while data := one.recv(CHUNK):
                if is_asking:
                    self.asked += data
                elif self.breaks:
                    self.breaks -= 1
                    other.sendall(data[: len(data) // 2])
                    break
                self.sent += 0 if is_asking else len(data)
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def asked_for(self, method):
        """Names of objects, of each such request."""
        found = re.findall(method.encode() + rb" (\S+) HTTP/1.1\r\n", self.asked)
        return [name.decode().partition("?")[0].rpartition("/")[2] for name in found]


@pytest.fixture(scope="module")
def server():
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture
def line(server):
    return Line(server)


@pytest.fixture
def options(line):
    """storage_options of an S3 that asks once: what asks again is ours."""
    once = {"retries": {"total_max_attempts": 1}, "connect_timeout": 2, "read_timeout": 20}
    return {
        "key": "somebody", "secret": SECRET, "endpoint_url": line.url, "config_kwargs": once,
        "client_kwargs": {"region_name": "us-east-1"}, "default_cache_type": "none",
    }  # fmt: skip


@pytest.fixture
def bucket(server, options, tmp_path, monkeypatch):
    """A bucket of this test, as a URL; and a cache."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "FIRST_WAIT_S", 0.01)
    name = f"b{abs(hash(str(tmp_path))):x}"
    make_bucket = Request(f"http://127.0.0.1:{server}/{name}", method="PUT")
    urlopen(make_bucket).close()
    fsspec.filesystem("s3", **options).retries = 1  # of s3fs itself
    return f"s3://{name}"


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS)
    return tmp_path / "rows.npy"


@pytest.fixture
def docs(bucket, options, path):
    """A collection of three shards, at a URL."""
    build_collection([path], folder_at(f"{bucket}/docs", options), **HOW)
    return f"{bucket}/docs"


def objects(url, options):
    system, path = fsspec.core.url_to_fs(url, **options)
    system.invalidate_cache()
    return {name.removeprefix(path + "/"): system.cat_file(name) for name in system.find(path)}


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_as_on_this_machine(docs, options, path, tmp_path, line):
    """The same bytes there, and the same answers; the caller's key signed every request."""
    build_collection([path], tmp_path / "here", **HOW)
    here = {file.name: file.read_bytes() for file in (tmp_path / "here").iterdir()}
    assert objects(docs, options) == here and len(here) == 4
    opened, wanted = hnsw_gpu.load(docs, storage_options=options), hnsw_gpu.load(tmp_path / "here")
    for found, expected in zip(opened.search(ROWS[:50]), wanted.search(ROWS[:50]), strict=True):
        assert found.tobytes() == expected.tobytes()
    assert (opened.path, len(opened)) == (docs, 600)
    assert docs in repr(opened)
    opened.check()
    requests = bytes(line.asked).count(b" HTTP/1.1\r\n")
    assert bytes(line.asked).count(b"Credential=somebody/") == requests > 10


def test_shards_are_copied_once(docs, options, line):
    hnsw_gpu.load(docs, storage_options=options)
    sizes = [len(data) for name, data in objects(docs, options).items() if name != MANIFEST]
    before = line.sent
    opened = hnsw_gpu.load(docs, storage_options=options)
    assert line.sent - before < sum(sizes) / 2
    assert (opened.search(ROWS[:20], 1).labels[:, 0] == np.arange(20)).all()


def test_what_changes_there_is_never_served(docs, options, path):
    """Neither by the copy that is here, nor by the one that would be made."""
    hnsw_gpu.load(docs, storage_options=options)
    system, place = fsspec.core.url_to_fs(docs, **options)
    first, second = (f"{place}/shard-000{s}.hnsw" for s in (0, 1))
    kept = system.cat_file(first)
    system.pipe_file(first, system.cat_file(second))
    with pytest.raises(CorruptIndexError, match=rf"{docs}/shard-0000.hnsw: .* manifest.json says"):
        hnsw_gpu.load(docs, storage_options=options)
    system.rm_file(first)
    with pytest.raises(CorruptIndexError, match=r"shard-0000.hnsw: is missing, and manifest.json"):
        hnsw_gpu.load(docs, storage_options=options)
    system.pipe_file(first, kept)
    assert len(hnsw_gpu.load(docs, storage_options=options)) == 600
    np.save(path, ROWS + 1)
    for name in system.find(place):
        system.rm_file(name)
    build_collection([path], folder_at(docs, options), **HOW)
    near = hnsw_gpu.load(docs, storage_options=options).exact_search(ROWS[:20] + 1, 1)
    assert (near.labels[:, 0] == np.arange(20)).all() and near.distances.max() < 1e-6


def test_flipped_bytes_are_not_copied(docs, options, tmp_path):
    system, place = fsspec.core.url_to_fs(f"{docs}/shard-0001.hnsw", **options)
    data = bytearray(system.cat_file(place))
    data[-3000] ^= 1
    system.pipe_file(place, bytes(data))
    with pytest.raises(CorruptIndexError, match=r"array '\w+' is damaged"):
        hnsw_gpu.load(docs, storage_options=options)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # of the shard before it


def test_check_looks_at_the_bytes_there(docs, options):
    opened = hnsw_gpu.load(docs, storage_options=options)
    system, place = fsspec.core.url_to_fs(f"{docs}/shard-0001.hnsw", **options)
    data = bytearray(system.cat_file(place))
    data[-3000] ^= 1
    system.pipe_file(place, bytes(data))
    with pytest.raises(CorruptIndexError, match=rf"{docs}/shard-0001.hnsw: array '\w+' is damaged"):
        opened.check()


@pytest.mark.parametrize("breaks", [1, 3])
def test_a_line_that_breaks_is_tried_again(docs, options, line, breaks):
    line.breaks = breaks
    opened = hnsw_gpu.load(docs, storage_options=options)
    assert line.breaks == 0
    assert (opened.search(ROWS[:20], 1).labels[:, 0] == np.arange(20)).all()


def test_a_line_that_breaks_while_it_is_built(bucket, options, line, path, tmp_path):
    line.breaks = 3
    build_collection([path], folder_at(f"{bucket}/new", options), **HOW)
    build_collection([path], tmp_path / "here", **HOW)
    here = {file.name: file.read_bytes() for file in (tmp_path / "here").iterdir()}
    assert line.breaks == 0 and objects(f"{bucket}/new", options) == here


def test_a_line_that_breaks_for_good_is_an_error(docs, options, line):
    line.breaks = 10**9
    with pytest.raises(ConnectionError, match=rf"{docs}/manifest.json: no answer, tried 4 times: "):
        hnsw_gpu.load(docs, storage_options=options)


def test_nobody_listens(options, bucket):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    nowhere = options | {"endpoint_url": f"http://127.0.0.1:{port}"}
    with pytest.raises(ConnectionError, match="no answer, tried 4 times") as error:
        hnsw_gpu.load(f"{bucket}/docs", storage_options=nowhere)
    assert SECRET not in repr(error.value) and SECRET not in repr(folder_at(bucket, options))


def test_nothing_is_there(bucket, options):
    with pytest.raises(FileNotFoundError, match=f"{bucket}/nothing"):
        hnsw_gpu.load(f"{bucket}/nothing", storage_options=options)
    folder_at(f"{bucket}/docs", options).write("other.txt", b"mine")
    with pytest.raises(IsADirectoryError, match="no collection, or one whose build is not"):
        hnsw_gpu.load(f"{bucket}/docs", storage_options=options)
    with pytest.raises(ValueError, match="storage_options are of a URL"):
        hnsw_gpu.load("docs", storage_options=options)


def test_a_manifest_of_another_version(docs, options):
    folder = folder_at(docs, options)
    facts = json.loads(folder.read(MANIFEST, 10**6))
    folder.write(MANIFEST, json.dumps(facts | {"format_version": 9}).encode())
    with pytest.raises(CorruptIndexError, match=rf"{docs}/{MANIFEST}: format version 9"):
        hnsw_gpu.load(docs, storage_options=options)


def test_an_interrupted_build_goes_on(bucket, options, path, line, monkeypatch):
    """What is there is not sent again; another plan is refused; nothing else is touched."""
    out, save = folder_at(f"{bucket}/docs", options), hnsw_gpu.Index.save

    def interrupted(index, path):
        if "0002" in str(path):
            raise KeyboardInterrupt
        save(index, path)

    with monkeypatch.context() as patched:
        patched.setattr(hnsw_gpu.Index, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_collection([path], out, **HOW)
    assert out.names() == [WORK, "shard-0000.hnsw", "shard-0001.hnsw"]
    with pytest.raises(ValueError, match="M was 8, is 16"):
        build_collection([path], out, **HOW | {"M": 16})
    line.asked.clear()
    build_collection([path], out, **HOW)
    assert line.asked_for("PUT") == ["shard-0002.hnsw", MANIFEST]
    assert out.names() == [MANIFEST, *(f"shard-000{s}.hnsw" for s in range(3))]
    with pytest.raises(ValueError, match=rf"{bucket}/docs holds manifest.json: a collection is"):
        build_collection([path], out, **HOW)


def test_the_command_line(bucket, options, path, tmp_path):
    (tmp_path / "options.json").write_text(json.dumps(options))
    how = ("--storage-options", f"@{tmp_path / 'options.json'}")
    url = f"{bucket}/docs"
    assert "600 vectors of 12 in 3 shards" in run(
        "build", path, "-o", url, "--shard-rows", 200, *how
    )
    assert json.loads(run("info", url, "--json", *how))["shards"] == 3
    assert f"{url}: sound, 600 vectors" in run("check", url, *how)
    run("search", url, path, "-k", 1, "-o", tmp_path / "found.npz", *how)
    assert (np.load(tmp_path / "found.npz")["labels"][:, 0] == np.arange(600)).mean() > 0.99
    told = run("check", f"{bucket}/none", *how, code=1)
    assert "No such file" in told and SECRET not in told
    assert "expected a JSON object" in run("check", url, "--storage-options", "[1]", code=2)
    assert "--ray and a URL need --shard-rows" in run("build", path, "-o", url, code=2)


def test_a_file_system_that_has_folders(path, tmp_path, monkeypatch):
    """There a file is written beside its place, and moved."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    build_collection([path], "memory://deep/docs", **HOW)
    make(tmp_path / "here", ROWS, metric="cosine", M=8, ef_construction=40)
    here = {file.name: file.read_bytes() for file in (tmp_path / "here").iterdir()}
    assert objects("memory://deep/docs", {}) == here
    opened = hnsw_gpu.load("memory://deep/docs")
    opened.check()
    assert (opened.search(ROWS[:20], 1).labels[:, 0] == np.arange(20)).all()
    assert len(hnsw_gpu.load(f"file://{tmp_path / 'here'}")) == 600
