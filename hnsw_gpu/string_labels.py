"""Labels that are strings. The engine knows them by numbers, and never sees one.

A string's number is its place in the order first given. A state (`engine/state.py`) holds the
`Names` of its labels; one that holds none has integers, which are their own numbers.
"""

import itertools
import sys
from collections import Counter
from typing import Any

import numpy as np

from hnsw_gpu.engine import State

STRINGS = np.dtypes.StringDType()  # of arrays of labels
NONE = ""  # in place of a label, where there are too few
# In a file: the number of each entry (in place of `labels`, so that no release reads these as
# labels), and where each string begins and ends in the UTF-8 of all.
ENTRIES, OFFSETS, BYTES = "label_strings", "string_offsets", "string_bytes"
LABEL_ARRAYS = ("labels", ENTRIES, OFFSETS, BYTES)  # of which a file has the first, or the others


class Names:
    """Strings by number. One thread at a time adds; others read meanwhile.

    A number never changes its meaning while a state that uses it lives. What was added for labels
    that were never published is taken back (`keep_first`) before the next change, which may be one
    of a forked process. No state holds such a number: who looks the string up finds no label.

    A list, not an array of numpy's StringDType: picking 100,000 strings takes 30 ms from either,
    an array's lock is held without the interpreter's (a fork may leave it so), and the strings of
    the table below are the same objects.
    """

    def __init__(self, strings: list[str] | None = None) -> None:
        self._strings = [NONE] if strings is None else [NONE, *strings]  # number n at n + 1
        self._string_bytes = sum(map(sys.getsizeof, self._strings))

    def __len__(self) -> int:
        return len(self._strings) - 1

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = sys.getsizeof(self._strings) + self._string_bytes
        table = vars(self).get("_table")
        if table is None:
            return held
        return held + sys.getsizeof(table) + len(table) * sys.getsizeof(len(table))

    def strings(self, numbers: np.ndarray) -> np.ndarray:
        """Strings (...) of numbers (...); "" of -1."""
        places = (numbers.ravel() + 1).tolist()
        found = list(map(self._strings.__getitem__, places))
        return np.array(found, STRINGS).reshape(numbers.shape)

    def number(self, string: str) -> int:
        """That of one string; -1 if it is unknown."""
        return self._looked_up().get(string, -1)

    def numbers(self, strings: np.ndarray) -> np.ndarray:
        """int64 numbers (m,) of strings (m,), which need not be of labels; -1 of unknown ones."""
        find = self._looked_up().get
        found = map(find, strings.tolist(), itertools.repeat(-1))
        return np.fromiter(found, np.int64, len(strings))

    def added(self, strings: np.ndarray) -> np.ndarray:
        """int64 numbers (m,) of strings (m,), none twice; unknown ones get the next."""
        table, first, given = self._looked_up(), len(self), strings.tolist()
        numbers = [table.setdefault(text, len(table)) for text in given]
        new = [text for text, number in zip(given, numbers, strict=True) if number >= first]
        self._strings += new
        self._string_bytes += sum(map(sys.getsizeof, new))
        return np.array(numbers, np.int64)

    def keep_first(self, count: int) -> None:
        """Take back what was added behind the first `count`."""
        table = vars(self).get("_table", {})
        while len(table) > count:  # it may hold more than the list, where a fork tore `added`
            table.popitem()
        self._string_bytes -= sum(map(sys.getsizeof, self._strings[count + 1 :]))
        del self._strings[count + 1 :]

    def _looked_up(self) -> dict[str, int]:
        """Numbers by string: a table, made when first asked for.

        Of two threads that make it at once, one's is kept (`setdefault` is one step). Either is
        whole: who adds has made it before.
        """
        held = vars(self)
        if "_table" not in held:
            strings = self._strings[1:]
            held.setdefault("_table", dict(zip(strings, range(len(strings)), strict=True)))
        return held["_table"]

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """The first `count` in a file: offsets int64 (count + 1,), and the UTF-8 of all, uint8."""
        texts = [text.encode() for text in self._strings[1 : 1 + count]]
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return {OFFSETS: offsets, BYTES: np.frombuffer(b"".join(texts), np.uint8)}


# ---------------------------------------------------------------- of a state


def labels_of(state: State, numbers: np.ndarray) -> np.ndarray:
    """What callers call labels (...) of a state, -1 where there is none."""
    return numbers if state.names is None else state.names.strings(numbers)


def taking(state: State, given: np.ndarray, what: str = "labels") -> State:
    """The state as it takes given labels, int64 or strings (m,): one that is empty takes either.

    TypeError where it holds the other kind.
    """
    are_strings = given.dtype.kind == "T"
    if are_strings == (state.names is not None) or not len(given):
        return state
    if len(state.labels) or len(state.labels.deleted.labels):
        kinds = ("strings", "integers") if are_strings else ("integers", "strings")
        raise TypeError(f"{what}: {kinds[0]}, and the labels of this index are {kinds[1]}")
    if are_strings:
        return state._replace(names=Names(), next_label=0)
    return state._replace(names=None)


def numbers_of(state: State, given: np.ndarray, what: str = "labels") -> np.ndarray:
    """int64 (m,): the engine's labels for given ones; -1 of a string that it does not know."""
    names = taking(state, given, what).names
    if not len(given):
        return np.empty(0, np.int64)
    return given if names is None else names.numbers(given)


def without_unused(state: State) -> State:
    """The state without the strings of labels that are gone for good, numbered anew."""
    if state.names is None:
        return state
    used = np.sort(np.concatenate([state.labels.sorted, state.labels.deleted.labels]))
    numbers = np.full(len(state.names), -1)
    numbers[used] = np.arange(len(used))
    return state._replace(
        names=Names(state.names.strings(used).tolist()) if len(used) else None,
        labels=state.labels.renumbered(numbers),
        next_label=len(used),
    )


def numbered_alike(state: State, other: State) -> tuple[State, State]:
    """The state as it takes all labels of another, and the other with its numbers.

    TypeError where they hold different kinds.
    """
    theirs = other.labels.sorted
    given = labels_of(other, theirs)
    state = taking(state, given, "merge")
    if state.names is None or not len(given):
        return state, other
    numbers = np.full(len(other.names), -1)
    numbers[theirs] = state.names.added(given)
    return state, other._replace(labels=other.labels.renumbered(numbers))


def with_all_strings(state: State) -> State:
    """The state, whose next string follows all that there are."""
    return state if state.names is None else state._replace(next_label=len(state.names))


# ---------------------------------------------------------------- in a file


def to_file(state: State) -> dict[str, np.ndarray]:
    """The arrays of a state, and of its strings, as a file holds them."""
    arrays = state.arrays()
    if state.names is not None:
        arrays[ENTRIES] = arrays.pop("labels")
        arrays |= state.names.arrays(state.next_label)
    return arrays


def from_file(arrays: dict[str, Any]) -> tuple[dict[str, Any], Names | None]:
    """The arrays of a state, and its strings. ValueError says what is wrong with those."""
    if ENTRIES not in arrays:
        return arrays, None
    return {**arrays, "labels": arrays[ENTRIES]}, names_of(arrays)


def names_of(arrays: dict[str, Any]) -> Names:
    """What gave these arrays. ValueError says what is wrong."""
    offsets, text = arrays[OFFSETS], arrays[BYTES]
    if (offsets.dtype, offsets.ndim, text.dtype, text.ndim) != (np.int64, 1, np.uint8, 1):
        raise ValueError(f"{OFFSETS} and {BYTES} are no strings")
    if not len(offsets) or (offsets[0], offsets[-1]) != (0, len(text)):
        raise ValueError(f"{OFFSETS} do not cover the {len(text)} bytes of strings")
    if (offsets[1:] <= offsets[:-1]).any():
        raise ValueError(f"{OFFSETS} do not ascend, or a string is empty")
    whole = text.tobytes()
    if b"\0" in whole:
        raise ValueError(f"{BYTES} hold a null character")
    strings = [whole[start:end].decode() for start, end in itertools.pairwise(offsets.tolist())]
    if len(set(strings)) < len(strings):
        twice = Counter(strings).most_common(1)[0][0]
        raise ValueError(f"{BYTES}: {twice!r} is there twice")
    return Names(strings)


def saved_labels(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The labels (n,) of a file, in any order, from its `LABEL_ARRAYS`."""
    arrays, names = from_file(arrays)
    labels = arrays["labels"]
    return labels if names is None else names.strings(labels)


def require_strings_of(state: State) -> None:
    """ValueError where labels are numbers of no string."""
    if state.names is not None:
        largest = int(state.labels.deleted.labels.max(initial=-1))
        if len(state.names) != state.next_label or largest >= state.next_label:
            raise ValueError(
                f"{len(state.names)} strings, where the next label is {state.next_label} and "
                f"deleted ones go to {largest}"
            )
