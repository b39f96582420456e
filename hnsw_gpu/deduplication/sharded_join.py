"""Shards joined: all near pairs of nodes that lie in several parts, found two parts at a time.

A node is a distinct vector of the whole set, however many shards hold it. Nodes are numbered by
their first appearance, so that the numbers of those at home in a shard (it is the first to hold
them) follow each other, and are the same however the set is cut. Block (s, t), s <= t: the nodes at
home in t ask shard s.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hnsw_gpu.deduplication import near_pairs
from hnsw_gpu.deduplication.device_join import DeviceJoin
from hnsw_gpu.deduplication.distinct_rows import ROWS_AT_ONCE
from hnsw_gpu.deduplication.limit import distance_of_copies
from hnsw_gpu.deduplication.near_pairs import Nodes
from hnsw_gpu.engine import (
    NodeTable,
    key_distances,
    key_nodes,
    rerank,
    rows_as_queries,
)

LEAST_PAIRS = 10_000_000  # that may be kept,
PAIRS_A_NODE = 64  # or this many for each node, if that is more
ID_BITS = np.uint64(0xFFFFFFFF)  # of a key: id and flag


class Block(NamedTuple):
    """What the join of two shards found; numbers are those of nodes of the whole set."""

    one: np.ndarray  # int32 (p,): a pair may be there twice, in either order
    other: np.ndarray  # int32 (p,)
    distances: np.ndarray  # float32 (p,)
    open_nodes: np.ndarray  # int32 (o,): two of them may be near without being here
    nearest: np.ndarray  # float32 (home nodes of t,): distance of the nearest other in s
    nearest_back: np.ndarray  # float32 (nodes of s,): of the nearest that asked, as far as seen


class Pairs(NamedTuple):
    """Pairs of nodes, a < b, in ascending order, each once."""

    a: np.ndarray  # int32 (p,)
    b: np.ndarray  # int32 (p,)
    distances: np.ndarray  # float32 (p,)
    is_open: np.ndarray  # bool (nodes,): two such nodes may be a pair that is not here
    nearest: np.ndarray  # float32 (nodes,): distance of the nearest other node, +inf where none


class Shards:
    """Nodes in parts. numbers: for each shard int64 (n,), the number of each of its own nodes.

    opened(s): the Nodes of a shard, in memory; rows(s): their rows alone, perhaps mapped. device:
    where blocks are joined. starts: int64 (shards + 1,), the number of the first node at home in
    each, where that is known.
    """

    def __init__(
        self,
        numbers: list[np.ndarray],
        opened: Callable[[int], Nodes],
        rows: Callable[[int], np.ndarray],
        metric: str,
        *,
        ef: int,
        threads: int,
        device: str = "cpu",
        starts: np.ndarray | None = None,
    ) -> None:
        self.join = DeviceJoin(device, ef, threads)
        self.numbers, self.metric = numbers, metric
        self.opened, self._rows, self.ef, self.threads = opened, rows, ef, threads
        self.starts = starts_of(numbers) if starts is None else starts
        self._homes: dict[int, np.ndarray] = {}

    @property
    def nodes(self) -> int:
        return int(self.starts[-1])

    def home(self, s: int) -> np.ndarray:
        """int64: a shard's own numbers of the nodes that are at home in it."""
        if s not in self._homes:
            self._homes[s] = np.flatnonzero(self.numbers[s] >= self.starts[s])
        return self._homes[s]

    def homes(self) -> list[int]:
        """How many nodes are at home in each shard."""
        counts: list[int] = np.diff(self.starts).tolist()
        return counts

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """All (s, t), those of one s together."""
        return blocks_of(len(self.numbers))

    def join_block(
        self, s: int, t: int, limit: float, advance: Callable[[int], object] = lambda _: None
    ) -> Block:
        """Block (s, t). advance: told how many nodes have asked."""
        home, homes = self.home(t), self.homes()
        whole = max(sum(homes[j] for _, j in self.blocks), 1)
        most = max(LEAST_PAIRS, PAIRS_A_NODE * self.nodes) * len(home) // whole
        back = np.full(len(self.numbers[s]), np.inf, np.float32)
        found = near_pairs.find_pairs(
            self._lists(s, t), home, self._others(s, t), limit, most, advance, back
        )
        one = [self.numbers[t][found.asked]]
        other = [self.numbers[s][key_nodes(found.keys)]]
        distances = [key_distances(found.keys)]
        open_nodes = [self.numbers[t][home[found.is_open]]]
        if s != t and found.is_open.any():  # what these did not list may list them
            again = near_pairs.find_pairs(
                self._lists(t, s), self.home(s), self._others(t, s), limit, most, lambda _: None
            )
            one.append(self.numbers[s][again.asked])
            other.append(self.numbers[t][key_nodes(again.keys)])
            distances.append(key_distances(again.keys))
            open_nodes.append(self.numbers[s][self.home(s)[again.is_open]])
        a, b = (np.concatenate(part).astype(np.int32) for part in (one, other))
        is_pair = a != b
        return Block(
            a[is_pair],
            b[is_pair],
            np.concatenate(distances)[is_pair],
            np.concatenate(open_nodes).astype(np.int32),
            found.nearest,
            back,
        )

    def _lists(self, s: int, t: int) -> near_pairs.NearestLists:
        """Of shard s, asked by the nodes of shard t."""
        return self.join.lists(self.opened(s), None if s == t else self._rows(t))

    def _others(self, s: int, t: int) -> int:
        return len(self.numbers[s]) - (s == t)

    def unite(self, blocks: Callable[[int, int], Block]) -> Pairs:
        """All pairs, of all blocks (s, t)."""
        is_open, nearest = np.zeros(self.nodes, bool), np.full(self.nodes, np.inf, np.float32)
        parts = []
        for s, t in self.blocks:
            block = blocks(s, t)
            parts.append(block[:3])
            is_open[block.open_nodes] = True
            asked = slice(self.starts[t], self.starts[t + 1])
            nearest[asked] = np.minimum(nearest[asked], block.nearest)
            np.minimum.at(nearest, self.numbers[s], block.nearest_back)
        if not parts:
            return no_pairs(nearest)
        one, other, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Pairs(*near_pairs.united(one, other, distances), is_open, nearest)

    def all_near(
        self, nodes: np.ndarray, limit: float, *, exactly: bool = False
    ) -> list[np.ndarray]:
        """Keys of all near others of each of some nodes, ascending. exactly: compare with all."""
        rows = self.rows_of(nodes)
        found: list[list[np.ndarray]] = [[np.empty(0, np.uint64)] for _ in nodes]
        for s, numbers in enumerate(self.numbers):
            part = self.opened(s)
            part = part._replace(graph=None) if exactly else part
            lists = near_pairs.lists_for_rows(part, rows, self.ef, self.threads)
            every = near_pairs.find_all_near(lists, np.arange(len(nodes)), len(numbers), limit)
            for i, keys in enumerate(every):
                number = numbers[key_nodes(keys)]
                keys = keys & ~ID_BITS | number.astype(np.uint64) << np.uint64(1)
                found[i].append(keys[number != nodes[i]])
        return [np.unique(np.concatenate(keys)) for keys in found]

    def rows_of(self, nodes: np.ndarray) -> np.ndarray:
        """float32 (m, row), encoded, of some nodes."""
        homes = np.searchsorted(self.starts, nodes, side="right") - 1
        rows = np.empty((len(nodes), self._rows(0).shape[1] if self.numbers else 0), np.float32)
        for s in np.unique(homes):
            here = np.flatnonzero(homes == s)
            rows[here] = self._rows(s)[self.home(s)[nodes[here] - self.starts[s]]]
        return rows

    def distances(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """float32 (m,), between nodes; of a node to itself, that of copies."""
        found = np.zeros(len(one), np.float32)
        for start in range(0, len(one), ROWS_AT_ONCE):
            place = slice(start, start + ROWS_AT_ONCE)
            queries, rows = rows_as_queries(self.rows_of(one[place])), self.rows_of(other[place])
            keys = np.arange(len(rows), dtype=np.uint64)[:, None] << np.uint64(1)
            decided = rerank(keys, rows, queries, self.metric, k=1, threads=1)
            found[place] = key_distances(decided[:, 0])
        found[one == other] = distance_of_copies(self.metric)
        return found


def blocks_of(shards: int) -> list[tuple[int, int]]:
    """All (s, t) of so many shards, those of one s together."""
    return [(s, t) for s in range(shards) for t in range(s, shards)]


def starts_of(numbers: list[np.ndarray]) -> np.ndarray:
    """int64 (shards + 1,): the number of the first node at home in each shard, then their count."""
    starts = [0]
    for own in numbers:
        starts.append(starts[-1] + int((own >= starts[-1]).sum()))
    return np.array(starts, np.int64)


def no_pairs(nearest: np.ndarray) -> Pairs:
    """None, of nodes of which nothing but the nearest distance, float32 (nodes,), is known."""
    none = np.empty(0, np.int32)
    return Pairs(none, none, np.empty(0, np.float32), np.zeros(len(nearest), bool), nearest)


def numbers_of_nodes(digests: list[np.ndarray]) -> list[np.ndarray]:
    """The numbers of the nodes of each shard, from digests uint64 (n, words) of their rows."""
    ends = np.cumsum([0] + [len(part) for part in digests])
    every = np.concatenate(digests) if digests else np.empty((0, 2), np.uint64)
    nodes, _ = NodeTable().assign(every, 0, len(every))
    return [nodes[start:stop] for start, stop in itertools.pairwise(ends)]
