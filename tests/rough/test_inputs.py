"""Input that is refused: masked rows, nulls; and what a refusal leaves behind."""

import gc
import tracemalloc

import numpy as np

from hnsw_gpu import Index


def test_a_refused_add_keeps_no_room() -> None:
    """Not even until the next collection: the error held all that was made for the rows."""
    index = Index(32, "l2")
    index.add(np.eye(32))
    rows = np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float32)
    rows[-1, 5] = np.nan
    held = index.nbytes
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(2):  # the first loads compiled code
            before = tracemalloc.get_traced_memory()[0]
            try:
                index.add(rows)
            except ValueError as error:
                assert "row 19999" in str(error)
            kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < 100_000 and index.nbytes == held
