"""What real machines do to the GPU engine, over the stand-in for CuPy: odd GPUs, streams, threads,
forks, memory that runs out."""

import ast
import itertools
import os
import re
import subprocess
import sys
import types
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import pytest
from emulator import cupy_stand_in

import hnsw_gpu
from hnsw_gpu import doctor
from hnsw_gpu.engine.walk import Queries, Walk
from hnsw_gpu.gpu import cupy_driver, gpu_engine, host_batches
from hnsw_gpu.serve.served_index import load_served_index

ROOT = Path(__file__).parents[2]
DIM = 16
ROWS = 300
VECTORS = np.random.default_rng(7).integers(-3, 4, (ROWS, DIM)).astype(np.float32)
QUERIES = VECTORS[:9] + 1


@pytest.fixture
def machine() -> Iterator[cupy_stand_in.Machine]:
    if emulator.missing():
        pytest.skip(emulator.missing())
    with cupy_stand_in.installed() as made:
        yield made


def make_index(device: str = "cuda", **how: Any) -> hnsw_gpu.Index:
    index = hnsw_gpu.Index(DIM, "l2", M=4, ef_construction=20, device=device, **how)
    index.add(VECTORS)
    return index


def engine_of(index: hnsw_gpu.Index) -> gpu_engine.GpuEngine:
    """The index's engine, with all of it on the GPU."""
    index.search(QUERIES[:1], 1)
    assert index._gpu is not None
    return index._gpu


@pytest.fixture(scope="module")
def wanted() -> hnsw_gpu.SearchResult:
    return make_index("cpu").search(QUERIES, 5, ef=20, expand=2)


def assert_same(found: Any, wanted: hnsw_gpu.SearchResult, stream: Any = None) -> None:
    for one, other in zip(found, wanted, strict=True):
        one = one.get(stream) if stream is not None else one
        np.testing.assert_array_equal(one, other)


# --- errors ---------------------------------------------------------------------------------------


def test_no_error_is_raised_again_by_its_type() -> None:
    """An error's class says nothing of what its constructor takes."""
    for path in [*(ROOT / "hnsw_gpu").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                made_by = node.exc.func
                is_type = isinstance(made_by, ast.Call) and ast.unparse(made_by.func) == "type"
                is_class = isinstance(made_by, ast.Attribute) and made_by.attr == "__class__"
                assert not is_type and not is_class, f"{path}:{node.lineno}"


def failing(error: Exception) -> Any:
    def fails(*given: Any, **more: Any) -> Any:
        raise error

    return fails


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError])
def test_cudas_errors_become_built_in_ones(
    machine: cupy_stand_in.Machine, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory = cupy_stand_in.OutOfMemoryError(1 << 20, 1 << 30)
    error = out_of_memory if kind is MemoryError else cupy_stand_in.CUDARuntimeError(700)
    index = make_index("cpu")
    monkeypatch.setattr(cupy_stand_in, "empty", failing(error))
    with pytest.raises(kind, match=r"^device='cuda': ") as raised:
        index.to("cuda")
    assert type(raised.value) is kind and str(error) in str(raised.value)
    assert index.device == "cpu" and index.to("auto").device == "cpu"


def test_an_import_that_fails_leaves_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cupy.py").write_text("raise PermissionError(13, 'no', 'no-home/.cupy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert make_index("auto").device == "cpu"
    with pytest.raises(RuntimeError, match=r"import fails: .*no-home/.cupy.*CUPY_CACHE_DIR"):
        make_index("cuda")
    assert "import fails" in doctor.nvrtc() and "import fails" in doctor.gpu_search()


# --- odd GPUs and versions ------------------------------------------------------------------------


def test_a_volta_and_cuda_13(machine: cupy_stand_in.Machine) -> None:
    machine.arch, machine.nvrtc = 70, (13, 5)
    with pytest.raises(RuntimeError, match=r"is 7\.0, and NVRTC 13\.5 .* 7\.5 .*cuda12") as raised:
        make_index()
    assert "without CUDA 13" in str(raised.value)
    machine.nvrtc = (12, 9)
    assert make_index().device == "cuda"
    machine.arch = 61
    with pytest.raises(RuntimeError, match=r"is 6\.1, and the kernels need 7\.0"):
        make_index()


@pytest.mark.parametrize(
    ("nvrtc", "driver", "said"),
    [
        (
            (12, 9),
            12080,
            "NVRTC 12.9, driver for CUDA 12.8; NVRTC is newer than the driver, of the",
        ),
        ((13, 5), 12040, 'NVRTC 13.5 is newer than the driver, .*pip install "hnsw-gpu.cuda12.'),
        ((12, 9), 13000, "^NVRTC 12.9, driver for CUDA 13.0$"),
        ((13, 0), 0, "^NVRTC 13.0$"),
    ],
)
def test_doctor_compares_nvrtc_and_driver(
    machine: cupy_stand_in.Machine, nvrtc: tuple[int, int], driver: int, said: str
) -> None:
    machine.nvrtc, machine.driver = nvrtc, driver
    assert re.search(said, doctor.examine()["nvrtc"])


def test_what_an_old_driver_does_not_load_is_told(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.nvrtc, machine.driver = (13, 5), 12040
    monkeypatch.setattr(cupy_stand_in, "RawModule", failing(RuntimeError("UNSUPPORTED_PTX")))
    with pytest.raises(RuntimeError, match=r"compiled here: UNSUPPORTED_PTX; NVRTC 13\.5 is newer"):
        make_index()


class NVMLError(Exception):
    pass


def nvml(**failing_calls: str) -> types.SimpleNamespace:
    """pynvml with one GPU, of which some calls are not supported."""
    told: dict[str, Any] = {
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetName": lambda handle: "NVIDIA GB10",
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=2**37, free=2**36),
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (12, 1),
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "NVMLError": NVMLError,
    }
    told |= {name: failing(NVMLError(why)) for name, why in failing_calls.items()}
    return types.SimpleNamespace(**told)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        ("", "NVIDIA GB10, 128 GiB (64.0 free), sm_121, driver 580.1"),
        ("nvmlDeviceGetMemoryInfo", "NVIDIA GB10, memory unknown (no), sm_121, driver 580.1"),
        ("nvmlDeviceGetName", "name unknown (no), 128 GiB (64.0 free), sm_121, driver 580.1"),
        (
            "nvmlDeviceGetCudaComputeCapability",
            "NVIDIA GB10, 128 GiB (64.0 free), architecture unknown (no), driver 580.1",
        ),
        (
            "nvmlSystemGetDriverVersion",
            "NVIDIA GB10, 128 GiB (64.0 free), sm_121, driver unknown (no)",
        ),
        ("nvmlDeviceGetCount", "unknown: no"),
        (
            "nvmlDeviceGetHandleByIndex",
            "name unknown (no), memory unknown (no), architecture unknown (no), driver 580.1",
        ),
        ("nvmlInit", "none: no"),
    ],
)
def test_doctor_takes_an_answer_a_field(
    call: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DGX Spark tells no memory, a slice of an H100 no more than it likes."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**({call: "no"} if call else {})))
    assert doctor.gpus() == [line]


def test_a_gpu_by_number(machine: cupy_stand_in.Machine, wanted: hnsw_gpu.SearchResult) -> None:
    """Whatever the current one is, CUDA is asked about the index's own."""
    machine.gpus = 2
    index = make_index("cuda:1")
    assert index.device == "cuda:1" and "device='cuda:1'" in repr(index)
    assert_same(index.search(QUERIES, 5, ef=20, expand=2), wanted)
    assert machine.asked and set(machine.asked) == {1}
    assert index.to("cuda").device == "cuda:1"  # it is on a GPU already
    assert index.to("cuda:0").device == "cuda"
    assert_same(index.search(QUERIES, 5, ef=20, expand=2), wanted)
    with cupy_stand_in.Device(1):
        assert make_index("cuda").device == "cuda:1"
    with pytest.raises(RuntimeError, match=r"there is no GPU 2: .* knows of cuda:0, cuda:1"):
        index.to("cuda:2")
    assert index.device == "cuda"
    for wrong in ("cuda:", "cuda:x", "gpu", "cuda:-1", 1, None):
        with pytest.raises(ValueError, match=r"^device=.*a GPU by number, as 'cuda:1'"):
            index.to(wrong)  # type: ignore[arg-type]
    assert cupy_driver.cupy_with_a_gpu(1) is sys.modules["cupy"]


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_filtered", [False, True])
def test_queries_of_the_current_stream_are_waited_for(
    machine: cupy_stand_in.Machine, is_filtered: bool, wanted: hnsw_gpu.SearchResult
) -> None:
    """CuPy's arrays do not know who writes them: it is CuPy's current stream."""
    import cupy

    index = make_index()
    stream = cupy.cuda.Stream(non_blocking=True)
    allow = np.ones(ROWS, bool) if is_filtered else None
    with cupy.cuda.Stream(non_blocking=True):
        queries = cupy.asarray(QUERIES)
        found = index.search(queries, 5, ef=20, expand=2, stream=stream, allow=allow)
    assert_same(found, wanted, stream)


class Owned:
    """An array of another library, by DLPack."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **settings: Any) -> Any:
        return self._array.__dlpack__(**settings)


def test_out_is_held_while_it_is_written(machine: cupy_stand_in.Machine) -> None:
    """Its owner may give the memory away as soon as nobody holds it."""
    import cupy

    index = make_index()
    stream = cupy.cuda.Stream(non_blocking=True)
    queries = cupy.asarray(QUERIES)
    out = Owned(cupy.empty((9, 5), np.int64)), Owned(cupy.empty((9, 5), np.float32))
    held = [weakref.ref(array) for array in out]
    index.search(queries, 5, stream=stream, out=out)
    del out
    assert all(array() is not None for array in held)
    stream.synchronize()
    index.search(queries, 5, stream=stream)
    assert all(array() is None for array in held)


def test_a_capturing_stream_is_refused(machine: cupy_stand_in.Machine) -> None:
    import cupy

    index, stream = make_index(), cupy.cuda.Stream(non_blocking=True)
    queries = cupy.asarray(QUERIES)
    stream.captures = True
    with pytest.raises(RuntimeError, match="capturing a CUDA graph, and a search cannot be"):
        index.search(queries, 5, stream=stream)


def test_waiting_spins_no_core(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    made: list[cupy_stand_in.Event] = []
    real = cupy_stand_in.Event.__init__

    def remembers(self: cupy_stand_in.Event, *given: Any, **more: Any) -> None:
        real(self, *given, **more)
        made.append(self)

    monkeypatch.setattr(cupy_stand_in.Event, "__init__", remembers)
    index = make_index()
    index.search(QUERIES, 5)
    index.search(cupy.asarray(QUERIES), 5, stream=cupy.cuda.Stream(non_blocking=True))
    assert len(made) >= 4 and all(event.block for event in made)


def test_a_deep_pipeline_asks_little(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many searches under way, a stream's oldest are asked about, and its last is waited for."""
    import cupy

    index, asked = make_index(), []
    is_done = cupy_stand_in.Event.done.fget
    monkeypatch.setattr(
        cupy_stand_in.Event, "done", property(lambda event: asked.append(event) or is_done(event))
    )
    queries = cupy.asarray(QUERIES[:1])
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    for _, stream in zip(range(60), itertools.cycle(streams), strict=False):
        index.search(queries, 1, ef=4, stream=stream)
    assert len(asked) <= 2 * 60
    pending = index._gpu._searches  # type: ignore[union-attr]
    assert [len(pending[stream.ptr]) for stream in streams] == [30, 30]
    assert index._gpu._ends() == [pending[stream.ptr][-1][0] for stream in streams]  # type: ignore[union-attr]
    for stream in streams:
        stream.synchronize()
    index.search(queries, 1, ef=4, stream=streams[0])
    assert [len(one) for one in index._gpu._searches.values()] == [1]  # type: ignore[union-attr]


# --- memory ---------------------------------------------------------------------------------------


def test_closing_gives_back_what_the_slots_had(machine: cupy_stand_in.Machine) -> None:
    """CuPy keeps freed memory by stream, for that stream alone."""
    index = make_index()
    index.search(QUERIES, 5)
    took = {step.stream for step in machine.steps if step.what in ("search", "upload")}
    machine.steps.clear()
    index.to("cpu")
    gave = {step.stream for step in machine.steps if step.what == "give back"}
    assert took and gave >= took


def test_threads_share_the_memory_for_batches(machine: cupy_stand_in.Machine) -> None:
    batches = engine_of(make_index())._batches
    free = batches._index.free_bytes()
    rooms = [batches.room(10**9, 1000) for _ in range(30)]
    taken = [room.nbytes for room in rooms]
    assert taken[0] == pytest.approx(min(free / 4, 2 * 1000 * host_batches.MOST_QUERIES), rel=0.01)
    machine.free = machine.live + 8_000_000
    del rooms  # and what was promised with them
    rooms = [batches.room(10**9, 1000) for _ in range(30)]
    taken = [room.nbytes for room in rooms]
    assert taken[0] == pytest.approx(2_000_000, rel=0.01)
    assert taken[1] == pytest.approx(1_000_000, rel=0.01)
    assert sum(taken) <= 4_000_000 + 30 * 2000
    assert all(room.queries >= 1 for room in rooms)  # one more is never refused for the others
    del rooms
    assert batches.room(10**9, 1000).nbytes == taken[0]
    with pytest.raises(MemoryError, match="one query takes"):
        batches.room(1, 3_000_000)


def test_many_threads_in_little_memory(
    machine: cupy_stand_in.Machine, wanted: hnsw_gpu.SearchResult
) -> None:
    """Eight callers, each of whom would take a quarter."""
    index = make_index()
    engine_of(index)
    machine.free = machine.live + 60_000
    queries = np.repeat(QUERIES, 20, axis=0)

    def search(_: int) -> hnsw_gpu.SearchResult:
        return index.search(queries, 5, ef=20, expand=2)

    before = machine.peak()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(search, range(16)):
            assert_same(found, hnsw_gpu.SearchResult(*(np.repeat(it, 20, axis=0) for it in wanted)))
    assert machine.peak() - before < 60_000


def test_nothing_is_promised_after_an_error(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(make_index())
    with monkeypatch.context() as patched:
        patched.setattr(engine._index, "walk", failing(KeyboardInterrupt()))  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt) as raised:
            engine.walk(Queries(QUERIES), Walk(5, 20))
    assert raised.value is not None  # and its frames, with their rooms
    assert sum(room.nbytes for room in engine._batches._rooms) == 0


# --- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", [False, True])
def test_what_is_compiled_beforehand_is_all(
    machine: cupy_stand_in.Machine, refine: bool, tmp_path: Path
) -> None:
    """A server's first searches of each kind compile nothing."""
    import cupy

    make_index("cpu", dtype="int8", refine=refine).save(tmp_path / "docs.hnsw")
    index = load_served_index(tmp_path / "docs.hnsw", 1, device="cuda", threads=1).index
    compiled = set(index._gpu._index._kernels)  # type: ignore[union-attr]
    for count in (1, 3, 9, 200):
        for allow in (None, np.arange(0, ROWS, 2), [1]):
            for ef in (4, 200):
                index.search(np.repeat(QUERIES[:1], count, axis=0), 3, ef=ef, allow=allow)
    index.search(cupy.asarray(QUERIES), 3)
    index.neighbor_graph(3)
    index.search_radius(QUERIES, 20.0)
    assert set(index._gpu._index._kernels) == compiled  # type: ignore[union-attr]
    warps = {dict(key[1:])["WARPS"] for key in compiled if key[0] == "search"}
    assert warps == {1, 4, 8}
    make_index("cpu").compile_kernels()  # nothing to do


# --- forks ----------------------------------------------------------------------------------------

FORKS = """
import os, signal, threading, time
import numpy as np
from emulator import cupy_stand_in
import hnsw_gpu
rows = np.random.default_rng(7).integers(-3, 4, (300, 16)).astype(np.float32)
with cupy_stand_in.installed():
    index = hnsw_gpu.Index(16, "l2", M=4, ef_construction=20, device="cuda")
    index.add(rows)
    wanted = index.search(rows[:3], 2).labels
    stop = threading.Event()
    def keep(work):
        while not stop.is_set():
            work()
    busy = [
        threading.Thread(target=keep, args=(lambda: index.search(rows[:2], 2),)),
        threading.Thread(target=keep, args=(lambda: index.compile_kernels(),)),
        threading.Thread(target=keep, args=(lambda: index.add(rows[:1]),)),
    ]
    for thread in busy:
        thread.start()
    children = []
    for number in range(12):
        time.sleep(0.02)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            code = 1
            try:
                calls = [
                    lambda: index.search(rows[:3], 2),
                    lambda: index.compile_kernels(),
                    lambda: index.neighbor_graph(2),
                    lambda: index.search_radius(rows[:3], 3.0),
                ]
                for call in calls:
                    try:
                        call()
                    except RuntimeError as error:
                        assert "forked this one" in str(error), error
                        assert 'index.to("cpu")' in str(error), error
                    else:
                        raise AssertionError("no error")
                assert index.device == "cuda" and len(index) >= 300
                index.to("cpu")
                found = index.search(rows[:3], 1, ef=400).distances
                assert (found == 0).all()
                index.add(rows[:1])
                for call in (lambda: index.to("cuda"), lambda: hnsw_gpu.Index(3, device="cuda")):
                    try:
                        call()
                    except RuntimeError as error:
                        assert "forked this one" in str(error), error
                    else:
                        raise AssertionError("no error")
                assert hnsw_gpu.Index(3, device="auto").device == "cpu"
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    stop.set()
    for thread in busy:
        thread.join()
    assert codes == [0] * len(children), codes
    index.search(rows[:3], 2)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are for POSIX")
def test_a_forked_process_says_so() -> None:
    """Never a hang, whatever lock another thread held."""
    if emulator.missing():
        pytest.skip(emulator.missing())
    path = os.pathsep.join(str(ROOT / part) for part in ("", "tests", "tests/gpu"))
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
