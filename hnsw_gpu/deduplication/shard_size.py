"""How many rows a shard has: by the memory that a deduplication of files may take."""

from hnsw_gpu.engine import memory_limit as machine_limit
from hnsw_gpu.engine import row_length

PROCESS_BYTES = 350 << 20  # Python with its libraries, compiled code, and blocks being read
ROW_BYTES = 160  # held of every row: numbers, order, digests
LEAST_SHARD = 1000  # rows


def shard_rows_within(memory_limit: int | None, rows: int, dim: int, M: int) -> int:
    """Rows a shard, so that all of `rows` fit a limit in bytes; ValueError where none would.

    memory_limit=None: half of what the machine, or a container's limit, allows.
    """
    if memory_limit is None:
        memory_limit = machine_limit() // 2
    left = memory_limit - PROCESS_BYTES - ROW_BYTES * rows
    fit = left // built_row_bytes(dim, M)
    if fit < min(LEAST_SHARD, rows):
        needed = PROCESS_BYTES + ROW_BYTES * rows + LEAST_SHARD * built_row_bytes(dim, M)
        raise ValueError(
            f"a memory limit of {memory_limit:,} bytes: {rows:,} rows of {dim} need at least "
            f"{needed:,}"
        )
    count = max(1, -(-rows // fit))
    return max(1, -(-rows // count))


def built_row_bytes(dim: int, M: int) -> int:
    """Held of a row while its shard is built: encoded, its codes, links and their distances."""
    return 4 * row_length(dim, "fp32") + row_length(dim, "int8") + 2 * 8 * M + 100
