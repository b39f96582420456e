"""Columns of any Arrow type: one type for several files, rows taken, and values as texts.

Few kernels of Arrow know views (`string_view`, `binary_view`): for those they pass through the
plain type and come back. Dictionaries and run-ends are ways of storing, and are decoded.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow


def decoded(values: Any) -> Any:
    """An array without dictionary or run-ends."""
    import pyarrow.compute
    import pyarrow.types as types

    if types.is_dictionary(values.type):
        return values.cast(values.type.value_type)
    if types.is_run_end_encoded(values.type):
        return pyarrow.compute.run_end_decode(values)
    return values


def decoded_type(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    """The type of `decoded` values."""
    import pyarrow.types as types

    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return kind.value_type
    return kind


def plain_type(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    """The type by which kernels know such values."""
    import pyarrow
    import pyarrow.types as types

    if types.is_string_view(kind):
        return pyarrow.large_string()
    if types.is_binary_view(kind):
        return pyarrow.large_binary()
    return kind


def taken(values: Any, places: Any) -> Any:
    """Values at some places, null where the place is; of the same type."""
    kind = values.type
    plain = plain_type(kind)
    return values.take(places) if plain == kind else values.cast(plain).take(places).cast(kind)


def filtered(batch: "pyarrow.RecordBatch", mask: np.ndarray) -> "pyarrow.RecordBatch":
    """The rows of a batch where bool `mask` (m,); of the same types."""
    import pyarrow

    places = pyarrow.array(np.flatnonzero(mask))
    columns = [taken(column, places) for column in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, schema=batch.schema)


def unified_type(kinds: "Sequence[pyarrow.DataType]") -> "pyarrow.DataType":
    """One type for values of all these, as Arrow unifies; ValueError where some would be lost."""
    import pyarrow
    import pyarrow.types as types

    if all(kind == kinds[0] for kind in kinds):
        return kinds[0]
    plain = [plain_type(decoded_type(kind)) for kind in kinds]
    schemas = [pyarrow.schema([("", kind)]) for kind in plain]
    whole = pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    for kind in plain:
        is_wide = kind in (pyarrow.int64(), pyarrow.uint64())
        if (is_wide and types.is_floating(whole)) or (
            kind == pyarrow.uint64() and types.is_signed_integer(whole)
        ):
            raise ValueError(f"{kind} as {whole}")
    return whole


def texts(values: Any) -> "list[str | None]":
    """Values of any type as people read them: bytes as UTF-8 where they are that, else in hex."""
    import pyarrow
    import pyarrow.types as types

    values = decoded(values)
    kind = values.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        if kind.extension_name == "arrow.uuid":
            return [None if value is None else str(value) for value in values.to_pylist()]
        parts = values.chunks if isinstance(values, pyarrow.ChunkedArray) else [values]
        return [text for part in parts for text in texts(part.storage)]
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        # a file may hold bytes that are no UTF-8
        found = values.cast(plain_type(kind)).cast(pyarrow.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="replace") for value in found]
    if "binary" in str(kind):
        return [None if value is None else _text_of_bytes(value) for value in values.to_pylist()]
    try:
        return values.cast(pyarrow.large_string()).to_pylist()
    except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowInvalid):
        return [None if not value.is_valid else _text_of_scalar(value) for value in values]


def _text_of_bytes(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value.hex()
    return text if text.isprintable() else value.hex()


def _text_of_scalar(value: Any) -> str:
    try:
        return str(value.as_py())
    except (ValueError, OverflowError):  # beyond what Python's types hold
        return str(value)


def ordered_values(values: Any) -> np.ndarray:
    """Numbers as they are; of anything else with an order its ranks, equal ones of equal values.

    ValueError of types without an order.
    """
    import pyarrow
    import pyarrow.compute
    import pyarrow.types as types

    values = decoded(values)
    kind = values.type
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return values.to_numpy()
    try:
        ranks = pyarrow.compute.rank(values.cast(plain_type(kind)), tiebreaker="dense")
    except pyarrow.ArrowNotImplementedError:
        raise ValueError(f"{kind} has no order") from None
    return ranks.to_numpy()
