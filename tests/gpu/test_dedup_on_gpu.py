"""The join on a GPU finds the pairs that the CPU finds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from click.testing import CliRunner
from emulator import cupy_stand_in

import hnsw_gpu
from hnsw_gpu import cli
from hnsw_gpu.deduplication import near_pairs

pytestmark = pytest.mark.slow
ROWS, DIM = 700, 20  # a width that is padded


def rows(seed: int = 3) -> np.ndarray:
    """Clusters, near-copies and copies, in real numbers, whose sums round."""
    made = oracle.gaussian(ROWS, DIM, seed=seed, clusters=40, spread=0.25)
    made[-60:-30] = made[:30]
    made[-30:] = made[30:60] + 1e-3
    return made


def assert_same(one: hnsw_gpu.DedupResult, other: hnsw_gpu.DedupResult) -> None:
    for name in ("keep", "duplicate_of", "engine_distance", "group"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for found, wanted in zip(one._near.pairs, other._near.pairs, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("linkage", ["star", "components"])
@pytest.mark.parametrize("method", ["exact", "hnsw"])
@pytest.mark.parametrize(
    ("metric", "limit"),
    [("cosine", {"threshold": 0.97}), ("l2", {"max_distance": 1.5}), ("ip", {"threshold": 20.0})],
)
def test_the_same_pairs(
    device: str, metric: str, limit: dict[str, float], method: str, linkage: str
) -> None:
    how: dict[str, Any] = {"metric": metric, "method": method, "linkage": linkage, **limit}
    how |= {"M": 6, "ef_construction": 30, "ef": 20}
    cpu = hnsw_gpu.dedup(rows(), **how)
    assert_same(hnsw_gpu.dedup(rows(), device="cuda", **how), cpu)
    assert 60 < cpu.keep.sum() < ROWS - 60


@pytest.mark.parametrize("method", ["exact", "hnsw"])
def test_what_it_launches(machine: cupy_stand_in.Machine, method: str) -> None:
    how: dict[str, Any] = {"threshold": 0.97, "method": method, "M": 6, "ef_construction": 30}
    hnsw_gpu.dedup(rows(), **how)
    assert not machine.launches
    hnsw_gpu.dedup(rows(), device="cuda", **how)
    kernels = {launch.kernel for launch in machine.launches}
    assert ("search" in kernels) == (method == "hnsw")
    assert ("compare" in kernels) == (method == "exact")
    assert machine.live == 0  # given back


def test_a_heap_beyond_a_beam(
    machine: cupy_stand_in.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists grow until a walk for them does not fit the GPU: the CPU lists those."""
    heap = rows()
    heap[:500] = heap[0] + np.random.default_rng(4).normal(size=(500, DIM)) * 1e-3
    how: dict[str, Any] = {"threshold": 0.9, "method": "hnsw", "ef": 20}
    cpu = hnsw_gpu.dedup(heap, **how)
    machine.limits = machine.limits._replace(shared_per_block=4096)
    assert_same(hnsw_gpu.dedup(heap, device="cuda", **how), cpu)
    assert machine.launches


@pytest.mark.parametrize("method", ["exact", "hnsw"])
def test_files_in_shards(device: str, method: str, tmp_path: Path) -> None:
    """One shard at a time is on the GPU, asked by itself and by those after it."""
    pytest.importorskip("pyarrow", reason="tables come with the extra `io`")
    np.save(tmp_path / "rows.npy", rows())
    for where in ("cpu", "cuda"):
        command = ["dedup", tmp_path / "rows.npy", "-o", tmp_path / where, "--device", where]
        command += ["--threshold", 0.9, "--shard-rows", 250, "--method", method, "--threads", 1]
        done = CliRunner().invoke(cli.main, [str(word) for word in command])
        assert done.exit_code == 0, done.output
    for name in ("pairs.parquet", "duplicates.parquet", "kept.parquet"):
        assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "cuda" / name).read_bytes()
    reports = [json.loads((tmp_path / d / "report.json").read_text()) for d in ("cpu", "cuda")]
    assert reports[0]["near_duplicates"] == reports[1]["near_duplicates"] > 100
    assert reports[0]["shards"]["count"] == 3


def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^device='gpu': expected"):
        hnsw_gpu.dedup(rows(), device="gpu")
    reason = hnsw_gpu.gpu.unavailable_reason()  # type: ignore[attr-defined]
    if reason:
        with pytest.raises(RuntimeError, match=r"^device='cuda': "):
            hnsw_gpu.dedup(rows(), device="cuda")
        assert_same(hnsw_gpu.dedup(rows(), device="auto"), hnsw_gpu.dedup(rows()))
    assert near_pairs.FIRST_K == 16
