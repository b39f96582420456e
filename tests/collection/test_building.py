"""`hnsw-gpu build --shard-rows`: shards as `Index` makes them, from any files, after any end."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import oracle
import pytest
from click.testing import CliRunner
from collections_of import make
from processes import most_memory

import hnsw_gpu
from hnsw_gpu import cli
from hnsw_gpu.collection.building import WORK, build_collection
from hnsw_gpu.collection.manifest import MANIFEST
from hnsw_gpu.files import checkpoints, folders, storage

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

RNG = np.random.default_rng(1)
ROWS = RNG.normal(size=(700, 10)).astype(np.float32)
IDS = RNG.permutation(10_000)[:700]


class Killed(BaseException):
    """The end of a process."""


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.main, ["build", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def paths(tmp_path):
    """The rows in files of three kinds, whose bounds are not those of shards."""
    folder = tmp_path / "in"
    folder.mkdir()
    columns = {"vec": list(ROWS[:250]), "id": IDS[:250]}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=77)
    columns = {"vec": list(ROWS[250:600].astype(np.float64)), "id": IDS[250:600].astype(np.uint32)}
    with pyarrow.ipc.new_file(folder / "b.arrow", pyarrow.table(columns).schema) as file:
        file.write_table(pyarrow.table(columns))
    columns = {"id": IDS[600:].astype(np.int32), "vec": list(ROWS[600:])}
    parquet.write_table(pyarrow.table(columns), folder / "c.parquet")
    return sorted(folder.iterdir())


def test_shards_are_indexes_of_their_rows(tmp_path, paths):
    how = {"metric": "l2", "M": 8, "ef_construction": 40, "seed": 3, "dtype": "int8"}
    for name, shards, rows in (("one", 1, 700), ("four", 4, 175)):
        options = [f"--{key.replace('_', '-')}={value}" for key, value in how.items()]
        told = run(
            *(tmp_path / "in", "-o", tmp_path / name, "--shard-rows", rows, "--column", "vec"),
            *("--id-column", "id", *options),
        )
        assert f"700 vectors of 10 in {shards} shard" in told
        make(tmp_path / "expected", ROWS, IDS, shards=shards, **how)
        assert files_of(tmp_path / name) == files_of(tmp_path / "expected")
        (tmp_path / "expected").rename(tmp_path / f"expected of {name}")
    opened = hnsw_gpu.load(tmp_path / "four")
    assert (opened.labels == np.sort(IDS)).all()
    assert (opened.exact_search(ROWS[:50], 1).labels[:, 0] == IDS[:50]).mean() > 0.9  # int8


def test_arrays_have_row_numbers_as_labels(tmp_path):
    np.save(tmp_path / "a.npy", ROWS[:300])
    ROWS[300:].tofile(tmp_path / "b.fbin")
    whole = (tmp_path / "b.fbin").read_bytes()
    (tmp_path / "b.fbin").write_bytes(np.array([400, 10], np.uint32).tobytes() + whole)
    run(tmp_path / "a.npy", tmp_path / "b.fbin", "-o", tmp_path / "c", "--shard-rows", 256)
    opened = hnsw_gpu.load(tmp_path / "c")
    truth = oracle.distances(ROWS[::7], ROWS, "cosine")
    assert (opened.exact_search(ROWS[::7], 5).labels == oracle.nearest(truth, 5)[0]).all()
    assert oracle.recall(opened.search(ROWS[::7], 5).labels, truth, 5) == 1.0
    assert sorted(files_of(tmp_path / "c")) == [MANIFEST, *(f"shard-000{s}.hnsw" for s in range(3))]


def test_no_rows_make_an_empty_shard(tmp_path):
    np.save(tmp_path / "a.npy", ROWS[:0])
    run(tmp_path / "a.npy", "-o", tmp_path / "c", "--shard-rows", 256)
    opened = hnsw_gpu.load(tmp_path / "c")
    assert (len(opened), opened.search(ROWS[:2], 1).labels.tolist()) == (0, [[-1], [-1]])


@pytest.mark.parametrize("step", range(6))
def test_ended_anywhere_it_goes_on(tmp_path, paths, monkeypatch, step):
    """The process ends at the n-th file that it would write; then once more, to the end."""
    how = {"shard_rows": 200, "column": "vec", "id_column": "id"}
    build_collection(paths, tmp_path / "whole", **how)
    written, atomic_file = [], storage.atomic_file

    def ending(path):
        written.append(path)
        if len(written) == step + 1:
            raise Killed
        return atomic_file(path)

    with monkeypatch.context() as patched:
        for module in (storage, folders):
            patched.setattr(module, "atomic_file", ending)
        with pytest.raises(Killed):
            build_collection(paths, tmp_path / "out", **how)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    assert len(done) == max(step - 1, 0)
    if step:
        with pytest.raises(IsADirectoryError, match="whose build is not finished"):
            hnsw_gpu.load(tmp_path / "out")
    build_collection(paths, tmp_path / "out", **how)
    assert done == {path: path.stat().st_mtime_ns for path in done}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_ended_before_the_work_folder_was_removed_it_goes_on(tmp_path, paths, monkeypatch):
    how = {"shard_rows": 200, "column": "vec"}
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Checkpoints, "remove", lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build_collection(paths, tmp_path / "out", **how)
    assert len(hnsw_gpu.load(tmp_path / "out")) == 700
    whole = files_of(tmp_path / "out")
    build_collection(paths, tmp_path / "out", **how)
    assert files_of(tmp_path / "out").items() < whole.items()
    assert not (tmp_path / "out" / WORK).exists()


@pytest.mark.slow
def test_killed_for_good_it_goes_on(tmp_path, paths):
    """A process killed by the system in the middle of writing its third shard."""
    program = """
import os, signal, sys
from contextlib import contextmanager
from hnsw_gpu.files import storage
from hnsw_gpu.cli import main
atomic = storage.atomic_file
@contextmanager
def watched(path):
    with atomic(path) as file:
        if "shard-0002" in str(path):
            file.write(b"some of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        yield file
storage.atomic_file = watched
main(sys.argv[1:])
"""
    arguments = [*map(str, paths), "--shard-rows", "150", "--column", "vec", "--id-column", "id"]
    command = [sys.executable, "-c", program, "build", *arguments, "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "out").glob("shard-*"))) == 2
    assert len(list((tmp_path / "out").glob(".shard-*"))) == 1  # what was being written
    run(*arguments, "-o", tmp_path / "out")
    run(*arguments, "-o", tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_interrupted_it_says_how_far_it_came(tmp_path, paths, monkeypatch):
    save = hnsw_gpu.Index.save

    def interrupted(index, path):
        if "0001" in str(path):
            raise KeyboardInterrupt
        save(index, path)

    monkeypatch.setattr(hnsw_gpu.Index, "save", interrupted)
    command = (*paths, "-o", tmp_path / "out", "--shard-rows", 300, "--column", "vec")
    assert "1 shards built: the same command goes on from there" in run(*command, code=130)


def test_a_full_disk_is_an_error_and_goes_on(tmp_path, paths):
    """A limit on the size of a file stands for it."""
    arguments = [*map(str, paths), "--shard-rows", "300", "--column", "vec"]
    program = """
import resource, signal, sys
from hnsw_gpu.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, "build", *arguments, "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    run(*arguments, "-o", tmp_path / "out")
    run(*arguments, "-o", tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_one_shard(tmp_path):
    """Twenty shards, 400 MB as float32, take what four take."""
    distinct, most = RNG.normal(size=(500, 512)).astype(np.float16), {}
    for shards in (4, 20):
        rows = distinct[RNG.integers(len(distinct), size=10_000 * shards)]
        lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), 512)
        table = pyarrow.table({"embedding": lists, "id": np.arange(len(rows))})
        path = tmp_path / f"{shards}.parquet"
        parquet.write_table(table, path, row_group_size=5000, compression="none")
        how = ["--shard-rows", 10_000, "--id-column", "id", "--M", 4]
        most[shards] = most_memory("build", path, "-o", tmp_path / "out", *how)
        assert len(hnsw_gpu.load(tmp_path / "out")) == len(rows)
        (tmp_path / "out").rename(tmp_path / f"out of {shards}")
    assert most[20] < most[4] + (100 << 20)  # of 330 MB more


@pytest.fixture
def begun(tmp_path, paths, monkeypatch):
    """A build that ended after its first shard."""

    def ended(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(hnsw_gpu.collection.building, "write_manifest", ended)
        with pytest.raises(Killed):
            build_collection(paths, tmp_path / "out", shard_rows=300, column="vec")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--shard-rows", "200"], "shard_rows was 300, is 200"),
        (["--shard-rows", "300", "--M", "8"], "M was 16, is 8"),
        (["--shard-rows", "300", "--metric", "l2"], "metric was 'cosine', is 'l2'"),
        (["--shard-rows", "300", "--id-column", "id"], "id_column was None, is 'id'"),
    ],
)
def test_a_folder_of_another_run(begun, paths, change, words):
    before = files_of(begun)
    told = run(*paths, "-o", begun, "--column", "vec", *change, code=1)
    assert words in told and "delete the folder to begin anew" in told
    assert files_of(begun) == before
    told = run(*paths[:2], "-o", begun, "--column", "vec", "--shard-rows", "300", code=1)
    assert "of other files" in told
    parquet.write_table(pyarrow.table({"vec": list(ROWS[:9])}), paths[2])
    told = run(*paths, "-o", begun, "--column", "vec", "--shard-rows", "300", code=1)
    assert "c.parquet has changed since" in told


def test_a_shard_that_was_damaged_meanwhile(begun, paths):
    shard = begun / "shard-0001.hnsw"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # of the links or the vectors
    shard.write_bytes(content)
    command = [*paths, "-o", begun, "--column", "vec", "--shard-rows", "300"]
    told = run(*command, code=1)
    assert "shard-0001.hnsw: array" in told and "is damaged" in told
    assert "delete it, and the same command" in told
    shard.unlink()
    run(*command)
    assert len(hnsw_gpu.load(begun)) == len(ROWS)


def test_a_shard_that_belongs_elsewhere(begun, paths):
    (begun / "shard-0001.hnsw").write_bytes((begun / "shard-0000.hnsw").read_bytes())
    told = run(*paths, "-o", begun, "--column", "vec", "--shard-rows", "300", code=1)
    assert "shard-0001.hnsw: is not the shard that belongs there" in told
    (begun / "shard-0001.hnsw").write_bytes(b"x" * 100)
    told = run(*paths, "-o", begun, "--column", "vec", "--shard-rows", "300", code=1)
    assert "shard-0001.hnsw: truncated, or not a saved index" in told


def test_what_is_not_ours_is_left(tmp_path, paths):
    command = (*paths, "-o", tmp_path / "out", "--shard-rows", 300, "--column", "vec")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds notes.txt: a collection is built in a folder of its own" in run(*command, code=1)
    (tmp_path / "out" / "notes.txt").rename(tmp_path / "file")
    run(*command)
    before = files_of(tmp_path / "out")
    assert "holds manifest.json" in run(*command, code=1)
    assert files_of(tmp_path / "out") == before
    told = run(*paths, "-o", tmp_path / "file", "--shard-rows", 300, "--column", "vec", code=1)
    assert str(tmp_path / "file") in told and (tmp_path / "file").read_text() == "mine"
    with storage_held(folders.LocalFolder(tmp_path / "out")):
        assert "another job writes into this folder" in run(*command, code=1)


def storage_held(folder):
    from hnsw_gpu.files import held

    return held(folder)


def test_ids_that_are_strings(tmp_path):
    """The same bytes as of shards that were given them; opened without all labels at once."""
    names = [f"{i:020d} \u00e4" for i in IDS]
    table = pyarrow.table({"vec": list(ROWS), "id": pyarrow.array(names).dictionary_encode()})
    parquet.write_table(table, tmp_path / "a.parquet")
    command = (tmp_path / "a.parquet", "-o", tmp_path / "out", "--shard-rows", 350)
    run(*command, "--column", "vec", "--id-column", "id", "--M", 4)
    make(tmp_path / "expected", ROWS, names, shards=2, M=4)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    opened = hnsw_gpu.load(tmp_path / "out")
    assert opened.labels.tolist() == sorted(names)
    assert opened.exact_search(ROWS[:50], 1).labels[:, 0].tolist() == names[:50]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ([5, 6, 5, 7], ": 5 is in {0}, row 0 (row group 0), and in {0}, row 2 (row group 0)"),
        ([5, None, 6, 7], "row 1 (row group 0): null in column 'id'"),
        ([5, -6, 8, 7], "column 'id': label -6, expected 0 or more"),
        ([5.5, 6, 8, 7], "column 'id' is double: labels are integers or strings"),
        (["a", "b", "c", "a"], "'a' is in {0}, row 0 (row group 0), and in {0}, row 3 (row"),
        (["a", "b", "b", "c"], "'b' is in {0}, row 1 (row group 0), and in {0}, row 2 (row"),
        (["a", None, "b", "c"], "row 1 (row group 0): null in column 'id'"),
        (["a", "b", "c", ""], "row 3 (row group 0): column 'id': empty strings"),
        (np.array([1, 2, 3, 2**63], np.uint64), "column 'id': labels beyond int64"),
    ],
)
def test_ids_that_are_no_labels(tmp_path, column, words):
    table = pyarrow.table({"embedding": list(ROWS[:4]), "id": column})
    parquet.write_table(table, tmp_path / "a.parquet")
    command = (tmp_path / "a.parquet", "-o", tmp_path / "out", "--shard-rows", 3)
    told = run(*command, "--id-column", "id", code=1)
    assert words.format(tmp_path / "a.parquet") in " ".join(told.split())
    assert not (tmp_path / "out").exists()
    assert "no column 'name'" in run(*command, "--id-column", "name", code=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_rows_that_are_no_vectors_are_named(tmp_path, bad):
    rows = ROWS[:500].copy()
    rows[403] = bad
    np.save(tmp_path / "a.npy", rows[:200])
    np.save(tmp_path / "b.npy", rows[200:])
    told = run(
        *(tmp_path / "a.npy", tmp_path / "b.npy", "-o", tmp_path / "out", "--shard-rows", 150),
        code=1,
    )
    assert f"{tmp_path / 'b.npy'}, row 203: " in told


def test_an_input_that_changes_meanwhile(tmp_path, paths, monkeypatch):
    save = hnsw_gpu.Index.save

    def changing(index, path):
        save(index, path)
        os.utime(paths[1], ns=(1, 1))

    monkeypatch.setattr(hnsw_gpu.Index, "save", changing)
    command = (*paths, "-o", tmp_path / "out", "--shard-rows", 100, "--column", "vec")
    assert "b.arrow was changed while it was read" in run(*command, code=1)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_one_index_of_any_files(paths, tmp_path):
    """As `Index.add` makes it, of the same rows and labels."""
    how = ("--M", 8, "--ef-construction", 40)
    run(*paths, "-o", tmp_path / "all.hnsw", "--column", "vec", "--id-column", "id", *how)
    expected = hnsw_gpu.Index(10, M=8, ef_construction=40)
    expected.add(ROWS, IDS)
    expected.save(tmp_path / "expected.hnsw")
    built = (tmp_path / "all.hnsw").read_bytes()
    assert built == (tmp_path / "expected.hnsw").read_bytes()
    np.save(tmp_path / "a.npy", ROWS)
    run(tmp_path / "a.npy", "-o", tmp_path / "one.hnsw", *how)
    one = hnsw_gpu.load(tmp_path / "one.hnsw")
    assert one.labels.tolist() == list(range(len(ROWS)))
    said = run(tmp_path / "a.npy", "-o", tmp_path / "x.hnsw", "--id-column", "id", code=1)
    assert "a.npy: no column 'id' beside the vectors: none" in said
    assert not (tmp_path / "x.hnsw").exists()
    (tmp_path / "x.npz").write_bytes(b"of an earlier run")  # beside its inputs, which are a folder
    run(tmp_path, "-o", tmp_path / "x.npz", "--column", "vec", *how)
    assert len(hnsw_gpu.load(tmp_path / "x.npz")) == 2 * len(ROWS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.npy", "-o", "c.hnsw", "--ray", "local"], "--ray and a URL need --shard-rows"),
        (
            ["a.npy", "-o", "c.hnsw", "--id-column", "id", "--labels", "a.npy"],
            "--labels, --id-column: expected one of the two",
        ),
        (["a.npy", "-o", "c", "--shard-rows", "9", "--labels", "a.npy"], "takes --id-column"),
        (["a.npy", "-o", "c", "--shard-rows", "0"], "0 is not in the range"),
        (["a.npy", "-o", "."], "is a directory"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", ROWS)
    assert words in " ".join(run(*arguments, code=2).split())
    assert os.listdir() == ["a.npy"]


def test_the_plan_names_what_decides(begun):
    plan = json.loads((begun / WORK / "plan.json").read_text())
    assert (plan["made_by"], plan["shard_rows"], plan["column"]) == ("hnsw-gpu build", 300, "vec")
    assert [os.path.basename(file["path"]) for file in plan["files"]] == [
        "a.parquet", "b.arrow", "c.parquet",
    ]  # fmt: skip
