"""Deduplication of files among files that are not its own, and resumed with other parameters."""

import json
import os

import numpy as np
import pytest
from click.testing import CliRunner

from hnsw_gpu import cli
from hnsw_gpu.deduplication import in_files
from hnsw_gpu.deduplication.checkpoints import WORK
from hnsw_gpu.deduplication.shard_steps import ResumableSteps
from hnsw_gpu.demo import walkthrough
from hnsw_gpu.files.checkpoints import PLAN

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

RESULTS = ("duplicates.parquet", "pairs.parquet", "kept.parquet", "report.json", "report.html")


def told(*arguments, code=0) -> str:
    result = CliRunner().invoke(cli.main, ["dedup", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def rows():
    """300 rows that are no near-duplicates of each other."""
    return np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)


@pytest.fixture
def path(tmp_path, rows):
    """A table whose column "embedding" has 300 distinct rows, and "other" 200."""
    other = rows.copy()
    other[200:] = other[:100]
    columns = {"embedding": list(rows), "other": list(other)}
    columns |= {"id": [f"a{i}" for i in range(300)], "text": ["words"] * 300}
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


@pytest.fixture
def ended_early(monkeypatch):
    """A run that ends after its shards were built."""

    def run(*arguments):
        def stop(*_):
            raise ValueError("stopped")

        with monkeypatch.context() as patched:
            patched.setattr(ResumableSteps, "join", stop)
            assert "stopped" in told(*arguments, code=1)

    return run


# ---------------------------------------------------------------- files that are not ours


@pytest.mark.parametrize("name", ["work", "shards", "tmp"])
def test_folders_of_the_user_stay(tmp_path, path, name) -> None:
    mine = tmp_path / "out" / name
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("ten years")
    (mine / "plan.json").write_text("{}")
    before = contents(mine)
    told(path, "-o", tmp_path / "out")
    assert contents(mine) == before
    assert not (tmp_path / "out" / WORK).exists()


@pytest.mark.parametrize("plan", [None, "{}", "[1]", "not json", '{"version": "0.1.0"}'])
def test_a_folder_of_our_name_without_our_plan_is_refused(tmp_path, path, plan) -> None:
    foreign = tmp_path / "out" / WORK
    foreign.mkdir(parents=True)
    (foreign / "shard-0000.safetensors").write_text("not ours")
    if plan is not None:
        (foreign / PLAN).write_text(plan)
    before = contents(tmp_path / "out")
    said = told(path, "-o", tmp_path / "out", code=1)
    assert f"{foreign} is there, and no plan of hnsw-gpu dedup in it" in said
    assert contents(tmp_path / "out") == before


def test_what_else_lies_in_our_folder_stays(tmp_path, path, ended_early) -> None:
    out = tmp_path / "out"
    ended_early(path, "-o", out)
    (out / WORK / "notes.txt").write_text("mine")
    (out / WORK / "folder").mkdir()
    (out / WORK / "folder" / "shard-0000.safetensors").write_text("mine")
    told(path, "-o", out)
    left = {str(name) for name in contents(out / WORK)}
    assert left == {"notes.txt", os.path.join("folder", "shard-0000.safetensors")}


def test_a_folder_in_which_only_a_kill_left_something_is_ours(tmp_path, path) -> None:
    work = tmp_path / "out" / WORK
    work.mkdir(parents=True)
    (work / f".{PLAN}.0123456789abcdef.tmp").write_text("{")
    told(path, "-o", tmp_path / "out")
    assert not work.exists()


def test_a_link_is_not_followed_to_be_emptied(tmp_path, path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "shard-0000.safetensors").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WORK).symlink_to(elsewhere)
    assert "no plan of hnsw-gpu dedup" in told(path, "-o", tmp_path / "out", code=1)
    assert contents(elsewhere).values() and (elsewhere / "shard-0000.safetensors").exists()


@pytest.mark.parametrize("name", RESULTS)
def test_files_of_the_user_are_not_overwritten(tmp_path, path, name) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"kept": "mine"}')
    before = contents(out)
    said = told(path, "-o", out, code=1)
    assert f"{out / name} is there, and no report.json of hnsw-gpu dedup beside it" in said
    assert contents(out) == before


def test_our_own_results_are_overwritten(tmp_path, path) -> None:
    out = tmp_path / "out"
    assert "300 of 300 rows kept" in told(path, "-o", out)
    assert "200 of 300 rows kept" in told(path, "-o", out, "--column", "other")


@pytest.mark.parametrize("which", ["read", "against"])
def test_an_input_is_not_overwritten(tmp_path, path, which) -> None:
    out = tmp_path / "out"
    told(path, "-o", out, "--write-kept")
    before = contents(out)
    inputs = (
        (out / "kept.parquet",) if which == "read" else (path, "--against", out / "kept.parquet")
    )
    said = told(*inputs, "-o", out, code=1)
    assert f"{out / 'kept.parquet'} is an input: it would be overwritten" in said
    assert contents(out) == before


def test_into_the_folder_that_is_read(tmp_path, path, ended_early) -> None:
    """Neither shards nor results become input of the next run without a word."""
    ended_early(tmp_path, "-o", tmp_path, "--shard-rows", 100)
    assert "300 of 300 rows kept" in told(tmp_path, "-o", tmp_path, "--shard-rows", 100)
    for name in ("duplicates.parquet", "pairs.parquet"):  # have no column of vectors
        (tmp_path / name).unlink()
    parquet.write_table(parquet.read_table(path), tmp_path / "kept.parquet")
    said = told(tmp_path, "-o", tmp_path, code=1)
    assert f"{tmp_path / 'kept.parquet'} is an input: it would be overwritten" in said


@pytest.mark.parametrize("name", list(walkthrough.FILES.values()))
def test_the_demo_overwrites_only_its_own(tmp_path, name) -> None:
    paths = {what: tmp_path / file for what, file in walkthrough.FILES.items()}
    walkthrough.require_ours(paths)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} is there, and not from hnsw-gpu demo"):
        walkthrough.require_ours(paths)
    walkthrough.write_figures(paths["figures"], {"k": 10})
    walkthrough.require_ours(paths)


# ---------------------------------------------------------------- resumed with other parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--column", "other"], "column was 'embedding', is 'other'"),
        (["--id-column", "id"], "id_column was None, is 'id'"),
        (["--text-column", "text"], "text_column was None, is 'text'"),
        (["--write-kept"], "write_kept was False, is True"),
        (["--keep", "last"], "keep was 'first', is 'last'"),
        (["--linkage", "components"], "linkage was 'star', is 'components'"),
        (["--on-invalid", "drop"], "on_invalid was 'raise', is 'drop'"),
        (["--threshold", "0.5"], "threshold was None, is 0.5"),
        (["--method", "exact"], "method was 'auto', is 'exact'"),
        (["--shard-rows", "100"], "shard_rows was 300, is 100"),
        (["--seed", "1"], "seed was 0, is 1"),
    ],
)
def test_what_decides_the_result_decides_resuming(
    tmp_path, path, ended_early, arguments, message
) -> None:
    out = tmp_path / "out"
    ended_early(path, "-o", out)
    assert f"{message}; delete the folder to begin anew" in told(
        path, "-o", out, *arguments, code=1
    )
    assert "300 of 300 rows kept" in told(path, "-o", out)


def test_another_tensor_is_another_input(tmp_path, rows, ended_early) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    file = tmp_path / "in.safetensors"
    halves = rows.copy()
    halves[150:] = halves[:150]
    numpy_files.save_file({"a": halves, "b": rows}, file)
    ended_early(file, "-o", tmp_path / "out", "--column", "a")
    assert "column was 'a', is 'b'" in told(file, "-o", tmp_path / "out", "--column", "b", code=1)


@pytest.mark.parametrize("part", ["version", "format"])
def test_another_release_does_not_go_on(tmp_path, path, ended_early, part, monkeypatch) -> None:
    ended_early(path, "-o", tmp_path / "out")
    if part == "version":
        monkeypatch.setattr(in_files.hnsw_gpu, "__version__", "99.0")
    else:
        monkeypatch.setattr(in_files, "FORMAT_VERSION", 99)
    assert f"{part} was" in told(path, "-o", tmp_path / "out", code=1)


def test_a_plan_of_an_older_release_is_another_plan(tmp_path, path, ended_early) -> None:
    ended_early(path, "-o", tmp_path / "out")
    plan = tmp_path / "out" / WORK / PLAN
    there = json.loads(plan.read_text())
    del there["column"]
    plan.write_text(json.dumps(there))
    assert "of another release" in told(path, "-o", tmp_path / "out", code=1)


# ---------------------------------------------------------------- inputs that change meanwhile


@pytest.mark.parametrize("kind", ["in place", "replaced", "cut"])
def test_an_input_that_changes_meanwhile(tmp_path, rows, kind, monkeypatch) -> None:
    file = tmp_path / "in.npy"
    np.save(file, rows)
    join = ResumableSteps.join

    def join_all(self):
        if kind == "in place":
            with file.open("r+b") as opened:
                opened.seek(200)
                opened.write(b"\0" * 64)
        elif kind == "cut":
            os.truncate(file, 1000)
        else:
            np.save(tmp_path / "new.npy", -rows)
            os.replace(tmp_path / "new.npy", file)
        os.utime(file, ns=(1, 1))  # of whatever time: clocks may be coarse
        return join(self)

    monkeypatch.setattr(ResumableSteps, "join", join_all)
    said = told(file, "-o", tmp_path / "out", code=1)
    assert f"{file} was changed while it was read: run the command again" in said
    assert not (tmp_path / "out" / "kept.parquet").exists()


# ---------------------------------------------------------------- folders within folders, two jobs


def test_an_output_folder_in_the_folder_that_is_read(tmp_path, path, ended_early) -> None:
    """Neither what a killed run left there, nor what one that ended wrote, is read."""
    out = tmp_path / "unique"
    how = (tmp_path, "-o", out, "--write-kept")
    ended_early(*how)
    for name in RESULTS:  # as if killed while it wrote
        parquet.write_table(parquet.read_table(path), out / name)
    assert "300 of 300 rows kept" in told(*how)
    assert "300 of 300 rows kept" in told(*how)


def test_results_of_a_killed_run_in_the_folder_that_is_read(tmp_path, path, ended_early) -> None:
    ended_early(tmp_path, "-o", tmp_path, "--write-kept")
    for name in ("duplicates.parquet", "kept.parquet"):
        parquet.write_table(parquet.read_table(path), tmp_path / name)
    assert "300 of 300 rows kept" in told(tmp_path, "-o", tmp_path, "--write-kept")
    said = told(tmp_path, "-o", tmp_path, "--write-kept", code=1)
    assert f"{tmp_path / 'duplicates.parquet'} is an input: it would be overwritten" in said


def test_a_folder_within_the_output_folder_is_read(tmp_path, rows) -> None:
    (tmp_path / "out" / "in").mkdir(parents=True)
    np.save(tmp_path / "out" / "in" / "a.npy", rows)
    assert "300 of 300 rows kept" in told(tmp_path / "out" / "in", "-o", tmp_path / "out")


def test_two_jobs_in_one_folder(tmp_path, path, monkeypatch) -> None:
    pytest.importorskip("fcntl")
    out, said = tmp_path / "out", []
    join = ResumableSteps.join

    def join_all(self):
        monkeypatch.setattr(ResumableSteps, "join", join)
        before = contents(out)
        said.append(told(path, "-o", out, code=1))
        assert contents(out) == before
        return join(self)

    monkeypatch.setattr(ResumableSteps, "join", join_all)
    assert "300 of 300 rows kept" in told(path, "-o", out)
    assert f"{out}: another job writes into this folder" in said[0]
    assert "300 of 300 rows kept" in told(path, "-o", out)


def test_a_plan_cut_short_is_said(tmp_path, path, ended_early) -> None:
    out = tmp_path / "out"
    ended_early(path, "-o", out)
    plan = out / WORK / PLAN
    whole = plan.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        plan.write_bytes(whole[:cut])
        assert f"{out / WORK} is there, and no plan" in told(path, "-o", out, code=1)
    plan.write_text("[" * 100_000)
    assert f"{out / WORK} is there, and no plan" in told(path, "-o", out, code=1)


@pytest.mark.parametrize("limit", ["1e400", "inf", "nan", "-1", "0", "-inf", "G", "4X", "1e400G"])
def test_limits_that_are_no_sizes(tmp_path, path, limit) -> None:
    said = told(path, "-o", tmp_path / "out", f"--memory-limit={limit}", code=2)
    assert f"{limit!r} is no size such as 4G" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed=-1: expected 0 to"),
        (["--seed", str(2**64)], f"seed={2**64}: expected 0 to"),
        (["--M", "0"], "M=0: expected 2 to 128"),
        (["--M", "1", "--method", "hnsw"], "M=1: expected 2 to 128"),
        (["--ef", "0"], "ef=0: expected at least 1"),
        (["--ef-construction", "0"], "ef_construction=0: expected 1 to"),
    ],
)
def test_wrong_parameters_of_the_graph_are_said_before_any_work(
    tmp_path, path, arguments, message
) -> None:
    assert message in told(path, "-o", tmp_path / "out", *arguments, code=1)
    assert not (tmp_path / "out").exists()
