"""Step 1 of a build: what is near each point of a batch in the graph as it was before.

Where many long rows of floats are added, the walks read int8 codes of them, a quarter of the bytes,
and the rows then say how far it is to what was found. Codes do not tell apart what is nearer to
each other than their rounding: a point whose candidates they put in a wrong order walks once more,
by rows.
"""

import numpy as np

from hnsw_gpu.engine.beam import TOGETHER, insert_some, size
from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import distance, prefetch_row
from hnsw_gpu.engine.eight_bits import encode_int8
from hnsw_gpu.engine.exact import AHEAD
from hnsw_gpu.engine.keys import KEY_NONE, key_node, make_key
from hnsw_gpu.engine.search import Task, walk
from hnsw_gpu.engine.vectors import empty_rows, rows_as_queries
from hnsw_gpu.engine.workers import run_chunks

LEAST_LENGTH = 96  # numbers in a row; shorter ones are compared as quickly
LEAST_NUMBERS = 1 << 23  # in all rows; with fewer, compiling another walk takes what is saved
LEAST_SHARE = 8  # one row of so many is new at least, for the others are encoded again
ENCODED = 4096  # rows that a thread encodes at a time
PART = 64 * ENCODED  # rows that are encoded before a caller may stop
COMPARED = 64  # points that a thread takes at a time
MOST_INVERTED = 0.2  # of pairs of a candidate and one of the farther half, by codes: rough
MOST_ROUGH = 0.3  # of the points that walked; two walks cost more than one by rows
ENOUGH = 1000  # points to judge by


class RowCodes:
    """int8 rows (n, row) that walks read in place of `rows`, until they mislead too many."""

    def __init__(self, rows):
        self.rows = empty_rows(len(rows), rows.shape[1], "int8")
        self.walked = self.rough = 0  # points

    def encode(self, rows, threads):
        """Write the codes of all rows; yields now and then, for it may take long."""
        for first in range(0, len(rows), PART):
            count = min(PART, len(rows) - first)

            def write(start, stop, first=first):
                place = slice(first + start, first + stop)
                encode_int8(rows[place].astype(np.float32, copy=False), self.rows[place])

            run_chunks(write, count, ENCODED, threads)
            yield

    def are_good(self):
        return self.walked < ENOUGH or self.rough < MOST_ROUGH * self.walked


def codes_pay(rows, start):
    """Are walks by codes quicker while rows[start:] (n, row) are inserted?"""
    count, length = rows.shape
    is_large = length >= LEAST_LENGTH and count * length >= LEAST_NUMBERS
    return is_large and rows.dtype.kind == "f" and (count - start) * LEAST_SHARE >= count


def find_candidates(graph, rows, codes, metric, levels, *, ef_construction, threads):
    """The walks (R3-R6) of the points that follow the graph's nodes, one level each, as a Task.

    Its keys are the `ef_construction` smallest of each point on each of its layers. Walks read
    `codes`, if there are some, first.
    """
    first, count = len(graph.neighbors0), len(levels)
    ends = np.cumsum(levels + 1, dtype=np.int64)
    task = Task(
        metric=metric,
        queries=rows_as_queries(rows[first : first + count]),
        levels=levels,
        own=np.empty(0, np.int32),
        allowed=np.empty((0, 0), np.uint32),
        ef=ef_construction,
        ef_upper=1,
        keys_start=ends - levels - 1,
        keys=np.full((ends[-1], ef_construction), KEY_NONE, np.uint64),
        counts=np.empty((count, 3), np.int32),
    )
    if first == 0:
        return task
    if codes is None or not codes.are_good():
        walk(graph, rows, task, threads=threads)
        return task
    by_codes = task._replace(queries=rows_as_queries(codes.rows[first : first + count]))
    walk(graph, codes.rows, by_codes, threads=threads)
    are_rough = np.empty(count, np.bool_)

    def compare(start, stop):
        found = np.empty(ef_construction + TOGETHER, np.uint64)
        _compare(graph, rows, task, start, stop, found, are_rough)

    run_chunks(compare, count, COMPARED, threads)
    rough = np.flatnonzero(are_rough)
    if len(rough):
        again = task._replace(
            queries=task.queries[rough],
            levels=levels[rough],
            keys_start=task.keys_start[rough],
            counts=task.counts[rough],
        )
        walk(graph, rows, again, threads=threads)
    codes.walked += count
    codes.rough += len(rough)
    return task


@jit
def _compare(graph, rows, task, start, stop, found, are_rough):
    """Give points start..stop the keys by rows of what they found; none to those that are rough."""
    for q in range(start, stop):
        for layer in range(task.levels[q] + 1):
            row = task.keys_start[q] + layer
            count = size(task.keys, row)
            for j in range(count + AHEAD):
                if j < count:
                    prefetch_row(rows, layer_node(graph, layer, key_node(task.keys[row, j])))
                if j >= AHEAD:
                    number = key_node(task.keys[row, j - AHEAD])
                    node = layer_node(graph, layer, number)
                    key = make_key(distance(task.metric, task.queries, q, rows, node), number)
                    found[j - AHEAD] = key
            if layer == 0:
                half, inverted = count >> 1, 0
                for j in range(half):
                    inverted += found[j] > found[j + half]
                are_rough[q] = inverted > MOST_INVERTED * half
            task.keys[row, :count] = KEY_NONE
            if not are_rough[q]:
                insert_some(task.keys, row, np.int64(count), found, np.int64(count))


@jit(is_inlined=True)
def layer_node(graph, layer, number):
    """Id of a number on a layer."""
    return np.int64(graph.nodes[graph.layer_offsets[layer - 1] + number]) if layer else number
