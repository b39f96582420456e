"""Rows that lie on disk, and are mapped: asking for those that are about to be read."""

import mmap

import numpy as np


def ask_for(rows, nodes):
    """Have the system read the rows of nodes (m,), side by side; nothing where none are mapped.

    Without it each page is waited for when it is touched, one after the other.
    """
    mapped = getattr(rows, "_mmap", None)
    if mapped is None or not hasattr(mmap, "MADV_WILLNEED"):
        return
    first, size = rows.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data, rows.strides[0]
    for node in nodes.tolist():
        start = first + node * size
        page = start & -mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, start + size - page)
