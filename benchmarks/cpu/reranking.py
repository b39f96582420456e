"""Recall@10 of int4 rows by how many of the beam the finer rows re-rank, at equal ef.

python -m benchmarks.cpu.reranking

writes `results/reranking.json`. Recall does not depend on the machine.
"""

import json
from pathlib import Path

import click

from benchmarks import datasets
from benchmarks.record import RESULTS, SETTING, about, rounded
from hnsw_gpu import Index

DEPTHS: tuple[int | None, ...] = (10, 15, 20, 40, None)
EFS = (64, 96, 256)


def recalls(name: str, rows: int, queries: int, dtype: str) -> dict[str, list[float]]:
    """Recall@10 at each of EFS, by rerank; None is "all"."""
    data = datasets.load(name, rows, queries)
    index = Index(
        data.base.shape[1], "cosine", dtype, refine="fp16",
        M=SETTING.M, ef_construction=SETTING.ef_construction, seed=SETTING.seed,
    )  # fmt: skip
    index.add(data.base)
    return {
        str(rerank or "all"): [
            datasets.recall(data, index.search(data.queries, 10, ef=ef, rerank=rerank).labels, 10)
            for ef in EFS
        ]
        for rerank in DEPTHS
    }


@click.command()
@click.option("--rows", default=100_000, show_default=True, help="Of each data set.")
@click.option("--queries", default=3000, show_default=True, help="Of each data set.")
@click.option("--datasets", "names", default="glove,verses", show_default=True)
@click.option("--out", type=Path, default=RESULTS / "reranking.json", show_default=True)
def main(rows: int, queries: int, names: str, out: Path) -> None:
    """Recall by what is re-ranked."""
    results = {**about([]), "rows": rows, "queries": queries, "refine": "fp16", "ef": EFS}
    results["recall"] = {}
    for name in names.split(","):
        for dtype in ("int4", "int8"):
            found = recalls(name, rows, queries, dtype)
            results["recall"][f"{name} {dtype}"] = found
            click.echo(f"{name} {dtype}: {rounded(found)}")
    out.write_text(json.dumps(rounded(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
