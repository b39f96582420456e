"""Who is kept: near pairs, an order and a linkage decide."""

from typing import Any, NamedTuple

import numpy as np

from hnsw_gpu import inputs
from hnsw_gpu.deduplication import linkage as linkages
from hnsw_gpu.deduplication.distinct_rows import Rows
from hnsw_gpu.deduplication.keep_order import node_order, row_order
from hnsw_gpu.deduplication.linkage import Neighbors
from hnsw_gpu.deduplication.near_pairs import united
from hnsw_gpu.deduplication.other_set import NearestOther
from hnsw_gpu.deduplication.sharded_join import Pairs, Shards
from hnsw_gpu.engine import key_distances, key_nodes
from hnsw_gpu.results import reported


class Decision(NamedTuple):
    """What became of the rows; the arrays are (n,), in input order."""

    keep: np.ndarray  # bool
    duplicate_of: np.ndarray  # int64: the kept row that stands for it; -1 where there is none
    distance: np.ndarray  # float32, engines', to what it is a duplicate of; NaN where it is none
    group: np.ndarray  # int64: the kept row, also of itself; -1 where invalid or of another set


class NearRows:
    """A set of rows, which of them are near each other, and which near another set's."""

    def __init__(
        self,
        metric: str,
        limit: float,
        rows: Rows,
        shards: Shards,
        pairs: Pairs,
        other: NearestOther | None = None,
    ) -> None:
        self.metric = metric  # by the caller's name: "euclidean" is one
        self.limit = limit  # the largest distance of pairs that were looked for
        self.rows, self.shards, self.pairs, self.other = rows, shards, pairs, other
        self._lists: Neighbors | None = None  # of all pairs
        self.is_known = np.zeros(rows.nodes, bool)  # nodes that the other set has
        if other is not None:
            self.is_known = other.distances <= np.float32(limit)

    @property
    def has_similarity(self) -> bool:
        """Has the metric a similarity, beside a distance?"""
        return inputs.METRICS[self.metric] != "l2"

    def reported(self, distances: np.ndarray) -> np.ndarray:
        """Engines' distances as the caller's metric has them."""
        return reported(distances, self.metric)

    def similarity(self, distances: np.ndarray) -> np.ndarray:
        """Cosine similarities, or dot products, of engines' distances."""
        return 0 - distances if self.metric == "ip" else 1 - distances

    def labels_in_other(self) -> np.ndarray:
        """Labels (n,) of the nearest in the other set, of rows that it has; else -1, or ""."""
        labels = np.full(self.rows.total, -1, np.int64)
        if self.other is not None:
            of_nodes = np.where(self.is_known, self.other.labels, -1)
            labels[self.rows.valid] = of_nodes[self.rows.node_of]
            if self.other.names is not None:
                return self.other.names.strings(labels)
        return labels

    def decide(self, limit: float, linkage: str, keep: Any) -> Decision:
        """By the pairs within a limit. Pairs that had to be found for it are kept in `pairs`."""
        near = self._neighbors(limit)
        places = row_order(keep, self.rows, near)
        order, row_of = node_order(places, self.rows)
        if linkage == "components":
            return self._decision(linkages.components(order, near), row_of)

        def all_near(nodes: np.ndarray) -> list[np.ndarray]:
            every = self.shards.all_near(nodes, limit)
            return [keys[~self.is_known[key_nodes(keys)]] for keys in every]

        is_open = self.pairs.is_open & ~self.is_known
        decide = linkages.star if linkage == "star" else linkages.any_earlier
        state, completed = decide(order, near, is_open, all_near)
        if completed:
            self._add_pairs(completed)
            near = self._neighbors(limit)
        if linkage == "star":
            root = linkages.nearest_kept(near, state)
        else:
            root = linkages.first_ancestor(order, near)
        return self._decision(root, row_of)

    def _neighbors(self, limit: float) -> Neighbors:
        """Of each node its near ones within a limit; nodes that the other set has take no part."""
        if self._lists is None:
            a, b, distances = self.pairs[:3]
            if self.other is not None:
                is_ours = ~self.is_known[a] & ~self.is_known[b]
                a, b, distances = a[is_ours], b[is_ours], distances[is_ours]
            self._lists = linkages.neighbor_lists(a, b, distances, self.rows.nodes)
        return self._lists.within(limit)

    def _add_pairs(self, completed: dict[int, np.ndarray]) -> None:
        """Pairs of open nodes, of the keys of all that is near them."""
        nodes = np.repeat(np.array(list(completed)), [len(keys) for keys in completed.values()])
        keys = np.concatenate(list(completed.values()))
        a, b, distances = united(
            np.concatenate([self.pairs.a, nodes]),
            np.concatenate([self.pairs.b, key_nodes(keys)]),
            np.concatenate([self.pairs.distances, key_distances(keys)]),
        )
        if len(a) > len(self.pairs.a):  # else all of them were there
            self.pairs = self.pairs._replace(a=a, b=b, distances=distances)
            self._lists = None

    def _decision(self, root: np.ndarray, row_of: np.ndarray) -> Decision:
        """Of root int64 (nodes,), the kept node for each, and the row of each kept node."""
        count = self.rows.total
        keep, group = np.zeros(count, bool), np.full(count, -1, np.int64)
        duplicate_of = np.full(count, -1, np.int64)
        distance = np.full(count, np.nan, np.float32)
        is_ours = ~self.is_known[self.rows.node_of]
        valid, node_of = self.rows.valid[is_ours], self.rows.node_of[is_ours]
        group[valid] = row_of[root[node_of]]
        is_kept = group[valid] == valid
        keep[valid] = is_kept
        dropped, nodes = valid[~is_kept], node_of[~is_kept]
        duplicate_of[dropped] = group[dropped]
        distance[dropped] = self._distances(nodes, root[nodes])
        if self.other is not None:
            known = self.other.distances[self.rows.node_of[~is_ours]]
            distance[self.rows.valid[~is_ours]] = known
        return Decision(keep, duplicate_of, distance, group)

    def _distances(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """float32 (m,), between nodes; many rows share a pair of them."""
        wanted, place = np.unique(one << 32 | other, return_inverse=True)
        return self.shards.distances(wanted >> 32, wanted & 0xFFFFFFFF)[place]
