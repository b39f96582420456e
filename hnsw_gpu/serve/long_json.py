"""JSON of many numbers, read into arrays and written from them, a piece at a time.

`json` holds the interpreter for as long as a text is, and makes an object of every number. Here no
piece is longer than `PIECE`. What is read is what a search may contain: an object of lists of
numbers, of lists of such lists, or of strings.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

PIECE = 2**16  # characters read, or about the numbers written, at once
_SPACE = r"[ \t\n\r]{0,1000}"
_START = re.compile(_SPACE + r"\{")
_NAME = re.compile(_SPACE + r'"([a-z]{1,20})"' + _SPACE + ":" + _SPACE)
_LIST = re.compile(_SPACE + r"\[")
_QUOTE = re.compile(_SPACE + '"')
_DECODER = json.JSONDecoder()
_NEXT = re.compile(_SPACE + r"([,\]}])")


class MalformedError(ValueError):
    """Bytes that are not in the format that they claim."""


def count_elements(body: bytes) -> int:
    """At least as many as the elements and lists of a JSON text."""
    count = 1
    for start in range(0, len(body), 2**20):
        block = np.frombuffer(body, np.uint8, min(2**20, len(body) - start), start)
        marks = (block == ord(",")) | (block == ord("[")) | (block == ord("{"))
        count += int(np.count_nonzero(marks))
    return count


def read_long_json(body: bytes) -> dict[str, np.ndarray | list[str]]:
    """The members of an object. MalformedError: no JSON; ValueError, TypeError: not such lists."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"not JSON: byte {error.start} is not UTF-8") from None
    held: dict[str, np.ndarray | list[str]] = {}
    at, mark = _after(_START, text, 0, "{"), ","
    while mark == ",":
        name, at = _found(_NAME, text, at, "a name")
        held[name], at = _array(name, text, at)
        mark, at = _found(_NEXT, text, at, ", or }")
    if mark != "}" or text[at:].strip(" \t\n\r"):
        raise MalformedError(f"not JSON: character {at - 1}: expected the end of the object")
    return held


def _array(name: str, text: str, at: int) -> tuple[np.ndarray | list[str], int]:
    """The numbers of the list at `at`, (n,) or (n, m), or its strings, and where it ends."""
    if not text.startswith("[", at):
        raise TypeError(f"{name}: expected numbers in lists")
    if name != "queries" and _QUOTE.match(text, at + 1) is not None:
        return _strings(name, text, at)
    if _LIST.match(text, at + 1) is None:
        numbers, at = _numbers(name, text, at)
        return np.asarray(numbers), at
    blocks: list[np.ndarray] = []
    rows: list[Any] = []
    at, mark = at + 1, ","
    while mark == ",":
        row, at = _numbers(name, text, _after(_LIST, text, at, "[") - 1)
        if not len(row):
            raise ValueError(f"{name}: an empty list")
        if len(row) != (blocks[0].shape[1] if blocks else len(rows[0] if rows else row)):
            raise ValueError(f"{name}: rows of different lengths")
        rows.append(row)
        if len(rows) * len(row) > PIECE:
            blocks.append(np.asarray(rows))
            rows = []
        mark, at = _found(_NEXT, text, at, ", or ]")
    if mark != "]":
        raise MalformedError(f"not JSON: character {at - 1}: expected , or ]")
    if rows:
        blocks.append(np.asarray(rows))
    return np.concatenate(blocks), at


def _numbers(name: str, text: str, at: int) -> tuple[list[Any] | np.ndarray, int]:
    """The numbers of the list at `at`, which holds no lists, and where it ends."""
    end = text.find("]", at)
    if end < 0:
        raise MalformedError(f"not JSON: character {at}: a list without an end")
    if end - at <= PIECE:
        return _piece(name, text[at : end + 1]), end + 1
    parts, at = [], at + 1
    while at <= end:
        cut = text.find(",", min(at + PIECE, end), end)
        cut = end if cut < 0 else cut
        if cut - at > 2 * PIECE:
            raise MalformedError(f"not JSON: character {at}: a number of {cut - at:,} characters")
        part = _piece(name, f"[{text[at:cut]}]")
        if not part:
            raise MalformedError(f"not JSON: character {cut}: expected a number")
        parts.append(np.asarray(part))
        at = cut + 1
    return np.concatenate(parts), end + 1


def _strings(name: str, text: str, at: int) -> tuple[list[str], int]:
    """The strings of the list at `at`, which holds nothing else, and where it ends."""
    found, mark, at = [], ",", at + 1
    while mark == ",":
        opened = _QUOTE.match(text, at)
        if opened is None:
            raise TypeError(f"{name}: expected strings")
        try:
            string, at = _DECODER.raw_decode(text, opened.end() - 1)
        except ValueError as error:
            raise MalformedError(f"not JSON: {error!s:.200}") from None
        found.append(string)
        mark, at = _found(_NEXT, text, at, ", or ]")
    if mark != "]":
        raise MalformedError(f"not JSON: character {at - 1}: expected , or ]")
    return found, at


def _piece(name: str, text: str) -> list[Any]:
    for wrong in '["{':
        if wrong in text[1:]:
            raise TypeError(f"{name}: expected numbers")
    try:
        numbers: list[Any] = json.loads(text, parse_constant=refuse_constant)
    except ValueError as error:
        raise MalformedError(f"not JSON: {error!s:.200}") from None
    return numbers


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _found(pattern: re.Pattern[str], text: str, at: int, expected: str) -> tuple[str, int]:
    found = pattern.match(text, at)
    if found is None:
        raise MalformedError(f"not JSON: character {at}: expected {expected}")
    return found[1], found.end()


def _after(pattern: re.Pattern[str], text: str, at: int, expected: str) -> int:
    found = pattern.match(text, at)
    if found is None:
        raise MalformedError(f"not JSON: character {at}: expected {expected}")
    return found.end()


def written_rows(rows: np.ndarray) -> Iterator[bytes]:
    """The rows (n, m) of a JSON list, without its brackets, some at a time."""
    step = max(1, PIECE // max(rows.shape[1], 1) // 4)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        if some.dtype.kind == "f" and not (finite := np.isfinite(some)).all():
            some = some.astype(object)
            some[~finite] = None
        yield (b", " if start else b"") + json.dumps(some.tolist())[1:-1].encode()
