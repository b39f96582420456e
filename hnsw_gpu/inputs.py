"""Validation of what callers pass, once: clear errors here, no checks inside."""

import logging
import operator
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu.engine import (
    LOST_SHARE,
    STORAGE,
    State,
    Walk,
    are_lengths_within,
    squared_lengths,
    thread_count,
)

METRICS = {"l2": "l2", "euclidean": "l2", "ip": "ip", "cosine": "cosine"}  # and the engines' name
ALIASES = {
    "sqeuclidean": "l2",
    "inner_product": "ip",
    "dot": "ip",
    "cos": "cosine",
    "angular": "cosine",
}
DEFAULT_EF = 64
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

logger = logging.getLogger("hnsw_gpu")


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
    """A number above 0 and at most 1; np.float32(0.95) is 0.95."""
    given = number(name, value)
    if isinstance(value, np.floating):
        given = float(str(value))
    if not 0 < given <= 1:
        raise ValueError(f"{name}: {given}, expected above 0 and at most 1")
    return given


def recall(value: Any, ef: int) -> float:
    """The recall that a search is asked for in place of ef."""
    if ef != DEFAULT_EF:
        raise ValueError(f"ef={ef}, recall={value}: expected one of the two")
    return share("recall", value)


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
    refuse_masked(name, value)
    for column in _columns(value):
        refuse(name, np.asarray(column.is_null()), "null")
    if not isinstance(value, np.ndarray) and not hasattr(value, "__array__"):
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        try:
            result = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if result.dtype == object and not result.ndim:  # a generator, a set, None
            raise TypeError(f"{name}: {type(value).__name__}, expected an array or a list")
        return result
    return np.asarray(value)


def refuse_masked(name: str, value: Any) -> None:
    """RowsError where numpy would forget that values are masked."""
    if isinstance(value, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(value)
        by_row = mask.reshape(mask.shape[0] if mask.ndim else 1, -1)
        refuse(name, np.asarray(by_row.any(axis=1)), MASKED)
    elif isinstance(value, (list, tuple)) and any(
        isinstance(row, np.ma.MaskedArray) for row in value
    ):
        refuse(name, np.array([np.ma.is_masked(row) for row in value]), MASKED)


def _columns(value: Any) -> Iterable[Any]:
    """The columns of an Arrow or polars table, or the one that it is; none of anything else.

    Of these numpy would read a null as NaN.
    """
    if hasattr(value, "is_null"):
        return (value,)
    columns: Any = getattr(value, "get_columns", None) or getattr(value, "itercolumns", None)
    return columns() if columns is not None else ()


def vectors(name: str, value: ArrayLike, dim: int | None = None) -> np.ndarray:
    """Vectors (n, dim) of real numbers, not yet converted; one vector (dim,) gives (1, dim)."""
    if isinstance(value, np.ma.MaskedArray) and value.ndim == 1 and dim is not None:
        value = value[None]  # one vector: what is masked is in row 0
    result = array(name, value)
    if result.dtype == object and result.ndim == 1 and len(result):
        result = _stacked(name, result)
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


def _stacked(name: str, rows: np.ndarray) -> np.ndarray:
    """The vectors (n, dim) of an array that holds each as an object, as tables' columns come."""
    are_vectors = np.array([np.ndim(row) == 1 for row in rows])
    refuse(name, ~are_vectors, "what is no vector")
    lengths = np.array([len(row) for row in rows])
    refuse(name, lengths != lengths[0], f"other lengths than the first's, {lengths[0]},")
    return np.stack(rows.tolist())


def float_vectors(
    name: str, part: np.ndarray, metric: str, dtype: str = "fp32", first: int = 0
) -> np.ndarray:
    """float32 copy, C order, of a part of `vectors` that begins at row `first`, values checked.

    dtype: in which they are to be stored; "" for queries.
    """
    result = _as_float32(part)
    if dtype != "fp16" and _are_plain(result, metric):
        return result
    squared = squared_lengths(result)
    if part.dtype == np.float64:
        is_beyond = (np.abs(part) > np.finfo(np.float32).max) & (np.abs(part) < np.inf)
        refuse(name, is_beyond.any(axis=1), "values beyond float32", first, SCALE_THEM)
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


def _as_float32(part: np.ndarray) -> np.ndarray:
    """float32, C order; what is too large becomes infinite."""
    if part.dtype == np.float32:
        return np.ascontiguousarray(part)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(part, np.float32)


def _are_plain(vectors: np.ndarray, metric: str) -> bool:
    """Are the lengths of float32 vectors (m, dim) all such that nothing is to be looked at?"""
    least, most = SHORTEST_SQUARED, LONGEST_SQUARED
    if metric == "cosine":
        least, most = float(np.finfo(np.float64).tiny), float(np.finfo(np.float64).max)
    return bool(are_lengths_within(vectors, least, most))


def _are_too_short(part: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """bool (m,): which vectors, of these squared lengths in float32, are all but zero."""
    too_short: np.ndarray = (squared > 0) & (squared < SHORTEST_SQUARED)
    zeros = np.flatnonzero(squared == 0)
    too_short[zeros] = (part[zeros] != 0).any(axis=1)  # float64 below float32's least
    return too_short


def are_valid(part: np.ndarray, metric: str) -> np.ndarray:
    """bool (m,): which of these vectors `float_vectors` would not refuse, stored as fp32."""
    squared = squared_lengths(_as_float32(part))
    if metric == "cosine":
        return np.isfinite(squared) & (squared > 0)
    return (squared <= LONGEST_SQUARED) & ~_are_too_short(part, squared)  # NaN is neither


def tell_blurred(blurred: int, count: int) -> None:
    """Say on the logger how many of `count` vectors float32 blurs, if any: `count_blurred`."""
    if blurred:
        logger.warning(
            "float32 takes over %.0f %% of what tells them apart from %s of %s vectors, in any "
            "dtype; subtract their mean, and multiply all that is tiny by one factor",
            100 * LOST_SHARE, f"{blurred:,}", f"{count:,}",
        )  # fmt: skip


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


def require_room(state: State, count: int) -> None:
    """ValueError where an index cannot hold `count` vectors more."""
    if state.node_count + count > MOST_NODES:
        raise ValueError(
            f"vectors: {state.node_count + count} in all, and an index holds at most {MOST_NODES}"
        )
