"""The API of hnswlib 0.8 over this engine: `import hnsw_gpu.hnswlib as hnswlib`.

Names, defaults and errors are hnswlib's, and so are its files. What differs:

- Vectors that no search can order (NaN, infinite, zero under cosine) raise ValueError.
- `filter` is called once a call for each label, not for each element that a walk meets.
- Elements that `add_items` replaces leave nodes behind, as those of `Index.delete`; where these are
  more than half an `add_items` rebuilds without them, and `save_index` always does.
- `device="cuda"` searches on a GPU.
"""

import copy
import logging
import os
import struct
import tempfile
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import index
from hnsw_gpu.conversion import index_of
from hnsw_gpu.exhaustive import exact_search
from hnsw_gpu.files import CorruptIndexError, atomic_file
from hnsw_gpu.inputs import LARGEST_LABEL, array
from hnsw_gpu.peers import read_hnswlib

__all__ = ["BFIndex", "Index"]

logger = logging.getLogger("hnsw_gpu")
DEFAULT_EF = 10
TOO_FEW = "Cannot return the results in a contiguous 2D array. Probably ef or M is too small"
FULL = "The number of elements exceeds the specified limit"
BRUTE_FORCE = struct.Struct("<3Q")  # capacity, bytes an element, elements
Filter = Callable[[int], bool]


class _Elements:
    """What the two kinds of index share: a space, and the shapes of what is given."""

    def __init__(self, space: str, dim: int) -> None:
        if space not in ("l2", "ip", "cosine"):
            raise RuntimeError("Space name must be one of l2, ip, or cosine.")
        self.space = space
        self.dim = int(dim)
        self.num_threads = os.cpu_count() or 1
        self._next_label = 0

    def __repr__(self) -> str:
        return f"<hnswlib.{type(self).__name__}(space='{self.space}', dim={self.dim})>"

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # as hnswlib's

    def set_num_threads(self, num_threads: int) -> None:
        """For calls that do not say; 0 or less: one a processor."""
        self.num_threads = num_threads

    def _threads(self, num_threads: int) -> int | None:
        wanted = num_threads if num_threads > 0 else self.num_threads
        return wanted if wanted > 0 else None

    def _rows(self, data: ArrayLike) -> np.ndarray:
        """float32 (m, dim)."""
        rows = np.asarray(array("data", data), np.float32)
        if rows.ndim not in (1, 2):
            raise RuntimeError(
                f"Input vector data wrong shape. Number of dimensions {rows.ndim}. "
                "Data must be a 1D or 2D array."
            )
        rows = np.atleast_2d(rows)
        if rows.shape[1] != self.dim:
            raise RuntimeError("Wrong dimensionality of the vectors")
        return rows

    def _labels(self, ids: ArrayLike | None, count: int) -> np.ndarray:
        """int64 (count,)."""
        if ids is None:
            return self._next_label + np.arange(count)
        given = np.asarray(ids)
        if given.dtype == np.uint64 and given.size and given.max() > LARGEST_LABEL:
            raise ValueError(f"label {given.max()}: expected at most 2^63 - 1")
        labels = given.astype(np.int64)
        if labels.ndim == 0 and count == 1:
            labels = labels[None]
        if labels.ndim != 1 or len(labels) != count:
            raise RuntimeError(
                f"The input label shape {labels.shape} does not match the input data vector shape "
                f"{count}"
            )
        return labels


def _last_of_each(labels: np.ndarray) -> np.ndarray:
    """Places, ascending, of the last of equal labels."""
    _, places = np.unique(labels[::-1], return_index=True)
    return np.sort(len(labels) - 1 - places)


def _passing(labels: np.ndarray, filter: Filter) -> np.ndarray:
    """bool (n,)"""
    return np.fromiter((bool(filter(label)) for label in labels.tolist()), bool, len(labels))


class Index(_Elements):
    """hnswlib.Index. `Index(other)` copies; `device` is where it searches."""

    def __init__(self, space: "str | Index", dim: int = 0, *, device: str = "cpu") -> None:
        if isinstance(space, Index):
            self.__dict__ |= copy.deepcopy(space.__dict__)
            return
        super().__init__(space, dim)
        self._device = device
        self._graph: index.Index | None = None
        self._max_elements = 0
        self._ef = DEFAULT_EF
        self._can_replace = False
        self._has_replaced = False  # are there nodes of elements that are gone?

    @property
    def _inited(self) -> index.Index:
        if self._graph is None:
            raise RuntimeError("Index not inited")
        return self._graph

    def init_index(
        self,
        max_elements: int,
        M: int = 16,
        ef_construction: int = 200,
        random_seed: int = 100,
        allow_replace_deleted: bool = False,
    ) -> None:
        """Make room for nothing, and remember the limit."""
        if self._graph is not None:
            raise RuntimeError("The index is already initiated.")
        self._graph = index.Index(
            self.dim, self.space, M=M, ef_construction=max(ef_construction, M), seed=random_seed,
            device=self._device,
        )  # fmt: skip
        self._max_elements = int(max_elements)
        self._can_replace = bool(allow_replace_deleted)

    def add_items(
        self,
        data: ArrayLike,
        ids: ArrayLike | None = None,
        num_threads: int = -1,
        replace_deleted: bool = False,
    ) -> None:
        """Add vectors, or give labels that are there new ones; of equal labels the last counts.

        replace_deleted: in the place of deleted elements, whose labels are gone then.
        """
        graph, rows = self._inited, self._rows(data)
        labels = self._labels(ids, len(rows))
        if replace_deleted and not self._can_replace:
            raise RuntimeError("Replacement of deleted elements is disabled in constructor")
        deleted = graph.deleted
        comes_back = np.isin(labels, deleted)
        if self._can_replace and not replace_deleted and comes_back.any():
            raise RuntimeError(
                "Can't use addPoint to update deleted elements if replacement of deleted elements "
                "is enabled."
            )
        places = _last_of_each(labels)
        is_new = ~(graph.holds(labels[places]) | comes_back[places])
        vacant = np.setdiff1d(deleted, labels)[: is_new.sum() if replace_deleted else 0]
        if self.element_count - len(vacant) + int(is_new.sum()) > self._max_elements:
            raise RuntimeError(FULL)
        graph.add(
            rows[places], labels[places], replace=True, keep_deleted=True,
            threads=self._threads(num_threads),
        )  # fmt: skip
        graph.forget(vacant)
        self._has_replaced |= len(vacant) > 0 or not is_new.all()
        self._next_label += len(rows)

    def knn_query(
        self,
        data: ArrayLike,
        k: int = 1,
        num_threads: int = -1,
        filter: Filter | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels uint64 and distances float32 (m, k); RuntimeError where there are fewer."""
        graph, allow = self._inited, None
        if filter is not None:
            allow = graph.labels
            allow = allow[_passing(allow, filter)]
        labels, distances = graph.search(
            self._rows(data), k, ef=self._ef, allow=allow, threads=self._threads(num_threads)
        )
        if (labels < 0).any():
            raise RuntimeError(TOO_FEW)
        return labels.view(np.uint64), distances

    def get_items(self, ids: ArrayLike | None = None, return_type: str = "numpy") -> Any:
        """The vectors of labels, of unit length under cosine, as an array or as lists."""
        if return_type not in ("numpy", "list"):
            raise ValueError('return_type should be "numpy" or "list"')
        labels = np.asarray([] if ids is None else ids)
        if labels.ndim == 0:
            raise ValueError("get_items accepts a list of indices and returns a list of vectors")
        try:
            rows = self._inited.vectors(labels.astype(np.int64).ravel())
        except KeyError:
            raise RuntimeError("Label not found") from None
        return rows.tolist() if return_type == "list" else rows

    def get_ids_list(self) -> list[int]:
        """All labels, deleted ones too."""
        graph = self._inited
        found: list[int] = np.sort(np.append(graph.labels, graph.deleted)).tolist()
        return found

    def mark_deleted(self, label: int) -> None:
        """Return it no more; `unmark_deleted` takes that back."""
        graph = self._inited
        if label not in graph:
            is_there = label in graph.deleted
            raise RuntimeError(
                "The requested to delete element is already deleted"
                if is_there
                else "Label not found"
            )
        graph.delete([label])

    def unmark_deleted(self, label: int) -> None:
        """Return it again."""
        graph = self._inited
        if label in graph:
            raise RuntimeError("The requested to undelete element is not deleted")
        try:
            graph.undelete([label])
        except KeyError:
            raise RuntimeError("Label not found") from None

    def save_index(self, path_to_index: str | os.PathLike[str]) -> None:
        """Write a file that hnswlib loads too."""
        graph = self._inited
        if self._has_replaced:
            graph.compact(keep_deleted=True)
            self._has_replaced = False
        graph.to_hnswlib(path_to_index, max_elements=self._max_elements)

    def load_index(
        self,
        path_to_index: str | os.PathLike[str],
        max_elements: int = 0,
        allow_replace_deleted: bool = False,
    ) -> None:
        """What hnswlib, or `save_index`, wrote. max_elements: the new limit, where it is enough."""
        if self._graph is not None:
            logger.warning("load_index: the index that was here is gone")
        try:
            peer = read_hnswlib(path_to_index, self.dim)
        except OSError as error:
            raise RuntimeError(f"Cannot open file: {error}") from None
        self._graph = index_of(peer, os.fspath(path_to_index), self.space, device=self._device)
        count = len(peer.labels)
        self._max_elements = max_elements if max_elements >= count > 0 else peer.capacity
        self._can_replace = bool(allow_replace_deleted)
        self._next_label, self._ef, self._has_replaced = count, DEFAULT_EF, False

    def index_file_size(self) -> int:
        """Bytes that `save_index` writes."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "index")
            self.save_index(path)
            return os.path.getsize(path)

    def resize_index(self, new_size: int) -> None:
        """Another limit."""
        if new_size < self.element_count:
            raise RuntimeError(
                "Cannot resize, max element is less than the current number of elements"
            )
        self._max_elements = int(new_size)

    def set_ef(self, ef: int) -> None:
        """Beam capacity of searches."""
        self.ef = ef

    @property
    def ef(self) -> int:
        """Beam capacity of searches."""
        return self._ef

    @ef.setter
    def ef(self, ef: int) -> None:
        self._ef = int(ef)

    def get_max_elements(self) -> int:
        """The limit."""
        return self._max_elements

    def get_current_count(self) -> int:
        """How many elements there are, deleted ones too."""
        return self.element_count

    @property
    def max_elements(self) -> int:
        """The limit."""
        return self._max_elements

    @property
    def element_count(self) -> int:
        """How many elements there are, deleted ones too."""
        return 0 if self._graph is None else len(self._graph) + len(self._graph.deleted)

    @property
    def M(self) -> int:
        """Most links of an element above layer 0; 0 before `init_index`."""
        return 0 if self._graph is None else self._graph.M

    @property
    def ef_construction(self) -> int:
        """Beam capacity of `add_items`; 0 before `init_index`."""
        return 0 if self._graph is None else self._graph.ef_construction


class BFIndex(_Elements):
    """hnswlib.BFIndex: all vectors, compared with every query."""

    def __init__(self, space: str, dim: int) -> None:
        super().__init__(space, dim)
        self._max_elements: int | None = None
        self._keep(np.empty((0, self.dim), np.float32), np.empty(0, np.int64))

    def _keep(self, vectors: np.ndarray, labels: np.ndarray) -> None:
        self._vectors, self._label_of = vectors, labels

    def init_index(self, max_elements: int) -> None:
        """Remember the limit."""
        if self._max_elements is not None:
            raise RuntimeError("The index is already initiated.")
        self._max_elements = int(max_elements)

    def add_items(self, data: ArrayLike, ids: ArrayLike | None = None) -> None:
        """Add vectors, or give labels that are there new ones; of equal labels the last counts."""
        limit, rows = self.get_max_elements(), self._rows(data)
        if self.space == "cosine":  # as hnswlib keeps them
            rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
        labels = np.append(self._label_of, self._labels(ids, len(rows)))
        places = _last_of_each(labels)
        if len(places) > limit:
            raise RuntimeError(FULL)
        self._keep(np.concatenate([self._vectors, rows])[places], labels[places])
        self._next_label += len(rows)

    def delete_vector(self, label: int) -> None:
        """Remove a label, if it is there."""
        is_kept = self._label_of != label
        self._keep(self._vectors[is_kept], self._label_of[is_kept])

    def knn_query(
        self,
        data: ArrayLike,
        k: int = 1,
        num_threads: int = -1,
        filter: Filter | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels uint64 and distances float32 (m, k); RuntimeError where there are fewer."""
        self.get_max_elements()
        vectors, labels = self._vectors, self._label_of
        if filter is not None:
            passes = _passing(labels, filter)
            vectors, labels = vectors[passes], labels[passes]
        if k > len(labels):
            raise RuntimeError(TOO_FEW)
        found = exact_search(
            vectors, self._rows(data), k, self.space, threads=self._threads(num_threads)
        )
        return labels[found.labels].astype(np.uint64), found.distances

    def get_max_elements(self) -> int:
        """The limit."""
        if self._max_elements is None:
            raise RuntimeError("Index not inited")
        return self._max_elements

    def get_current_count(self) -> int:
        """How many vectors there are."""
        return len(self._label_of)

    def save_index(self, path_to_index: str | os.PathLike[str]) -> None:
        """Write a file that hnswlib loads too."""
        capacity = self.get_max_elements()
        elements = np.zeros(capacity, self._element)
        count = self.get_current_count()
        elements["vector"][:count], elements["label"][:count] = self._vectors, self._label_of
        with atomic_file(path_to_index) as file:
            file.write(BRUTE_FORCE.pack(capacity, self._element.itemsize, count))
            file.write(elements.tobytes())

    def load_index(self, path_to_index: str | os.PathLike[str], max_elements: int = 0) -> None:
        """What hnswlib, or `save_index`, wrote; max_elements says nothing."""
        try:
            with open(path_to_index, "rb") as file:
                content = file.read()
        except OSError as error:
            raise RuntimeError(f"Cannot open file: {error}") from None
        capacity, size, count = BRUTE_FORCE.unpack(content[:24].ljust(24, b"\0"))
        expected = BRUTE_FORCE.size + capacity * self._element.itemsize
        if size != self._element.itemsize or count > capacity or len(content) != expected:
            raise CorruptIndexError(
                f"{os.fspath(path_to_index)}: {len(content)} bytes, {count} elements of {size} in "
                f"room for {capacity}: is damaged, or no brute-force index of dim={self.dim}"
            )
        elements = np.frombuffer(content[BRUTE_FORCE.size :], self._element)[:count]
        self._max_elements, self._next_label = capacity, count
        self._keep(elements["vector"].copy(), elements["label"].astype(np.int64))

    @property
    def _element(self) -> np.dtype:
        return np.dtype([("vector", "<f4", (self.dim,)), ("label", "<u8")])
