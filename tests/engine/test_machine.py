"""What a process may use, by files as systems have them."""

import os

import numpy as np
import pytest

from hnsw_gpu.deduplication import shard_size
from hnsw_gpu.engine import machine, thread_count

GIB = 1 << 30
V1_NONE = 9223372036854771712  # what v1 says where there is no limit


@pytest.fixture
def root(tmp_path, monkeypatch):
    def build(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return tmp_path

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    return build


GROUP = "sys/fs/cgroup"
CONTAINER = {  # cgroup v2 with a namespace of its own
    "proc/self/cgroup": "0::/",
    f"{GROUP}/memory.max": 2 * GIB,
    f"{GROUP}/memory.current": GIB,
    f"{GROUP}/memory.stat": f"anon 5\ninactive_file {GIB // 2}\nactive_file 7",
    f"{GROUP}/cpu.max": "150000 100000",
}
NESTED = {  # the group above is the narrower one
    "proc/self/cgroup": "0::/user.slice/job.scope",
    f"{GROUP}/user.slice/memory.max": GIB,
    f"{GROUP}/user.slice/memory.current": 100,
    f"{GROUP}/user.slice/cpu.max": "50000 100000",
    f"{GROUP}/user.slice/job.scope/memory.max": "max",
    f"{GROUP}/user.slice/job.scope/memory.current": 50,
    f"{GROUP}/user.slice/job.scope/cpu.max": "max 100000",
}
V1 = {
    "proc/self/cgroup": "11:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n1:name=systemd:/docker/1f",
    f"{GROUP}/memory/memory.limit_in_bytes": 3 * GIB,  # as the container sees its own group
    f"{GROUP}/memory/memory.usage_in_bytes": GIB,
    f"{GROUP}/memory/memory.stat": "inactive_file 3\ntotal_inactive_file 1000",
    f"{GROUP}/cpu/cpu.cfs_quota_us": 100000,
    f"{GROUP}/cpu/cpu.cfs_period_us": 50000,
}
UNLIMITED = {
    "proc/self/cgroup": "11:cpu,cpuacct:/\n4:memory:/\n0::/",
    "proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 70 kB",
    f"{GROUP}/memory/memory.limit_in_bytes": V1_NONE,
    f"{GROUP}/cpu/cpu.cfs_quota_us": -1,
    f"{GROUP}/cpu/cpu.cfs_period_us": 100000,
}
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("files", "limit", "free", "quota"),
    [
        (CONTAINER, 2 * GIB, 3 * GIB // 2, 2),
        (NESTED, GIB, GIB - 100, 1),
        (V1, 3 * GIB, 2 * GIB + 1000, 2),
        (UNLIMITED, MACHINE, 70 * 1024, 1000),
        ({}, MACHINE, None, 1000),
        ({"proc/self/cgroup": "0::/../../else", f"{GROUP}/memory.max": GIB}, GIB, GIB, 1000),
    ],
)
def test_limits(root, monkeypatch, files, limit, free, quota) -> None:
    folder = root(files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1000)), raising=False)
    assert machine.memory_limit(folder) == min(limit, MACHINE)
    assert machine.memory_free(folder) == free
    assert thread_count(None) == quota and thread_count(7) == 7


def test_this_machine() -> None:
    assert 0 < machine.memory_limit() <= MACHINE
    assert 1 <= thread_count(None) <= (os.cpu_count() or 1)


def test_shards_are_planned_for_the_container(monkeypatch) -> None:
    """10 GB of rows, in 2 GB."""
    rows, dim = 2_000_000, 1280
    monkeypatch.setattr(shard_size, "machine_limit", lambda: 2 * GIB)
    planned = shard_size.shard_rows_within(None, rows, dim, 16)
    assert planned == shard_size.shard_rows_within(GIB, rows, dim, 16)
    assert planned * 4 * dim < GIB
    assert np.ceil(rows / planned) > 10
