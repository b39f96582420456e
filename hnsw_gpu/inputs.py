"""Validation of what callers pass, once: clear errors here, no checks inside."""

import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu.engine import STORAGE, State, Walk, squared_lengths, thread_count
from hnsw_gpu.string_labels import STRINGS, numbers_of, taking

METRICS = {"l2": "l2", "euclidean": "l2", "ip": "ip", "cosine": "cosine"}  # and the engines' name
ALIASES = {
    "sqeuclidean": "l2",
    "inner_product": "ip",
    "dot": "ip",
    "cos": "cosine",
    "angular": "cosine",
}
LEAST_RERANK = 20  # nodes that refine rows re-rank, and the share of ef: see benchmarks/README.md
RERANK_SHARE = 4
MOST_NODES = 2**31 - 1
LARGEST_LABEL = 2**63 - 1
DEFAULT_REFINE = {"int4": "fp16"}  # where nobody says; it cannot do without
REFINE = {False: "", "": "", True: "fp32", "fp32": "fp32", "fp16": "fp16"}
CUDA_MEMORY = (2, 13)  # device types of DLPack: plain, managed
MASKED = "masked values"
LONGEST_SQUARED = float(np.finfo(np.float32).max) / 4  # then no distance overflows float32
SHORTEST_SQUARED = 1e-28  # then what underflows float32 is less than it rounds
FP16_LOSS = 0.01  # most of a vector's length that rounding to fp16 may take; normal is 0.0005
SCALE_THEM = "multiply all vectors by one factor"  # the remedy: no order changes
OR_ZERO = f"{SCALE_THEM}, or make these zero"


class RowsError(ValueError):
    """Some rows are refused: the text names the first of them."""

    def __init__(self, text: str, what: str, rows: np.ndarray) -> None:
        super().__init__(text)
        self.what = what  # is wrong with them
        self.rows = rows  # int64 (m,): all of them, ascending

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.what, self.rows)


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """`value`, if it is a known name."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, known))}")
    return value


def device(value: Any) -> str:
    """`value`, if it says where to search."""
    if isinstance(value, str) and re.fullmatch(r"cuda:[0-9]{1,3}", value):
        return value
    if not isinstance(value, str) or value not in ("cpu", "auto", "cuda"):
        raise ValueError(
            f"device={value!r}: expected 'cpu', 'auto', 'cuda' (CuPy's current GPU), or a GPU by "
            "number, as 'cuda:1'"
        )
    return value


def metric(value: Any) -> str:
    """The metric of a name or an alias."""
    name = one_of("metric", value, (*METRICS, *ALIASES))
    return ALIASES.get(name, name)


def number(name: str, value: Any) -> float:
    """`value` as float, if it is a number."""
    try:
        result = float(value + 0.0)  # adding refuses text, which float() would read
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r}: expected a number") from None
    if np.isnan(result):
        raise ValueError(f"{name}: NaN")
    return result


def share(name: str, value: Any) -> float:
    """A number above 0 and at most 1."""
    given = number(name, value)
    if not 0 < given <= 1:
        raise ValueError(f"{name}: {given}, expected above 0 and at most 1")
    return given


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as int, if it is one within bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r}: expected an integer") from None
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r}: expected an integer")
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}={number}: expected {bounds}")
    return number


def refine(value: bool | str | None, dtype: str) -> str:
    """The dtype of the rows that are kept beside those of `dtype`; "" for none."""
    if value is None:
        value = DEFAULT_REFINE.get(dtype, "")
    if value not in REFINE:
        raise ValueError(f"refine={value!r}: expected True, False, 'fp32', 'fp16' or None")
    kept = REFINE[value]
    if not kept and dtype in DEFAULT_REFINE:
        raise ValueError(
            f"refine={value!r}: distances of dtype={dtype!r} are estimates, expected "
            "'fp16' (the default) or 'fp32' rows that decide"
        )
    if kept and np.dtype(STORAGE[kept]).itemsize <= np.dtype(STORAGE[dtype]).itemsize:
        raise ValueError(f"refine={value!r}: {kept} rows are no finer than dtype={dtype!r}")
    return kept


def threads(value: int | None) -> int:
    """How many threads to use; None: one a processor."""
    return thread_count(None if value is None else integer("threads", value, 1))


def reranked(value: int | str | None, k: int, ef: int, dtype: str) -> int | None:
    """How many nodes refine rows re-rank; None: the whole beam."""
    if value is None:
        return None
    if isinstance(value, str) and value == "auto":
        return max(2 * k, LEAST_RERANK, ef // RERANK_SHARE) if dtype == "int4" else None
    return integer("rerank", value, 1)


def walk(
    k: int,
    ef: int,
    threads_given: int | None,
    expand: int,
    ef_upper: int = 1,
    rerank: int | str | None = "auto",
    dtype: str = "",
) -> Walk:
    """The numbers of a search."""
    k, ef = integer("k", k, 1, MOST_NODES), integer("ef", ef, 1)
    return Walk(
        k=k,
        rerank=reranked(rerank, k, ef, dtype) or 0,
        ef=ef,
        expand=integer("expand", expand, 1, 32),
        ef_upper=integer("ef_upper", ef_upper, 1, 65536),
        threads=threads(threads_given),
    )


def is_on_gpu(value: Any) -> bool:
    """Is it an array in the memory of an NVIDIA GPU?"""
    if hasattr(value, "__cuda_array_interface__"):
        return True
    return hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] in CUDA_MEMORY


def array(name: str, value: Any) -> np.ndarray:
    """Any array-like as a numpy array, without copying where that is possible.

    RowsError where values are missing.
    """
    if is_on_gpu(value):
        raise TypeError(
            f"{name}: on a GPU, expected an array in host memory (only the queries of `search` on "
            "an index that is on that GPU may lie there)"
        )
    _refuse_missing(name, value)
    if not isinstance(value, np.ndarray) and not hasattr(value, "__array__"):
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        try:
            return np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return np.asarray(value)


def _refuse_missing(name: str, value: Any) -> None:
    """RowsError where numpy would forget that values are masked, or read a null as NaN."""
    if isinstance(value, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(value)
        by_row = mask.reshape(mask.shape[0] if mask.ndim else 1, -1)
        refuse(name, np.asarray(by_row.any(axis=1)), MASKED)
    elif isinstance(value, (list, tuple)):
        if any(isinstance(row, np.ma.MaskedArray) for row in value):
            refuse(name, np.array([np.ma.is_masked(row) for row in value]), MASKED)
    else:
        for column in _columns(value):
            refuse(name, np.asarray(column.is_null()), "null")


def _columns(value: Any) -> Iterable[Any]:
    """The columns of an Arrow or polars table, or the one that it is; none of anything else."""
    if hasattr(value, "is_null"):
        return (value,)
    columns: Any = getattr(value, "get_columns", None) or getattr(value, "itercolumns", None)
    return columns() if columns is not None else ()


def vectors(name: str, value: ArrayLike, dim: int | None = None) -> np.ndarray:
    """Vectors (n, dim) of real numbers, not yet converted; one vector (dim,) gives (1, dim)."""
    if isinstance(value, np.ma.MaskedArray) and value.ndim == 1 and dim is not None:
        value = value[None]  # one vector: what is masked is in row 0
    result = array(name, value)
    if result.dtype.kind not in "fiub":
        raise TypeError(f"{name}: dtype {result.dtype}, expected real numbers")
    if result.ndim == 1 and (dim is not None and len(result) == dim):
        result = result[None]
    if result.ndim == 1 and result.size == 0 and dim is not None:
        result = result.reshape(0, dim)
    if result.ndim != 2 or (dim is not None and result.shape[1] != dim):
        expected = f"(n, {dim})" if dim is not None else "(n, dim)"
        raise ValueError(f"{name}: shape {result.shape}, expected {expected}")
    return result


def float_vectors(
    name: str, part: np.ndarray, metric: str, dtype: str = "fp32", first: int = 0
) -> np.ndarray:
    """float32 copy, C order, of a part of `vectors` that begins at row `first`, values checked.

    dtype: in which they are to be stored; "" for queries.
    """
    with np.errstate(over="ignore"):  # a float64 too large becomes inf and is refused below
        result = np.ascontiguousarray(part, np.float32)
    squared = squared_lengths(result)
    refuse(name, ~np.isfinite(squared), "NaN or infinite values", first)
    if metric == "cosine":
        refuse(name, squared == 0, "zero vectors, which have no cosine distance", first)
        return result
    what = "values too {} for float32 distances"
    refuse(name, squared > LONGEST_SQUARED, what.format("large"), first, SCALE_THEM)
    if dtype or metric == "ip":
        refuse(name, _are_too_short(part, squared), what.format("small"), first, OR_ZERO)
    if dtype == "fp16":
        largest = np.abs(result).max(axis=1, initial=0)
        too_large = largest > np.finfo(np.float16).max
        refuse(name, too_large, "values too large for fp16", first, SCALE_THEM)
        lost = squared_lengths(result - result.astype(np.float16))
        too_small = lost > FP16_LOSS**2 * squared
        refuse(name, too_small, "values too small for fp16", first, OR_ZERO)
    return result


def _are_too_short(part: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """bool (m,): which vectors, of these squared lengths in float32, are all but zero."""
    too_short: np.ndarray = (squared > 0) & (squared < SHORTEST_SQUARED)
    zeros = np.flatnonzero(squared == 0)
    too_short[zeros] = (part[zeros] != 0).any(axis=1)  # float64 below float32's least
    return too_short


def are_valid(part: np.ndarray, metric: str) -> np.ndarray:
    """bool (m,): which of these vectors `float_vectors` would not refuse, stored as fp32."""
    with np.errstate(over="ignore"):
        squared = squared_lengths(np.ascontiguousarray(part, np.float32))
    if metric == "cosine":
        return np.isfinite(squared) & (squared > 0)
    return (squared <= LONGEST_SQUARED) & ~_are_too_short(part, squared)  # NaN is neither


def refuse(name: str, is_bad: np.ndarray, what: str, first: int = 0, remedy: str = "") -> None:
    """RowsError that names the first rows where `is_bad`, counted from `first`, and a remedy.

    No variable holds it here: with its traceback it would keep all that its callers hold.
    """
    if is_bad.any():
        rows = first + np.flatnonzero(is_bad)
        listed = ", ".join(map(str, rows[:5].tolist()))
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        remedy = f": {remedy}" if remedy else ""
        said = f"{name}: {what} in row{'s' * (len(rows) > 1)} {listed}{more}{remedy}"
        raise RowsError(said, what, rows)


def label_array(name: str, value: Any) -> np.ndarray:
    """As `array`; what holds strings gives an array of them (m,), each fit to be a label."""
    if isinstance(value, str):
        return _strings(name, [value])
    if isinstance(value, (list, tuple)) and len(value) and isinstance(value[0], str):
        return _strings(name, value)  # numpy would make all as long as the longest
    result = array(name, value)
    if result.dtype.kind not in "OTU" or not result.size:
        return result
    given = result.ravel().tolist()
    if not any(isinstance(item, str) for item in given):
        return result
    if result.ndim > 1:
        raise ValueError(f"{name}: shape {result.shape}, expected (m,)")
    return _strings(name, value if isinstance(value, (list, tuple)) else given)


def _strings(name: str, given: Sequence[Any]) -> np.ndarray:
    """Strings (m,), as numpy's StringDType; RowsError names those that cannot be a label."""
    refuse(name, np.array([not isinstance(item, str) for item in given]), "no strings")
    refuse(name, np.array([not item for item in given]), "empty strings (which mean none)")
    refuse(name, np.array(["\0" in item for item in given]), "null characters")
    try:
        "".join(given).encode()
    except UnicodeEncodeError:
        refuse(name, np.array([_is_torn(text) for text in given]), "lone surrogates")
    if set(map(type, given)) != {str}:
        given = [str.__str__(text) for text in given]
    return np.array(given, STRINGS)


def _is_torn(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def labels(name: str, value: ArrayLike) -> np.ndarray:
    """Labels (m,): int64, or strings."""
    result = label_array(name, value)
    if result.size == 0:
        return np.empty(0, np.int64)
    if result.dtype.kind == "T":
        return result
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
    return np.ascontiguousarray(result, np.int64)


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


def require_room(state: State, count: int) -> None:
    """ValueError where an index cannot hold `count` vectors more."""
    if state.node_count + count > MOST_NODES:
        raise ValueError(
            f"vectors: {state.node_count + count} in all, and an index holds at most {MOST_NODES}"
        )


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


def entry_mask(value: ArrayLike, state: State, queries: int) -> np.ndarray:
    """bool mask (entries,) or (queries, entries) of `allow=` over the entries of a state's labels.

    `value`: bool (n,) or (queries, n) indexed by label; the same as uint8 bits packed little-endian
    (`np.packbits(mask, axis=-1, bitorder="little")`); or labels (m,), signed integers or strings.
    """
    entry_labels = state.labels.labels
    are_strings = isinstance(value, np.ndarray) and value.dtype.kind == "T"  # fit or not, no matter
    allow = np.asarray(value) if are_strings else label_array("allow", value)
    if allow.size == 0 and allow.ndim == 1 and allow.dtype != bool:
        return np.zeros(len(entry_labels), bool)
    if allow.dtype.kind in "iT" and allow.ndim == 1:  # labels that are not here allow nothing
        return np.isin(entry_labels, numbers_of(state, allow, "allow"))
    if allow.dtype not in (np.dtype(bool), np.dtype(np.uint8)):
        raise TypeError(
            f"allow: dtype {allow.dtype}, {allow.ndim}-d, expected a bool mask, "
            "uint8 packed bits, or a 1-d array of labels"
        )
    if state.names is not None:
        raise ValueError("allow: a mask is indexed by label, and those of this index are strings")
    if allow.ndim not in (1, 2) or (allow.ndim == 2 and len(allow) != queries):
        raise ValueError(f"allow: shape {allow.shape}, expected (n,) or ({queries}, n)")
    covered = allow.shape[-1] * (8 if allow.dtype == np.uint8 else 1)
    if len(entry_labels) and (entry_labels.min() < 0 or entry_labels.max() >= covered):
        outside = entry_labels.min() if entry_labels.min() < 0 else entry_labels.max()
        raise ValueError(
            f"allow: a mask of {covered} is indexed by label, and label {outside} is outside; "
            "give the allowed labels instead"
        )
    if allow.dtype == bool:
        return allow[..., entry_labels]
    bits = allow[..., entry_labels >> 3] >> (entry_labels & 7).astype(np.uint8)
    return (bits & 1).astype(bool)
