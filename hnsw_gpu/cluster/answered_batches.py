"""Many queries on a cluster, in batches: Ray Data reads, limits what is under way, and writes."""

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hnsw_gpu.cluster.ray_connection import imported_ray
from hnsw_gpu.files import Sources, open_sources, rows_of_column
from hnsw_gpu.results import SearchResult
from hnsw_gpu.searching import Searching

if TYPE_CHECKING:
    import pyarrow


def answered(
    index: Searching, queries: Any, how: dict[str, Any], column: str, batch_rows: int
) -> Any:
    """The `ray.data.Dataset` of the answers to those of a Dataset, or of files.

    index: pickled into the tasks of Ray Data, so one that may be.
    """
    imported_ray()
    try:
        from ray.data import Dataset, from_items
    except ImportError as error:
        raise ImportError(f'{error}: pip install "hnsw-gpu[ray]"') from None
    if isinstance(queries, Dataset):
        return queries.map_batches(
            functools.partial(_with_answers, index=index, how=how, column=column),
            batch_size=batch_rows,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
    paths = [queries] if isinstance(queries, (str, os.PathLike)) else queries
    sources = open_sources([Path(path).absolute() for path in paths], column=column)
    if sources.dim != index.dim:
        first = sources.paths[0]
        raise ValueError(f"{first}: vectors of {sources.dim} numbers, expected {index.dim}")
    starts = [{"start": start} for start in range(0, len(sources), batch_rows)]
    return from_items(starts).map_batches(
        functools.partial(_of_files, index=index, how=how, sources=sources, rows=batch_rows),
        batch_size=1,
        batch_format="numpy",
    )


def _with_answers(
    table: "pyarrow.Table", *, index: Searching, how: dict[str, Any], column: str
) -> "pyarrow.Table":
    twice = sorted({"labels", "distances"} & set(table.column_names))
    if twice:
        raise ValueError(f"the Dataset has a column {twice[0]!r} already: rename it")
    found = _whole(index, rows_of_column(table, column, index.dim), how)
    for name, lists in _lists_of(found).items():
        table = table.append_column(name, lists)
    return table


def _of_files(
    batch: dict[str, np.ndarray],
    *,
    index: Searching,
    how: dict[str, Any],
    sources: Sources,
    rows: int,
) -> "pyarrow.Table":
    import pyarrow

    start = int(batch["start"][0])
    stop = min(start + rows, len(sources))
    found = _whole(index, np.concatenate(list(sources.vectors(start, stop))), how)
    numbers = pyarrow.array(np.arange(start, stop))
    return pyarrow.table({"row": numbers, **_lists_of(found)})


def _whole(index: Searching, queries: np.ndarray, how: dict[str, Any]) -> SearchResult:
    """An answer of all shards: in a table nobody would see that one is missing."""
    return index.search_checked(index.checked_queries(queries), **how)


def _lists_of(found: SearchResult) -> dict[str, Any]:
    """Columns of lists of k."""
    import pyarrow

    k = found.labels.shape[1]
    columns = {}
    for name, values in found._asdict().items():
        flat = values.ravel()
        column = pyarrow.array(flat.tolist() if flat.dtype.kind == "T" else flat)
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(column, k)
    return columns
