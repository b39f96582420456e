"""What this process may use: processors and memory, of the machine and of its control groups.

A container has the files of its own group (of cgroup v2 or v1) where those of the machine would
be; else /proc/self/cgroup says which it is. All groups above it count too.
"""

import os
from collections.abc import Iterator
from functools import cache
from math import ceil
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def processors() -> int:
    """How many run at a time: those that we may run on, and no more than the quota allows."""
    if hasattr(os, "sched_getaffinity"):  # Linux; elsewhere all processors count
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return min(count, _cpu_quota(ROOT))


def memory_limit(root: Path = ROOT) -> int:
    """Bytes that this process may take at most."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _memory(root))])


def memory_free(root: Path = ROOT) -> int | None:
    """Bytes that are left to this process; None if unknown. What files are cached in is free."""
    free = [max(limit - used, 0) for limit, used in _memory(root)]
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    return min(free, default=None)


@cache
def _cpu_quota(root: Path) -> int:
    """Processors' worth of time that the groups leave to us, rounded up; at least 1."""
    quotas = [2.0**31]
    for folder, is_v2 in _groups(root, "cpu"):
        if is_v2:
            parts = _text(folder / "cpu.max").split()
        else:
            parts = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(parts) == 2 and all(part.isdecimal() for part in parts) and int(parts[1]):
            quotas.append(int(parts[0]) / int(parts[1]))
    return max(1, ceil(min(quotas)))


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use but for cached files) of each group that has a limit."""
    for folder, is_v2 in _groups(root, "memory"):
        names = ("memory.max", "memory.current", "inactive_file")
        if not is_v2:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = (_text(folder / name).strip() for name in names[:2])
        if limit.isdecimal():
            lines = (line.split() for line in _text(folder / "memory.stat").splitlines())
            stat = {line[0]: int(line[1]) for line in lines if len(line) == 2}
            cached = stat.get(names[2], 0)
            yield int(limit), max(int(used) - cached, 0) if used.isdecimal() else 0


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of our group and those above it that have a controller; are they of cgroup v2?"""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mounted = root / "sys/fs/cgroup"
        if controllers:
            mounted /= controller
        if not controllers or controller in controllers.split(","):
            parts = [part for part in PurePosixPath(path).parts[1:] if part != ".."]
            for depth in range(len(parts), -1, -1):
                yield mounted.joinpath(*parts[:depth]), not controllers


def _text(path: Path) -> str:
    """What a file says; nothing where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
