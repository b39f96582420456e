"""Builds and deduplications as tasks of Ray: what one machine writes, whoever is killed."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from click.testing import CliRunner

ray = pytest.importorskip("ray", reason="needs the extra `ray`")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from processes import processes, wait

import hnsw_gpu
from hnsw_gpu import cli
from hnsw_gpu.cluster import steps_on_ray
from hnsw_gpu.cluster.job_steps import RETRIES, _do
from hnsw_gpu.collection.building import build_collection
from hnsw_gpu.deduplication import Settings, dedup_files, in_files
from hnsw_gpu.deduplication.checkpoints import WORK
from hnsw_gpu.files import HERE, UNSEEN, Checkpoints, LocalFolder, folder_at

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")

RNG = np.random.default_rng(2)
ROWS = RNG.normal(size=(800, 12)).astype(np.float32)
ROWS[500:650] = ROWS[:150] + 0.01  # near-duplicates, in other shards
ROWS[650:700] = ROWS[:50]  # and copies
IDS = RNG.permutation(5000)[: len(ROWS)]
HOW = {"M": 8, "ef_construction": 40}
SETTINGS = Settings(threshold=0.97, method="hnsw", ef_construction=40)
TABLES = ("duplicates.parquet", "pairs.parquet", "kept.parquet")


@pytest.fixture(scope="module", autouse=True)
def two_cpus():
    """One Ray for all, of the program's own: no test may shut it down."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    assert ray.is_initialized()
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def runner():
    with steps_on_ray() as found:
        yield found


@pytest.fixture
def path(tmp_path):
    table = {"embedding": list(ROWS), "id": IDS}
    parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet", row_group_size=90)
    return tmp_path / "rows.parquet"


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def tables_of(out):
    return {name: (out / name).read_bytes() for name in TABLES}


def workers(step):
    """The processes that run a step on the Ray of these tests."""
    raylets = [
        pid for pid, parent, name in processes() if parent == os.getpid() and "raylet" in name
    ]
    return [pid for pid, parent, name in processes() if parent in raylets and f"::{step}" in name]


def of_ray(driver):
    """Processes of the Ray that a driver started, but for its agents, whom it forgets at a kill."""
    found = []
    for pid, _, name in processes():
        with contextlib.suppress(OSError):
            if b"OF_A_DRIVER=%d" % driver in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(name)
    return [name for name in found if re.search("raylet|gcs_server|ray::_|ray::IDLE", name)]


class Until:
    """A runner that is interrupted before a step of some name."""

    def __init__(self, runner, step):
        self._runner, self._step, self.threads = runner, step, runner.threads

    def each(self, do, *rest):
        if do.__name__ == self._step:
            raise KeyboardInterrupt
        return self._runner.each(do, *rest)


# ---------------------------------------------------------------- building


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_build_writes_what_one_machine_writes(tmp_path, path, runner, shards):
    how = HOW | {"shard_rows": 800 // shards, "id_column": "id"}
    build_collection([path], tmp_path / "here", **how)
    manifest = build_collection([path], tmp_path / "ray", runner=runner, **how)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "here")
    assert len(manifest.shards) == shards


def test_the_command_line(tmp_path, path, monkeypatch):
    """Relative paths are those of the driver; the Ray of this program is used, and left alone."""
    monkeypatch.chdir(tmp_path)
    address = ray.get_runtime_context().gcs_address
    command = ["build", "rows.parquet", "-o", "docs", "--shard-rows", "300", "--ray", address]
    told = CliRunner().invoke(cli.main, command)
    assert "800 vectors of 12 in 3 shards" in told.output
    assert (hnsw_gpu.load("docs").search(ROWS[:50], 1).labels[:, 0] == np.arange(50)).mean() > 0.9
    command = ["dedup", "rows.parquet", "-o", "out", "--threshold", "0.97", "--ray", address]
    told = CliRunner().invoke(cli.main, command)
    assert "--ray needs --shard-rows" in told.output and told.exit_code == 2
    told = CliRunner().invoke(cli.main, [*command, "--shard-rows", "300"])
    assert "600 of 800 rows kept" in told.output


def test_a_build_into_s3(tmp_path, path, runner, monkeypatch):
    moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs the extra `remote`")
    monkeypatch.setenv("HNSW_GPU_SHARD_CACHE", str(tmp_path / "cache"))
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        urlopen(Request(f"{url}/bucket", method="PUT")).close()
        options = {"key": "somebody", "secret": "open sesame", "endpoint_url": url}
        out = folder_at("s3://bucket/docs", options)
        build_collection([path], out, shard_rows=300, runner=runner, **HOW)
        build_collection([path], tmp_path / "here", shard_rows=300, **HOW)
        opened = hnsw_gpu.load("s3://bucket/docs", storage_options=options)
        wanted = hnsw_gpu.load(tmp_path / "here")
        assert opened.manifest == wanted.manifest
        for found, expected in zip(opened.search(ROWS), wanted.search(ROWS), strict=True):
            assert found.tobytes() == expected.tobytes()
    finally:
        server.stop()


# ---------------------------------------------------------------- deduplication


def test_dedup_writes_what_one_machine_writes(tmp_path, path, runner):
    """And keeps the same rows, however many shards there are."""
    kept = []
    for shards in (1, 2, 4, 8):
        how = {"shard_rows": 800 // shards, "id_column": "id"}
        here, there = tmp_path / f"here {shards}", tmp_path / f"ray {shards}"
        dedup_files([path], here, SETTINGS, **how)
        report = dedup_files([path], there, SETTINGS, runner=runner, **how)
        assert tables_of(there) == tables_of(here)
        assert report["kept"] == 600 and report["shards"]["count"] == shards
        kept.append((there / "kept.parquet").read_bytes())
    assert len(set(kept)) == 1


def test_the_same_markers(tmp_path, path, runner):
    """A job goes on wherever it was begun, and what one machine left is what Ray leaves."""
    np.save(tmp_path / "theirs.npy", ROWS[100:120])
    how = {"shard_rows": 200, "against": [tmp_path / "theirs.npy"]}
    whole = dedup_files([path], tmp_path / "whole", SETTINGS, **how)
    for name, first in (("here", HERE), ("ray", runner)):
        with pytest.raises(KeyboardInterrupt):
            dedup_files([path], tmp_path / name, SETTINGS, runner=Until(first, "_conclude"), **how)
    markers = files_of(tmp_path / "ray" / WORK)
    assert markers == files_of(tmp_path / "here" / WORK)
    assert len(markers) == 1 + 5 + 10 + 3  # the plan, our shards, blocks, the other set's
    times = {name: (tmp_path / "here" / WORK / name).stat().st_mtime_ns for name in markers}
    with pytest.raises(KeyboardInterrupt):
        again = Until(runner, "_conclude")
        dedup_files([path], tmp_path / "here", SETTINGS, runner=again, **how)
    assert times == {n: (tmp_path / "here" / WORK / n).stat().st_mtime_ns for n in markers}
    for name, last in (("here", runner), ("ray", HERE)):
        report = dedup_files([path], tmp_path / name, SETTINGS, runner=last, **how)
        assert tables_of(tmp_path / name) == tables_of(tmp_path / "whole")
        assert report["against_duplicates"] == whole["against_duplicates"] >= 20


# ---------------------------------------------------------------- losses


@pytest.mark.slow
def test_killed_workers_change_nothing(tmp_path, path, runner):
    dedup_files([path], tmp_path / "whole", SETTINGS, shard_rows=100)
    killed, is_done = [], threading.Event()

    def kill():
        for step in ("_build", "_join"):
            while not is_done.is_set():
                found = workers(step)
                if found:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(found[0], signal.SIGKILL)
                        killed.append(step)
                    break
                time.sleep(0.001)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        dedup_files([path], tmp_path / "out", SETTINGS, shard_rows=100, runner=runner)
    finally:
        is_done.set()
        killer.join()
    assert tables_of(tmp_path / "out") == tables_of(tmp_path / "whole")
    assert killed == ["_build", "_join"]


def dies(folder, number, *, advance):
    """A step whose process dies, the third always."""
    tries = len(list(folder.glob(f"{number} *")))
    (folder / f"{number} {tries}").touch()
    if not tries or number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * 10


def test_a_step_that_kills_its_worker(tmp_path, runner):
    assert runner.each(dies, (tmp_path,), [(1,), (2,)], [1, 1], UNSEEN) == [10, 20]
    with pytest.raises(RuntimeError, match=rf"a step \(dies\) was lost {RETRIES + 1} times"):
        runner.each(dies, (tmp_path,), [(3,)], [1], UNSEEN)
    assert len(list(tmp_path.glob("3 *"))) == RETRIES + 1


def fails(folder, number, *, advance):
    if number == 0:
        while not (folder / "1").exists():
            time.sleep(0.01)
        raise FileNotFoundError(2, "no such thing", "thing")
    (folder / f"{number}").touch()
    time.sleep(600)


def test_where_one_fails_the_others_are_ended(tmp_path, runner):
    with pytest.raises(FileNotFoundError, match="no such thing") as error:
        runner.each(fails, (tmp_path,), [(i,) for i in range(9)], [1] * 9, UNSEEN)
    assert error.value.filename == "thing"
    wait(lambda: not workers("fails"))
    assert len(list(tmp_path.iterdir())) <= 2  # the others had not begun


COMMAND = """
import os, sys
os.environ["OF_A_DRIVER"] = str(os.getpid())
from hnsw_gpu.cli import main
main(sys.argv[1:])
"""


COMMANDS = {
    "build": ["build", "--M", "8", "--shard-rows", "10"],  # many: it is to be met before its end
    "dedup": ["dedup", "--threshold", "0.97", "--method", "hnsw", "--shard-rows", "80"],
}


def begun(name, path, out):
    arguments = [*COMMANDS[name], path, "-o", out, "--ef-construction", "40", "--ray", "local"]
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(name, path, out, step, how, code):
    """End a driver once a step is there, see its Ray end too, and return what was told."""
    driver = begun(name, path, out)
    wait(lambda: list(out.rglob(f"{step}*")) or driver.poll() is not None)
    assert of_ray(driver.pid)
    driver.send_signal(how)
    _, told = driver.communicate(timeout=60)
    assert driver.returncode == code, told
    wait(lambda: not of_ray(driver.pid))
    return told


@pytest.mark.slow
def test_interrupted_and_killed_drivers_leave_no_ray_and_go_on(tmp_path, path, runner):
    docs, out = tmp_path / "docs", tmp_path / "out"
    told = ended("build", path, docs, "shard-0001", signal.SIGINT, 130)
    assert re.search(r"\d+ shards built: the same command goes on", told)
    shards = {file: file.stat().st_mtime_ns for file in docs.glob("shard-*.hnsw")}
    assert shards
    build_collection([path], docs, shard_rows=10, runner=runner, **HOW)
    assert shards == {file: file.stat().st_mtime_ns for file in shards}
    build_collection([path], tmp_path / "here", shard_rows=10, **HOW)
    assert files_of(docs) == files_of(tmp_path / "here")
    ended("dedup", path, out, "block-0000", signal.SIGKILL, -signal.SIGKILL)
    times = {file: file.stat().st_mtime_ns for file in (out / WORK).glob("[sb]*.safetensors")}
    assert 10 < len(times) < 66
    with pytest.raises(KeyboardInterrupt):
        again = Until(runner, "_conclude")
        dedup_files([path], out, SETTINGS, shard_rows=80, runner=again)
    assert times == {file: file.stat().st_mtime_ns for file in times}
    dedup_files([path], out, SETTINGS, shard_rows=80, runner=runner)
    dedup_files([path], tmp_path / "whole", SETTINGS, shard_rows=80)
    assert tables_of(out) == tables_of(tmp_path / "whole")


# ---------------------------------------------------------------- bad input, progress


def test_errors_are_those_of_one_machine(tmp_path, path, runner):
    rows, ids = ROWS.copy(), IDS.copy()
    rows[333, 4] = np.nan
    np.save(tmp_path / "bad.npy", rows)
    ids[700] = ids[20]
    table = pyarrow.table({"embedding": list(ROWS), "id": ids})
    parquet.write_table(table, tmp_path / "twice.parquet")
    expected = rf"column 'id': {ids[20]} is in .*twice.parquet, row 20 .*, and in .*row 700 "
    for who in (HERE, runner):
        with pytest.raises(ValueError, match=r"bad.npy, row 333: NaN"):
            build_collection(
                [tmp_path / "bad.npy"], tmp_path / "a", shard_rows=200, runner=who, **HOW
            )
        with pytest.raises(ValueError, match=r"bad.npy, row 333: NaN"):
            dedup_files(
                [tmp_path / "bad.npy"], tmp_path / "b", SETTINGS, shard_rows=200, runner=who
            )
        with pytest.raises(ValueError, match=expected):
            build_collection(
                [tmp_path / "twice.parquet"], tmp_path / "c", shard_rows=200, id_column="id",
                runner=who, **HOW,
            )  # fmt: skip
        with pytest.raises(ValueError, match="no column 'name'"):
            dedup_files([path], tmp_path / "d", SETTINGS, id_column="name", runner=who)
        assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()


def _sees(sources, *, advance):
    return len(sources)


def test_a_file_that_a_node_sees_otherwise(path, runner):
    opened = in_files.open_sources([path])
    assert runner.each(_sees, (opened,), [()], [1], UNSEEN) == [800]
    parquet.write_table(parquet.read_table(path).slice(1), path)
    with pytest.raises(ValueError, match=r"rows.parquet was changed while it was read"):
        runner.each(_sees, (opened,), [()], [1], UNSEEN)


def _step(work, name, *, advance):
    work.do_once(name, lambda: {"a": np.arange(3)})


def test_a_folder_that_a_node_sees_otherwise(tmp_path, runner):
    """One of its own, as where every machine has a disk of that name."""
    work = Checkpoints(LocalFolder(tmp_path / "work"), "a test", "step-[0-9]")
    work.begin({"seed": 0})
    runner.each(_step, (work,), [("step-0",)], [1], UNSEEN)
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    theirs = Checkpoints(LocalFolder(tmp_path / "work"), "a test", "step-[0-9]")
    for begin in (lambda: None, lambda: theirs.begin({"seed": 1})):  # none, or another run
        begin()
        with pytest.raises(ValueError, match=f"{socket.gethostname()} is not the folder of this"):
            runner.each(_step, (work,), [("step-1",)], [1], UNSEEN)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"threads": 3}, "threads=3: no node of the Ray cluster has more than 2"),
        ({"gpus": 1}, "gpus=1: no node of the Ray cluster has more than 0"),
        ({"threads": 0}, "threads=0"),
        ({"address": "nowhere"}, "address='nowhere': expected 'HOST:PORT'"),
    ],
)
def test_what_no_node_has(how, words):
    with pytest.raises(ValueError, match=words), steps_on_ray(**how):
        pass


def test_another_release_on_a_node():
    with pytest.raises(RuntimeError, match=r"a node .* has hnsw_gpu .*, the driver 9.9"):
        _do(("9.9", b"not looked at"))


@pytest.mark.parametrize("where", ["here", "ray"])
def test_progress(tmp_path, path, runner, monkeypatch, where):
    """A bar of the rows that are done, of each stage; here it moves within a step too."""
    runner, bars = HERE if where == "here" else runner, []

    @contextlib.contextmanager
    def bar(is_shown, total, text, unit="rows"):
        class Shown:
            n, moves = 0, 0

            def update(self, count):
                self.n += count
                self.moves += 1

        shown = Shown()
        yield shown
        bars.append([text, total, unit, shown.n])
        assert shown.moves > 3 or where == "ray"

    monkeypatch.setattr("hnsw_gpu.collection.building.bar", bar)
    monkeypatch.setattr("hnsw_gpu.deduplication.shard_steps.bar", bar)
    build_collection([path], tmp_path / "docs", shard_rows=300, runner=runner, **HOW)
    dedup_files([path], tmp_path / "out", SETTINGS, shard_rows=400, runner=runner)
    nodes = len(np.unique(ROWS, axis=0))
    home = len(np.unique(ROWS[:400], axis=0))
    joined = home + 2 * (nodes - home)
    assert bars == [
        ["build 3 shards", 800, "rows", 800],
        ["build 2 shards", 800, "rows", 800],
        ["join 3 blocks", joined, "rows", joined],
    ]
