"""What a GPU run says: the machine, a table, a plot."""

import shutil
import subprocess
from pathlib import Path

import click


def gpu_facts() -> dict:
    """What a reader needs to judge or repeat the results."""
    import cupy

    runtime, device = cupy.cuda.runtime, cupy.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": device.compute_capability,
        "sms": properties["multiProcessorCount"],
        "memory_bytes": device.mem_info[1],
        "l2_bytes": runtime.deviceGetAttribute(runtime.cudaDevAttrL2CacheSize, device.id),
        "driver": driver(device.id),
        "cuda_of_driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "nvrtc": list(cupy.cuda.nvrtc.getVersion()),
        "cupy": cupy.__version__,
    }


def driver(device: int) -> str:
    """Version of the driver, clocks and power limit, as nvidia-smi gives them; "" without it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    asked = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", asked, "--format=csv,noheader", f"--id={device}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def report(results: dict) -> None:
    """The points, as a table."""
    for name, found in results["results"].items():
        size = f"{found['rows']:,} x {found['dim']} {found['dtype']}"
        click.echo(f"\n{name}: {size}, built in {found['build_seconds']:.1f} s")
        for series in found["series"]:
            own = " (the index's own)" if series["is_own"] else ""
            about = f"ef {series['ef']}, recall {series['recall']:.4f}"
            click.echo(f"  expand {series['expand']}{own}, {about}")
            for point in series["points"]:
                click.echo(
                    f"    {point['queries']:7,} queries  {point['warps']} warps  "
                    f"kernel {point['kernel']['queries_per_s']:11,.0f} /s  "
                    f"roofline {point['roofline_ratio']:6.3f}  "
                    f"numpy {point['numpy']['queries_per_s']:11,.0f} /s"
                )
        for peer, side in found["peers"].items():
            click.echo(f"  {peer}, ef {side['ef']}, recall {side['recall']:.4f}")
            for point in side["points"]:
                kernel = (
                    f"{point['kernel']['queries_per_s']:11,.0f} /s" if "kernel" in point else ""
                )
                click.echo(
                    f"    {point['queries']:7,} queries           "
                    f"kernel {kernel:14}                   "
                    f"numpy {point['numpy']['queries_per_s']:11,.0f} /s"
                )
    for line in results["left_out"]:
        click.echo(f"left out: {line}")
    if "note" in results:
        click.echo(f"\n{results['note']}")


COLORS = {"ours": "#b3261e", "hnswlib": "#1a5fb4", "cagra": "#4a7f3c"}


def draw(results: dict, path: Path) -> None:
    """Queries/s over the batch, a column a data set, and below it the share of the roofline."""
    from matplotlib.figure import Figure

    from benchmarks.plot import style

    found = results["results"]
    if not found:
        return
    figure = Figure(figsize=(4.2 * len(found) + 1, 6.4), layout="constrained")
    every = figure.subplots(2, len(found), squeeze=False, sharex=True, height_ratios=[2, 1])
    for column, (name, one) in enumerate(found.items()):
        rates, shares = every[:, column]
        own = next(series for series in one["series"] if series["is_own"])
        sides = {"ours": own, **one["peers"]}
        for side, series in sides.items():
            for kind, line in (("kernel", "o-"), ("numpy", "o--")):
                points = [p for p in series["points"] if kind in p]
                if points:
                    rates.plot(
                        [p["queries"] for p in points],
                        [p[kind]["queries_per_s"] for p in points],
                        line,
                        color=COLORS[side],
                        label=f"{'hnsw_gpu' if side == 'ours' else side}, {kind}",
                    )
        batches = [point["queries"] for point in own["points"]]
        limits = [point["roofline_queries_per_s"] for point in own["points"]]
        rates.plot(batches, limits, ":", color="#77767b", label="roofline")
        rates.set_xscale("log")
        rates.set_yscale("log")
        style(rates, f"{name}, {one['rows'] / 1000:,.3g}k, {one['dtype']}", "", "queries/s")
        for series in one["series"]:
            ratios = [point["roofline_ratio"] for point in series["points"]]
            shares.plot(batches, ratios, "o-", label=f"expand {series['expand']}")
        shares.set_ylim(bottom=0)
        style(shares, "", "queries in a batch", "share of roofline")
    every[0, 0].legend(fontsize=9, frameon=False)
    every[1, 0].legend(fontsize=9, frameon=False)
    if "note" in results:
        figure.suptitle(results["note"], fontsize=10)
    figure.savefig(path, dpi=140)
