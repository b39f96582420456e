"""What a search costs, from the profile of its executed PTX: by class, function and line."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from hnsw_gpu.gpu import kernel_source
from ptx.launches import Profile

CLASSES = {  # a pattern of the mnemonic; the first that fits
    "global load": r"ld\.global",
    "global store, atomic": r"st\.global|atom",
    "shared load": r"ld\.shared",
    "shared store": r"st\.shared",
    "parameter": r"ld\.param",
    "shuffle": r"shfl",
    "vote, match": r"vote|match",
    "barrier": r"bar\.",
    "branch": r"bra|ret",
    "float": r"(add|sub|mul|fma|div|sqrt|max|min|abs|neg)\.(rn\.)?(ftz\.)?f|dp4a",
    "conversion from fp16": r"cvt.*f16",
    "compare, select": r"setp|selp|(and|or|not|xor|mov)\.pred",
    "move": r"mov",
    "64-bit integer": r".*[.][bsu]64|mul\.wide|mad\.wide",
    "32-bit integer": r".",
}

ACCESSES = ("global load", "global store, atomic", "shared load", "shared store")


class Cost(NamedTuple):
    """Of some instructions: executions by a warp, lanes of each, and units of its accesses."""

    executions: int
    lanes: float
    units: float  # 32-byte sectors or wavefronts an execution


def class_of(text: str) -> str:
    mnemonic = re.sub(r"^@!?\S+\s+", "", text)
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, mnemonic))


def own_place(place: tuple) -> tuple[str, int]:
    """File and line in the kernels; what is of warp.cuh counts where it is called."""
    return next((one for one in place if one[1] and one[0] != "warp.cuh"), ("", 0))


@functools.cache
def function_names() -> dict[tuple[str, int], str]:
    """Of each file and line the function that it is in."""
    found: dict[tuple[str, int], str] = {("", 0): "(moved by the compiler)"}
    begin = re.compile(r"\s*(?:__device__|extern \"C\" __global__).*?(\w+)\(|(\w+)\(const \w+ \w+,")
    for path in kernel_source.folder().iterdir():
        name = "(header)"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if (match := begin.match(line)) and match[1] != "__launch_bounds__":
                name = match[1] or match[2]
            found[path.name, number] = name
    return found


def function_of(place: tuple) -> str:
    file, line = own_place(place)
    return f"{file} {function_names().get((file, line), '')}".strip()


def is_of_distance(place: tuple) -> bool:
    return any(file == "distance.cuh" for file, _ in place)


def grouped(profile: Profile, name_of: Callable[[int], object]) -> dict[object, Cost]:
    """Cost by name of the instructions, the dearest first."""
    numbers = defaultdict(list)
    for i in range(len(profile.executions)):
        numbers[name_of(i)].append(i)
    costs = {name: cost_of(profile, where) for name, where in numbers.items()}
    return dict(sorted(costs.items(), key=lambda item: -item[1].executions))


def cost_of(profile: Profile, where: Iterable[int]) -> Cost:
    chosen = np.array(list(where), int)
    executions = int(profile.executions[chosen].sum())
    of_one = max(executions, 1)
    return Cost(
        executions,
        float(profile.lanes[chosen].sum()) / of_one,
        float(profile.units[chosen].sum()) / of_one,
    )


def by_class(profile: Profile) -> dict[str, Cost]:
    return grouped(profile, lambda i: class_of(profile.program.text[i]))


def by_function(profile: Profile) -> dict[str, Cost]:
    return grouped(profile, lambda i: function_of(profile.program.place[i]))


def by_line(profile: Profile) -> dict[tuple[str, int], Cost]:
    return grouped(profile, lambda i: own_place(profile.program.place[i]))


def by_access(profile: Profile) -> dict[tuple[str, tuple[str, int]], Cost]:
    """Of a class that reads or writes memory, and a line."""
    every = grouped(
        profile, lambda i: (class_of(profile.program.text[i]), own_place(profile.program.place[i]))
    )
    return {name: cost for name, cost in every.items() if name[0] in ACCESSES}


def steps(profile: Profile) -> int:
    """Rounds of search.cu: how often `gather` waits for what it listed."""
    return int(
        sum(
            executions
            for text, place, executions in zip(
                profile.program.text, profile.program.place, profile.executions, strict=True
            )
            if text.startswith("bar.warp.sync")
            and place[0][0] == "warp.cuh"
            and function_of(place[1:2]) == "search.cu gather"
        )
    )


def distance_instructions(profile: Profile) -> int:
    """Of distance.cuh."""
    places = profile.program.place
    return cost_of(profile, (i for i, at in enumerate(places) if is_of_distance(at))).executions
