"""What an index holds, and as what arrays it is saved."""

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

import numpy as np

from hnsw_gpu.engine.build import empty_graph, packed
from hnsw_gpu.engine.copies import NodeTable
from hnsw_gpu.engine.cpu_engine import CpuEngine
from hnsw_gpu.engine.graph import Graph, check_graph, check_links
from hnsw_gpu.engine.labels import Deleted, Labels, label_problems
from hnsw_gpu.engine.row_check import row_problems
from hnsw_gpu.engine.second_copy import SecondCopy
from hnsw_gpu.engine.vectors import decode, empty_rows

DELETED = ("deleted_labels", "deleted_nodes")  # in a file, where there are some


class Parameters(NamedTuple):
    """How vectors are kept, and how they are linked."""

    dim: int
    metric: str  # the engines': "l2", "ip" or "cosine"
    dtype: str
    refine: str  # "", "fp32" or "fp16"
    M: int
    ef_construction: int
    seed: int


class Source(Protocol):
    """Where mapped rows lie."""

    path: str
    checksum: str

    def require_unchanged(self) -> None:
        """Raise an error if they are no longer what they were."""


class State(NamedTuple):
    """Nodes, links and labels, all of which a search reads and nobody changes.

    An index replaces it whole (growth.py). Who does may write behind the n nodes of `rows`,
    `refine_rows` and `room`, and all of `table` and of the spare links, which no search reads.
    """

    parameters: Parameters
    graph: Graph  # of the n nodes there are, the first of the next
    room: Graph  # with rows for nodes to come, on each layer
    version: int  # another one where rows or links differ
    rows: np.ndarray  # (n or more, row) encoded as dtype
    refine_rows: np.ndarray | None  # (n or more, row) encoded as refine
    labels: Labels
    table: NodeTable  # of the finest rows, by which copies are found
    next_label: int
    unrepaired: int  # nodes that were added since layer 0 was last repaired
    spare_neighbors0: SecondCopy  # of the room's neighbors0
    spare_neighbors: SecondCopy  # of its neighbors above
    source: Source | None = None  # None: all is in memory
    names: Any = None  # what callers call labels by (`string_labels.py`); None: as they are

    @property
    def node_count(self) -> int:
        return len(self.graph.neighbors0)

    @property
    def cpu(self) -> CpuEngine:
        """The CPU engine over the nodes; an error where they were mapped and have changed."""
        self.require_unchanged()
        return self._cpu

    def require_unchanged(self) -> None:
        """An error where rows are mapped and have changed, as may what was made of them."""
        if self.source is not None:
            self.source.require_unchanged()

    @property
    def _cpu(self) -> CpuEngine:
        count, kept = self.node_count, self.parameters
        fine = None if self.refine_rows is None else self.refine_rows[:count]
        rows = self.rows[:count]
        return CpuEngine(self.graph, rows, fine, kept.metric, kept.dtype, kept.refine)

    @property
    def nbytes(self) -> int:
        """Bytes of nodes, links and labels, without room for nodes to come."""
        cpu = self._cpu
        held = [*packed(self.graph), cpu.rows]
        held += [] if cpu.refine_rows is None else [cpu.refine_rows]
        return sum(array.nbytes for array in held) + self.labels.nbytes + self.table.nbytes

    def vectors(self, nodes: np.ndarray) -> np.ndarray:
        """float32 (m, dim) vectors of nodes (m,), from the finest rows."""
        kept = self.parameters
        return decode(self.cpu.finest[nodes], kept.dim, kept.refine or kept.dtype)

    def problems(self) -> list[str]:
        """What is wrong with the graph, the labels or the rows, in sentences."""
        return self.labels.problems(self.node_count, self.next_label) + self.node_problems(())

    def node_problems(self, unread: Collection[str]) -> list[str]:
        """The same of the graph and the rows, but for those (by their name in `arrays`) unread.

        Whether every node is reachable is asked where none is unrepaired.
        """
        # that of a file is looked at as it is
        graph = self.graph if self.graph is self.room else packed(self.graph)
        found: list[str] = check_links(graph) if self.unrepaired else check_graph(graph)
        cpu, kept = self.cpu, self.parameters
        for name, rows, dtype in (
            ("vectors", cpu.rows, kept.dtype),
            ("refine_vectors", cpu.refine_rows, kept.refine),
        ):
            if rows is not None and name not in unread:
                found += row_problems(name, rows, kept.dim, kept.metric, dtype)
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` takes, by name."""
        cpu = self.cpu
        found = {"vectors": cpu.rows, **packed(self.graph)._asdict()}
        if cpu.refine_rows is not None:
            found["refine_vectors"] = cpu.refine_rows
        found |= dict(zip(("label_offsets", "labels"), self.labels.packed(), strict=True))
        deleted = self.labels.deleted
        if len(deleted.labels):
            found |= dict(zip(DELETED, deleted, strict=True))
        return found


def empty_state(parameters: Parameters) -> State:
    """The state of an index that holds nothing."""
    kept = parameters
    graph = empty_graph(kept.M)
    return State(
        parameters,
        graph,
        graph,
        0,
        empty_rows(0, kept.dim, kept.dtype),
        empty_rows(0, kept.dim, kept.refine) if kept.refine else None,
        Labels(),
        NodeTable(),
        next_label=0,
        unrepaired=0,
        spare_neighbors0=SecondCopy(),
        spare_neighbors=SecondCopy(),
    )


def from_arrays(
    parameters: Parameters,
    arrays: dict[str, Any],
    next_label: int,
    *,
    unread: Collection[str],
    unrepaired: int = 0,
) -> State:
    """The state that gave `arrays`. KeyError names what is missing, ValueError what is wrong.

    unrepaired: how many nodes may not be reachable.
    """
    empty = empty_state(parameters)
    graph = Graph(*(arrays[name] for name in Graph._fields))
    count = len(graph.neighbors0)
    _expect("vectors", arrays["vectors"], empty.rows, count)
    if empty.refine_rows is not None:
        _expect("refine_vectors", arrays["refine_vectors"], empty.refine_rows, count)
    _expect("neighbors0", graph.neighbors0, empty.graph.neighbors0, count)
    _expect("neighbors", graph.neighbors, empty.graph.neighbors, len(graph.nodes))
    offsets, labels, like = arrays["label_offsets"], arrays["labels"], Deleted()
    _expect("label_offsets", offsets, like.labels, count + 1)
    _expect("labels", labels, like.labels, len(labels))
    deleted = Deleted(*(arrays.get(*pair) for pair in zip(DELETED, like, strict=True)))
    for name, array in zip(DELETED, deleted, strict=True):
        _expect(name, array, like.labels, len(array))
    problems = label_problems(offsets, labels, deleted, count, next_label)
    if problems:
        raise ValueError("; ".join(problems))
    state = empty._replace(
        unrepaired=unrepaired,
        graph=graph,
        room=graph,
        rows=arrays["vectors"],
        refine_rows=None if empty.refine_rows is None else arrays["refine_vectors"],
        labels=Labels(offsets, labels, deleted),
        next_label=next_label,
    )
    state.table.clear()
    problems = state.node_problems(unread)
    if problems:
        raise ValueError("; ".join(problems))
    return state


def _expect(name: str, array: np.ndarray, like: np.ndarray, count: int) -> None:
    """The array must have the dtype and row shape of an empty index's."""
    expected = (count, *like.shape[1:])
    if array.dtype != like.dtype or array.shape != expected:
        raise ValueError(f"{name}: {array.dtype} {array.shape}, expected {like.dtype} {expected}")
