"""Draws what `benchmarks.cpu.run` found: recall against queries/s, a search from inside."""

import math
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers import LABELS

COLORS = {
    "ours-int4": "#7b1fa2",
    "ours-int8": "#b3261e",
    "ours-fp32": "#e8710a",
    "hnswlib": "#1a5fb4",
    "svs": "#0f9d9d",
    "faiss": "#4a7f3c",
    "faiss-ivf": "#9bc53d",
    "usearch": "#77767b",
}
PARTS = {
    "links": "#c8c6c4",
    "visited": "#8f8d8b",
    "arithmetic": "#1a5fb4",
    "memory": "#7fa8d9",
    "beam": "#e8710a",
}
LEGEND: dict[str, Any] = {"fontsize": 12, "frameon": False}
TITLES = {"glove": "GloVe words", "verses": "Sentences", "clusters": "Gaussian clusters"}


def draw(results: dict, path: Path) -> None:
    """`path` shows the races; beside it, NAME-inside.png the growth and the anatomy."""
    if "race" in results:
        races = results["race"]["results"]
        shown = [name for name in ("glove", "verses") if name in races] or list(races)[:2]
        figure = titled(10.4, 6.0, results["race"]["about"])
        every = columns(figure, len(shown))
        for axes, name in zip(every, shown, strict=True):
            draw_race(axes, races[name], TITLES.get(name, name))
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, **LEGEND)
        figure.savefig(path, dpi=160)
    if "growth" in results and "anatomy" in results:
        figure = titled(10.4, 5.0, results["growth"]["about"])
        left, right = columns(figure, 2)
        draw_growth(left, results["growth"]["results"])
        draw_anatomy(right, results["anatomy"]["results"])
        figure.savefig(path.with_name(f"{path.stem}-inside.png"), dpi=160)


def titled(width: float, height: float, about: dict) -> Figure:
    """A figure that says which kind of processor it is of."""
    figure = Figure(figsize=(width, height), layout="constrained")
    model = about["processor"].partition(" (")[0]
    figure.suptitle(f"{model}, {about['kind']}", x=0.01, ha="left", fontsize=12, color="#555555")
    return figure


def columns(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold")
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_race(axes: Axes, race: dict, title: str) -> None:
    """Queries/s over recall on one thread; recall is stretched towards 1.

    Drawn from processor time: the points were timed minutes apart, and other programs' share of the
    machine would draw kinks.
    """
    entries = [entry for entry in race["searches"] + race["curve"] if entry["threads"] == 1]
    title = f"{title}, {race['rows'] / 1000:,.0f}k × {race['dim']}"
    entries.sort(key=lambda entry: entry["recall"])
    names = [name for name in COLORS if name in race["build"]["seconds"]]
    for name in names:
        points = [
            (stretched(entry["recall"]), entry["queries_per_processor_s"][name])
            for entry in entries
            if name in entry["queries_per_s"] and entry["ef"][name][0] != entry["ef"][name][1]
        ]
        if points:
            is_ours = name.startswith("ours")
            axes.plot(
                *zip(*points, strict=True),
                "o-",
                color=COLORS[name],
                linewidth=3 if is_ours else 1.8,
                markersize=6 if is_ours else 4.5,
                label=LABELS.get(name, name),
            )
    ticks = sorted({entry["recall"] for entry in entries if entry["queries_per_s"]})
    kept = [tick for tick in ticks if tick in (0.8, 0.9, 0.95, 0.98, 0.99)]
    axes.set_xticks([stretched(tick) for tick in kept], [f"{tick:.2f}" for tick in kept])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(10, subs=(1, 2, 5)))
    axes.margins(y=0.08)
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    style(axes, title, "recall@10", "queries/s of processor time, one thread")


def stretched(recall: float) -> float:
    return -math.log10(1 - recall)


def draw_growth(axes: Axes, growth: dict) -> None:
    """Microseconds a query over rows, at a fixed ef and a fixed recall."""
    series = [
        (f"ef {growth['fixed_ef']['ef']}", growth["fixed_ef"]["points"], "#1a5fb4"),
        (f"recall {growth['fixed_recall']['recall']}", growth["fixed_recall"]["points"], "#b3261e"),
    ]
    for label, points, color in series:
        rows = [point["rows"] for point in points]
        axes.plot(rows, [p["microseconds"] for p in points], "o-", color=color, label=label, lw=2.5)
    ticks = [point["rows"] for point in growth["fixed_ef"]["points"]]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick / 1000:.3g}k" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    style(axes, "A search as the index grows", "rows (log)", "microseconds a query")
    axes.legend(**LEGEND)


def draw_anatomy(axes: Axes, anatomy: dict) -> None:
    """A bar for each dtype and ef: nanoseconds a distance, by part."""
    bars = [
        (f"{name.removeprefix('ours-')}, ef {entry['ef']}", entry["parts_ns_per_distance"])
        for name, found in anatomy.items()
        for entry in found["shares"]
    ][::-1]
    start = [0.0] * len(bars)
    for part, color in PARTS.items():
        widths = [max(0.0, parts[part]) for _, parts in bars]
        axes.barh([label for label, _ in bars], widths, left=start, color=color, label=part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    style(axes, "Where the time goes", "nanoseconds a distance computed", "")
    axes.grid(False, axis="y")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), **LEGEND)
