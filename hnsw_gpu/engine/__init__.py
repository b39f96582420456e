"""Arrays in, arrays out: the graph, its search and its building on the CPU."""

from hnsw_gpu.engine.alignment import copy_aligned
from hnsw_gpu.engine.compiled import cache_folder, jit
from hnsw_gpu.engine.copies import NodeTable, move_together
from hnsw_gpu.engine.cpu_engine import CpuEngine
from hnsw_gpu.engine.exact import block_rows, exact_block, rerank
from hnsw_gpu.engine.filtered_search import Allowed, nearest, within
from hnsw_gpu.engine.graph import Graph, unlinked, unreachable
from hnsw_gpu.engine.growth import build_graph, compacted, insert, joined, repaired, with_vectors
from hnsw_gpu.engine.keys import KEY_NONE, key_distances, key_nodes
from hnsw_gpu.engine.labels import Labels
from hnsw_gpu.engine.machine import memory_free, memory_limit
from hnsw_gpu.engine.merge import merged
from hnsw_gpu.engine.rounding import LOST_SHARE, Rounded, count_blurred
from hnsw_gpu.engine.search import search_graph
from hnsw_gpu.engine.state import Parameters, State, empty_state, from_arrays
from hnsw_gpu.engine.vectors import (
    METRICS,
    STORAGE,
    are_lengths_within,
    empty_queries,
    empty_rows,
    encode,
    encode_queries,
    row_length,
    rows_as_queries,
    squared_lengths,
)
from hnsw_gpu.engine.walk import Queries, Walk, Walked
from hnsw_gpu.engine.workers import (
    ChangeLock,
    SharedLock,
    Stopped,
    run_to_a_stop,
    tell_of_forks,
    thread_count,
)

__all__ = [
    "KEY_NONE",
    "LOST_SHARE",
    "METRICS",
    "STORAGE",
    "Allowed",
    "ChangeLock",
    "CpuEngine",
    "Graph",
    "Labels",
    "NodeTable",
    "Parameters",
    "Queries",
    "Rounded",
    "SharedLock",
    "State",
    "Stopped",
    "Walk",
    "Walked",
    "are_lengths_within",
    "block_rows",
    "build_graph",
    "cache_folder",
    "compacted",
    "copy_aligned",
    "count_blurred",
    "empty_queries",
    "empty_rows",
    "empty_state",
    "encode",
    "encode_queries",
    "exact_block",
    "from_arrays",
    "insert",
    "jit",
    "joined",
    "key_distances",
    "key_nodes",
    "memory_free",
    "memory_limit",
    "merged",
    "move_together",
    "nearest",
    "repaired",
    "rerank",
    "row_length",
    "rows_as_queries",
    "run_to_a_stop",
    "search_graph",
    "squared_lengths",
    "tell_of_forks",
    "thread_count",
    "unlinked",
    "unreachable",
    "with_vectors",
    "within",
]
