"""The benchmarks' command line: `python -m benchmarks.cpu.run --peers hnswlib,svs`."""

import json
import os
from pathlib import Path

import click

from benchmarks import datasets, plot
from benchmarks.cpu import anatomy, growth, memory
from benchmarks.peers import EFS, PEERS, Ours, make, reason_to_skip
from benchmarks.race import race_builds, race_searches
from benchmarks.record import SETTING, about, file_of_kind, kind, rounded

OURS = ["ours-fp32", "ours-int8", "ours-int4"]
SECTIONS = ["race", "memory", "growth", "anatomy"]
RECALLS = (0.90, 0.95, 0.99)  # where ratios are taken, on one thread and on two
CURVE = (0.80, 0.85, 0.93, 0.97, 0.98)  # points for the plot only, one thread
COMPARED_EFS = (16, 32, 64, 128, 256)  # where recall is compared at equal ef


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
@click.option(
    "--peers",
    default="",
    callback=names,
    help=f"Of {', '.join(n for n in PEERS if n not in OURS)}.",
)
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
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=file_of_kind("cpu"),
    show_default="results/cpu-KIND.json, by the kind of processor",
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
    results = json.loads(out.read_text()) if out.exists() else {}
    refuse_mixture(results, out)
    if not quick:
        refuse_blas_settings(peers)
    left_out = {name: reason for name in peers if (reason := reason_to_skip(name))}
    peers = [name for name in peers if name not in left_out]
    for name, reason in left_out.items():
        click.echo(f"{name} is left out: {reason}", err=True)
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
    for section in only:
        click.echo(f"{section} ...", err=True)
        results[section] = {
            "about": {**about(peers), "left_out": left_out},
            "results": work[section](),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rounded(results), indent=1) + "\n")
    report(results)
    plot.draw(results, out.with_suffix(".png"))


def refuse_mixture(results: dict, out: Path) -> None:
    """One file holds one kind of processor."""
    others = {section["about"]["kind"] for section in results.values()} - {kind()}
    if others:
        raise click.UsageError(
            f"{out} holds results of {', '.join(sorted(others))} and this processor is of the kind "
            f"{kind()}: give another --out"
        )


def refuse_blas_settings(peers: list[str]) -> None:
    """A peer that leans on BLAS is not raced with the BLAS of an older processor."""
    given = [name for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if name in os.environ]
    slowed = [name for name in peers if PEERS[name].leans_on_blas]
    if given and slowed:
        raise click.UsageError(
            f"{', '.join(slowed)} leans on BLAS, which {', '.join(given)} pins: "
            f"run `env {' '.join(f'-u {name}' for name in given)} python -m benchmarks.cpu.run ...`"
        )


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
        "recall_at_ef": {
            side.name: {str(ef): side.recall(ef) for ef in COMPARED_EFS}
            for side in sides
            if EFS in side.peer.ladders
        },
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
