"""Which part of the model, or of the step around it, a compiled operation belongs to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from convnext_jax.analysis.hlo import Operation

# Blocks in a loop have no number.
_BLOCK = re.compile(r"stages_(\d+)/(?:[\w()]+/)*?blocks(?:_\d+)?(?:/([\w()]+))?")
_DOWNSAMPLE = re.compile(r"stages_(\d+)/downsample/")
# What stacks the blocks' parameters and leads them, and what they keep, through the loop.
_LOOP = re.compile(r"stages_(\d+)/")
_BLOCK_PARTS = ("dwconv", "norm", "pwconv1", "grn", "pwconv2")
# What GELU is made of; what else a block does by itself are layer scale, drop path and addition.
_ACTIVATION = ("erf", "erfc", "erf_inv", "exp", "integer_pow", "neg", "square", "sqrt", "tanh")


@dataclasses.dataclass(frozen=True)
class PartCost:
    """What one part costs in a step.

    Attributes:
      part: "stages_2 dwconv", "stem", "augmentation", …
      direction: "forward", "backward", or "" for what is neither.
      operations: instructions of the compiled program.
      cycles: estimated, of one step.
    """

    part: str
    direction: str
    operations: int
    cycles: float


def model_part(operation: Operation) -> tuple[str, str]:
    """The part that an operation belongs to, and the direction.

    The compiler fuses neighbours: a fusion counts for the part that the compiler names it after,
    GELU mostly for the product before or behind it.

    Args:
      operation: of a compiled training step.

    Returns:
      Part and direction, as in `PartCost`.
    """
    source = operation.source
    direction = "backward" if "transpose(" in source else "forward" if "jvp(" in source else ""
    if match := _BLOCK.search(source):
        stage, inner = match.groups()
        last = source.rpartition("/")[2]
        if inner in _BLOCK_PARTS:
            part = inner
        else:
            part = "activation" if last in _ACTIVATION else "residual"
        return f"stages_{stage} {part}", direction
    if match := _DOWNSAMPLE.search(source):
        return f"stages_{match[1]} downsample", direction
    if match := _LOOP.search(source):
        return f"stages_{match[1]} loop", direction
    if "/stem/" in source:
        return "stem", direction
    if direction and ("/head/" in source or "/pre_logits/" in source or "_pool" in source):
        return "head", direction
    if direction:
        return "loss", direction
    # Around the model no module lends its name, but the file tells.
    if any(file.endswith("/data/mixing.py") for file in operation.files):
        return "mixing", ""
    if any("convnext_jax/data/" in file for file in operation.files):
        return "augmentation", ""
    if "/shard_map" in source:  # only the batch's preparation is written by devices
        return "augmentation", ""
    if source.startswith("jit("):
        return "optimizer and average", ""
    return "copies without a name", ""


def costs_by_part(operations: Iterable[Operation]) -> list[PartCost]:
    """Sums the estimates over the parts.

    Args:
      operations: of a compiled training step.

    Returns:
      The parts that cost anything, the costliest first.
    """
    totals: dict[tuple[str, str], tuple[int, float]] = {}
    for operation in operations:
        if operation.total_cycles:
            key = model_part(operation)
            count, cycles = totals.get(key, (0, 0.0))
            totals[key] = count + 1, cycles + operation.total_cycles
    parts = [PartCost(*key, *total) for key, total in totals.items()]
    return sorted(parts, key=lambda part: (-part.cycles, part.part, part.direction))
