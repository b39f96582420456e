"""What tests ask of other processes: which there are, how much memory one takes, and patience."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

WATCHED = """
import sys, threading, time
from hnsw_gpu.cli import main
most = [0]
def watch():
    while True:
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                most[0] = max(most[0], int(line.split()[1]) * 1024)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
try:
    main(sys.argv[1:])
finally:
    print("most", most[0])
"""


def most_memory(*arguments: object, **environment: str) -> int:
    """Runs `hnsw-gpu ARGUMENTS`, which must succeed: most bytes of its own, mapped files aside.

    What is freed goes back to the system: else glibc keeps it, once for each of its arenas, and how
    many there are is luck on a busy machine.
    """
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def processes() -> Iterator[tuple[int, int, str]]:
    """Number, parent's number and command line of every process that has not ended."""
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                stat, name = (place / "stat").read_text(), (place / "cmdline").read_text()
            except (OSError, UnicodeDecodeError):
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state != "Z":
                yield int(place.name), int(parent), name


def wait(is_true: Callable[[], object], seconds: float = 90.0) -> None:
    """Until something is true, which must not take longer than that."""
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.02)
