"""dedup of files beside dedup of the same rows in memory; cut in shards, interrupted, resumed."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from processes import most_memory
from test_in_memory import made

from hnsw_gpu import Index, cli, dedup
from hnsw_gpu.deduplication import in_files, report, report_page, tables
from hnsw_gpu.deduplication.checkpoints import WORK
from hnsw_gpu.deduplication.distinct_rows import digest
from hnsw_gpu.deduplication.shard_steps import ResumableSteps
from hnsw_gpu.files import checkpoints, folders, sources, storage

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = made(1200)
TABLES = ("duplicates.parquet", "pairs.parquet", "kept.parquet")


@pytest.fixture
def paths(tmp_path):
    """The rows as two parquet files and a .npy, with ids, texts and lengths."""
    for name, start, stop in (("a", 0, 500), ("b", 500, 900)):
        columns = {
            "id": [f"row {i}" for i in range(start, stop)],
            "text": [f"The text of row {i}." for i in range(start, stop)],
            "length": np.random.default_rng(start).integers(0, 30, stop - start),
            "embedding": list(ROWS[start:stop]),
        }
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet", row_group_size=90)
    np.save(tmp_path / "c.npy", ROWS[900:])
    return [tmp_path / "a.parquet", tmp_path / "b.parquet"]


def run(*arguments) -> str:
    result = CliRunner().invoke(cli.main, ["dedup", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def fails(*arguments) -> str:
    result = CliRunner().invoke(cli.main, ["dedup", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    return result.output


def files_of(out) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


@pytest.mark.parametrize("linkage", ["star", "components", "any-earlier"])
@pytest.mark.parametrize(
    ("method", "shard_rows"), [("exact", 2000), ("exact", 250), ("hnsw", 250), ("hnsw", 700)]
)
def test_as_in_memory(tmp_path, paths, method, shard_rows, linkage) -> None:
    every = [*paths, tmp_path / "c.npy"]
    out = tmp_path / "out"
    told = run(
        *every, "-o", out, "--threshold", 0.97, "--method", method, "--shard-rows", shard_rows,
        "--linkage", linkage, "--threads", 2,
    )  # fmt: skip
    wanted = dedup(ROWS, 0.97, method="exact", linkage=linkage)
    assert f"{wanted.keep.sum():,} of 1,200 rows kept" in told
    assert parquet.read_table(out / "duplicates.parquet").equals(wanted.duplicates)
    assert parquet.read_table(out / "pairs.parquet").equals(wanted.pairs)
    kept = parquet.read_table(out / "kept.parquet")["id"].to_numpy()
    np.testing.assert_array_equal(kept, np.flatnonzero(wanted.keep))
    report = json.loads((out / "report.json").read_text())
    for name in ("rows", "kept", "exact_copies", "near_duplicates", "pairs", "groups", "open_rows"):
        assert report[name] == wanted.report[name]
    assert report["recall"]["recall"] == 1
    assert sum(report["histogram"]["rows"][97:]) == sum(wanted.report["histogram"]["rows"][97:])
    for point in report["curve"]:
        again = wanted.regroup(point["threshold"]).report
        assert point == {"threshold": point["threshold"]} | {
            name: again[name] for name in point if name != "threshold"
        }
    assert not (out / WORK).exists()


def test_ids_texts_and_who_is_kept(tmp_path, paths) -> None:
    out = tmp_path / "out"
    told = ("--id-column", "id", "--text-column", "text", "--threshold", 0.97)
    run(*paths, "-o", out, *told, "--keep", "max:length", "--write-kept", "--shard-rows", 200)
    table = pyarrow.concat_tables([parquet.read_table(path) for path in paths])
    wanted = dedup(ROWS[:900], 0.97, keep=("max", table["length"].to_numpy()), ids=table["id"])
    assert parquet.read_table(out / "duplicates.parquet").equals(wanted.duplicates)
    assert parquet.read_table(out / "pairs.parquet").equals(wanted.pairs)
    assert parquet.read_table(out / "kept.parquet").equals(table.filter(pyarrow.array(wanted.keep)))
    report = json.loads((out / "report.json").read_text())
    assert report["parameters"]["keep"] == "max:length"
    largest = report["largest_groups"][0]
    rows, counts = np.unique(wanted.group, return_counts=True)
    assert largest["size"] == counts.max()
    head = int(largest["id"].split()[1])
    assert counts[rows == head] == counts.max() and largest["text"] == f"The text of row {head}."
    for member in largest["members"]:
        row = int(member["id"].split()[1])
        assert member["text"] == f"The text of row {row}." and wanted.duplicate_of[row] == head
        assert member["similarity"] == pytest.approx(float(wanted.similarity[row]), abs=1e-6)
    assert [group["size"] for group in report["largest_groups"]] == sorted(counts[counts > 1])[
        ::-1
    ][:50]


@pytest.mark.parametrize("kind", ["files", "index"])
@pytest.mark.parametrize("only", [True, False])
def test_against(tmp_path, kind, only) -> None:
    np.save(tmp_path / "ours.npy", ROWS[:700])
    theirs = ROWS[600:] + 0
    if kind == "files":
        np.save(tmp_path / "theirs.npy", theirs)
        path = tmp_path / "theirs.npy"
    else:
        path = tmp_path / "theirs.hnsw"
        index = Index(12)
        index.add(theirs)
        index.save(path)
    out = tmp_path / "out"
    flags = ["--only-against"] if only else []
    run(tmp_path / "ours.npy", "-o", out, "--threshold", 0.97, "--against", path,
        "--shard-rows", 300, "--method", "hnsw", *flags)  # fmt: skip
    wanted = dedup(ROWS[:700], 0.97, against=theirs, itself=not only)
    assert wanted.report["against_duplicates"] > 100
    assert parquet.read_table(out / "duplicates.parquet").equals(wanted.duplicates)
    assert parquet.read_table(out / "kept.parquet")["id"].to_pylist() == list(
        np.flatnonzero(wanted.keep)
    )


def test_the_same_for_any_threads(tmp_path, paths) -> None:
    for threads in (1, 2, 3):
        run(*paths, "-o", tmp_path / str(threads), "--shard-rows", 300, "--method", "hnsw",
            "--threads", threads)  # fmt: skip
        assert files_of(tmp_path / str(threads)) == files_of(tmp_path / "1")


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("step", range(0, 17))
def test_ended_anywhere_it_goes_on(tmp_path, paths, monkeypatch, step) -> None:
    """The process ends at the n-th file that it would write; then once more, to the end."""
    command = (paths, tmp_path / "out", in_files.Settings(threshold=0.97, method="hnsw"))
    in_files.dedup_files(paths, tmp_path / "whole", command[2], shard_rows=300)
    written, atomic_file = [], storage.atomic_file

    def ending(path):
        written.append(path)
        if len(written) == step + 1:
            raise Killed
        return atomic_file(path)

    with monkeypatch.context() as patched:
        for module in (storage, folders, report, report_page, tables):
            patched.setattr(module, "atomic_file", ending)
        if step < 16:
            with pytest.raises(Killed):
                in_files.dedup_files(*command, shard_rows=300)
        else:
            in_files.dedup_files(*command, shard_rows=300)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / WORK).glob("[sb]*")}
    assert len(done) == (min(max(step - 1, 0), 10) if step < 16 else 0)
    opened = []
    monkeypatch.setattr(
        checkpoints,
        "write_arrays",
        lambda path, *rest, write=storage.write_arrays: (opened.append(path), write(path, *rest)),
    )
    in_files.dedup_files(*command, shard_rows=300)
    assert not set(opened) & set(done)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not (tmp_path / "out" / WORK).exists()


@pytest.mark.slow
def test_killed_for_good_it_goes_on(tmp_path, paths) -> None:
    """A process killed by the system as soon as its second shard is there."""
    program = """
import os, signal, sys
from hnsw_gpu.files import checkpoints, storage
from hnsw_gpu.cli import main
atomic = storage.atomic_file
def watched(path):
    if "shard-0002" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return atomic(path)
storage.atomic_file = watched
main(sys.argv[1:])
"""
    arguments = [str(path) for path in paths] + ["--shard-rows", "300", "--method", "hnsw"]
    command = [sys.executable, "-c", program, "dedup", *arguments, "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "out" / WORK).glob("shard-*"))) == 2
    run(*arguments, "-o", tmp_path / "out")
    run(*arguments, "-o", tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_interrupted_it_says_how_far_it_came(tmp_path, paths, monkeypatch) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumableSteps, "join", interrupted)
    result = CliRunner().invoke(cli.main, ["dedup", str(paths[0]), "-o", str(tmp_path / "out")])
    assert result.exit_code == 130
    assert "1 shards built, 0 blocks joined: the same command goes on from there" in result.output


def test_a_work_folder_of_another_run(tmp_path, paths, monkeypatch) -> None:
    def stop(*_):
        raise ValueError("stopped")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(ResumableSteps, "join", stop)
        fails(*paths, "-o", out, "--threshold", 0.97)
    assert "threshold was 0.97, is 0.96; delete" in fails(*paths, "-o", out, "--threshold", 0.96)
    assert "of other files" in fails(paths[0], "-o", out, "--threshold", 0.97)
    before = paths[1].read_bytes()
    parquet.write_table(parquet.read_table(paths[1]).slice(1), paths[1])
    told = fails(*paths, "-o", out, "--threshold", 0.97)
    assert f"{paths[1]} has changed since (checksum" in told
    paths[1].write_bytes(before)
    run(*paths, "-o", out, "--threshold", 0.97)


def test_a_damaged_shard_is_named(tmp_path, paths, monkeypatch) -> None:
    def stop(*_):
        raise ValueError("stopped")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(ResumableSteps, "join", stop)
        fails(*paths, "-o", out, "--shard-rows", 300)
    path = out / WORK / "shard-0001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "shard-0001.safetensors: array" in fails(*paths, "-o", out, "--shard-rows", 300)
    path.unlink()  # what is missing is made again
    run(*paths, "-o", out, "--shard-rows", 300)


def test_bad_rows_are_named_in_their_file(tmp_path) -> None:
    rows = ROWS[:300].copy()
    np.save(tmp_path / "good.npy", rows)
    rows[123, 4] = np.nan
    np.save(tmp_path / "bad.npy", rows)
    both = (tmp_path / "good.npy", tmp_path / "bad.npy")
    told = fails(*both, "-o", tmp_path / "out", "--shard-rows", 200)
    assert f"{tmp_path / 'bad.npy'}, row 123: NaN or infinite values" in told
    assert "599 rows" not in run(*both, "-o", tmp_path / "dropped", "--on-invalid", "drop",
                                 "--shard-rows", 200)  # fmt: skip
    report = json.loads((tmp_path / "dropped" / "report.json").read_text())
    assert report["invalid"] == 1 and report["kept"] <= 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--id-column", "name"], "a.parquet: no column 'name' beside the vectors: 'id', 'text'"),
        (["--text-column", "x"], "a.parquet: no column 'x'"),
        (["--keep", "max:embedding"], "a.parquet: no column 'embedding' beside the vectors"),
        (["--keep", "best"], "expected one of 'first', 'last', 'medoid'"),
        (["--column", "vector"], "a.parquet: no column 'vector'; there are 'id'"),
        (["--memory-limit", "100M"], "a memory limit of 104,857,600 bytes: 900 rows of 12 need at"),
        (["--metric", "l2"], "metric 'l2': say max_distance"),
        (["--linkage", "all"], "expected one of 'star'"),
        (["--method", "fast"], "method='fast': expected one of 'auto', 'exact', 'hnsw'"),
    ],
)
def test_bad_parameters(tmp_path, paths, arguments, message) -> None:
    assert message in fails(*paths, "-o", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()  # refused before any work


def test_a_null_row_is_named_once(tmp_path) -> None:
    """The file names its own bad row; nothing is put before that."""
    rows = [row.tolist() for row in ROWS[:300]]
    rows[250] = None
    column = pyarrow.array(rows, pyarrow.list_(pyarrow.float64()))
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"embedding": column}), path)
    told = fails(path, "-o", tmp_path / "out", "--shard-rows", 200)
    assert f"{path}: column 'embedding': null in row 250 (row group 0)" in told
    assert told.count(str(path)) == 1


def test_a_full_disk_is_an_error(tmp_path, paths) -> None:
    """A limit on the size of a file stands for it: the old result stays whole."""
    arguments = [str(path) for path in paths] + ["-o", str(tmp_path / "out")]
    run(*arguments)
    before = files_of(tmp_path / "out")
    program = """
import resource, signal, sys
from hnsw_gpu.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, "dedup", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert files_of(tmp_path / "out") == before
    run(*arguments)
    assert files_of(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_within_the_limit(tmp_path) -> None:
    """1,230 MB of vectors under a limit of 600 MB: of the process, but for mapped files."""
    dim, blocks = 1024, 6
    distinct = np.random.default_rng(0).normal(size=(1000, dim)).astype(np.float16)
    for place in range(blocks):
        rng = np.random.default_rng(place)
        rows = distinct[rng.integers(len(distinct), size=52_000)]
        values = pyarrow.array(rows.reshape(-1))
        lists = pyarrow.FixedSizeListArray.from_arrays(values, dim)
        parquet.write_table(
            pyarrow.table({"embedding": lists}), tmp_path / f"{place}.parquet",
            row_group_size=20_000, compression="none", use_dictionary=False,
        )  # fmt: skip
    limit = 600 << 20
    files = [str(path) for path in sorted(tmp_path.glob("*.parquet"))]
    most = most_memory(
        "dedup", *files, "-o", tmp_path / "out", "--memory-limit", "600M", "--threshold", "0.99",
        "--method", "hnsw", "--M", "4", "--ef-construction", "16", OPENBLAS_NUM_THREADS="2",
    )  # fmt: skip
    assert sum(os.path.getsize(path) for path in files) * 2 > 2 * limit  # as float32
    assert most < limit
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"] == len(distinct) and report["shards"]["count"] > 3


def test_sizes() -> None:
    for text, size in (("4G", 4 << 30), ("512M", 512 << 20), ("1.5GB", 3 << 29), ("9", 9)):
        assert cli._bytes(None, None, text) == size
    with pytest.raises(Exception, match="'many' is no size"):
        cli._bytes(None, None, "many")


def test_digests_tell_rows_apart() -> None:
    rows = made(300).astype(np.float32)
    _, expected = np.unique(rows, axis=0, return_inverse=True)
    _, found = np.unique(digest(rows), axis=0, return_inverse=True)
    table = np.stack([expected.ravel(), found.ravel()])
    assert len(np.unique(table, axis=1).T) == len(np.unique(expected)) == len(np.unique(found))


def test_a_source_without_rows(tmp_path) -> None:
    np.save(tmp_path / "none.npy", np.empty((0, 4), np.float32))
    run(tmp_path / "none.npy", "-o", tmp_path / "out")
    assert parquet.read_table(tmp_path / "out" / "kept.parquet").num_rows == 0
    assert len(sources.open_sources([tmp_path / "none.npy"])) == 0


def test_without_pyarrow_nothing_is_begun(tmp_path, monkeypatch) -> None:
    np.save(tmp_path / "a.npy", np.eye(4, dtype=np.float32))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'dedup needs pyarrow: pip install "hnsw-gpu\[io\]"'):
        in_files.dedup_files([tmp_path / "a.npy"], tmp_path / "out", in_files.Settings())
    assert not (tmp_path / "out").exists()
