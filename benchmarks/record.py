"""What all results have in common: where they lie, what a reader needs to judge or repeat them."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import hnsw_gpu
from benchmarks.peers import PEERS, Setting

RESULTS = Path(__file__).parent / "results"
SETTING = Setting()
MAKERS = ("AMD", "Intel")  # whose AVX-512 is not alike: ratios on one are twice those on the other


def about(peers: list[str]) -> dict:
    """What a reader needs to judge or repeat a section."""
    distributions = ["numpy", "numba", *(PEERS[name].distribution for name in peers)]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "kind": kind(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            "hnsw-gpu": hnsw_gpu.__version__,
            **{name: importlib.metadata.version(name) for name in distributions},
        },
        "blas_settings": {k: v for k, v in os.environ.items() if k.startswith("OPENBLAS_")},
        "metric": "cosine",
        "k": 10,
        **SETTING._asdict(),
    }


def processor() -> str:
    """Model and the vector extensions that matter here; those that were left unused are named."""
    model, flags = cpuinfo()
    present = [flag for flag in ("avx2", "avx512f", "avx512_vnni") if flag in flags]
    unused = [flag for flag in present if flag not in usable(flags)]
    used = ", ".join(flag for flag in present if flag not in unused)
    return f"{model} ({used}{'; without its ' * bool(unused)}{', '.join(unused)})"


def usable(flags: list[str]) -> list[str]:
    """Of a processor's flags those that our code may use: NUMBA_CPU_FEATURES can name fewer.

    So one that has more stands in for a kind that is not at hand.
    """
    allowed = os.environ.get("NUMBA_CPU_FEATURES")
    if allowed is None:
        return flags
    named = {feature.removeprefix("+") for feature in allowed.split(",")}
    return [flag for flag in flags if flag.replace("_", "") in named]


def kind() -> str:
    """Of processor: ratios of one say little about another, so their results lie side by side."""
    model, flags = cpuinfo()
    kinds = {"avx512_vnni": "AVX-512 VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}
    here = usable(flags)
    found = next((name for flag, name in kinds.items() if flag in here), platform.machine())
    maker = next((f", {name}" for name in MAKERS if model.startswith(name)), "")
    return found + maker


def file_of_kind(stem: str) -> Path:
    """Such as results/cpu-avx512-vnni-amd.json."""
    words = kind().lower().replace("avx-", "avx").replace(",", "").split()
    return RESULTS / f"{'-'.join([stem, *words])}.json"


def cpuinfo() -> tuple[str, list[str]]:
    """Model and flags of the first core."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        field, _, value = line.partition(":")
        facts.setdefault(field.strip(), value.strip())
    words = [facts.get("model name", platform.machine())]
    # Names such as "AMD EPYC" do not say which.
    numbers = {"family": facts.get("cpu family"), "model": facts.get("model")}
    words += [f"{name} {number}" for name, number in numbers.items() if number]
    return ", ".join(words), facts.get("flags", "").split()


def rounded(value: Any) -> Any:
    """Floats to six figures, in dicts and lists too: more is noise, and hard to read."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
