"""Arrays in, arrays out: the graph, its search and its building on the CPU."""

from hnsw_gpu.engine.build import empty_graph, insert_nodes, repair, without_unfinished
from hnsw_gpu.engine.copies import NodeTable, move_together
from hnsw_gpu.engine.cpu_engine import CpuEngine
from hnsw_gpu.engine.exact import BLOCK, BLOCK_VALUES, exact_block, rerank
from hnsw_gpu.engine.filtered_search import nearest, nearest_others, within
from hnsw_gpu.engine.graph import Graph, check_graph
from hnsw_gpu.engine.keys import KEY_NONE, key_distances, key_nodes
from hnsw_gpu.engine.labels import Labels
from hnsw_gpu.engine.search import pack_bits, search_graph
from hnsw_gpu.engine.vectors import (
    BLOCK_BYTES,
    METRICS,
    STORAGE,
    decode,
    empty_rows,
    encode,
    encode_queries,
    row_length,
    rows_as_queries,
    squared_lengths,
)
from hnsw_gpu.engine.workers import SharedLock, run_to_a_stop, thread_count

__all__ = [
    "BLOCK",
    "BLOCK_BYTES",
    "BLOCK_VALUES",
    "KEY_NONE",
    "METRICS",
    "STORAGE",
    "CpuEngine",
    "Graph",
    "Labels",
    "NodeTable",
    "SharedLock",
    "check_graph",
    "decode",
    "empty_graph",
    "empty_rows",
    "encode",
    "encode_queries",
    "exact_block",
    "insert_nodes",
    "key_distances",
    "key_nodes",
    "move_together",
    "nearest",
    "nearest_others",
    "pack_bits",
    "repair",
    "rerank",
    "row_length",
    "rows_as_queries",
    "run_to_a_stop",
    "search_graph",
    "squared_lengths",
    "thread_count",
    "within",
    "without_unfinished",
]
