"""The GPU benchmark reports what the engine did: counts, recall and the roofline, recomputed."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import emulator
import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib", reason="the benchmarks draw, which comes with the extra `bench`")
if emulator.missing():
    pytest.skip(emulator.missing(), allow_module_level=True)

import emulated

import hnsw_gpu
from benchmarks import datasets
from benchmarks.gpu import kernel_times, stand_in
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import run as gpu
from benchmarks.gpu import sanitizer as sanitizer_wheel
from benchmarks.gpu import sides as gpu_sides
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.engine.vectors import encode_queries

pytestmark = pytest.mark.slow

ROWS, BATCHES, ROUNDS = 260, [1, 6, 20], 2
M, EF_CONSTRUCTION = gpu.EMULATED.setting.M, gpu.EMULATED.setting.ef_construction


def race(out: Path, *options: str) -> str:
    """What the command prints; its results lie in `out`."""
    fixed = ["race", "--engine", "emulated", "--rows", str(ROWS), "--rounds", str(ROUNDS)]
    done = CliRunner().invoke(gpu.main, [*fixed, "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("gpu")
    printed = race(out, "--batches", "1,6,20", "--datasets", "synthetic-128,synthetic-768")
    assert (out / "gpu.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "gpu.json").read_text())
    assert found["note"] in printed
    return found


def index_of(name: str) -> tuple[hnsw_gpu.Index, datasets.Dataset]:
    """The index that was measured, built again, on the CPU."""
    one = gpu.SETS[name]
    dataset = gpu.load(name, gpu.EMULATED._replace(rows=ROWS))
    index = hnsw_gpu.Index(
        one.dim, "cosine", one.dtype, M=M, ef_construction=EF_CONSTRUCTION, device="cpu"
    )
    index.add(dataset.base)
    return index, dataset


def points(results: dict) -> list[tuple[str, dict, dict]]:
    """(data set, series, point) of all that was measured of ours."""
    return [
        (name, series, point)
        for name, found in results["results"].items()
        for series in found["series"]
        for point in series["points"]
    ]


def test_what_was_measured(results) -> None:
    assert list(results["results"]) == ["synthetic-128", "synthetic-768"]
    assert results["engine"] == "emulated"
    assert results["about"]["gpu"] == "the emulator"
    measured = [(series["expand"], point["queries"]) for _, series, point in points(results)]
    expands = [s["expand"] for found in results["results"].values() for s in found["series"]]
    assert measured == [(expand, batch) for expand in expands for batch in BATCHES]
    assert [point["warps"] for _, _, point in points(results)] == [8, 4, 1] * len(expands)
    for found in results["results"].values():
        assert [series["is_own"] for series in found["series"]].count(True) == 1
        if importlib.util.find_spec("hnswlib"):
            peer = found["peers"]["hnswlib"]
            assert peer["recall"] >= 0.95
            assert [point["queries"] for point in peer["points"]] == BATCHES


def test_counts_are_the_engines(results) -> None:
    """By the kernel itself with the plan's visited cache, and hops by the CPU's walk."""
    for name in results["results"]:
        index, dataset = index_of(name)
        one = gpu.SETS[name]
        encoded = encode_queries(dataset.queries, "cosine", one.dtype)
        for _, series, point in (each for each in points(results) if each[0] == name):
            batch = point["queries"]
            asked = [i % len(encoded) for i in range(ROUNDS * batch)]  # each batch, the next ones
            build = emulated.Build(
                "cosine", one.dtype, one.dim, M, point["warps"], point["tag_bits"]
            )
            settings = {"k": 10, "ef": series["ef"], "expand": series["expand"]}
            found = emulated.search(
                build,
                index._state.graph,
                index._state.rows[:ROWS],
                encoded[asked],
                **settings,
                visited_buckets=point["visited_buckets"],
                groups=point["queries_per_block"],
            )
            wanted = search_graph(
                index._state.graph, index._state.rows[:ROWS], encoded[asked], "cosine", **settings
            )
            np.testing.assert_array_equal(found.hops, wanted.hops)
            assert point["hops_per_query"] == pytest.approx(wanted.hops.mean(), rel=1e-5)
            assert point["distances_per_query"] == pytest.approx(found.distances.mean(), rel=1e-5)
            assert found.distances.mean() >= wanted.distances.mean() > series["ef"] / 2


def test_roofline_is_recomputed(results) -> None:
    attributes = stand_in.ATTRIBUTES
    peak = attributes["MemoryClockRate"] * 1000 * 2 * attributes["GlobalMemoryBusWidth"] / 8
    row_bytes = {"synthetic-128": 128 * 4, "synthetic-768": 768 * 2}
    for name, _, point in points(results):
        found = results["results"][name]
        assert (found["peak_bytes_per_s"], found["roofline_by"]) == (peak, "peak")
        read = point["distances_per_query"] * row_bytes[name] + point["hops_per_query"] * 2 * M * 4
        assert point["bytes_per_query"] == pytest.approx(read, rel=1e-5)
        assert point["roofline_queries_per_s"] == pytest.approx(peak / read, rel=1e-5)
        rate = point["queries"] / point["kernel"]["seconds"]
        assert point["kernel"]["queries_per_s"] == pytest.approx(rate, rel=1e-5)
        assert point["roofline_ratio"] == pytest.approx(rate * read / peak, rel=1e-4)
        for times in (point["kernel"], point["numpy"]):
            assert 0 < times["low"] <= times["seconds"] <= times["high"]
        assert point["copy_bytes_per_s"] > 0


def test_roofline_by_the_copies_where_no_peak_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(stand_in.ATTRIBUTES, "MemoryClockRate", 0)
    race(tmp_path, "--datasets", "synthetic-128", "--peers", "", "--batches", "3")
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["results"]["synthetic-128"]["roofline_by"] == "copy"
    for _, _, point in points(results):
        limit = point["copy_bytes_per_s"] / point["bytes_per_query"]
        assert point["roofline_queries_per_s"] == pytest.approx(limit, rel=1e-5)
        ratio = point["kernel"]["queries_per_s"] / limit
        assert point["roofline_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_rows_that_re_rank_are_read_too(tmp_path) -> None:
    race(tmp_path, "--datasets", "synthetic-128-int4", "--batches", "4")
    (found,) = json.loads((tmp_path / "gpu.json").read_text())["results"].values()
    assert (found["dtype"], found["refine"], found["peers"]) == ("int4", "fp16", {})
    for series in found["series"]:
        (point,) = series["points"]
        walked = point["distances_per_query"] * (64 + 3 * 4 + 20)  # codes, three numbers, padding
        fine = max(20, series["ef"] // 4) * 128 * 2
        read = walked + fine + point["hops_per_query"] * 2 * M * 4
        assert point["bytes_per_query"] == pytest.approx(read, rel=1e-5)


def test_ef_is_the_smallest_for_the_recall(results) -> None:
    """Recall by looking at every row, of the CPU's answers at the same ef and expand."""
    for name, found in results["results"].items():
        index, dataset = index_of(name)
        count = found["judged_queries"]
        queries = dataset.queries[:count]
        every = 1 - queries.astype(np.float64) @ dataset.base.astype(np.float64).T
        limit = np.sort(every, axis=1)[:, 9:10] + 1e-6
        for series in found["series"]:
            recalls = []
            for ef in (series["ef"], gpu.EFS[gpu.EFS.index(series["ef"]) - 1]):
                labels = index.search(queries, 10, ef=ef, expand=series["expand"]).labels
                recalls.append((np.take_along_axis(every, labels, 1) <= limit).mean())
            assert series["recall"] == pytest.approx(recalls[0], abs=1e-5)
            assert recalls[0] >= 0.95 > recalls[1]


def test_batches_take_the_queries_in_turn() -> None:
    assert kernel_times.places(3, 0, 5).tolist() == [0, 1, 2]
    assert kernel_times.places(3, 1, 5).tolist() == [3, 4, 0]
    assert kernel_times.places(7, 0, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_chosen_ef() -> None:
    efs = [10, 20, 30, 40]
    for target, wanted in ((5, 10), (10, 10), (11, 20), (25, 30), (40, 40), (99, 40)):
        assert gpu_sides.chosen_ef(efs, target, lambda ef: ef) == (wanted, wanted)


def test_what_cannot_be_had_is_left_out(tmp_path, monkeypatch) -> None:
    def lacking(error: Exception) -> Callable[[], None]:
        def load() -> None:
            raise error

        return load

    monkeypatch.setitem(datasets.SOURCES, "glove", lacking(FileNotFoundError("npm")))
    monkeypatch.setitem(datasets.SOURCES, "verses768", lacking(ImportError("no sklearn")))
    printed = race(tmp_path, "--datasets", "glove,verses768", "--peers", "")
    results = json.loads((tmp_path / "gpu.json").read_text())
    lines = ["glove: npm", "verses768: no sklearn"]
    assert (results["results"], results["left_out"]) == ({}, lines)
    assert "left out: glove: npm" in printed
    race(tmp_path, "--datasets", "synthetic-128", "--peers", "", "--seconds", "0")
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["left_out"] == ["synthetic-128: no time left (--seconds)"]


def test_emulated_times_are_not_taken_for_results() -> None:
    for options in ([], ["--out", str(gpu.RESULTS)]):
        done = CliRunner().invoke(gpu.main, ["race", "--engine", "emulated", *options])
        assert done.exit_code == 2
        assert "mean nothing" in done.output


def test_what_a_gpu_lacks_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    for command in (["race", "--out", str(tmp_path)], ["check"]):
        done = CliRunner().invoke(gpu.main, command)
        assert done.exit_code == 1
        assert "a GPU search needs CuPy: pip install" in done.output


def test_small_searches_of_every_kernel_equal_the_cpus() -> None:
    with stand_in.installed() as machine:
        import cupy

        count = gpu.check_index(cupy, "int8", refine=True, rows=100)
        launched = {(it.kernel, it.definitions["WARPS"]) for it in machine.launches}
    assert count == 9 + 9 + 9 + 100 + 2 + 4 + 9 + 9
    assert {("search", warps) for warps in (1, 4, 8)} <= launched
    assert {kernel for kernel, _ in launched} == {"search", "compare", "encode", "keys_to_labels"}


def test_a_wrong_answer_fails_the_check(monkeypatch) -> None:
    with stand_in.installed():
        import cupy

        from hnsw_gpu.gpu.gpu_engine import GpuEngine

        right = GpuEngine.walk

        def wrong(*args, **named):
            found = right(*args, **named)
            return found._replace(keys=found.keys + 2)

        monkeypatch.setattr(GpuEngine, "walk", wrong)
        with pytest.raises(AssertionError, match="not equal"):
            gpu.check_index(cupy, "fp32", refine=False, rows=100)


def test_nvidia_smi_is_asked(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_report.driver(0) == ""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "580.1, $3"\n')
    program.chmod(0o755)
    assert gpu_report.driver(3) == "580.1, --id=3"


def exact_cagra() -> dict[str, types.ModuleType]:
    """cuVS's names and arguments (25.10), answering exactly."""

    class Resources:
        def __init__(self, stream: int | None = None) -> None:
            self.stream = stream

    def build(index_params, dataset, resources=None):
        assert dataset.dtype == np.float16
        return dataset.get()

    def search(search_params, index, queries, k, neighbors=None, distances=None, resources=None):
        import cupy

        if resources is not None:
            assert resources.stream == cupy.cuda.get_current_stream().ptr
        every = queries.get().astype(np.float32) @ index.astype(np.float32).T
        order = np.argsort(-every, axis=1, kind="stable")[:, :k]
        if search_params["itopk_size"] < 64:
            order = np.roll(order, 1, axis=0)
        return None, cupy.asarray(order.astype(np.uint32))

    def index_params(*, metric, graph_degree, intermediate_graph_degree):
        assert (metric, graph_degree) == ("sqeuclidean", 2 * M)
        return intermediate_graph_degree

    def search_params(*, itopk_size):
        return {"itopk_size": itopk_size}

    modules = {name: types.ModuleType(name) for name in ("cuvs", "cuvs.common", "cuvs.neighbors")}
    modules["cuvs.common"].Resources = Resources
    modules["cuvs.neighbors"].cagra = types.SimpleNamespace(
        IndexParams=index_params, SearchParams=search_params, build=build, search=search
    )
    return modules


def test_cagra_is_called_as_cuvs_has_it(monkeypatch) -> None:
    for name, module in exact_cagra().items():
        monkeypatch.setitem(sys.modules, name, module)
    sizes = gpu.EMULATED._replace(rows=ROWS, batches=[2, 5])
    dataset = gpu.load("synthetic-768", sizes)
    with stand_in.installed():
        found = gpu_sides.raced("cagra", dataset, "fp16", sizes, 0.95)
    assert (found["ef"], found["graph_degree"]) == (64, 2 * M)
    assert found["recall"] > 0.99  # but for the rounding to fp16
    for point, batch in zip(found["points"], (2, 5), strict=True):
        rate = batch / point["kernel"]["seconds"]
        assert point["kernel"]["queries_per_s"] == pytest.approx(rate)


def test_the_shell_script(tmp_path) -> None:
    """Its options, what it skips, and that a part that fails is its failure."""
    script = Path(gpu.__file__).with_name("run.sh")
    for program in ("bash", "dirname", "true", "false", "sleep"):  # and no compute-sanitizer
        (tmp_path / program).symlink_to(str(shutil.which(program)))

    def run(*options: str, python: str = "true", **more: str) -> tuple[int, str]:
        environment = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "PYTHON": python} | more
        done = subprocess.run(
            ["bash", script, *options], capture_output=True, text=True, env=environment
        )
        return done.returncode, done.stdout + done.stderr

    assert run("--engine", "emulated")[0] == 2
    assert run("--engine", "other") == (2, "--engine other: gpu or emulated\n")
    assert run("--only", "other") == (2, "--only other: tests, sanitizers or timings\n")
    assert run("--only") == (2, "--only needs a value\n")
    code, printed = run("--engine", "emulated", "--out", str(tmp_path), "--rows", "200")
    assert code == 0
    names = ("gpu_engine", "index_on_gpu", "dedup_on_gpu", "kernels")
    tests = [f"tests/gpu/test_{name}.py" for name in names]
    assert f"{' '.join(tests)} -m not gpu\n" in printed
    assert "memcheck racecheck synccheck initcheck: skipped, the engine is emulated" in printed
    assert f"race --engine emulated --out {tmp_path} --rows 200\n" in printed
    code, printed = run(python="false")
    said = f"false is no Python 3.11 or later; what to do says {script} --help\n"
    assert (code, printed) == (2, said)
    fails = tmp_path / "fails"  # a Python that is new enough, and no more
    fails.write_text('#!/usr/bin/env bash\n[ "$1" = -c ]\n')
    fails.chmod(0o755)
    code, printed = run("--only", "timings", python="fails")
    assert (code, printed.splitlines()[-1]) == (1, "failed: doctor timings")
    assert "race --engine gpu\n" in printed
    code, printed = run()
    assert code == 0
    assert "tests/gpu/test_kernels.py -m gpu\n" in printed
    requires = tmp_path / "requires"
    requires.write_text('#!/usr/bin/env bash\necho "required: $HNSW_GPU_REQUIRE_GPU"\n')
    requires.chmod(0o755)
    assert "\nrequired: 1\n" in run("--only", "tests", python="requires")[1]
    assert "skipped, there is no compute-sanitizer: see " in printed
    tools = "memcheck racecheck synccheck initcheck"
    assert printed.endswith(f"; NOT RUN, without compute-sanitizer: {tools}\n")
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/usr/bin/env bash\necho "asked $*"\n[ "$2" != racecheck ]\n')
    sanitizer.chmod(0o755)
    code, printed = run("--only", "sanitizers")
    assert (code, printed.splitlines()[-1]) == (1, "failed: racecheck")
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        asked = f"asked --tool {tool} --error-exitcode 1 true -m benchmarks.gpu.run check\n"
        assert asked in printed
    (tmp_path / "timeout").symlink_to(str(shutil.which("timeout")))
    fails.write_text('#!/usr/bin/env bash\n[ "$1" = -c ] || sleep 60\n')
    code, printed = run("--only", "timings", python="fails", SECONDS_A_PART="1")
    assert (code, printed.splitlines()[-1]) == (1, "failed: doctor timings")


def test_the_sanitizer_of_a_wheel_is_found(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "nvidia" / "cu13"
    for place in (folder / "bin", folder / "compute-sanitizer"):
        place.mkdir(parents=True)
        (place / "compute-sanitizer").write_text("")
    about = tmp_path / "nvidia_cuda_sanitizer_api-13.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: nvidia-cuda-sanitizer-api\nVersion: 13.0\n")
    names = ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer")
    (about / "RECORD").write_text("".join(f"nvidia/cu13/{name},,\n" for name in names))
    monkeypatch.syspath_prepend(tmp_path)
    assert sanitizer_wheel.find() == ""  # none can be run
    (folder / "bin" / "compute-sanitizer").chmod(0o755)
    assert sanitizer_wheel.find() == str(folder / "bin" / "compute-sanitizer")


def test_where_a_gpu_is_required_its_absence_is_a_failure() -> None:
    try:
        hnsw_gpu.Index(2, "l2", device="cuda")
    except RuntimeError:
        pass
    else:
        pytest.skip("there is a GPU")
    root = Path(gpu.__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    command += ["tests/gpu/test_gpu_engine.py", "-k", "an_empty_index or masks"]

    def outcome(**more: str) -> tuple[int, str]:
        environment = {k: v for k, v in os.environ.items() if k != "HNSW_GPU_REQUIRE_GPU"}
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, env=environment | more
        )
        return done.returncode, done.stdout

    code, said = outcome()
    assert code == 0 and "skipped" in said and "passed" not in said
    code, said = outcome(HNSW_GPU_REQUIRE_GPU="1")
    assert code == 1 and "no GPU that CuPy can use" in said and "passed" not in said


def test_the_notebook_runs(tmp_path, monkeypatch) -> None:
    """Its cells in order, but for the installation, over the emulated engine."""
    book = json.loads(Path(gpu.__file__).with_name("notebook.ipynb").read_text())
    assert (book["nbformat"], book["metadata"]["accelerator"]) == (4, "GPU")
    assert all(not cell.get("outputs") for cell in book["cells"])  # no times of an emulator
    monkeypatch.setenv("HNSW_GPU_ENGINE", "emulated")
    monkeypatch.setenv("HNSW_GPU_ROOT", str(Path(gpu.__file__).parents[2]))
    monkeypatch.setenv("HNSW_GPU_OUT", str(tmp_path))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k an_empty_index")  # the others run beside this one
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, object] = {}
    ran = 0
    for number, cell in enumerate(book["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            code = compile(text, f"cell {number}", "exec")
            if "install" not in cell["metadata"].get("tags", []):
                exec(code, names)
                ran += 1
    assert ran == 5
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [len(series["points"]) for series in found["results"]["synthetic-128"]["series"]]
    assert (tmp_path / "notebook.png").read_bytes().startswith(b"\x89PNG")
