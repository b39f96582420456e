"""The recall that `tune` promises, and what other queries then get.

python -m benchmarks.cpu.tuning

writes `results/tuning.json`: for each data set the ef found on stored vectors and on a quarter of
its queries, and the recall of half of them, others, with it. "phrases" are sums of two words'
vectors, which lie elsewhere than words. Recall does not depend on the machine.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import datasets
from benchmarks.record import RESULTS, SETTING, about, rounded
from hnsw_gpu import Index

SETS = ("glove", "verses", "clusters")
TARGETS = (0.9, 0.95, 0.99)
K = 10


def delivered(index: Index, dataset: datasets.Dataset, target: float) -> dict[str, Any]:
    """What `tune` says of stored vectors and of every fourth query; the recall of every second."""
    other = dataset._replace(queries=dataset.queries[1::2], truth=dataset.truth[1::2])
    found = {}
    for name, queries in (("stored", None), ("queries", dataset.queries[::4])):
        tuned = index.tune(target, K, queries)
        labels = index.search(other.queries, K, recall=target).labels
        found[name] = tuned._asdict() | {"delivered": datasets.recall(other, labels, K)}
    return found


def phrases(dataset: datasets.Dataset) -> datasets.Dataset:
    """As many queries, each the sum of two stored words."""
    pairs = np.random.default_rng(0).integers(0, len(dataset.base), (len(dataset.queries), 2))
    queries = datasets.unit(dataset.base[pairs].sum(axis=1))
    truth = datasets.nearest(dataset.base, queries, datasets.TRUTH_K)[0]
    return datasets.Dataset("phrases", dataset.base, queries, truth)


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RESULTS / "tuning.json",
    show_default="results/tuning.json",
)
@click.option("--dtype", default="int4", show_default=True)
def main(dtype: str, out: Path) -> None:
    """What `tune` finds, and the recall of queries that it has not seen."""
    results = {}
    for name in SETS:
        dataset = datasets.load(name, queries=4_000)
        index = Index(
            dataset.base.shape[1], dtype=dtype, M=SETTING.M,
            ef_construction=SETTING.ef_construction,
        )  # fmt: skip
        index.add(dataset.base, progress=True)
        for each in (dataset, phrases(dataset)) if name == "glove" else (dataset,):
            results[each.name] = {str(target): delivered(index, each, target) for target in TARGETS}
            click.echo(f"{each.name}: {json.dumps(rounded(results[each.name]))}")
    found = {"about": {**about([]), "dtype": dtype}, "results": results}
    out.write_text(json.dumps(rounded(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
