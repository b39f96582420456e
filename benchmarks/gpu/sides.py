"""The sides of the GPU race: what every one is asked, and those that are not ours."""

import importlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import datasets
from benchmarks.datasets import Dataset
from benchmarks.gpu.kernel_times import Clock, Round, places, spread
from benchmarks.peers import EFS, Hnswlib, K, Setting

ITOPK = range(32, 513, 32)  # CAGRA's ef
PEERS = {"hnswlib": "hnswlib", "cagra": "cuvs"}  # name: the package that must be there


class Sizes(NamedTuple):
    """How much is measured."""

    rows: int
    queries: int
    judged: int
    batches: list[int]
    expands: list[int]  # beside the one that an index takes by itself
    rounds: int
    copied_bytes: int
    setting: Setting


def cores() -> int:
    return len(os.sched_getaffinity(0))


def judge(dataset: Dataset, search: Callable[[np.ndarray], np.ndarray]) -> float:
    """Recall of the labels that `search` gives for the queries whose answers are known."""
    asked = dataset.queries[: len(dataset.truth)]
    return datasets.recall(dataset._replace(queries=asked), search(asked), K)


def chosen_ef(
    efs: Sequence[int], target: float, recall_at: Callable[[int], float]
) -> tuple[int, float]:
    """The smallest of ascending `efs` for recall `target`, or else the last; its recall."""
    low, high = 0, len(efs) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if recall_at(efs[middle]) >= target else (middle + 1, high)
    return efs[low], recall_at(efs[low])


def wall(search: Callable[[np.ndarray], Any], queries: np.ndarray, batch: int, rounds: int) -> dict:
    """Times of searches with arrays of the host, after one to warm up."""
    times = []
    for number in range(rounds + 1):
        part = queries[places(batch, number, len(queries))]
        start = time.perf_counter()
        search(part)
        times.append(time.perf_counter() - start)
    return spread(times[1:], batch)


def raced(peer: str, dataset: Dataset, dtype: str, sizes: Sizes, target: float) -> dict:
    """A peer at its own ef for the same recall, on the same batches."""
    side: HostPeer | Cagra = Cagra() if peer == "cagra" else HostPeer()
    start = time.perf_counter()
    side.build(dataset, dtype, sizes.setting)
    build = time.perf_counter() - start

    def recall_at(ef: int) -> float:
        return judge(dataset, lambda part: side.search(part, ef))

    ef, reached = chosen_ef(side.efs, target, recall_at)
    points = []
    for batch in sizes.batches:
        point = {"queries": batch, **side.kernel(dataset.queries, batch, ef, sizes)}
        point["numpy"] = wall(
            lambda part: side.search(part, ef), dataset.queries, batch, sizes.rounds
        )
        points.append(point)
    return {"ef": ef, "recall": reached, "build_seconds": build, **side.facts, "points": points}


class HostPeer:
    """hnswlib, with all cores of the host."""

    efs: Sequence[int] = EFS

    def build(self, dataset: Dataset, dtype: str, setting: Setting) -> None:
        self.facts = {"threads": cores(), "dtype": "fp32"}
        self.peer = Hnswlib()
        self.peer.build(dataset.base, setting, cores())

    def search(self, queries: np.ndarray, ef: int) -> np.ndarray:
        return self.peer.search(queries, K, ef, cores())

    def kernel(self, queries: np.ndarray, batch: int, ef: int, sizes: Sizes) -> dict:
        """It has none."""
        return {}


class Cagra:
    """cuVS's graph on the GPU, of as many links a node; `ef` is its itopk_size."""

    efs: Sequence[int] = ITOPK

    def build(self, dataset: Dataset, dtype: str, setting: Setting) -> None:
        import cupy

        resources = importlib.import_module("cuvs.common").Resources
        cagra = importlib.import_module("cuvs.neighbors").cagra

        cupy.get_default_memory_pool().free_all_blocks()  # cuVS has memory of its own
        self.facts = {"graph_degree": 2 * setting.M, "dtype": dtype}
        self.cupy, self.cagra, self.resources = cupy, cagra, resources
        self.dtype = {"fp32": np.float32, "fp16": np.float16}[dtype]
        # of unit vectors, the order by squared distance is the one by cosine
        params = cagra.IndexParams(
            metric="sqeuclidean",
            graph_degree=2 * setting.M,
            intermediate_graph_degree=4 * setting.M,
        )
        self.rows = cupy.asarray(dataset.base.astype(self.dtype))
        self.index = cagra.build(params, self.rows)

    def search(self, queries: np.ndarray, ef: int) -> np.ndarray:
        found = self.cagra.search(
            self.cagra.SearchParams(itopk_size=ef),
            self.index,
            self.cupy.asarray(queries.astype(self.dtype)),
            K,
        )
        return self.cupy.asarray(found[1]).get().astype(np.int64)

    def kernel(self, queries: np.ndarray, batch: int, ef: int, sizes: Sizes) -> dict:
        """As `kernel_times.measure` times ours."""
        clock, params = Clock(sizes.copied_bytes), self.cagra.SearchParams(itopk_size=ef)

        def timed(number: int) -> Round:
            part = queries[places(batch, number, len(queries))].astype(self.dtype)
            given = clock.upload(part)
            resources = self.resources(stream=clock.stream_ptr)
            return clock.time(
                lambda: self.cagra.search(params, self.index, given, K, resources=resources)
            )

        timed(0)
        times = [timed(number) for number in range(sizes.rounds)]
        return {"kernel": spread([one.search for one in times], batch)}
