"""Rows that lie on disk, and are mapped: asking for those that are about to be read."""

import mmap

import numpy as np


def are_mapped(rows):
    """Whether rows lie in a file that is mapped."""
    return getattr(rows, "_mmap", None) is not None


def ask_for(rows, nodes):
    """Have the system read the rows of nodes (m,), which are mapped, side by side.

    Without it each page is waited for when it is touched, one after the other.
    """
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    mapped = rows._mmap
    first, size = rows.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data, rows.strides[0]
    for node in nodes.tolist():
        start = first + node * size
        page = start & -mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, start + size - page)
