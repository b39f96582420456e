"""Validation of labels, and of filters by them: integers, or strings."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu.engine import State
from hnsw_gpu.inputs import LARGEST_LABEL, array, refuse
from hnsw_gpu.string_labels import STRINGS, numbers_of, taking


def label_array(name: str, value: Any) -> np.ndarray:
    """As `array`; what holds strings gives an array of them (m,), each fit to be a label."""
    if isinstance(value, str):
        return _strings(name, [value])
    if isinstance(value, (list, tuple)) and len(value) and isinstance(value[0], str):
        return _strings(name, value)  # numpy would make all as long as the longest
    result = array(name, value)
    if result.dtype.kind not in "OTU" or not result.size:
        return result
    if result.dtype.kind == "U":
        refuse(name, ~are_text(result.ravel()), "numbers that are no characters")
    given = result.ravel().tolist()
    if not any(isinstance(item, str) for item in given):
        return result
    if result.ndim > 1:
        raise ValueError(f"{name}: shape {result.shape}, expected (m,)")
    return _strings(name, value if isinstance(value, (list, tuple)) else given)


def _strings(name: str, given: Sequence[Any]) -> np.ndarray:
    """Strings (m,), as numpy's StringDType; RowsError names those that cannot be a label."""
    is_other = np.array([not isinstance(item, str) for item in given])
    refuse(name, is_other, "values that are no strings (all labels are, or none)")
    refuse(name, np.array([not item for item in given]), "empty strings (which mean none)")
    refuse(name, np.array(["\0" in item for item in given]), "null characters")
    try:
        "".join(given).encode()
    except UnicodeEncodeError:
        refuse(name, ~are_text(np.array(given, str)), "lone surrogates")
    if set(map(type, given)) != {str}:
        given = [str.__str__(text) for text in given]
    return np.array(given, STRINGS)


def are_text(strings: np.ndarray) -> np.ndarray:
    """bool (m,): which of numpy's U (m,) are characters that UTF-8 knows; nobody else looks."""
    native = np.ascontiguousarray(strings, strings.dtype.newbyteorder("="))
    numbers = native.view(np.uint32).reshape(len(native), native.itemsize // 4)
    found: np.ndarray = ~((numbers > 0x10FFFF) | (numbers >> 11 == 0xD800 >> 11)).any(axis=1)
    return found


def labels(name: str, value: ArrayLike) -> np.ndarray:
    """Labels (m,): int64, or strings."""
    result = label_array(name, value)
    if result.size == 0:
        return np.empty(0, np.int64)
    if result.dtype.kind == "T":
        return result
    if result.dtype == object and result.ndim == 1:
        kinds = map(type, result)
        are_whole = [issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds]
        refuse(name, ~np.array(are_whole), "values that are neither integers nor strings")
        try:
            result = np.array(result.tolist(), np.int64)
        except OverflowError:
            raise ValueError(f"{name}: labels beyond int64") from None
    if result.dtype.kind not in "iu":
        raise TypeError(f"{name}: dtype {result.dtype}, expected integers or strings")
    if result.ndim == 0:
        result = result[None]
    if result.ndim != 1:
        raise ValueError(f"{name}: shape {result.shape}, expected (m,)")
    if result.dtype == np.uint64 and (result > np.iinfo(np.int64).max).any():
        raise ValueError(f"{name}: labels beyond int64")
    if result.min() < 0:
        raise ValueError(f"{name}: label {result.min()}, expected 0 or more (-1 means none)")
    return np.require(result, np.int64, ["C", "W"])  # one type for compiled code


def unique_labels(name: str, value: ArrayLike) -> np.ndarray:
    """Labels (m,), int64 or strings, none twice."""
    result = labels(name, value)
    if result.dtype.kind == "T":
        given = result.tolist()
        if len(set(given)) < len(given):
            twice = Counter(given).most_common(1)[0][0]
            raise ValueError(f"{name}: label {twice!r} is given more than once")
        return result
    ordered = np.sort(result)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(f"{name}: label {repeated[0]} is given more than once")
    return result


def labels_for(value: ArrayLike, count: int) -> np.ndarray:
    """Labels (count,) for vectors, int64 or strings, none twice."""
    given = unique_labels("labels", value)
    if len(given) != count:
        raise ValueError(f"labels: {len(given)} for {count} vectors")
    return given


def new_labels(
    value: ArrayLike | None, count: int, state: State, may_be_known: bool = False
) -> tuple[State, np.ndarray]:
    """The state as it takes new labels, and the engine's int64 (count,) for these, none in use.

    None goes on after the largest.
    """
    if value is None:
        return state, _next_labels(count, state)
    given = labels_for(value, count)
    state = taking(state, given)
    if not may_be_known:
        is_known = state.labels.find(numbers_of(state, given)) >= 0
        if is_known.any():
            first = given[is_known].tolist()[0]
            raise ValueError(
                f"labels: label {first!r} is already in the index ({is_known.sum()} are)"
            )
    return state, given if state.names is None else state.names.added(given)


def _next_labels(count: int, state: State) -> np.ndarray:
    """int64 (count,): those after the largest."""
    if state.names is not None and count:
        raise ValueError("labels=None: the labels of this index are strings; give one a vector")
    first = state.next_label
    if count and first + count - 1 > LARGEST_LABEL:
        raise ValueError(
            f"labels=None: {count} labels from {first} on would pass the largest, "
            f"{LARGEST_LABEL}; give labels"
        )
    return first + np.arange(count) if count else np.empty(0, np.int64)


def allowed_entries(value: ArrayLike, state: State, queries: int) -> np.ndarray:
    """Packed bits, uint32 (words,) or (queries, words), of the entries that `allow=` allows.

    `value`: bool (n,) or (queries, n) indexed by label; the same as uint8 bits packed little-endian
    (`np.packbits(mask, axis=-1, bitorder="little")`); or labels (m,): strings, or integers of any
    dtype but uint8.
    """
    held = state.labels
    are_strings = isinstance(value, np.ndarray) and value.dtype.kind == "T"  # fit or not, no matter
    allow = np.asarray(value) if are_strings else label_array("allow", value)
    if allow.size == 0 and allow.ndim == 1 and allow.dtype != bool:
        return held.bits_of(np.empty(0, np.int64))
    if allow.dtype.kind == "i" or (allow.dtype.kind == "u" and allow.dtype.itemsize > 1):
        # one type for compiled code, whatever was given; what is beyond int64 becomes negative
        allow = np.require(allow, np.int64, ["C", "W"])
    if allow.dtype.kind in "iT" and allow.ndim == 1:  # labels that are not here allow nothing
        return held.bits_of(numbers_of(state, allow, "allow"))
    if allow.dtype not in (np.dtype(bool), np.dtype(np.uint8)):
        raise TypeError(
            f"allow: dtype {allow.dtype}, {allow.ndim}-d, expected a bool mask, "
            "uint8 packed bits, or a 1-d array of labels"
        )
    if state.names is not None:
        raise ValueError(
            "allow: a mask is indexed by integer labels, and those of this index are strings: give "
            "the allowed labels"
        )
    if allow.ndim not in (1, 2) or (allow.ndim == 2 and len(allow) != queries):
        raise ValueError(f"allow: shape {allow.shape}, expected (n,) or ({queries}, n)")
    try:
        return held.bits_of_mask(allow)
    except IndexError as error:
        covered = allow.shape[-1] * (8 if allow.dtype == np.uint8 else 1)
        raise ValueError(
            f"allow: a mask of {covered} is indexed by label, and label {error} is outside; "
            "give the allowed labels instead (of any dtype but uint8, which is packed bits)"
        ) from None
