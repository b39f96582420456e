"""What search.cu reads of rows and links, to the byte, beside a search that forgets nothing (R7).

The figures are kept in `baselines/bytes_read.txt`, to be reviewed as a diff:

    HNSW_GPU_WRITE_BASELINES=1 python -m pytest tests/gpu/test_bytes_read.py
"""

import difflib
import os
from pathlib import Path

import emulated
import oracle
import ptx
import pytest

import hnsw_gpu
from hnsw_gpu.engine import search
from hnsw_gpu.engine.vectors import encode_queries
from hnsw_gpu.gpu import launch_plan

pytestmark = pytest.mark.slow

ROWS, DIM, QUERIES = 6000, 24, 40
BASELINE = Path(__file__).parent / "baselines" / "bytes_read.txt"
HOW_TO_WRITE = "HNSW_GPU_WRITE_BASELINES=1 python -m pytest tests/gpu/test_bytes_read.py"
DESCRIPTION = f"""\
# Bytes that search.cu reads of rows and of layer 0, by executing its PTX: {QUERIES} queries
# in {ROWS:,} clustered vectors of {DIM} dimensions, l2, fp32, M = 16, k = 10, the plan's visited
# cache.
#
# distances   computed a query
# forgotten   of those, how many more than the CPU engine, which forgets nothing it visited (R7)
# expanding   distances beside those of expand = 1
# hops        expansions a query
#
# Written by   {HOW_TO_WRITE}
"""
HEADER = "  ef expand buckets   hops  distances  forgotten  expanding   row bytes  link bytes"


@pytest.fixture(scope="module")
def index() -> hnsw_gpu.Index:
    made = hnsw_gpu.Index(DIM, "l2", M=16, ef_construction=100)
    made.add(oracle.gaussian(ROWS, DIM, seed=1, clusters=60, spread=0.5))
    return made


@pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing())
def test_bytes_read_are_those_of_the_baseline(index: hnsw_gpu.Index) -> None:
    lines = [HEADER]
    for ef in (32, 64, 128, 256):
        one = None
        for expand in (1, 2, 4, 8):
            hops, distances, exact, read, buckets = counted(index, ef, expand)
            one = one or distances
            lines.append(
                f"{ef:4d} {expand:6d} {buckets:7d} {hops:6.1f} {distances:10.1f} "
                f"{distances / exact - 1:9.2%} {distances / one - 1:10.2%} "
                f"{read['rows'] // QUERIES:11,} {read['neighbors0'] // QUERIES:11,}"
            )
            assert read["rows"] == round(distances * QUERIES) * index._state.rows.shape[1] * 4
            assert distances <= 1.05 * exact
    found = DESCRIPTION + "\n" + "\n".join(lines) + "\n"
    if os.environ.get("HNSW_GPU_WRITE_BASELINES"):
        BASELINE.write_text(found)
    expected = BASELINE.read_text()
    change = "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), lineterm=""))
    assert not change, f"{change}\nif this is meant: {HOW_TO_WRITE}"


def counted(index: hnsw_gpu.Index, ef: int, expand: int) -> tuple[float, float, float, dict, int]:
    """Hops and distances a query, distances of the CPU engine, bytes read, buckets."""
    queries = encode_queries(
        oracle.gaussian(QUERIES, DIM, seed=2, clusters=60, spread=0.5), "l2", "fp32"
    )
    graph, rows = index._state.graph, index._state.rows[:ROWS]
    buckets, tag_bits = launch_plan.visited_cache(
        launch_plan.BeamShape(ef=ef, k=10, expand=expand), ROWS
    )
    build = emulated.Build("l2", "fp32", DIM, 16, tag_bits=tag_bits, arch=90)
    read: dict[str, int] = {}
    how = {"k": 10, "ef": ef, "expand": expand}
    found = emulated.search(
        build, graph, rows, queries, **how, visited_buckets=buckets, bytes_read=read, seed=None
    )
    wanted = search.search_graph(graph, rows, queries, "l2", **how)
    return found.hops.mean(), found.distances.mean(), wanted.distances.mean(), read, buckets
