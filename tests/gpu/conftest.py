"""Where the tests of the GPU engine run: the stand-in for CuPy over emulated kernels, and a GPU.

A test that takes `device` runs on both; one that takes `machine` looks into the stand-in. A GPU
that is not there is a skip, but a failure where HNSW_GPU_REQUIRE_GPU is set, as
`benchmarks/gpu/run.sh` does: tests that asked no GPU would prove nothing there.
"""

import os
from collections.abc import Iterator

import emulator
import pytest
from emulator import cupy_stand_in


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what asks a GPU."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "gpu" in (parameters.get("device"), parameters.get("on_gpu")):
            item.add_marker(pytest.mark.gpu)


def has_gpu() -> bool:
    try:
        import cupy
    except Exception:  # it is not there, or finds no place for its cache
        return False
    return bool(cupy.cuda.is_available())


def require_gpu() -> None:
    """Skip or fail where there is none."""
    if not has_gpu():
        wanted = os.environ.get("HNSW_GPU_REQUIRE_GPU")
        (pytest.fail if wanted else pytest.skip)("no GPU that CuPy can use")


@pytest.fixture
def machine() -> Iterator[cupy_stand_in.Machine]:
    """No GPU, but the stand-in."""
    if emulator.missing():
        pytest.skip(emulator.missing())
    with cupy_stand_in.installed() as made:
        yield made


@pytest.fixture(params=["emulated", "gpu"])
def device(request: pytest.FixtureRequest) -> str:
    """For tests of values: the stand-in, and a GPU."""
    if request.param == "emulated":
        request.getfixturevalue("machine")
    else:
        require_gpu()
    return request.param


@pytest.fixture(params=["emulated", "gpu"], scope="module")
def on_gpu(request: pytest.FixtureRequest) -> bool:
    """For tests that launch kernels themselves: `Build.on_gpu`."""
    if request.param == "gpu":
        require_gpu()
    elif emulator.missing():
        pytest.skip(emulator.missing())
    return bool(request.param == "gpu")
