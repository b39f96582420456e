"""The command line gives what the library gives, says errors in one line, and stops cleanly."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import oracle
import pytest
from click.testing import CliRunner

import hnsw_gpu
from hnsw_gpu import cli, doctor
from hnsw_gpu.gpu import gpu_engine

ROOT = Path(__file__).parents[1]
ROWS, QUERIES, DIM = 600, 25, 12


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with vectors.npy, queries.npy, labels.npy and docs.hnsw, an l2 index of them."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(11)
    np.save(folder / "vectors.npy", rng.normal(size=(ROWS, DIM)).astype(np.float32))
    np.save(folder / "queries.npy", rng.normal(size=(QUERIES, DIM)).astype(np.float32))
    np.save(folder / "labels.npy", rng.permutation(10 * ROWS)[:ROWS])
    run("build", folder / "vectors.npy", "-o", folder / "docs.hnsw", "--metric", "l2")
    return folder


def run(*arguments: object, code: int = 0) -> str:
    """Standard output of a command; standard error must be empty when it went well."""
    result = CliRunner().invoke(cli.main, [str(part) for part in arguments])
    assert result.exit_code == code, result.output
    if code == 0:
        assert result.stderr == ""
        return result.stdout
    assert result.stdout == ""
    return result.stderr


def fails(*arguments: object) -> str:
    """The one line of an error of the library."""
    text = run(*arguments, code=1)
    assert text.startswith("Error: ")
    assert text.count("\n") == 1
    return text


def start(*arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "hnsw_gpu", *map(str, arguments)]
    # a shell's background jobs ignore SIGINT, and so would all that they start
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=hear, **options)


def truth(folder: Path, k: int) -> tuple[np.ndarray, np.ndarray]:
    vectors, queries = np.load(folder / "vectors.npy"), np.load(folder / "queries.npy")
    return oracle.nearest(oracle.distances(queries, vectors, "l2"), k)


def test_build_saves_what_the_library_saves(files, tmp_path):
    labels, vectors = np.load(files / "labels.npy"), np.load(files / "vectors.npy")
    settings = ["--metric", "ip", "--dtype", "int8", "--refine", "fp16", "--M", 8]
    settings += ["--ef-construction", 50, "--seed", 3, "--labels", files / "labels.npy"]
    text = run("build", files / "vectors.npy", "-o", tmp_path / "a.hnsw", *settings, "--threads", 2)
    assert f"{ROWS} vectors of {DIM}" in text
    index = hnsw_gpu.Index(
        DIM, "ip", "int8", M=8, ef_construction=50, refine="fp16", seed=3, device="cpu"
    )
    index.add(vectors, labels)
    index.save(tmp_path / "b.hnsw")
    assert (tmp_path / "a.hnsw").read_bytes() == (tmp_path / "b.hnsw").read_bytes()


def test_search_writes_the_exact_neighbours(files, tmp_path):
    run("search", files / "docs.hnsw", files / "queries.npy", "-k", 7, "--ef", ROWS,
        "-o", tmp_path / "found.npz")  # fmt: skip
    labels, distances = truth(files, 7)
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_array_equal(found["labels"], labels)
        np.testing.assert_allclose(found["distances"], distances, rtol=1e-5)


def test_rerank(tmp_path):
    rows = np.float32(oracle.gaussian(900, DIM, seed=7) + 9)  # coarse codes
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "queries.npy", rows[:50])
    index = tmp_path / "a.hnsw"
    run("build", tmp_path / "rows.npy", "-o", index, "--dtype", "int4", "--metric", "l2")
    assert json.loads(run("info", index, "--json"))["refine"] == "fp16"
    loaded, answers = hnsw_gpu.load(index), set()
    for given, rerank in (("auto", "auto"), ("all", None), (1, 1), (9, 9)):
        output = tmp_path / "a.npz"
        run("search", index, tmp_path / "queries.npy", "-o", output, "-k", 4, "--rerank", given)
        expected = loaded.search(rows[:50], 4, rerank=rerank)
        with np.load(output) as found:
            np.testing.assert_array_equal(found["labels"], expected.labels)
        answers.add(expected.labels.tobytes())
        command = ["recall", index, tmp_path / "queries.npy", "-k", 4, "--ef", 64, "--json"]
        (point,) = json.loads(run(*command, "--rerank", given))
        truth = oracle.distances(rows[:50], loaded.vectors(loaded.labels), "l2")
        assert point["recall"] == pytest.approx(oracle.recall(expected.labels, truth, 4))
    assert len(answers) == 4
    for wrong in ("0", "some", "-1", "1.5"):
        text = run(
            "search", index, tmp_path / "queries.npy", "-o", output, "--rerank", wrong, code=2
        )
        assert f"'{wrong}' is no number from 1 on, auto or all" in text


def test_search_in_blocks_is_the_search_in_one(files, tmp_path, monkeypatch):
    answers = []
    for block in (QUERIES, 7, 1):
        monkeypatch.setattr(cli, "QUERY_BLOCK", block)
        output = tmp_path / f"{block}.npz"
        run("search", files / "docs.hnsw", files / "queries.npy", "--ef", 10, "-o", output)
        answers.append(output.read_bytes())
    assert answers[0] == answers[1] == answers[2]


def test_search_without_queries(files, tmp_path):
    np.save(tmp_path / "none.npy", np.empty((0, DIM), np.float32))
    run("search", files / "docs.hnsw", tmp_path / "none.npy", "-k", 3, "-o", tmp_path / "none.npz")
    with np.load(tmp_path / "none.npz") as found:
        assert found["labels"].shape == found["distances"].shape == (0, 3)


def test_info_tells_what_the_index_is(files):
    index = hnsw_gpu.load(files / "docs.hnsw")
    facts = json.loads(run("info", files / "docs.hnsw", "--json"))
    assert facts["file_bytes"] == (files / "docs.hnsw").stat().st_size
    assert facts["memory_bytes"] == pytest.approx(index.nbytes, rel=0.05)
    wanted = {"vectors": ROWS, "metric": "l2", "dtype": "fp32", "dim": DIM, "M": 16, "seed": 0}
    wanted |= {"refine": index.refine, "ef_construction": 200}
    assert {name: facts[name] for name in wanted} == wanted
    table = dict(line.split(maxsplit=1) for line in run("info", files / "docs.hnsw").splitlines())
    assert set(table) == set(facts)
    assert (table["metric"], table["seed"], table["refine"]) == ("l2", "0", "none")


def test_check_finds_a_flipped_bit(files, tmp_path):
    assert "sound" in run("check", files / "docs.hnsw")
    content = bytearray((files / "docs.hnsw").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "bad.hnsw").write_bytes(content)
    assert "bad.hnsw" in fails("check", tmp_path / "bad.hnsw")


def test_recall_is_the_one_of_the_oracle(files):
    index = hnsw_gpu.load(files / "docs.hnsw")
    queries, vectors = np.load(files / "queries.npy"), np.load(files / "vectors.npy")
    exact = oracle.distances(queries, vectors, "l2")
    points = json.loads(
        run("recall", files / "docs.hnsw", files / "queries.npy", "-k", 5, "--ef", "5,9", "--json")
    )
    assert [point["ef"] for point in points] == [5, 9]
    for point in points:
        found = index.search(queries, 5, ef=point["ef"]).labels
        assert point["recall"] == pytest.approx(oracle.recall(found, exact, 5))
        assert point["queries_per_s"] > 0


def test_recall_against_the_original_vectors(files, tmp_path):
    """int8 alone loses recall that only the original vectors show; labels as `build` gives them."""
    queries, vectors = np.load(files / "queries.npy"), np.load(files / "vectors.npy")
    run("build", files / "vectors.npy", "-o", tmp_path / "a.hnsw", "--dtype", "int8")
    command = ["recall", tmp_path / "a.hnsw", files / "queries.npy", "--ef", str(ROWS)]
    found = hnsw_gpu.load(tmp_path / "a.hnsw").search(queries, 10, ef=ROWS).labels
    wanted = oracle.recall(found, oracle.distances(queries, vectors, "cosine"), 10)
    assert wanted < 1
    table = run(*command, "--vectors", files / "vectors.npy").splitlines()
    assert table[0].split() == ["ef", "recall@10", "queries/s"]
    assert table[1].split()[:2] == [str(ROWS), f"{wanted:.4f}"]
    np.save(tmp_path / "few.npy", vectors[:100])
    assert "100 rows" in fails(*command, "--vectors", tmp_path / "few.npy")


def test_recall_draws(files, tmp_path):
    pytest.importorskip("matplotlib", reason="drawing comes with the extra `demo`")
    from matplotlib.image import imread

    run("recall", files / "docs.hnsw", files / "queries.npy", "--plot", tmp_path / "a.png")
    drawing = imread(tmp_path / "a.png")
    assert drawing[..., :3].min() < 0.5 < drawing[..., :3].max()


# what pynvml offers, on a machine with two cards
NVML = """
from types import SimpleNamespace
NVMLError = OSError
nvmlInit = nvmlShutdown = lambda: None
nvmlSystemGetDriverVersion = lambda: "1.2"
nvmlDeviceGetCount = lambda: 2
nvmlDeviceGetHandleByIndex = int
nvmlDeviceGetCudaComputeCapability = lambda card: (9, 0)
nvmlDeviceGetMemoryInfo = lambda card: SimpleNamespace(total=80 << 30, free=3 << 29)
nvmlDeviceGetName = lambda card: f"Card {card}"
"""
WITHOUT_DRIVER = """
class NVMLError(Exception): pass
def nvmlInit(): raise NVMLError("Driver Not Loaded")
"""
CARDS = [f"Card {card}, 80 GiB (1.5 free), sm_90, driver 1.2" for card in (0, 1)]


@pytest.mark.parametrize(
    ("pynvml", "gpus"),
    [
        (NVML, CARDS),
        (WITHOUT_DRIVER, ["none: Driver Not Loaded"]),
        ("raise ImportError", ["unknown: pip install nvidia-ml-py shows them"]),
    ],
    ids=["cards", "no driver", "no package"],
)
def test_doctor(pynvml, gpus, tmp_path):
    (tmp_path / "pynvml.py").write_text(pynvml)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "hnsw_gpu", "doctor", "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    facts = json.loads(done.stdout)
    assert facts["gpus"] == gpus
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["numpy"] == np.__version__
    assert facts["gpu_search"] == (gpu_engine.unavailable_reason() or "ready")
    assert facts["cupy"] == doctor.cupy()
    assert facts["hnsw-gpu"] == hnsw_gpu.__version__
    assert Path(facts["compile_cache"]).parent == tmp_path / "cache"


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({}, "hnsw-gpu[cuda12]"),
        ({"cupy-cuda12x": "14.2.0"}, "cupy-cuda12x 14.2.0, NVRTC from the system or missing"),
        ({"cupy-cuda13x": "14.2", "nvidia-cuda-nvrtc": "13.5"}, "13x 14.2 nvidia-cuda-nvrtc 13.5"),
    ],
    ids=["nothing", "no compiler", "all"],
)
def test_doctor_on_cupy(monkeypatch, there, said):
    monkeypatch.setattr(doctor, "installed", lambda name: there.get(name, "not installed"))
    assert said in doctor.cupy()


@pytest.mark.skipif(gpu_engine.unavailable_reason() == "", reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there(files, tmp_path):
    command = ["search", files / "docs.hnsw", files / "queries.npy", "-o", tmp_path / "out.npz"]
    assert gpu_engine.unavailable_reason().split(" (")[0] in fails(*command, "--device", "cuda")
    assert run(*command, "--device", "auto") != ""


def test_doctor_prints_a_table(monkeypatch):
    facts = {"numpy": "2.0", "file_bytes": 12345, "gpus": CARDS}
    monkeypatch.setattr("hnsw_gpu.doctor.examine", lambda: facts)
    assert run("doctor").splitlines() == [
        "numpy       2.0",
        "file_bytes  12,345",
        f"gpus        {CARDS[0]}",
        f"            {CARDS[1]}",
    ]


def test_where_nothing_is_kept_it_is_said(monkeypatch):
    """And an image of a container is not made."""
    monkeypatch.setattr("hnsw_gpu.engine.compiled.os.access", lambda *_: False)
    monkeypatch.setattr("hnsw_gpu.warming.warmed", lambda *_: [])
    assert "every process compiles again" in doctor.compile_cache()
    assert "NUMBA_CACHE_DIR names one" in fails("warm", "fp32")


def test_errors_are_one_line(files, tmp_path):
    docs, queries = files / "docs.hnsw", files / "queries.npy"
    output = tmp_path / "out.npz"
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "wide.npy", np.ones((3, DIM + 1)))
    np.save(tmp_path / "nan.npy", np.full((3, DIM), np.nan))
    np.save(tmp_path / "floats.npy", np.ones(ROWS))
    search = ["search", docs, queries, "-o", output]
    build = ["build", files / "vectors.npy", "-o", tmp_path / "x.hnsw"]
    assert "no.npy: No such file" in fails("search", docs, tmp_path / "no.npy", "-o", output)
    assert "folder: No such file" in fails("build", tmp_path / "folder", "-o", tmp_path / "x.hnsw")
    assert "empty.npy" in fails("search", docs, tmp_path / "empty.npy", "-o", output)
    assert str(DIM + 1) in fails("search", docs, tmp_path / "wide.npy", "-o", output)
    assert "0" in fails("search", docs, tmp_path / "nan.npy", "-o", output)
    assert "queries.npy" in fails("search", queries, queries, "-o", output)
    assert "k" in fails(*search, "-k", -1)
    assert "does not exist" in fails("search", docs, queries, "-o", tmp_path / "no" / "out.npz")
    assert ".npz" in fails("search", docs, queries, "-o", tmp_path / "out.txt")
    assert "hamming" in fails(*build, "--metric", "hamming")
    assert "fp8" in fails(*build, "--dtype", "fp8")
    assert "M" in fails(*build, "--M", 1)
    assert "float" in fails(*build, "--labels", tmp_path / "floats.npy")
    assert "empty.npy" in fails(*build, "--labels", tmp_path / "empty.npy")
    assert "overwritten" in fails("build", queries, "-o", queries)
    assert "'a,b'" in run("recall", docs, queries, "--ef", "a,b", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("empty.npy", "floats.npy", "nan.npy", "wide.npy")
    ]


def test_every_command_teaches():
    text = run("--help")
    for name, command in cli.main.commands.items():
        assert name in text
        words = run(name, "--help")
        assert f"hnsw-gpu {name}" in words.partition("Example:")[2]
        assert command.help.count(".") >= 2
        options = [option for option in command.params if option.param_type_name == "option"]
        assert all(option.help for option in options)


def test_version_is_the_package_version():
    assert run("--version").split()[-1] == hnsw_gpu.__version__


@pytest.fixture
def long_build(files, tmp_path):
    """A build of half a minute over an existing index, its error output on a terminal."""
    vectors = np.random.default_rng(1).normal(size=(150_000, 64)).astype(np.float32)
    np.save(tmp_path / "many.npy", vectors)
    output = tmp_path / "docs.hnsw"
    output.write_bytes((files / "docs.hnsw").read_bytes())
    termios = pytest.importorskip("termios", reason="there are no pseudo-terminals here")
    terminal, other_end = os.openpty()
    termios.tcsetwinsize(other_end, (24, 80))  # a bar needs a width
    process = start(
        *("build", tmp_path / "many.npy", "-o", output, "--ef-construction", 500),
        stderr=other_end,
        stdout=subprocess.PIPE,
    )
    os.close(other_end)
    yield process, terminal, output
    process.kill()
    process.communicate()
    os.close(terminal)


def test_interrupt_leaves_the_old_index(files, long_build):
    process, terminal, output = long_build
    seen = b""
    while not any(f" {percent}%".encode() in seen for percent in range(2, 100)):
        seen += os.read(terminal, 1 << 12)  # OSError at the end of the process
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    said = rest_of(terminal)
    assert b"Traceback" not in said
    assert said.split()[-1] == b"Interrupted."
    assert process.stdout.read() == b""
    assert output.read_bytes() == (files / "docs.hnsw").read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == ["docs.hnsw", "many.npy"]


def rest_of(terminal: int) -> bytes:
    said = b""
    while True:
        try:
            part = os.read(terminal, 1 << 12)
        except OSError:  # Linux says so when the other end is closed
            return said
        if not part:
            return said
        said += part


def test_reader_that_leaves_is_no_error(files):
    """`hnsw-gpu info docs.hnsw | head -0`"""
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start("info", files / "docs.hnsw", stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    _, said = process.communicate()
    assert (process.returncode, said) == (1, b"")


# ---------------------------------------------------------------- other libraries' graphs


def test_convert_keeps_the_graph(files, tmp_path):
    """Out to hnswlib's format and back: the same file but for what hnswlib's does not hold."""
    there, back = tmp_path / "docs.bin", tmp_path / "back.hnsw"
    said = run("convert", files / "docs.hnsw", "--to", "hnswlib", "-o", there)
    assert said == f"{there}: 600 vectors of 12, l2\n"
    run("convert", there, "--from", "hnswlib", "--metric", "l2", "-o", back)
    queries = np.load(files / "queries.npy")
    one, other = (hnsw_gpu.load(path) for path in (files / "docs.hnsw", back))
    oracle.assert_same(one.search(queries, 5), other.search(queries, 5))
    small = tmp_path / "small.hnsw"
    run("convert", there, "--from", "hnswlib", "--metric", "l2", "--dtype", "int8", "-o", small)
    assert hnsw_gpu.load(small).dtype == "int8"


def test_convert_to_faiss_and_from_there(files, tmp_path):
    pytest.importorskip("faiss", reason="faiss-cpu comes with the extra `test`")
    there, back = tmp_path / "docs.faiss", tmp_path / "back.hnsw"
    run("convert", files / "docs.hnsw", "--to", "faiss", "-o", there)
    run("convert", there, "--from", "faiss", "-o", back)
    assert len(hnsw_gpu.load(back)) == ROWS


def test_convert_from_usearch(tmp_path):
    there = ROOT / "tests" / "peers" / "data" / "usearch-2.26.6.usearch"
    run("convert", there, "--from", "usearch", "-o", tmp_path / "docs.hnsw")
    index = hnsw_gpu.load(tmp_path / "docs.hnsw")
    assert (len(index), index.metric) == (230, "cosine")


def test_convert_says_what_is_wrong(files, tmp_path):
    there = tmp_path / "out.hnsw"
    said = run("convert", files / "docs.hnsw", "--from", "hnswlib", "-o", there, code=2)
    assert "needs --metric" in said
    said = run("convert", files / "docs.hnsw", "--metric", "ip", "-o", there, code=2)
    assert "--metric, --dtype and --refine are for other libraries' files" in said
    said = run(
        "convert", files / "docs.hnsw", "--from", "hnswlib", "--metric", "l2", "-o", there, code=1
    )
    assert "is no index of hnswlib, or damaged" in said and not there.exists()
