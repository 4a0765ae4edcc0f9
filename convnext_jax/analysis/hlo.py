"""Reading an optimised HLO text: what the compiler expects each operation to cost, and collectives.

The TPU compiler writes its own cost model's "estimated_cycles" beside each operation. Operations
within a loop stand in the text once and run many times, so their cycles are multiplied by the
loop's trip count where the text says it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
# Computations that run by themselves; a fusion's inside is part of the fusion's own cost.
_CALLED = re.compile(r"\b(?:body|condition|calls|branch_computations|to_apply)=\{?([^},]*)\}?")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of the compiled program.

    Attributes:
      name: as the compiler calls it.
      opcode: "fusion", "all-reduce", …
      source: the JAX operation that it came from, "jit(train_step)/…/dot_general", or "".
      cycles: estimated, of one run; 0 where the compiler gives none.
      runs: how often it runs in the program.
      result_bytes: size of what it produces.
    """

    name: str
    opcode: str
    source: str
    cycles: int
    runs: int
    result_bytes: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    source: str
    cycles: int
    result_bytes: int
    called: tuple[str, ...]
    trip_count: int


def operations(text: str) -> list[Operation]:
    """All instructions that run, loops' bodies with their loop's trip count.

    Args:
      text: of `compiled.as_text()`. Loops whose trip count the text doesn't say count once.

    Returns:
      The instructions, in the order of the text's calls from the entry.

    Raises:
      ValueError: if the text has no entry computation.
    """
    computations, entry = _parse(text)
    return list(_walk(computations, entry, 1))


def collectives(program: Sequence[Operation]) -> list[Operation]:
    """Those that exchange data between devices; of an asynchronous pair, the start."""
    return [
        operation for operation in program if operation.opcode.removesuffix("-start") in COLLECTIVES
    ]


def _walk(
    computations: Mapping[str, Sequence[_Instruction]], name: str, runs: int
) -> Iterator[Operation]:
    for one in computations[name]:
        yield Operation(one.name, one.opcode, one.source, one.cycles, runs, one.result_bytes)
        if one.opcode in ("while", "call", "conditional", "async-start"):
            for called in one.called:
                yield from _walk(computations, called, runs * one.trip_count)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(_instruction(instruction, line))
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give that of an optimised HLO module")
    return computations, entry


def _instruction(match: re.Match[str], line: str) -> _Instruction:
    name, shape, opcode, rest = match.groups()
    cycles, source = _CYCLES.search(rest), _OP_NAME.search(rest)
    trips = _TRIP_COUNT.search(rest)
    called = [
        part.strip().lstrip("%") for group in _CALLED.findall(rest) for part in group.split(",")
    ]
    return _Instruction(
        name=name,
        opcode=opcode,
        source=source[1] if source else "",
        cycles=int(cycles[1]) if cycles else 0,
        result_bytes=sum(_bytes(kind, dims) for kind, dims in _ARRAY.findall(shape)),
        called=tuple(called),
        trip_count=int(trips[1]) if trips else 1,
    )


def _bytes(kind: str, dims: str) -> int:
    if kind == "pred":
        bits = 8
    elif digits := _BITS.search(kind):
        bits = int(digits[0])
    else:  # token, opaque: nothing that is moved
        return 0
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8
