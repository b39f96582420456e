"""Two or more indexes timed in turn, because only ratios taken within one run mean anything.

A machine that others use is slower in one minute than in the next, for everyone. So the sides take
turns (A, B, A, B, ...), every turn gives one ratio, and the median of the ratios is the result.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.datasets import Dataset, recall
from benchmarks.peers import K, Peer, Setting, make

Bracket = tuple[Any, Any]  # neighbouring rungs of a ladder, with the target recall between them


class Side:
    """A built index in a race, with its recall at every rung (mostly an ef) asked for so far."""

    def __init__(self, name: str, peer: Peer, dataset: Dataset) -> None:
        self.name = name
        self.peer = peer
        self.dataset = dataset
        self.recalls: dict[Any, float] = {}

    def recall(self, rung: Any) -> float:
        if rung not in self.recalls:
            labels = self.peer.search(self.dataset.queries, K, rung, 2)
            self.recalls[rung] = recall(self.dataset, labels, K)
        return self.recalls[rung]

    def brackets(self, target: float) -> list[Bracket]:
        """The two rungs around the target recall of every ladder that reaches it."""
        found = (self.bracket(ladder, target) for ladder in self.peer.ladders)
        return [bracket for bracket in found if bracket]

    def bracket(self, ladder: Sequence[Any], target: float) -> Bracket | None:
        """Of one ladder; the first rung twice, where it is past the target; None: out of reach."""
        low, high = 0, len(ladder) - 1
        if self.recall(ladder[low]) >= target:
            return ladder[low], ladder[low]
        if self.recall(ladder[high]) < target:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.recall(ladder[middle]) < target:
                low = middle
            else:
                high = middle
        return ladder[low], ladder[high]

    def fastest(self, brackets: list[Bracket], target: float, threads: int) -> Bracket:
        """The bracket with the highest rate at the target, by processor time of a short trial."""
        if len(brackets) == 1:
            return brackets[0]
        trial = self.dataset.queries[:1_000]

        def rate(bracket: Bracket) -> float:
            spent = [
                min(self.seconds(trial, rung, threads)[1] for _ in range(3)) for rung in bracket
            ]
            recalls = [self.recall(rung) for rung in bracket]
            return interpolate(target, recalls, [1 / seconds for seconds in spent])

        return max(brackets, key=rate)

    def seconds(self, queries: np.ndarray, rung: Any, threads: int) -> tuple[float, float]:
        """Wall and processor seconds of one search."""
        wall, processor = time.perf_counter(), time.process_time()
        self.peer.search(queries, K, rung, threads)
        return time.perf_counter() - wall, time.process_time() - processor


def race_builds(
    names: list[str], dataset: Dataset, setting: Setting, threads: int, rounds: int
) -> tuple[list[Side], dict]:
    """Builds every index `rounds` times in turn: the indexes of the last round, and the times."""
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    sides: dict[str, Side] = {}
    for turn in range(rounds):
        for name in tqdm(in_turn(names, turn), desc=f"{dataset.name}: build", disable=None):
            sides.pop(name, None)
            peer = make(name, dataset.base.shape[1])
            start, start_processor = time.perf_counter(), time.process_time()
            peer.build(dataset.base, setting, threads)
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - start_processor)
            sides[name] = Side(name, peer, dataset)
    report = {
        "threads": threads,
        "seconds": {name: median(values) for name, values in wall.items()},
        "processor_seconds": {name: median(values) for name, values in processor.items()},
        "ratios": ratios(wall),
        "processor_ratios": ratios(processor),
    }
    return [sides[name] for name in names], report


def race_searches(
    sides: list[Side], target: float, threads: int, rounds: int, least_seconds: float
) -> dict:
    """Queries/s of every side that reaches recall `target`, and their ratios, at that recall.

    A turn times each side at the two rungs around the target, on the same queries; its queries/s
    are interpolated, their logarithm over recall. Of several ladders, the fastest is taken.
    """
    brackets = {
        side: side.fastest(found, target, threads)
        for side in sides
        if (found := side.brackets(target))
    }
    count, turns = time_in_turn(brackets, threads, rounds, least_seconds)
    rates: dict[str, list[float]] = {side.name: [] for side in brackets}
    processor_rates: dict[str, list[float]] = {side.name: [] for side in brackets}
    for spent in turns:
        for side, bracket in brackets.items():
            recalls = [side.recall(rung) for rung in bracket]
            for into, clock in ((rates, 0), (processor_rates, 1)):
                ends = [count / spent[side, rung][clock] for rung in bracket]
                into[side.name].append(interpolate(target, recalls, ends))
    return {
        "recall": target,
        "threads": threads,
        "queries": count,
        "ef": {side.name: list(bracket) for side, bracket in brackets.items()},
        "queries_per_s": {name: median(values) for name, values in rates.items()},
        "queries_per_processor_s": {
            name: median(values) for name, values in processor_rates.items()
        },
        "ratios": ratios(rates),
        "processor_ratios": ratios(processor_rates),
    }


Turn = dict[tuple[Side, Any], tuple[float, float]]  # (side, rung): wall and processor seconds


def time_in_turn(
    plan: Mapping[Side, tuple[Any, ...]], threads: int, rounds: int, least_seconds: float
) -> tuple[int, list[Turn]]:
    """Searches of each side at its rungs, `rounds` times in turn: (queries a search, the times)."""
    if not plan:
        return 0, []
    count = batch_size(plan, threads, least_seconds)
    turns = []
    for number in tqdm(range(rounds), desc=f"searches, {threads} threads", disable=None):
        turn: Turn = {}
        for place in range(max(map(len, plan.values()))):
            for side in in_turn(plan, number):
                rung = plan[side][place]
                queries = np.roll(side.dataset.queries, -number * count, axis=0)[:count]
                turn[side, rung] = side.seconds(queries, rung, threads)
        turns.append(turn)
    return count, turns


def batch_size(plan: Mapping[Side, tuple[Any, ...]], threads: int, least_seconds: float) -> int:
    """Queries for a search so that the fastest takes `least_seconds`, if there are as many."""
    fastest = 0.0
    for side, rungs in plan.items():
        trial = side.dataset.queries[:300]
        side.seconds(trial, rungs[0], threads)
        fastest = max(fastest, len(trial) / side.seconds(trial, rungs[0], threads)[0])
    everything = min(len(side.dataset.queries) for side in plan)
    return min(everything, math.ceil(fastest * least_seconds))


def interpolate(target: float, recalls: list[float], rates: list[float]) -> float:
    """The rate at recall `target`, log-linear between two points, or else that of a first rung."""
    if recalls[0] >= target:
        return rates[0]
    part = (target - recalls[0]) / (recalls[1] - recalls[0])
    return math.exp((1 - part) * math.log(rates[0]) + part * math.log(rates[1]))


def ratios(values: dict[str, list[float]]) -> dict:
    """For "ours-*/peer": the median, lowest and highest ratio of values of the same turn."""
    found = {}
    for ours in filter(is_ours, values):
        for peer in values:
            if not is_ours(peer):
                each = sorted(a / b for a, b in zip(values[ours], values[peer], strict=True))
                found[f"{ours}/{peer}"] = {
                    "median": median(each),
                    "low": each[0],
                    "high": each[-1],
                }
    return found


def is_ours(name: str) -> bool:
    return name.startswith("ours")


def in_turn(sides: Iterable, turn: int) -> list:
    """There and back again, so that none always follows the same other."""
    order = list(sides)
    return order if turn % 2 == 0 else order[::-1]
