"""hnsw_gpu as VIBE (a benchmark of embeddings) asks an algorithm: one thread, one query a call."""

from typing import Any

import numpy as np
from vibe.algorithms.base.module import BaseANN

import hnsw_gpu

METRICS = {"cosine": "cosine", "normalized": "cosine", "ip": "ip", "euclidean": "l2"}
REFINE: dict[str, bool | str] = {"fp32": False, "int8": "fp32", "int4": "fp16"}


class HnswGpu(BaseANN):
    """An index on the CPU; codes are re-ranked by finer rows."""

    def __init__(self, metric: str, dtype: str, M: int, ef_construction: int) -> None:
        self.metric = METRICS[metric]
        self.dtype = dtype
        self.M = M
        self.ef_construction = ef_construction

    def fit(self, X: np.ndarray) -> None:
        self.index = hnsw_gpu.Index(
            X.shape[1], self.metric, self.dtype,
            M=self.M, ef_construction=self.ef_construction, refine=REFINE[self.dtype],
        )  # fmt: skip
        self.index.add(X, threads=1)

    def set_query_arguments(self, ef: int, rerank: int | str | None) -> None:
        self.ef = ef
        self.rerank = rerank

    def query(self, q: np.ndarray, n: int) -> np.ndarray:
        return self.index.search(q, n, ef=self.ef, rerank=self.rerank, threads=1).labels[0]

    def get_additional(self) -> dict[str, Any]:
        return {"index_bytes": self.index.nbytes}

    def __str__(self) -> str:
        return (
            f"hnsw_gpu(dtype={self.dtype}, M={self.M}, ef_construction={self.ef_construction}, "
            f"ef={self.ef}, rerank={self.rerank})"
        )
