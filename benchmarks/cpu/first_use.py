"""What the first `add` and `search` of a process cost on a machine where nothing is compiled.

python -m benchmarks.cpu.first_use [--against CHECKOUT]

writes `results/first-use.json`: processor seconds by dtype, the least of some new processes, and
of those that find the code on disk. Another checkout is measured in turns with this one: the ratio
is the result. What is compiled is counted in `tests/engine/baselines/first_use.txt`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.record import RESULTS, about, rounded

HERE = Path(__file__).parents[2]
DTYPES = ("fp32", "fp16", "int8", "int4")
JOB = """
import sys, time
import numpy as np
import hnsw_gpu

started = time.process_time()
vectors = np.random.default_rng(0).normal(size=(600, 32)).astype(np.float32)
index = hnsw_gpu.Index(dim=32, dtype=sys.argv[1])
index.add(vectors, threads=1)
index.search(vectors[:8], k=5, threads=1)
print(time.process_time() - started)
"""


def seconds(checkout: Path, dtype: str) -> list[float]:
    """Processor seconds of a first process, and of the next one."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-c", JOB, dtype]
        return [
            float(subprocess.check_output(command, cwd=checkout, env=environment, text=True))
            for _ in range(2)
        ]


@click.command()
@click.option("--against", type=click.Path(exists=True, path_type=Path), help="Another checkout.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", type=Path, default=RESULTS / "first-use.json", show_default=True)
def main(against: Path | None, rounds: int, out: Path) -> None:
    """First use with nothing compiled, by dtype."""
    checkouts = {"here": HERE, **({} if against is None else {"against": against.resolve()})}
    found = []
    for dtype in DTYPES:
        taken: dict[str, list[list[float]]] = {name: [] for name in checkouts}
        for _ in range(rounds):
            for name, checkout in checkouts.items():
                taken[name].append(seconds(checkout, dtype))
        least = {
            name: [min(one) for one in zip(*runs, strict=True)] for name, runs in taken.items()
        }
        one = {"dtype": dtype, "seconds": least["here"][0], "seconds_next": least["here"][1]}
        if against is not None:
            one |= {"against": least["against"][0], "ratio": one["seconds"] / least["against"][0]}
        click.echo(one)
        found.append(one)
    results = {**about([]), "dim": 32, "rows": 600, "first_use": found}
    out.write_text(json.dumps(rounded(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
