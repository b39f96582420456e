"""Answers of several parts made one."""

import numpy as np

from hnsw_gpu.engine.compiled import jit


def merged(labels, distances, k):
    """The first k labels and distances (q, k) of parts' (s, q, m), each nearest first.

    What comes next is the smallest of the parts' heads: by distance, then by label. So answers do
    not depend on m, if it is at least k; a single part is as it was, also where its labels at one
    distance do not ascend; and where they do, in all parts, so they do in the answer. Too few:
    label -1, distance +inf, as in the parts.
    """
    found = np.full((labels.shape[1], k), -1, np.int64)
    far = np.full(found.shape, np.inf, np.float32)
    _merge(labels, distances, np.empty(len(labels), np.int64), found, far)
    return found, far


@jit
def _merge(labels, distances, heads, found, far):
    parts, queries, most = labels.shape
    for q in range(queries):
        heads[:] = 0
        for i in range(found.shape[1]):
            best = -1
            for s in range(parts):
                head = heads[s]
                if head == most or labels[s, q, head] < 0:
                    continue
                distance = distances[s, q, head]
                if (
                    best < 0
                    or distance < far[q, i]
                    or (distance == far[q, i] and labels[s, q, head] < found[q, i])
                ):
                    best = s
                    found[q, i] = labels[s, q, head]
                    far[q, i] = distance
            if best < 0:
                break
            heads[best] += 1
