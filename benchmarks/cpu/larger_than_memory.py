"""Searches of an int4 index whose finer rows are four times a memory limit, and stay on disk.

python -m benchmarks.cpu.larger_than_memory

writes `results/larger-than-memory.json`. The limit is that of a cgroup, a child of the one that
this process is in, made and removed here: whoever runs it must be allowed to (root, mostly). It
counts the pages of the file too, so that most of the rows that a search re-ranks come from disk.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from benchmarks.cpu.memory import resident, status
from benchmarks.datasets import draw_clusters, unit
from benchmarks.record import RESULTS, about, rounded

DIM, INNER_DIM = 4096, 256  # numbers a row, and of what they are made
ROW_BYTES = 4 * DIM
QUERIES, BATCH, EF = 4000, 250, 64
GROUPS = Path("/sys/fs/cgroup")


def drawn(count: int) -> np.ndarray:
    """Unit rows in clusters, of INNER_DIM numbers, turned into DIM by one random matrix."""
    inner = draw_clusters(count, INNER_DIM, 500)
    turn = np.random.default_rng(1).standard_normal((INNER_DIM, DIM), np.float32)
    return unit(inner @ turn)


def build(folder: Path, rows: int) -> None:
    """Save an index and queries, which lie among its rows."""
    from hnsw_gpu import Index

    vectors = drawn(rows + QUERIES)
    np.save(folder / "queries.npy", vectors[rows:])
    index = Index(DIM, "cosine", "int4", refine="fp32", ef_construction=100)
    index.add(vectors[:rows])
    index.save(folder / "index.hnsw")


def measure(folder: Path, limit: int, is_mapped: bool, threads: int) -> dict:
    """The figures of a fresh process, which may hold `limit` bytes; 0: any number."""
    command = [sys.executable, "-m", "benchmarks.cpu.larger_than_memory", "search", str(folder)]
    command += [str(int(is_mapped)), str(threads)]
    if not limit:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout)
    with (folder / "index.hnsw").open("rb") as file:  # what others have read would not count
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with group(limit) as entry:
        enter = ["sh", "-c", f'echo $$ > {entry}/cgroup.procs && exec "$@"', "sh"]
        done = subprocess.run([*enter, *command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


@contextmanager
def group(limit: int) -> Iterator[Path]:
    """A new cgroup that may hold `limit` bytes."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        old = "memory" in kinds.split(",")  # cgroup v1
        parent = GROUPS / ("memory" if old else "") / path.lstrip("/")
        name = "memory.limit_in_bytes" if old else "memory.max"
        if old or (not kinds and (parent / name).exists()):
            made = parent / "larger_than_memory"
            made.mkdir()
            try:
                (made / name).write_text(str(limit))
                yield made
            finally:
                made.rmdir()
            return
    raise click.ClickException("no cgroup of this process limits memory")


def search(folder: Path, is_mapped: bool, threads: int) -> dict:
    """Queries/s over batches that were never asked before, and what the process holds."""
    from hnsw_gpu import load

    queries = np.load(folder / "queries.npy")
    before = resident()
    index = load(folder / "index.hnsw", mmap=is_mapped, device="cpu")
    found = [index.search(queries[:BATCH], ef=EF, threads=threads).labels]
    faults, started = page_faults(), time.perf_counter()
    for start in range(BATCH, QUERIES, BATCH):
        part = queries[start : start + BATCH]
        found.append(index.search(part, ef=EF, threads=threads).labels)
    seconds = time.perf_counter() - started
    np.save(folder / f"labels-{int(is_mapped)}.npy", np.concatenate(found))
    return {
        "queries_per_s": (QUERIES - BATCH) / seconds,
        "reads_a_query": (page_faults() - faults) / (QUERIES - BATCH),
        "bytes": resident() - before,
        "bytes_without_pages_of_the_file": status("RssAnon"),
        "codes_and_links_bytes": index.nbytes - len(index) * ROW_BYTES,
    }


def page_faults() -> int:
    """Those of this process that waited for the disk."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[9])


@click.command()
@click.option("--limit", default=512, show_default=True, help="Megabytes (2**20).")
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=Path, default=RESULTS / "larger-than-memory.json", show_default=True)
def main(limit: int, threads: int, out: Path) -> None:
    """An index whose finer rows are four times what a process may hold."""
    limit <<= 20
    rows = 4 * limit // ROW_BYTES
    results = {**about([]), "rows": rows, "dim": DIM, "dtype": "int4", "refine": "fp32", "ef": EF}
    results |= {"limit_bytes": limit, "refine_bytes": rows * ROW_BYTES, "threads": threads}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # on a disk: /tmp may be memory
        folder = Path(name)
        build(folder, rows)
        for side, most, is_mapped in (
            ("in memory", 0, False),
            ("mapped, without a limit", 0, True),
            ("mapped, within the limit", limit, True),
        ):
            results[side] = measure(folder, most, is_mapped, threads)
            click.echo(f"{side}: {rounded(results[side])}")
        same = [np.load(folder / f"labels-{i}.npy") for i in (0, 1)]
        np.testing.assert_array_equal(*same)
    out.write_text(json.dumps(rounded(results), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["search"]:
        print(json.dumps(search(Path(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]))))
    else:
        main()
