"""Many callers of one cluster at once, and whether each got what it should."""

import threading
from contextlib import contextmanager

from hnsw_gpu.results import SearchResult


def same(found, expected):
    """Equal bits, shapes and dtypes."""
    return all(
        (mine.dtype, mine.shape, mine.tobytes()) == (its.dtype, its.shape, its.tobytes())
        for mine, its in zip(found, expected, strict=True)
    )


@contextmanager
def sixteen_callers(cluster, queries, expected):
    """They ask one query after the other until the block ends; what went wrong, and how many."""
    k = expected.labels.shape[1]
    rows = [SearchResult(*(a[None] for a in row)) for row in zip(*expected, strict=True)]
    failed, differing, asked, is_over = [], [], [0] * 16, threading.Event()

    def ask(caller):
        while not is_over.is_set():
            q = (asked[caller] * 16 + caller) % len(queries)
            try:
                if not same(cluster.search(queries[q], k), rows[q]):
                    differing.append(q)
            except Exception as error:
                failed.append(error)
            asked[caller] += 1

    callers = [threading.Thread(target=ask, args=(caller,)) for caller in range(16)]
    for caller in callers:
        caller.start()
    try:
        yield failed, differing, asked
    finally:
        is_over.set()
        for caller in callers:
            caller.join()
