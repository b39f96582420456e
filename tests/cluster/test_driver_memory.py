"""What drives a build or a deduplication on Ray holds nothing of the size of the data."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="needs the extra `ray`")
pytest.importorskip("pyarrow")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc"),
]

# Most bytes that are the process's own, from when it is connected to the end.
DRIVER = """
import re, sys, threading, time
from pathlib import Path
import click
from hnsw_gpu.cli import main
from hnsw_gpu.cluster import steps_on_ray

def held():
    told = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", told)[1]) << 10

most, is_done = [0], threading.Event()

def watch():
    while not is_done.is_set():
        most[0] = max(most[0], held())
        time.sleep(0.005)

with steps_on_ray("local"):
    for name in ("small", "large"):
        most[0] = 0
        is_done.clear()
        watching = threading.Thread(target=watch)
        watching.start()
        for command in sys.argv[1:]:
            arguments = command.replace("SIZE", name).split()
            main(arguments + ["--ray", "local"], standalone_mode=False)
        is_done.set()
        watching.join()
        print(name, most[0])
"""


def test_memory_of_the_driver_is_flat(tmp_path):
    """Twenty times as many rows, with ids: 19 bytes of each held would be seen."""
    import pyarrow
    import pyarrow.parquet

    for name, count in (("small", 10_000), ("large", 200_000)):
        rows = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
        lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), 4)
        columns = {"embedding": lists, "id": pyarrow.array(np.arange(count)[::-1])}
        pyarrow.parquet.write_table(
            pyarrow.table(columns), tmp_path / f"{name}.parquet", row_group_size=5_000
        )
        (tmp_path / f"{name}.rows").write_text(str(count // 2))
    how = "--shard-rows 50000 --id-column id --M 4 --ef-construction 8"
    commands = [
        f"build {tmp_path}/SIZE.parquet -o {tmp_path}/SIZE.docs {how}",
        f"dedup {tmp_path}/SIZE.parquet -o {tmp_path}/SIZE.out {how} --ef 8 --threshold 0.9999999",
    ]
    done = subprocess.run([sys.executable, "-c", DRIVER, *commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = (int(re.search(rf"{n} (\d+)", done.stdout)[1]) for n in ("small", "large"))
    assert large - small < 190_000 * 19, (small, large)
