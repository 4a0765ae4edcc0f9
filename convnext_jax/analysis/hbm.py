"""Bytes that a compiled TPU program moves between the chip and its memory, by instruction.

Read from the optimised HLO text, where each array's layout says how it is tiled and where it lies.
XLA's own "bytes accessed" counts the operands and results of every instruction, wherever they lie:
an array that was fetched to vector memory counts when it is fetched, and again when it is used.
"""

from __future__ import annotations

import dataclasses
import math
import re

from convnext_jax.analysis.hlo_text import Computation, Instruction, array_bytes, parse

# f32[768,3072]{1,0:T(8,128)S(1)}: dimensions, the order of them from the fastest, tiles, and the
# memory space. HBM is the one without a number.
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::((?:[^{}]|\{[^}]*\})*))?\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")

# What only names memory, or is counted with the instructions that it calls.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call"),
}
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one instruction moves.

    Attributes:
      name: of the instruction.
      opcode: "fusion", "copy-start", …
      source: the JAX operation that it came from, or "".
      read: bytes from HBM, the tiles' padding among them.
      written: bytes to HBM.
    """

    name: str
    opcode: str
    source: str
    read: int
    written: int

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.read + self.written


def traffic(text: str) -> list[Traffic]:
    """What the instructions of a program's entry computation move.

    An operand counts whole, which is right for elementwise work and reductions, and too much where
    a fusion takes a slice of it. Loops and branches are left out: this is for programs without.

    Args:
      text: of `compiled.as_text()`, compiled for a TPU.

    Returns:
      Those that move anything, in order.

    Raises:
      ValueError: if the text has no entry computation, or there is a loop or a branch in it.
    """
    module = parse(text)
    entry = module.computations[module.entry]
    for one in entry.values():
        if one.opcode in ("while", "conditional"):
            raise ValueError(f"{one.name} is a loop or a branch, which this does not count")
    moved = [_traffic(one, entry) for one in entry.values()]
    return [one for one in moved if one.bytes]


def hbm_bytes(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in HBM, padded to whole tiles.

    Args:
      shape: as HLO writes it, of an array or a tuple, with layouts.
    """
    return sum(_padded_bytes(*groups) for groups in _ARRAY.findall(shape) if _in_hbm(groups[3]))


def _traffic(one: Instruction, entry: Computation) -> Traffic:
    read = written = 0
    target = one.attributes.get("custom_call_target")
    if one.opcode.endswith("-start"):
        # ((operands), result, context), or (result, operand, context) of a copy: what is moved is
        # as large as the result, which a slice's operand is not.
        arrays = _ARRAY.findall(one.shape)
        result = arrays[0] if one.opcode == "copy-start" else arrays[-2 if len(arrays) > 2 else -1]
        size = _padded_bytes(*result)
        operands = (entry[name].shape for name in one.operands if name in entry)
        read = size if any(hbm_bytes(shape) for shape in operands) else 0
        written = size if _in_hbm(result[3]) else 0
    elif not (one.opcode in _FREE or one.opcode.endswith("-done") or target in _FREE_TARGETS):
        read = sum(hbm_bytes(entry[name].shape) for name in one.operands if name in entry)
        written = hbm_bytes(one.shape)
    return Traffic(one.name, one.opcode, one.source, read, written)


def _in_hbm(layout: str) -> bool:
    space = _SPACE.search(layout)
    return space is None or space[1] == "0"


def _padded_bytes(kind: str, dimensions: str, order: str, layout: str) -> int:
    sizes = [int(size) for size in dimensions.split(",") if size]
    from_fastest = [sizes[int(axis)] for axis in order.split(",") if axis] or sizes[::-1]
    if tile := _TILE.search(layout):
        for i, side in enumerate(reversed([int(side) for side in tile[1].split(",")])):
            if i < len(from_fastest):
                from_fastest[i] = math.ceil(from_fastest[i] / side) * side
    return array_bytes(kind, from_fastest)
