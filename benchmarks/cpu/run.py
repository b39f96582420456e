"""The benchmarks' command line: `python -m benchmarks.cpu.run --peers hnswlib,faiss,usearch`."""

import json
from pathlib import Path

import click

from benchmarks import datasets, plot
from benchmarks.cpu import anatomy, growth, memory
from benchmarks.peers import PEERS, Ours, make
from benchmarks.race import race_builds, race_searches
from benchmarks.record import RESULTS, SETTING, about, rounded

OURS = ["ours-fp32", "ours-int8"]
SECTIONS = ["race", "memory", "growth", "anatomy"]
RECALLS = (0.90, 0.95, 0.99)  # where ratios are taken, on one thread and on two
CURVE = (0.80, 0.85, 0.93, 0.97, 0.98)  # points for the plot only, one thread
EFS = (16, 32, 64, 128, 256)  # where recall is compared at equal ef


def names(_context: click.Context, option: click.Parameter, text: str) -> list[str]:
    """The names in "a,b,c"; the first unknown one is an error."""
    known = {"peers": list(PEERS), "sets": list(datasets.SOURCES), "only": SECTIONS}[
        str(option.name)
    ]
    chosen = [name for name in text.split(",") if name]
    for name in chosen:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return chosen


@click.command()
@click.option("--peers", default="", callback=names, help="Of hnswlib, faiss, usearch.")
@click.option(
    "--datasets", "sets", default="glove,verses,clusters", show_default=True, callback=names
)
@click.option(
    "--only",
    default=",".join(SECTIONS),
    show_default=True,
    callback=names,
    help="Sections to measure; the others stay in the results as they are.",
)
@click.option("--rounds", default=5, show_default=True, help="Turns of each timed search.")
@click.option("--build-rounds", default=3, show_default=True, help="Turns of each timed build.")
@click.option("--seconds", default=0.5, show_default=True, help="Least length of a timed search.")
@click.option("--quick", is_flag=True, help="A smoke test on 2,000 rows: its times mean nothing.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "cpu.json"
)
def main(
    peers: list[str],
    sets: list[str],
    only: list[str],
    rounds: int,
    build_rounds: int,
    seconds: float,
    quick: bool,
    out: Path,
) -> None:
    """The engine on the CPU: search, build, memory, growth with n, and where the time goes."""
    if quick:
        sets, rounds, build_rounds, seconds = ["tiny"], 1, 1, 0.01
    sizes = [500, 1_000, 2_000] if quick else [10_000, 33_000, 100_000, 1_000_000]
    contenders = [*OURS, *peers]
    work = {
        "race": lambda: {
            name: race(name, contenders, rounds, build_rounds, seconds) for name in sets
        },
        "memory": lambda: {name: memory.measure(name, sets[0], threads=2) for name in contenders},
        "growth": lambda: growth.measure(sets[0], sizes, SETTING, 64, 0.95, rounds, seconds),
        "anatomy": lambda: {name: dissect(sets[0], name, rounds) for name in OURS},
    }
    results = json.loads(out.read_text()) if out.exists() else {}
    for section in only:
        click.echo(f"{section} ...", err=True)
        results[section] = {"about": about(peers), "results": work[section]()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rounded(results), indent=1) + "\n")
    report(results)
    plot.draw(results, out.with_suffix(".png"))


def race(
    dataset_name: str, contenders: list[str], rounds: int, build_rounds: int, seconds: float
) -> dict:
    """Builds and searches of one data set, the libraries in turn."""
    dataset = datasets.load(dataset_name)
    sides, build = race_builds(contenders, dataset, SETTING, 2, build_rounds)
    searches = [
        race_searches(sides, recall, threads, rounds, seconds)
        for threads in (1, 2)
        for recall in RECALLS
    ]
    curve = [race_searches(sides, recall, 1, min(rounds, 3), seconds) for recall in CURVE]
    return {
        "rows": len(dataset.base),
        "dim": dataset.base.shape[1],
        "queries": len(dataset.queries),
        "build": build,
        "recall_at_ef": {side.name: {str(ef): side.recall(ef) for ef in EFS} for side in sides},
        "searches": searches,
        "curve": curve,
    }


def dissect(dataset_name: str, name: str, rounds: int) -> dict:
    """Where the time goes in one of our indexes, and the limits of the machine beside it."""
    dataset = datasets.load(dataset_name)
    peer = make(name, dataset.base.shape[1])
    assert isinstance(peer, Ours)
    peer.build(dataset.base, SETTING, threads=2)
    graph, rows = peer.arrays
    queries = dataset.queries[:: max(1, len(dataset.queries) // 2000)]
    return {
        "dataset": dataset_name,
        "shares": [
            anatomy.shares(graph, rows, queries, peer.dtype, ef, rounds) for ef in (64, 256)
        ],
        "limits": [anatomy.limits(rows, queries, peer.dtype, t, rounds) for t in (1, 2)],
    }


def report(results: dict) -> None:
    """The ratios, as a table."""
    for name, dataset in results.get("race", {}).get("results", {}).items():
        click.echo(f"\n{name}: {dataset['rows']:,} x {dataset['dim']}")
        for pair, ratio in dataset["build"]["ratios"].items():
            click.echo(f"  build seconds          {pair:22} {ratio['median']:6.2f}")
        for peer, recalls in dataset["recall_at_ef"].items():
            if peer not in OURS:
                ours = dataset["recall_at_ef"]["ours-fp32"]
                gaps = ", ".join(f"{ef}: {ours[ef] - recalls[ef]:+.4f}" for ef in recalls)
                click.echo(f"  recall at ef, ours-fp32 minus {peer}: {gaps}")
        for entry in dataset["searches"]:
            for pair, ratio in entry["ratios"].items():
                label = f"recall {entry['recall']:.2f}, {entry['threads']} threads"
                spread = f"({ratio['low']:.2f} .. {ratio['high']:.2f})"
                click.echo(f"  {label:22} {pair:22} {ratio['median']:6.2f}  {spread}")
    for name, growth_of in results.get("memory", {}).get("results", {}).items():
        share = growth_of["growth_over_rows_and_layer_0"]
        click.echo(f"memory of {name}: {share:.2f} x (rows + layer 0)")


if __name__ == "__main__":
    main()
