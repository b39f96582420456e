"""The self-join on a GPU: which nodes are near is asked there, how near they are is the CPU's word.

Walks expand a node at a time, as the CPU's do, and meet the same nodes where sums do not round;
what they list is measured again by the CPU, so that distances are its bits.
"""

import numpy as np

from hnsw_gpu.deduplication import near_pairs
from hnsw_gpu.deduplication.near_pairs import NearestLists, Nodes
from hnsw_gpu.engine import (
    KEY_NONE,
    CpuEngine,
    Graph,
    Queries,
    Walk,
    key_nodes,
    rerank,
    rows_as_queries,
)
from hnsw_gpu.gpu import GpuEngine, on_gpu

NO_LINKS = 2  # a node, where all are compared: the fewest that kernels are made for


class DeviceJoin:
    """Nearest lists on a device: "cpu", "cuda", "cuda:1" or "auto". Holds the nodes asked last."""

    def __init__(self, device: str, ef: int, threads: int) -> None:
        self._device, self._ef, self._threads = device, ef, threads
        self._nodes: Nodes | None = None
        self._engine: GpuEngine | None = None

    def lists(self, nodes: Nodes, asking: np.ndarray | None) -> NearestLists:
        """Of encoded rows (m, row) that ask by their number, or None: of the nodes themselves."""
        if asking is None:
            on_cpu = near_pairs.lists_of_itself(nodes, self._ef, self._threads)
        else:
            on_cpu = near_pairs.lists_for_rows(nodes, asking, self._ef, self._threads)
        engine = self._engine_of(nodes)
        if engine is None:
            return on_cpu
        rows, every = nodes.rows if asking is None else asking, np.arange(len(nodes.rows))
        is_itself = asking is None

        def lists(ids: np.ndarray, k: int) -> np.ndarray:
            encoded = rows_as_queries(rows[ids])
            who = Queries(own=ids) if is_itself else Queries(encoded=encoded)
            if nodes.graph is None:
                keys = engine.compare(who, every, min(k + is_itself, len(every)))
                if is_itself:
                    keys[key_nodes(keys) == ids[:, None]] = KEY_NONE
                    keys = np.sort(keys, axis=1)
            else:
                ef = near_pairs.capacity(nodes, k, self._ef)
                if not engine.can_walk(ef, keeps_allowed=is_itself):
                    return on_cpu(ids, k)
                keys = engine.walk(who, Walk(min(k, len(nodes.rows)), ef)).keys
            k = min(k, keys.shape[1])
            return rerank(keys, nodes.rows, encoded, nodes.metric, k=k, threads=self._threads)

        return lists

    def _engine_of(self, nodes: Nodes) -> GpuEngine | None:
        """The GPU with these nodes; None: the CPU is asked."""
        if self._device == "cpu" or not len(nodes.rows):
            return None
        if self._nodes is not nodes:
            self.close()
            graph = _without_links(len(nodes.rows)) if nodes.graph is None else nodes.graph
            cpu = CpuEngine(graph, nodes.rows, None, nodes.metric, "fp32", "")
            self._engine = on_gpu(self._device, cpu, nodes.rows.shape[1], version=1)
            self._nodes = nodes
        return self._engine

    def close(self) -> None:
        """Give the GPU's memory back."""
        engine, self._engine, self._nodes = self._engine, None, None
        if engine is not None:
            engine.close()


def _without_links(count: int) -> Graph:
    return Graph(
        neighbors0=np.full((count, 2 * NO_LINKS), -1, np.int32),
        nodes=np.empty(0, np.int32),
        neighbors=np.empty((0, NO_LINKS), np.int32),
        below=np.empty(0, np.int32),
        layer_offsets=np.zeros(1, np.int64),
    )
