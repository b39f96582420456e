"""What is handed to ann-benchmarks and to VIBE does what their runners ask of it."""

import importlib
import sys
from itertools import product
from types import ModuleType

import numpy as np
import oracle
import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra `ray`")

BASE, QUERIES = oracle.gaussian(900, 32, seed=1), oracle.gaussian(40, 32, seed=2)
K = 10
MEANING = {  # of the harnesses' names of distances
    "angular": "cosine",
    "cosine": "cosine",
    "normalized": "cosine",  # of rows of unit length
    "euclidean": "euclidean",
    "ip": "ip",
}


class BaseANN:
    """What the harnesses' class of this name does beside defaults that are overridden."""

    def get_batch_results(self):
        return self.res

    def get_additional(self):
        return {}


@pytest.fixture(params=["ann_benchmarks", "vibe"])
def submission(request, monkeypatch):
    """The name, the module and its configuration, where the harness is this class alone."""
    stand_in = ModuleType("stand-in")
    stand_in.BaseANN = BaseANN
    parts = f"{request.param}.algorithms.base.module".split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), stand_in)
    folder = importlib.import_module(f"benchmarks.{request.param}")
    module = importlib.import_module(f"benchmarks.{request.param}.module")
    with open(f"{folder.__path__[0]}/config.yml") as file:
        ((config,),) = yaml.safe_load(file)["float"].values()
    return request.param, module, config


def combinations(of: list | dict) -> list[tuple]:
    """Lists of arguments, as the runners make them."""
    return list(product(*(of.values() if isinstance(of, dict) else of)))


def test_it_runs_as_it_is_configured(submission):
    harness, module, config = submission
    assert config["module"] == f"{harness}.algorithms.hnsw_gpu"
    assert config["base_args"] == ["@metric"]
    truth = oracle.distances(QUERIES, BASE, "cosine")
    for group in config["run_groups"].values():
        algorithm = getattr(module, config["constructor"])(
            "angular" if harness == "ann_benchmarks" else "cosine", *combinations(group["args"])[2]
        )
        algorithm.fit(BASE)
        rungs = combinations(group["query_args"])
        recalls, names = [], set()
        for ef, rerank in (rungs[0], rungs[-1]):
            algorithm.set_query_arguments(ef, rerank)
            found = np.stack([algorithm.query(query, K) for query in QUERIES])
            recalls.append(oracle.recall(found, truth, K))
            names.add(str(algorithm))
            if harness == "ann_benchmarks":
                algorithm.batch_query(QUERIES, K)
                np.testing.assert_array_equal(algorithm.get_batch_results(), found)
        assert recalls[0] <= recalls[-1] and recalls[-1] >= 0.98
        assert len(names) == 2
        assert algorithm.get_additional() == {"index_bytes": algorithm.index.nbytes}


def test_metrics_order_as_the_harness_does(submission):
    _, module, _ = submission
    lengths = np.linspace(0.5, 2, len(BASE))[:, None].astype(np.float32)
    for theirs in module.METRICS:
        rows = oracle.unit(BASE) if theirs == "normalized" else BASE * lengths
        algorithm = module.HnswGpu(theirs, "fp32", 8, 60)
        algorithm.fit(rows)
        algorithm.set_query_arguments(200, None)
        found = np.stack([algorithm.query(query, K) for query in QUERIES])
        truth = oracle.distances(QUERIES, rows, MEANING[theirs])
        assert oracle.recall(found, truth, K) >= 0.98, theirs
