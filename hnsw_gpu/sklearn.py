"""Nearest neighbours for scikit-learn: `HNSWTransformer` in the place of `KNeighborsTransformer`.

Its graph is what estimators with precomputed distances or neighbours take: `KNeighborsClassifier`,
`DBSCAN`, `TSNE` and `Isomap` (metric="precomputed"), `SpectralClustering`
(affinity="precomputed_nearest_neighbors").
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs
from hnsw_gpu.index import Index

try:
    from joblib import effective_n_jobs
    from scipy.sparse import csr_matrix
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(f'{error}: pip install "hnsw-gpu[sklearn]"') from None

__all__ = ["HNSWTransformer"]

# What scikit-learn calls a distance: what we do. Its "l2" is no square.
METRICS = {"euclidean": "euclidean", "l2": "euclidean", "sqeuclidean": "l2", "cosine": "cosine"}
MODES = ("distance", "connectivity")
FLOATS = (np.float64, np.float32)


class HNSWTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Rows (m, dim) into the sparse graph of their nearest fitted rows, found by an `Index`.

    mode: what the graph holds, "distance" or "connectivity" (ones).
    n_neighbors: fitted rows a row. A fitted row is a neighbour of its own; for that "distance"
        holds one more.
    metric: "euclidean" ("l2"), "sqeuclidean" or "cosine", as scikit-learn defines them.
    M, ef_construction, dtype, device: see `hnsw_gpu.Index`.
    ef: beam capacity of searches; a larger one finds more and takes longer.
    n_jobs: threads, as scikit-learn counts them: None is 1, -1 all processors. The graph does not
        depend on it.
    random_state: of the levels: an int for the same graph every time, a RandomState, or None.

    Attributes: `index_` (the Index: labels are row numbers), `n_samples_fit_`, `n_features_in_`,
    and `feature_names_in_` where the columns had names.

    NaN, infinite values and sparse rows are refused, and so are zero rows under cosine.
    """

    def __init__(
        self,
        *,
        mode: str = "distance",
        n_neighbors: int = 5,
        metric: str = "euclidean",
        M: int = 16,
        ef_construction: int = 200,
        ef: int = 64,
        dtype: str = "fp32",
        device: str = "cpu",
        n_jobs: int | None = None,
        random_state: Any = 0,
    ) -> None:
        self.mode = mode
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.M = M
        self.ef_construction = ef_construction
        self.ef = ef
        self.dtype = dtype
        self.device = device
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None) -> "HNSWTransformer":
        """Build the index of rows (n, dim). y: not used."""
        inputs.refuse_masked("X", X)  # scikit-learn would forget the mask
        rows = validate_data(self, X, dtype=FLOATS)
        self._row_length()
        index = Index(
            rows.shape[1], METRICS[inputs.one_of("metric", self.metric, METRICS)], self.dtype,
            M=self.M, ef_construction=self.ef_construction, device=self.device,
            seed=check_random_state(self.random_state).randint(np.iinfo(np.int32).max),
        )  # fmt: skip
        index.add(rows, threads=effective_n_jobs(self.n_jobs))
        self.index_ = index
        self.n_samples_fit_ = self._n_features_out = len(rows)
        return self

    def transform(self, X: ArrayLike) -> csr_matrix:
        """The graph of rows (m, dim): float64 CSR (m, fitted rows), in each row nearest first.

        ValueError where fewer rows were fitted than one of the graph holds.
        """
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=FLOATS, reset=False)
        length = self._row_length(len(rows))
        return self._graph(
            *self.index_.search(rows, length, ef=self.ef, threads=effective_n_jobs(self.n_jobs))
        )

    def fit_transform(self, X: ArrayLike, y: object = None) -> csr_matrix:
        """As `fit(X).transform(X)`, by searches that begin at each row's own node.

        Each row comes first among its neighbours. y: not used.
        """
        self.fit(X)
        others = self._row_length(self.n_samples_fit_) - 1
        labels, distances = self.index_.neighbor_graph(
            max(others, 1), ef=self.ef, threads=effective_n_jobs(self.n_jobs)
        )
        own = np.arange(self.n_samples_fit_)[:, None]
        return self._graph(
            np.hstack([own, labels[:, :others]]),
            np.hstack([np.zeros(own.shape, np.float32), distances[:, :others]]),
        )

    def _row_length(self, asked: int | None = None) -> int:
        """Neighbours in a row of the graph, of `asked` rows if the index is there to be asked."""
        length = inputs.integer("n_neighbors", self.n_neighbors, 1)
        length += inputs.one_of("mode", self.mode, MODES) == "distance"
        if asked is not None and length > self.n_samples_fit_:
            raise ValueError(
                f"Expected n_neighbors <= n_samples_fit, but n_neighbors = {length}, "
                f"n_samples_fit = {self.n_samples_fit_}, n_samples = {asked}"
            )
        return length

    def _graph(self, labels: np.ndarray, distances: np.ndarray) -> csr_matrix:
        """Neighbours (m, length) as a graph.

        1 - cosine of copies may round to less than 0, which nobody takes for a distance. A graph of
        float32 would be converted by estimators, and SciPy sorts by column what it converts.
        """
        count, length = labels.shape
        if self.mode == "connectivity":
            weights = np.ones(labels.size)
        else:
            weights = np.maximum(distances.ravel(), 0).astype(np.float64)
        starts = np.arange(0, labels.size + 1, length)
        return csr_matrix((weights, labels.ravel(), starts), shape=(count, self.n_samples_fit_))
