"""PTX text into the instructions of the executor."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ptx.executor_library import CONSTANT, INSTRUCTION, SPECIAL, operations

SHARED_BASE = 1024  # as in executor/shared_memory.h
SPACES = ("global", "shared", "param")
NEGATED_GUARD, NEGATED_SOURCE, NON_COHERENT, SIGNED, WIDE = 1, 2, 4, 8, 16
KINDS = (
    "arithmetic", "select", "load", "store", "atomic add", "fence", "branch", "return", "barrier",
    "warp barrier", "vote", "shuffle", "match",
)  # fmt: skip
MODES = {
    "vote": ("ballot.b32", "any.pred", "all.pred"),
    "shuffle": ("up.b32", "down.b32", "bfly.b32", "idx.b32"),
}
# What a load or store may say that changes nothing here.
HINTS = {"relaxed", "volatile", "gpu", "cta"}

Place = tuple[tuple[str, int], ...]  # file and line, then those of each inlined call


class Parameter(NamedTuple):
    offset: int
    size: int


class Program:
    """The one kernel of a PTX module.

    text[i] is instruction i and place[i] where it comes from; code[i] is for the executor.
    """

    def __init__(self, text: str):
        kernel = re.search(r"\.entry\s+(\w+)\((.*?)\)[^{]*\{(.*)\n\}", text, re.DOTALL)
        assert kernel is not None, "no kernel"
        self.name, parameters, body = kernel.groups()
        self.parameters, self.parameter_bytes = _parameters(parameters)
        assert not re.search(r"^\s*\.shared", text, re.MULTILINE), "static shared memory"
        self._symbols = re.findall(r"\.extern \.shared .*? (\w+)\[\]", text)
        self.slots = 0
        self.special = dict.fromkeys(SPECIAL, -1)
        self.text: list[str] = []
        self.place: list[Place] = []
        self._registers: dict[str, tuple[int, str]] = {}  # slot and width
        self._constants: dict[tuple[int, str], int] = {}
        self._labels: dict[str, int] = {}
        self._jumps: dict[int, str] = {}
        codes = []
        files = {int(n): Path(p).name for n, p in re.findall(r'\.file\s+(\d+) "([^"]*)"', text)}
        for statement, place in _statements(body, files):
            if label := re.fullmatch(r"(\$?\w+):", statement):
                self._labels[label[1]] = len(codes)
            elif statement.startswith(".reg"):
                self._declare(statement)
            elif not statement.startswith("."):
                codes.append(self._encoded(statement, len(codes)))
                self.text.append(statement)
                self.place.append(place)
        self.code = np.concatenate(codes)
        for number, label in self._jumps.items():
            self.code["jump"][number] = self._labels[label]
        self.constants = np.array(
            [(value, slot, ord(width)) for (value, width), slot in self._constants.items()],
            CONSTANT,
        )

    # --- registers ---

    def _slot(self, width: str) -> int:
        self.slots += 2 if width == "q" else 1
        return self.slots - (2 if width == "q" else 1)

    def _declare(self, statement: str) -> None:
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
        width = "p" if kind == "pred" else "q" if kind.endswith("64") else "w"
        for name in names.split(","):
            stem, count = re.fullmatch(r"([%\w]+)(?:<(\d+)>)?", name.strip()).groups()
            for one in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                self._registers[one] = self._slot(width), width

    def _operand(self, text: str, width: str) -> int:
        """The slot of a register, or of one that holds a constant."""
        if text in self._registers:
            slot, own = self._registers[text]
            assert own == width, f"{text} is no register of width {width}"
            return slot
        if text in self.special:
            if self.special[text] < 0:
                self.special[text] = self._slot("w")
            return self.special[text]
        value = SHARED_BASE if text in self._symbols else _constant(text)
        key = value % 2 ** {"p": 1, "w": 32, "q": 64}[width], width
        if key not in self._constants:
            self._constants[key] = self._slot(width)
        return self._constants[key]

    def _operands(self, texts: list[str], widths: str) -> list[int]:
        return [self._operand(text, width) for text, width in zip(texts, widths, strict=True)]

    # --- instructions ---

    def _encoded(self, statement: str, number: int) -> np.ndarray:
        guard, mnemonic, rest = re.fullmatch(
            r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL
        ).groups()
        operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        if mnemonic in ("bra", "bra.uni"):
            self._jumps[number] = operands[0]
        fields, targets, sources = self._read(mnemonic, operands)
        code = np.zeros(1, INSTRUCTION)
        for name, value in fields.items():
            code[name] = KINDS.index(value) if name == "kind" else value
        code["guard"] = self._operand(guard.lstrip("!"), "p") if guard else -1
        if guard and guard.startswith("!"):
            code["flags"] |= NEGATED_GUARD
        code["targets"], code["sources"] = len(targets), len(sources)
        code["target"][0, : len(targets)] = targets
        code["source"][0, : len(sources)] = sources
        return code

    def _read(self, mnemonic: str, operands: list[str]) -> tuple[dict, list[int], list[int]]:
        """Fields, targets and sources of an instruction."""
        first = mnemonic.split(".")[0]
        if mnemonic in ("bra", "bra.uni"):
            return {"kind": "branch"}, [], []
        if mnemonic in ("ret", "exit"):
            return {"kind": "return"}, [], []
        if first in ("membar", "fence"):
            return {"kind": "fence"}, [], []
        if mnemonic == "bar.sync" and operands == ["0"]:
            return {"kind": "barrier"}, [], []
        if mnemonic == "bar.warp.sync":
            return {"kind": "warp barrier"}, [], self._operands(operands, "w")
        if first in ("vote", "shfl"):
            return self._read_collective(mnemonic, operands)
        if mnemonic == "match.any.sync.b32":
            mask = self._operands(operands, "www")
            return {"kind": "match"}, mask[:1], mask[1:]
        if first in ("ld", "st"):
            return self._read_access(mnemonic, operands)
        if mnemonic in ("atom.global.add.u32", "atom.add.u32"):
            address, fields = self._address(operands[1], "q")
            value = self._operand(operands[2], "w")
            targets = self._operands(operands[:1], "w")
            return {"kind": "atomic add"} | fields, targets, [*address, value]
        return self._read_arithmetic(mnemonic, operands)

    def _read_arithmetic(self, mnemonic: str, operands: list[str]):
        if "{" in "".join(operands):  # a vector of registers, to or from a wider one
            is_packed = operands[1].startswith("{")
            mnemonic = mnemonic.replace("mov", "pack" if is_packed else "unpack")
            operands = [one for operand in operands for one in _elements(operand)]
        if mnemonic not in operations():
            raise NotImplementedError(f"{mnemonic} {', '.join(operands)}")
        operation = operations()[mnemonic]
        slots = self._operands(operands, operation.targets + operation.sources)
        kind = "select" if mnemonic.startswith("selp.") else "arithmetic"
        count = len(operation.targets)
        return {"kind": kind, "operation": operation.number}, slots[:count], slots[count:]

    def _read_collective(self, mnemonic: str, operands: list[str]):
        kind = "vote" if mnemonic.startswith("vote") else "shuffle"
        mode = MODES[kind].index(mnemonic.split(".", 2)[2])
        fields = {"kind": kind, "mode": mode}
        if kind == "vote":
            if operands[1].startswith("!"):
                fields["flags"] = NEGATED_SOURCE
            target = self._operand(operands[0], "p" if mode else "w")
            return fields, [target], self._operands([operands[1].lstrip("!"), operands[2]], "pw")
        value, _, is_in_range = operands[0].partition("|")
        targets = [self._operand(value, "w")]
        if is_in_range:
            targets.append(self._operand(is_in_range, "p"))
        return fields, targets, self._operands(operands[1:], "wwww")

    def _read_access(self, mnemonic: str, operands: list[str]):
        """ld.global.nc.v4.u32 {a, b, c, d}, [address] and the like."""
        first, *words, kind = mnemonic.split(".")
        space = next(word for word in words if word in SPACES)
        vector = [word for word in words if word in ("v2", "v4")]
        if set(words) - HINTS - {space, "nc", *vector}:
            raise NotImplementedError(f"{mnemonic} {', '.join(operands)}")
        address, values = operands if first == "st" else reversed(operands)
        names = _elements(values)
        assert len(names) == (int(vector[0][1]) if vector else 1), operands
        size = int(kind[1:]) // 8
        is_wide = size == 8 or any(self._registers.get(name, (0, ""))[1] == "q" for name in names)
        flags = NON_COHERENT * ("nc" in words) | SIGNED * (kind[0] == "s") | WIDE * is_wide
        where, fields = self._address(address, "q" if space == "global" else "w")
        slots = self._operands(names, ("q" if is_wide else "w") * len(names))
        fields |= {"space": SPACES.index(space), "size": size, "flags": flags}
        if first == "ld":
            return fields | {"kind": "load"}, slots, where
        return fields | {"kind": "store"}, [], where + slots

    def _address(self, text: str, width: str) -> tuple[list[int], dict[str, int]]:
        """[register + 8]: the register's slot, if there is one, and the offset."""
        base, offset = re.fullmatch(r"\[([%\w$]+)(?:\s*\+\s*(-?\w+))?\]", text).groups()
        number = int(offset or "0", 0)
        if base in self.parameters:
            return [], {"offset": self.parameters[base].offset + number}
        return [self._operand(base, width)], {"offset": number}


def _elements(operand: str) -> list[str]:
    """`{a, b}` is two operands."""
    return [one.strip() for one in operand.strip("{}").split(",")]


def _constant(text: str) -> int:
    """The bits of a number; 0f and 0d begin the hexadecimal ones of a float and a double."""
    if text[:2] in ("0f", "0d"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0)


def _parameters(text: str) -> tuple[dict[str, Parameter], int]:
    found, end = {}, 0
    for align, name, size in re.findall(r"\.param \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
        begin = -(-end // int(align)) * int(align)
        found[name] = Parameter(begin, int(size))
        end = begin + int(size)
    return found, end


def _statements(body: str, files: dict[int, str]):
    """Every statement and label with its place, which is told by .loc lines."""
    place: Place = ()
    outer: dict[tuple, Place] = {}  # of what was inlined there
    text = ""
    for raw in body.splitlines():
        line = raw.split("//")[0].strip()
        if line.startswith(".loc"):
            place = _place(line, files, outer)
            continue
        text += f" {line}"
        while found := re.match(r"\s*(?:[{}]|(\$?\w+:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)", text):
            text = text[found.end() :]
            if found[1] or found[2]:
                yield (found[1] or found[2]).strip(), place


def _place(line: str, files: dict[int, str], outer: dict[tuple, Place]) -> Place:
    found = re.match(
        r"\.loc\s+(\d+) (\d+) (\d+)(?:, function_name \S+, inlined_at (\d+) (\d+) (\d+))?", line
    )
    assert found is not None, line
    file, number, column, *inlined_at = (int(x) if x else 0 for x in found.groups())
    around = outer.get(tuple(inlined_at), ()) if inlined_at[0] else ()
    if inlined_at[0] and not around:
        around = ((files.get(inlined_at[0], "?"), inlined_at[1]),)
    outer[file, number, column] = ((files.get(file, "?"), number), *around)
    return outer[file, number, column]
