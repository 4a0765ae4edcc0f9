"""How often a loop of a compiled program runs, read off its condition and its counter."""

from __future__ import annotations

import re
from collections.abc import Mapping

from convnext_jax.analysis.hlo_text import Instruction

_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')

_Computation = Mapping[str, Instruction]


def trip_count(
    loop: Instruction, caller: _Computation, condition: _Computation, body: _Computation
) -> int | None:
    """Counts a loop's trips, where it goes by a counter.

    The TPU compiler's text says no count. But its counted loops keep their counter in their state:
    it starts at a constant, the body adds a constant to it, the condition compares it with one.

    Args:
      loop: the `while`.
      caller: the computation that it stands in.
      condition: the one that decides whether it goes on.
      body: the one that it repeats.

    Returns:
      The count; None for a loop of another kind, such as one that rejects draws.
    """
    if known := _TRIP_COUNT.search(loop.rest):
        return int(known[1])
    compare = _origin(condition, _root(condition).name)
    if compare is None or compare.opcode != "compare":
        return None
    counter, limit = (_origin(condition, name) for name in compare.operands)
    direction = compare.attributes.get("direction")
    index, end = _element(counter), _constant(limit)
    if index is None or end is None or direction not in ("LT", "LE"):
        return None

    initial, final = _origin(caller, loop.operands[0]), _root(body)
    if initial is None or initial.opcode != "tuple" or final.opcode != "tuple":
        return None
    start = _constant(_origin(caller, initial.operands[index]))
    add = _origin(body, final.operands[index])
    if start is None or add is None or add.opcode != "add":
        return None
    terms = [_origin(body, name) for name in add.operands]
    steps = [value for value in map(_constant, terms) if value is not None]
    if len(steps) != 1 or steps[0] <= 0 or index not in map(_element, terms):
        return None
    return max(0, -(-(end + (direction == "LE") - start) // steps[0]))


def _root(computation: _Computation) -> Instruction:
    return next(one for one in computation.values() if one.is_root)


def _origin(computation: _Computation, name: str) -> Instruction | None:
    """What made a value, seen through copies of it."""
    one = computation.get(name)
    while one is not None and one.opcode in ("copy", "bitcast", "convert") and one.operands:
        one = computation.get(one.operands[0])
    return one


def _element(one: Instruction | None) -> int | None:
    """Which element of the loop's state is read."""
    if one is None or one.opcode != "get-tuple-element":
        return None
    return int(one.attributes["index"])


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.arguments):
        return None
    return int(one.arguments)
