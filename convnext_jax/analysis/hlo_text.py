"""The text of an optimised HLO module, taken apart: computations, instructions, call stacks."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_ATTRIBUTE = re.compile(r'(\w+)=(\{[^}]*\}|"[^"]*"|%?[\w.\-]+)')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_TABLE_ROW = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without its %.
      opcode: "fusion", "all-reduce", …
      operands: names of the instructions whose results it takes.
      arguments: all that stands in its parentheses: of a constant its value.
      rest: what follows them.
      result_bytes: size of what it produces.
      shape: of the same, with layouts, "f32[8,128]{1,0:T(8,128)}".
      is_root: whether its result is the computation's.
    """

    name: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    rest: str
    result_bytes: int
    shape: str
    is_root: bool

    @functools.cached_property
    def attributes(self) -> Mapping[str, str]:
        """What it is told besides operands, names without %, lists joined by commas."""
        plain = self.rest.partition("metadata=")[0]
        return {key: re.sub(r'[{}%"\s]', "", value) for key, value in _ATTRIBUTE.findall(plain)}

    @property
    def source(self) -> str:
        """The JAX operation that it came from, or ""."""
        match = _OP_NAME.search(self.rest)
        return match[1] if match else ""

    @property
    def frame(self) -> int | None:
        """The number of that operation's call stack."""
        match = _FRAME.search(self.rest)
        return int(match[1]) if match else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: by name, their instructions by name and in order.
      entry: the name of the computation that runs.
      files: Python files of each call stack by its number, innermost first.
    """

    computations: Mapping[str, Computation]
    entry: str
    files: Mapping[int, tuple[str, ...]]


def parse(text: str) -> Module:
    """Takes a module's text apart.

    Args:
      text: of `compiled.as_text()`.

    Returns:
      The module.

    Raises:
      ValueError: if it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = match.groups()
            arguments, rest = _split_arguments(rest)
            operands = tuple(_NAME.findall(arguments))
            current[name] = Instruction(
                name, opcode, operands, arguments, rest, _bytes(shape), shape, bool(root)
            )
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give that of an optimised HLO module")
    return Module(computations, entry, _files(text))


def _split_arguments(rest: str) -> tuple[str, str]:
    """Cuts what follows an opcode's parenthesis where that closes."""
    depth = 1
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return rest[: match.start()], rest[match.end() :]
    return rest, ""


def _files(text: str) -> dict[int, tuple[str, ...]]:
    """The files of each call stack, from the tables at the head of the text."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] = {}
    for line in text.splitlines():
        if _COMPUTATION.match(line):
            break
        if row := _TABLE_ROW.match(line):
            current[int(row[1])] = row[2] if row[2] is not None else row[3]
        elif re.fullmatch(r"[A-Z]\w+", line):
            current = tables.setdefault(line, {})

    def field(row: str, name: str) -> int:
        match = re.search(rf"\b{name}=(\d+)", row)
        return int(match[1]) if match else 0

    names, places = tables.get("FileNames", {}), tables.get("FileLocations", {})
    files: dict[int, tuple[str, ...]] = {}
    for number, frame in sorted(tables.get("StackFrames", {}).items()):
        place = places.get(field(frame, "file_location_id"), "")
        name = names.get(field(place, "file_name_id"), "")
        # The table counts parents from two: one stands for none.
        files[number] = (name, *files.get(field(frame, "parent_frame_id") - 1, ()))
    return files


def _bytes(shape: str) -> int:
    return sum(
        array_bytes(kind, [int(d) for d in dims.split(",") if d])
        for kind, dims in _ARRAY.findall(shape)
    )


def array_bytes(kind: str, sizes: Sequence[int]) -> int:
    """Size of an array without padding.

    Args:
      kind: HLO's element type, "bf16".
      sizes: of its dimensions.
    """
    if kind == "pred":
        bits = 8
    elif digits := _BITS.search(kind):
        bits = int(digits[0])
    else:  # token, opaque: nothing that is moved
        return 0
    return math.prod(sizes) * bits // 8
