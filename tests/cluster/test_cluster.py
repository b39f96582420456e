"""A cluster answers as its collection does on one machine, whoever is killed meanwhile."""

import asyncio
import itertools
import os
import pickle
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import oracle
import pytest

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `io`")
ray = pytest.importorskip("ray", reason="needs the extra `ray`")

from callers import same, sixteen_callers
from collections_of import make, manifest_of
from processes import processes, wait

import hnsw_gpu
from hnsw_gpu import CorruptIndexError, PartialResult, ShardLostError
from hnsw_gpu.cluster.answered_batches import _lists_of
from hnsw_gpu.cluster.cluster import ANY_NUMBER, _places
from hnsw_gpu.collection.manifest import entry_of, write_manifest
from hnsw_gpu.files import folders

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")

RNG = np.random.default_rng(3)
ROWS = RNG.normal(size=(1200, 12)).astype(np.float32)
ROWS[700:760] = ROWS[20:80]  # copies, in another shard
QUERIES = np.concatenate([RNG.normal(size=(20, 12)), ROWS[20:40]]).astype(np.float32)
LABELS = RNG.permutation(5000)[: len(ROWS)]


@pytest.fixture(scope="module", autouse=True)
def two_cpus(tmp_path_factory):
    """One Ray for all, of the program's own: no test may shut it down."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(folders.CACHE, str(tmp_path_factory.mktemp("copies")))  # of actors, too
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
    assert ray.is_initialized()
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Collections by their number of shards."""
    place = tmp_path_factory.mktemp("collections")
    for shards in (1, 2, 5):
        make(place / str(shards), ROWS, LABELS, shards=shards)
    return place


@pytest.fixture(scope="module")
def pair(folder):
    """Two shards, two replicas of each."""
    with hnsw_gpu.Cluster(folder / "2", replicas=2, cpus=1) as opened:
        yield opened


def actors() -> set[int]:
    """The processes of the shards' actors of this Ray."""
    raylets = [
        pid for pid, parent, name in processes() if parent == os.getpid() and "raylet" in name
    ]
    return {pid for pid, parent, name in processes() if parent in raylets and "ShardActor" in name}


def replicas(cluster):
    return [replica for shard in cluster.status()["shards"] for replica in shard["replicas"]]


def end_for_good(cluster, shard):
    """End the one actor of a shard, which is then not made again."""
    pid = cluster.status()["shards"][shard]["replicas"][0]["pid"]
    ray.kill(cluster._calls.replicas[shard][0].handle)
    wait(lambda: pid not in actors())


def all_live(cluster):
    return all(replica["state"] == "live" for replica in replicas(cluster))


def everything_asked(index):
    """What a collection is asked, each answer a tuple of arrays."""
    some = LABELS[::7]
    mask = np.arange(5000) % 2 == 0
    return [
        index.search(QUERIES, 7, ef=30),
        index.search(QUERIES[3], 7, ef=30),
        index.search(QUERIES, 1300),
        index.search(QUERIES, 7, allow=some),
        index.search(QUERIES, 7, allow=mask, ef=20),
        index.search(QUERIES, 7, allow=np.stack([mask] * len(QUERIES)), expand=4, ef_upper=3),
        index.search(np.tile(QUERIES, (100, 1)), 7),  # arrays that go by the store
        index.exact_search(QUERIES, 9),
        index.search_radius(QUERIES, 0.6),
        index.search_radius(QUERIES, 0.6, ef=30, allow=some),
        (index.vectors(LABELS[:300]), index.labels, index.some_labels(9)),
        (np.array([LABELS[0] in index, 6000 in index, len(index), index.nbytes]),),
    ]


@pytest.mark.parametrize("shards", [1, 5])
def test_answers_are_those_of_the_collection(folder, shards):
    opened = hnsw_gpu.load(folder / str(shards))
    with hnsw_gpu.Cluster(folder / str(shards), replicas=1) as cluster:
        for found, expected in zip(
            everything_asked(cluster), everything_asked(opened), strict=True
        ):
            assert same(found, expected)
        assert (cluster.device, cluster.has_deleted) == ("cpu", False)
        assert repr(cluster).startswith("Cluster(") and f"in {shards} shards" in repr(cluster)
        pids = {replica["pid"] for replica in replicas(cluster)}
        assert pids <= actors() and len(pids) == shards
    wait(lambda: not pids & actors())
    with pytest.raises(RuntimeError, match="the cluster is closed"):
        cluster.search(QUERIES)


def test_labels_that_are_strings(tmp_path):
    names = [f"row {label}" for label in LABELS]
    make(tmp_path / "c", ROWS, names, shards=2)
    opened = hnsw_gpu.load(tmp_path / "c")
    with hnsw_gpu.Cluster(tmp_path / "c", replicas=1, cpus=1) as cluster:
        for ask in (
            lambda index: index.search(QUERIES, 7),
            lambda index: index.search(QUERIES, 1300),
            lambda index: index.search(QUERIES, 7, allow=names[::7]),
            lambda index: index.search_radius(QUERIES, 0.6),
            lambda index: (index.vectors(names[:300]), index.labels, index.some_labels(9)),
        ):
            oracle.assert_same(ask(cluster), ask(opened))
        assert names[3] in cluster and cluster.label_kind == "strings"
        table = pyarrow.table(_lists_of(cluster.search(QUERIES, 7)))
        assert table["labels"].to_pylist() == opened.search(QUERIES, 7).labels.tolist()


def test_answers_of_two_replicas_from_threads_tasks_and_processes(folder, pair):
    opened = hnsw_gpu.load(folder / "2")
    for found, expected in zip(everything_asked(pair), everything_asked(opened), strict=True):
        assert same(found, expected)
    expected = [opened.search(query, 5) for query in QUERIES]

    async def ask_all():
        return await asyncio.gather(*(pair.search_async(query, 5) for query in QUERIES))

    with ThreadPoolExecutor(8) as threads:
        for answers in (
            asyncio.run(ask_all()),
            threads.map(lambda query: pair.search(query, 5), QUERIES),
        ):
            assert all(map(same, answers, expected))
    assert all(replica["searches"] > 0 for replica in replicas(pair))  # they take turns
    before = sum(replica["searches"] for replica in replicas(pair))
    with hnsw_gpu.Batcher(pair, batch_rows=8) as batcher:
        assert pair.calls_at_once == 2  # batches: one a replica
        futures = [batcher.submit(query, 5) for query in QUERIES]
        assert all(map(same, [future.result() for future in futures], expected))
    assert sum(replica["searches"] for replica in replicas(pair)) < before + 2 * len(QUERIES)

    @ray.remote(num_cpus=0)
    def elsewhere(cluster):
        with cluster:  # closes nothing
            return cluster.search(QUERIES, 5)

    assert same(ray.get(elsewhere.remote(pair)), opened.search(QUERIES, 5))
    assert len(pickle.dumps(pair)) < 10_000  # handles: no vectors, no labels
    assert all_live(pair)


def test_nobody_notices_that_actors_are_killed(folder, pair):
    """One of a shard, one of another, then all of one shard: by SIGKILL, under 16 callers."""
    whole = hnsw_gpu.load(folder / "2").search(QUERIES, 5)
    wait(lambda: all_live(pair))
    with sixteen_callers(pair, QUERIES, whole) as (failed, differing, asked):
        for victims in ([(0, 0)], [(1, 1)], [(0, 0), (0, 1)]):
            wait(lambda: all_live(pair))
            before = min(asked)
            shards = pair.status()["shards"]
            for s, r in victims:
                os.kill(shards[s]["replicas"][r]["pid"], signal.SIGKILL)
            wait(lambda: min(asked) > before + 3)  # noqa: B023
        wait(lambda: all_live(pair))
    assert (failed, differing) == ([], [])
    assert sum(shard["retries"] for shard in pair.status()["shards"]) > 0
    assert same(pair.search(QUERIES, 5), whole)


@pytest.mark.parametrize(
    ("room", "replicas", "expected"),
    [
        ({"a": 1, "b": 3}, 2, ["ba", "bb"]),  # GPUs
        ({"a": 2, "b": 2, "c": 2}, 2, ["ab", "ca", "bc"]),
        (dict.fromkeys("abc", ANY_NUMBER), 2, ["ab", "ca", "bc", "ab"]),
        (dict.fromkeys("ab", ANY_NUMBER), 3, ["aba", "bab"]),
    ],
)
def test_replicas_go_where_room_is_and_apart(room, replicas, expected):
    room = {name * 56: count for name, count in room.items()}  # as long as Ray's ids
    for nodes in expected:
        assert "".join(place.node_id[0] for place in _places(room, replicas)) == nodes
    assert _places({}, 2) == ["SPREAD"] * 2


def test_one_that_says_nothing_is_left_for_the_other(folder, pair):
    """As where its machine hangs; it is asked again once it has said something."""
    expected = hnsw_gpu.load(folder / "2").search(QUERIES, 5)
    wait(lambda: all_live(pair))
    before = [shard["retries"] for shard in pair.status()["shards"]]
    stopped = [shard["replicas"][0]["pid"] for shard in pair.status()["shards"]]
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert pair.is_ready()
        for _ in range(5):
            assert same(pair.search(QUERIES, 5), expected)
            for one in itertools.chain(*pair._calls.replicas):
                one.failed_at = 0.0  # it was long ago
        after = [shard["retries"] for shard in pair.status()["shards"]]
        assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]
        states = [[replica["state"] for replica in s["replicas"]] for s in pair.status()["shards"]]
        assert states == [["silent", "live"]] * 2
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    wait(lambda: all(one.silent is None for one in itertools.chain(*pair._calls.replicas)))
    wait(lambda: all_live(pair))
    assert same(pair.search(QUERIES, 5), expected)


def test_one_replica_alone(folder):
    """A lost shard is waited for as long as allowed, whether it is killed or says nothing."""
    expected = hnsw_gpu.load(folder / "2").search(QUERIES, 5)
    with hnsw_gpu.Cluster(folder / "2", replicas=1) as patient:
        brief = pickle.loads(pickle.dumps(patient))
        brief._calls.timeout_s = 0.2
        for sign in (signal.SIGSTOP, signal.SIGKILL):
            os.kill(pid := replicas(patient)[1]["pid"], sign)
            with pytest.raises(TimeoutError, match=r"shard-0001\.hnsw: no answer within timeout_s"):
                brief.search(QUERIES, 5)
            if sign == signal.SIGSTOP:
                assert [replica["state"] for replica in replicas(patient)] == ["live", "silent"]
                os.kill(pid, signal.SIGCONT)
            assert same(patient.search(QUERIES, 5), expected)
            assert patient.is_ready()


def test_a_shard_that_is_lost_for_good(folder):
    """It is named at once: in an error, or beside the answers of the others."""
    expected = hnsw_gpu.load(folder / "2").search(QUERIES, 5)
    left = hnsw_gpu.load(folder / "2" / "shard-0000.hnsw").search(QUERIES, 5)
    with hnsw_gpu.Cluster(folder / "2", replicas=1, on_shard_error="partial") as partial:
        found = partial.search(QUERIES, 5)
        assert isinstance(found, PartialResult) and found.missing == () and same(found, expected)
        strict = pickle.loads(pickle.dumps(partial))
        strict._on_shard_error = "raise"
        end_for_good(partial, 1)
        with pytest.raises(ShardLostError, match=r"shard-0001\.hnsw: no replica") as caught:
            strict.search(QUERIES, 5)
        assert pickle.loads(pickle.dumps(caught.value)).shards == ("shard-0001.hnsw",)
        out = np.empty((40, 5), np.int64), np.empty((40, 5), np.float32)
        found = partial.search(QUERIES, 5, out=out)
        assert found.missing == ("shard-0001.hnsw",) and found.labels is out[0]
        assert same(found, left)
        again = pickle.loads(pickle.dumps(found))
        assert same(again, left) and again.missing == found.missing
        for ask in (
            lambda: partial.search_checked(QUERIES, 5, ef=64),
            lambda: partial.exact_search(QUERIES),
        ):
            with pytest.raises(ShardLostError, match=r"shard-0001\.hnsw"):
                ask()
        pytest.importorskip("pyarrow", reason="needs the extra `io`")
        answers = partial.map_batches(ray.data.from_items([{"embedding": list(QUERIES[0])}]), k=5)
        with pytest.raises(Exception, match=r"no replica answers of \('shard-0001\.hnsw',\)"):
            answers.take_all()
        assert [replica["state"] for replica in replicas(partial)] == ["live", "lost"]
        end_for_good(partial, 0)
        with pytest.raises(ShardLostError, match=r"shard-0000\.hnsw"):
            partial.search(QUERIES, 5)


def test_a_file_that_is_lost_later_is_named(folder, tmp_path):
    make(tmp_path / "c", ROWS, LABELS, shards=1)
    shard = tmp_path / "c" / "shard-0000.hnsw"
    with hnsw_gpu.Cluster(tmp_path / "c", replicas=1) as cluster:
        expected = cluster.search(QUERIES)
        shard.rename(tmp_path / "away")
        os.kill(replicas(cluster)[0]["pid"], signal.SIGKILL)
        with pytest.raises(CorruptIndexError, match=r"shard-0000\.hnsw: is missing"):
            cluster.search(QUERIES)
        (tmp_path / "away").rename(shard)
        assert same(cluster.search(QUERIES), expected)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (((np.ones((2, 5)),), {}), ValueError),
        (((QUERIES, 0), {}), ValueError),
        (((QUERIES,), {"ef": 0}), ValueError),
        (((QUERIES,), {"allow": np.ones(10, bool)}), ValueError),
        (((QUERIES,), {"allow": np.ones(3)}), ValueError),
        (((np.full((1, 12), np.nan),), {}), ValueError),
        (((QUERIES,), {"stream": 1}), ValueError),
    ],
)
def test_bad_arguments_are_those_of_a_collection(folder, pair, arguments, error):
    positional, named = arguments
    said = []
    for asked in (hnsw_gpu.load(folder / "2"), pair):
        with pytest.raises((error, TypeError)) as caught:
            asked.search(*positional, **named)
        told = re.sub(r"label \d+ is outside", "a label is outside", str(caught.value))
        said.append((type(caught.value), told))
    assert said[0] == said[1]
    with pytest.raises(KeyError, match="label 5001 and 1 more: not in the collection"):
        pair.vectors([LABELS[0], 5001, 5002])


def test_what_cannot_be_opened_leaves_nothing(folder, pair, tmp_path):
    before = actors()
    make(tmp_path / "broken", ROWS, LABELS, shards=2)
    whole = (tmp_path / "broken" / "shard-0001.hnsw").read_bytes()

    def refused(error, words, place=folder / "2", **how):
        with pytest.raises(error, match=words):
            hnsw_gpu.Cluster(place, **{"replicas": 1, **how})

    refused(ValueError, "replicas=0: expected at least 1", replicas=0)
    refused(TypeError, "replicas='2'", replicas="2")
    refused(ValueError, "cpus=0", cpus=0)
    refused(ValueError, "gpus=-1", gpus=-1)
    refused(ValueError, "timeout_s=0", timeout_s=0)
    refused(ValueError, "on_shard_error='ignore'", on_shard_error="ignore")
    refused(ValueError, "connected to another Ray", address="10.0.0.1:6379")
    refused(FileNotFoundError, "missing", tmp_path / "missing")
    refused(IsADirectoryError, r"without manifest\.json", tmp_path)
    refused(ValueError, r"no collection", folder / "2" / "shard-0000.hnsw")
    manifest = tmp_path / "broken" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 9'))
    refused(CorruptIndexError, "format version 9", tmp_path / "broken")
    manifest.write_text(text)
    (tmp_path / "broken" / "shard-0001.hnsw").write_bytes(whole[:-64])
    refused(CorruptIndexError, r"shard-0001\.hnsw: .* bytes", tmp_path / "broken")
    manifest.write_text(re.sub(r'"shards": \[.*\]', '"shards": []', text, flags=re.S))
    refused(CorruptIndexError, "no shards: the collection is empty", tmp_path / "broken")
    [index, _] = make(tmp_path / "swapped", ROWS, LABELS, shards=2)
    one, other = sorted((tmp_path / "swapped").glob("*.hnsw"))
    one.rename(tmp_path / "one")
    other.rename(one)
    (tmp_path / "one").rename(other)
    refused(CorruptIndexError, r"shard-000\d\.hnsw: ", tmp_path / "swapped")
    mixed = hnsw_gpu.Index(12, "l2")
    mixed.add(ROWS[600:], LABELS[600:])
    mixed.save(other)
    index.save(one)
    entries = [entry_of(tmp_path / "swapped", path.name) for path in (one, other)]
    write_manifest(tmp_path / "swapped", manifest_of(index, entries))
    refused(CorruptIndexError, r"shard-0001\.hnsw: metric l2, and .* cosine", tmp_path / "swapped")
    make(tmp_path / "twice", ROWS, np.concatenate([LABELS[:600], LABELS[:600]]), shards=2)
    refused(
        CorruptIndexError, r"is in shard-0000\.hnsw and in shard-0001\.hnsw \(600 are\)",
        tmp_path / "twice",
    )  # fmt: skip
    refused(TimeoutError, r"2 of 2 actors were not there .* gpus=1, of 0", gpus=1,
            start_timeout_s=1.0)  # fmt: skip
    wait(lambda: actors() <= before)
    assert all_live(pair)


def test_an_open_cluster_that_is_forgotten_ends(folder):
    before = actors()
    cluster = hnsw_gpu.Cluster(folder / "1", replicas=1)
    assert cluster.search(QUERIES[0], 1).labels.shape == (1, 1)
    assert len(actors() - before) == 1
    del cluster
    wait(lambda: actors() <= before)


def test_map_batches(folder, pair, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `io`")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra `io`")
    pytest.importorskip("ray.data", reason="needs the extra `ray`")

    rows = np.tile(QUERIES, (5, 1))
    expected = hnsw_gpu.load(folder / "2").search(rows, 4, ef=32)
    table = pyarrow.table({"embedding": list(rows), "id": np.arange(200) * 3})
    for part in range(2):
        parquet.write_table(table.slice(part * 100, 100), tmp_path / f"{part}.parquet")

    def check(found, name, step):
        order = np.argsort(found.column(name).to_numpy())
        assert (found.column(name).to_numpy()[order] == np.arange(200) * step).all()
        for column, values in expected._asdict().items():
            assert found.column(column).combine_chunks().take(order).to_pylist() == values.tolist()

    files = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    pair.map_batches(files, tmp_path / "out", k=4, ef=32, batch_rows=64)
    check(parquet.read_table(tmp_path / "out"), "row", 1)
    found = pair.map_batches(ray.data.from_arrow(table), k=4, ef=32, batch_rows=64)
    check(pyarrow.concat_tables(ray.get(found.to_arrow_refs())), "id", 3)
    for words, given, how in (
        ("is not empty", files, {"out": tmp_path / "out"}),
        ("k=0", files, {"k": 0}),
        ("batch_rows=0", files, {"batch_rows": 0}),
        ("no column 'vector'", files, {"column": "vector"}),
        ("expected a folder", files, {"out": "s3://bucket/answers"}),
    ):
        with pytest.raises(ValueError, match=words):
            pair.map_batches(given, **how)
    monkeypatch.chdir(tmp_path)  # the nodes stay where they are
    pair.map_batches("0.parquet", "relative", k=4)
    assert parquet.read_table(tmp_path / "relative").num_rows == 100
    there = ray.data.from_arrow(table.append_column("labels", table.column("id")))
    with pytest.raises(Exception, match="has a column 'labels' already: rename it"):
        pair.map_batches(there, k=4).materialize()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of moto and botocore
def test_shards_at_a_url(folder, monkeypatch):
    """S3, as moto serves it; credentials by storage_options."""
    s3fs = pytest.importorskip("s3fs", reason="needs the extra `remote`")
    moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")
    before = actors()
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    once = {"retries": {"total_max_attempts": 1}, "connect_timeout": 2}  # what asks again is ours
    options = {"key": "user", "secret": "open sesame", "endpoint_url": url, "config_kwargs": once}
    try:
        bucket = s3fs.S3FileSystem(**options)
        bucket.mkdir("bucket")
        bucket.put(str(folder / "2"), "bucket/docs.collection", recursive=True)
        place = "s3://bucket/docs.collection"
        with hnsw_gpu.Cluster(place, replicas=1, storage_options=options) as cluster:
            expected = hnsw_gpu.load(folder / "2").search(QUERIES, 5)
            assert same(cluster.search(QUERIES, 5), expected)
            assert "sesame" not in repr(cluster) + str(cluster.status())
            os.kill(replicas(cluster)[0]["pid"], signal.SIGKILL)
            assert same(cluster.search(QUERIES, 5), expected)
        with pytest.raises(FileNotFoundError, match="s3://bucket/missing"):
            hnsw_gpu.Cluster("s3://bucket/missing", storage_options=options)
        bucket.rm("bucket/docs.collection/shard-0001.hnsw")
        with pytest.raises(
            CorruptIndexError, match=r"docs\.collection/shard-0001\.hnsw: is missing"
        ):
            hnsw_gpu.Cluster(place, replicas=1, storage_options=options)
    finally:
        server.stop()
    monkeypatch.setattr(folders, "FIRST_WAIT_S", 0.01)
    bucket.retries = 1  # of s3fs itself
    with pytest.raises(ConnectionError, match=r"s3://bucket/docs\.collection.* tried 4 times"):
        hnsw_gpu.Cluster(place, replicas=1, storage_options=options)
    with pytest.raises(ValueError, match="storage_options are of a URL"):
        hnsw_gpu.Cluster(folder / "2", replicas=1, storage_options=options)
    wait(lambda: actors() <= before)


def test_a_server_in_front(folder, tmp_path):
    """The same answers over HTTP; ready while each shard has a live replica; swaps."""
    for extra in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(extra, reason="needs the extra `serve`")
    from served import running

    from hnsw_gpu.serve import OnRay

    indexes = make(tmp_path / "other", ROWS, LABELS, shards=1)
    make(tmp_path / "docs", ROWS, LABELS, shards=2)
    indexes[0].save(tmp_path / "docs.hnsw")
    filters = tmp_path / "docs.filters"
    filters.mkdir()
    np.save(filters / "seventh.npy", LABELS[::7])
    opened = hnsw_gpu.load(tmp_path / "docs")
    before = actors()
    on_ray = OnRay(ray.get_runtime_context().gcs_address, replicas=1)
    with running(tmp_path / "docs", on_ray=on_ray) as fresh:

        def check(expected, target):
            answer = fresh.call.search(QUERIES, target, Accept="application/json").json
            assert answer["labels"] == expected.labels.tolist()
            assert np.float32(answer["distances"]).tolist() == expected.distances.tolist()

        check(opened.search(QUERIES, 7, ef=40), "/v1/search?k=7&ef=40")
        check(opened.search(QUERIES, 7, allow=LABELS[::7]), "/v1/search?k=7&allow=seventh")
        near = fresh.call.as_json({"labels": LABELS[:4].tolist()}, "/v1/search?k=1").json
        assert len(near["labels"]) == 4
        told = fresh.call("GET", "/v1/index").json
        assert (told["n"], told["checksum"]) == (1200, opened.manifest.checksum)
        assert fresh.call.metric("canary_recall") == 1.0
        assert fresh.call.metric("shard_live_replicas") == fresh.call.metric("shard_replicas") == 2
        assert fresh.call.metric("shard_rows") == 1200
        assert fresh.call.metric("shard_searches_total") > 0

        ready = fresh.call("GET", "/health/ready")
        assert (ready.status, ready.json) == (200, {"state": "ready"})
        cluster = fresh.live.served.index
        os.kill(pid := replicas(cluster)[1]["pid"], signal.SIGKILL)
        wait(lambda: fresh.call("GET", "/health/ready").status == 503)
        check(opened.search(QUERIES, 7, ef=40), "/v1/search?k=7&ef=40")  # waits
        wait(lambda: fresh.call("GET", "/health/ready").status == 200)
        assert pid not in actors()

        fresh.call.as_json({"path": "docs.hnsw"}, "/v1/index:swap").refused(422, "no collection")
        old = {replica["pid"] for replica in replicas(cluster)}
        del cluster
        told = fresh.call.as_json({"path": "other"}, "/v1/index:swap").json
        assert (told["path"], told["n"], told["version"]) == ("other", 1200, 2)
        check(indexes[0].search(QUERIES, 5), "/v1/search?k=5")
        wait(lambda: not old & actors())
        end_for_good(fresh.live.served.index, 0)
        reply = fresh.call.search(QUERIES, "/v1/search?k=5")
        reply.refused(503, "shard-0000.hnsw: no replica answers")
    wait(lambda: actors() <= before)


def test_a_server_that_cannot_begin_says_why(tmp_path):
    pytest.importorskip("starlette", reason="needs the extra `serve`")
    from served import running

    from hnsw_gpu.serve import OnRay

    before = actors()
    make(tmp_path / "docs", ROWS, LABELS, shards=2)
    (tmp_path / "docs" / "shard-0001.hnsw").unlink()
    address = ray.get_runtime_context().gcs_address
    with running(tmp_path / "docs", on_ray=OnRay(address)) as fresh:
        assert "shard-0001.hnsw: is missing" in str(fresh.live.error)
    wait(lambda: actors() <= before)
