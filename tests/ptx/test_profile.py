"""What search.cu executes for a query: counted, and kept in `baselines/profile.txt`.

HNSW_GPU_WRITE_BASELINES=1 python -m pytest tests/ptx/test_profile.py
"""

import difflib
import os
import re
from pathlib import Path

import pytest

import ptx

if ptx.missing():
    pytest.skip(ptx.missing(), allow_module_level=True)

import cuda_toolkit
import emulated
import numpy as np

import hnsw_gpu
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.engine.vectors import empty_rows, encode, encode_queries
from hnsw_gpu.gpu import kernel_source, launch_plan
from ptx import costs

pytestmark = pytest.mark.slow

ROWS, QUERIES, K, M, EXPAND, ARCH = 10_000, 32, 10, 16, 4, 90
CASES = [("fp32", 100, 64), ("fp32", 100, 128), ("fp16", 768, 64), ("fp16", 768, 128)]
CASES += [("int4", 100, 64), ("int4", 768, 128)]
LINES = 24  # of a case
BASELINE = Path(__file__).parent / "baselines" / "profile.txt"
HOW_TO_WRITE = "HNSW_GPU_WRITE_BASELINES=1 python -m pytest tests/ptx/test_profile.py"
DESCRIPTION = f"""\
# What search.cu executes: PTX instructions of a warp, means a query. One warp a query; lanes that
# part come together again as soon as they can. Rows are whole numbers of nearly equal length,
# compared by inner product, which is what cosine is but for a constant.
#
# rows     {ROWS:,}, and {QUERIES} queries; M = {M}, k = {K}, expand = {EXPAND}, sm_{ARCH}
# lanes    active, of 32
# units    of an access: 32-byte sectors of global memory, wavefronts of shared memory
#
# Machine code has fewer instructions than PTX: many moves vanish in it.
# Written by   {HOW_TO_WRITE}
# Another compiler gives other numbers: they are compared by this version alone.
#
# compiler: NVRTC {cuda_toolkit.find().version}
"""


def vectors(dim: int) -> np.ndarray:
    """Whole numbers, a few directions strong as in embeddings; the last rows are queries."""
    rng = np.random.default_rng(dim)
    drawn = rng.standard_normal((ROWS + QUERIES, dim)) * np.arange(1, dim + 1) ** -0.35
    turned = drawn @ np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return np.rint(8 * np.sqrt(dim) * turned / np.linalg.norm(turned, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def profiles() -> dict[tuple, tuple]:
    """Of each case the result and the profile."""
    made: dict[tuple, tuple] = {}
    indexes: dict[int, hnsw_gpu.Index] = {}
    for dtype, dim, ef in CASES:
        numbers = vectors(dim).astype(np.float32)
        if dim not in indexes:
            indexes[dim] = hnsw_gpu.Index(dim, "ip", M=M, ef_construction=100)
            indexes[dim].add(numbers[:ROWS])
        graph = indexes[dim]._state.graph
        rows = encode(numbers[:ROWS], "ip", dtype)
        queries = encode_queries(numbers[ROWS:], "ip", dtype)
        walk = launch_plan.BeamShape(ef=ef, k=K, expand=EXPAND)
        buckets, tag_bits = launch_plan.visited_cache(walk, ROWS)
        build = emulated.Build("ip", dtype, dim, M, tag_bits=tag_bits, arch=ARCH)
        how = {"k": K, "ef": ef, "expand": EXPAND}
        found = emulated.search(
            build, graph, rows, queries, **how, visited_buckets=buckets, groups=4, seed=None
        )
        wanted = search_graph(graph, rows, queries, "ip", **how)
        np.testing.assert_array_equal(found.keys, wanted.keys)
        made[dtype, dim, ef] = found, build.library("search").profile
    return made


def table(case: tuple, found, profile) -> str:
    dtype, dim, ef = case
    steps, distances = costs.steps(profile), int(found.distances.sum())
    total = int(profile.executions.sum())
    of_distance = costs.distance_instructions(profile)
    lanes = profile.lanes.sum() / total
    lines = [
        f"{dtype} {dim}-d, ef {ef}",
        f"  a query      {total / QUERIES:,.0f} instructions, {lanes:.1f} lanes; "
        f"{distances / QUERIES:,.1f} distances, {found.hops.mean():.1f} hops, "
        f"{steps / QUERIES:.1f} steps",
        f"  a distance   {of_distance / distances:.2f} instructions",
        f"  a step       {(total - of_distance) / steps:,.1f} instructions",
        "",
    ]

    def add(title: str, named: dict[str, costs.Cost], has_units: bool) -> None:
        lines.append(f"  {title:42} a query   share  lanes{'  units' if has_units else ''}")
        for name, cost in named.items():
            units = f"{cost.units:7.2f}" if has_units and cost.units else ""
            lines.append(
                f"  {name:40} {cost.executions / QUERIES:9,.0f} {cost.executions / total:7.1%} "
                f"{cost.lanes:6.1f}{units}".rstrip()
            )
        lines.append("")

    add("class", costs.by_class(profile), True)
    named = {
        name: c for name, c in costs.by_function(profile).items() if c.executions > total / 200
    }
    add("function", named, False)
    accesses = list(costs.by_access(profile).items())[: LINES // 2]
    add(
        "access", {f"{kind}, {text_of(where)}"[:40]: cost for (kind, where), cost in accesses}, True
    )
    dearest = list(costs.by_line(profile).items())[:LINES]
    add("line", {text_of(place): cost for place, cost in dearest}, False)
    return "\n".join(lines)


def text_of(place: tuple[str, int]) -> str:
    """The line's own text: a number would change with every line above it."""
    file, line = place
    if not line:
        return costs.function_of(())
    text = (kernel_source.folder() / file).read_text().splitlines()[line - 1].strip()
    return f"{file.partition('.')[0]}: {text}"[:40]


def test_profile_is_that_of_the_baseline(profiles) -> None:
    made = DESCRIPTION + "\n" + "\n".join(table(case, *profiles[case]) for case in CASES)
    if os.environ.get("HNSW_GPU_WRITE_BASELINES"):
        BASELINE.parent.mkdir(exist_ok=True)
        BASELINE.write_text(made)
    kept = BASELINE.read_text()
    version = re.search(r"# compiler: NVRTC (\S+)", kept)
    if version is None or version[1] != cuda_toolkit.find().version:
        pytest.skip(f"the baseline is of {version and version[0]}")
    change = "\n".join(
        difflib.unified_diff(kept.splitlines(), made.splitlines(), "baseline", "now", lineterm="")
    )
    assert not change, f"{change}\nif this is meant: {HOW_TO_WRITE}"


def test_rows_are_read_whole_and_once(profiles) -> None:
    """Each row in as many sectors as it has: nothing is fetched in vain."""
    for (dtype, dim, _), (found, profile) in profiles.items():
        row_bytes = empty_rows(1, dim, dtype).nbytes
        (rows,) = (one for one in profile.memory if one.nbytes == ROWS * row_bytes)
        wanted = int(found.distances.sum()) * row_bytes
        assert profile.read_of(rows) == (wanted, wanted // 32)


def test_classes_and_lines_hold_all_instructions(profiles) -> None:
    for _, profile in profiles.values():
        total = int(profile.executions.sum())
        for parts in (costs.by_class, costs.by_function, costs.by_line):
            assert sum(cost.executions for cost in parts(profile).values()) == total
        moved = costs.by_line(profile).get(("", 0))
        assert moved is None or moved.executions < total / 20
        assert not any(name.endswith("?") for name in costs.by_function(profile))


def test_steps_are_between_hops_and_the_shortest_way(profiles) -> None:
    for found, profile in profiles.values():
        hops = int(found.hops.sum())
        assert hops / EXPAND <= costs.steps(profile) <= hops + QUERIES * 8
