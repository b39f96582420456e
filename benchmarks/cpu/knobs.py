"""Recall, distances and bytes by ef, M and ef_construction, on rows of 100, 256 and 768 numbers.

python -m benchmarks.cpu.knobs

writes `results/knobs.json`; data sets that are there and not asked for stay as they are. All of it
is counted, none of it timed, so it does not depend on the machine: a search takes about as long as
it computes distances.
"""

import json
from pathlib import Path

import click

from benchmarks import datasets
from benchmarks.cpu.growth import counted
from benchmarks.peers import K, Ours, Setting
from benchmarks.race import Side
from benchmarks.record import RESULTS, SETTING, about, rounded

SETS = {"glove": "words", "verses": "sentences", "verses768": "sentences"}
EFS = (16, 32, 64, 128, 256)
SETTINGS = [(16, 200), (8, 200), (32, 200), (16, 50), (16, 100), (16, 400)]  # M, ef_construction


def counts(data: datasets.Dataset) -> dict:
    """Recall@10 and distances a query at each of EFS, and bytes a row, by what was built with."""
    found: dict = {"recall": {}, "distances": {}, "bytes_a_row": {}}
    for M, ef_construction in SETTINGS:
        key = f"M {M}, ef_construction {ef_construction}"
        peer = Ours("fp32")
        peer.build(data.base, Setting(M, ef_construction, SETTING.seed), threads=2)
        side = Side(key, peer, data)
        found["recall"][key] = [side.recall(ef) for ef in EFS]
        found["distances"][key] = [float(counted(side, ef).distances.mean()) for ef in EFS]
        found["bytes_a_row"][key] = peer.index.nbytes / len(data.base)
        click.echo(f"{data.name}, {key}: {rounded(found['recall'][key])}", err=True)
    return found


@click.command()
@click.option("--rows", default=50_000, show_default=True, help="Of each data set.")
@click.option("--queries", default=2000, show_default=True, help="Of each data set.")
@click.option("--datasets", "names", default=",".join(SETS), show_default=True)
@click.option("--out", type=Path, default=RESULTS / "knobs.json", show_default=True)
def main(rows: int, queries: int, names: str, out: Path) -> None:
    """What ef, M and ef_construction buy."""
    sets = json.loads(out.read_text())["sets"] if out.exists() else {}
    for name in names.split(","):
        data = datasets.load(name, rows, queries)
        n, dim = data.base.shape
        sets[name] = {
            "title": SETS.get(name, name),
            "rows": n,
            "dim": dim,
            "queries": queries,
            **counts(data),
        }
    results = {**about([]), "ef": EFS, "k": K, "sets": sets}
    out.write_text(json.dumps(rounded(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
