"""Small searches by every kernel, which must equal the CPU's, key for key."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import hnsw_gpu
from benchmarks.gpu.kernel_times import places
from hnsw_gpu.engine.walk import Queries, Walk


def check_index(cupy: Any, dtype: str, refine: bool, rows: int) -> int:
    """How many answers were compared; AssertionError where one differs."""
    rng = np.random.default_rng(1)
    vectors = rng.integers(-1, 2, (rows, 24)).astype(np.float32)  # sums in any order are the same
    index = hnsw_gpu.Index(24, "l2", dtype, refine=refine, M=4, ef_construction=32, device="cpu")
    index.add(vectors)
    sms = cupy.cuda.runtime.getDeviceProperties(0)["multiProcessorCount"]
    mask = rng.random(rows) < 0.7
    searches: list[Callable[[], tuple]] = [
        lambda: index.search(vectors[:9], 5, ef=20, expand=4, allow=mask),
        lambda: index.search(vectors[:9], 5, ef=20, expand=4, allow=np.arange(0, rows, 19)),
        lambda: index._searched(
            lambda _, engine: engine.walk(Queries(own=np.arange(9)), Walk(5, 20, expand=4))
        ),
        lambda: index._searched(lambda _, engine: (engine.own_keys(np.arange(rows)),)),
    ]
    for batch in (sms, 2 * sms, 4 * sms + 1):  # 8, 4 warps a query, and 1
        queries = vectors[places(batch, 0, rows)]
        searches.append(functools.partial(index.search, queries, 5, ef=20, expand=4))
    wanted: list[tuple] = [search() for search in searches]
    index.to("cuda")
    found: list[tuple] = [search() for search in searches]
    on_gpu: Any = index.search(cupy.asarray(vectors[:9]), 5, ef=20, expand=4)
    cupy.cuda.Device().synchronize()
    found.append(tuple(array.get() for array in on_gpu))
    index.to("cpu")
    wanted.append(index.search(vectors[:9], 5, ef=20, expand=4))
    for ours, theirs in zip(found, wanted, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
    return sum(len(answer[0]) for answer in found)
