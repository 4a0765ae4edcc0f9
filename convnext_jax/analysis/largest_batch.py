"""The largest batch that fits, in few compilations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

# A batch within this share of the largest is as good.
_TOLERANCE = 1 / 16


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """How many images a chip can take.

    Attributes:
      images: the largest number that was found to fit; 0 for none.
      needed: bytes that they take.
      refused: the smallest number that was found not to fit; None if none was.
    """

    images: int
    needed: int
    refused: int | None


def largest_batch(
    needed: Callable[[int], int | None],
    capacity: int,
    *,
    start: int,
    unit: int,
    fixed: int,
    attempts: int = 8,
) -> LargestBatch:
    """Finds the largest batch by the line through what is known, each guess verified.

    Memory grows nearly in proportion to the batch, so the line lands close at once, where blind
    bisection would take a compilation for each bit. Near the limit the compiler begins to compute
    things twice to save memory: there the line is flat, and halving takes over.

    Only round numbers are tried, multiples of eight or, below that, powers of two: at others mixing
    may pair images of different chips so awkwardly that the compiler gathers the whole batch.

    Args:
      needed: bytes for a number of images; None where they are too many and no figure is known.
      capacity: bytes that there are.
      start: the number of images that is tried first, a multiple of `unit`.
      unit: all numbers tried are round multiples of it.
      fixed: bytes that no number of images falls below.
      attempts: how many numbers are tried at most.

    Returns:
      The largest that fits, to within a sixteenth or the next round number.
    """
    known = {0: fixed}
    fits, refused = 0, None
    candidate, in_a_row = start, 0
    for _ in range(attempts):
        size = needed(candidate)
        if size is not None:
            known[candidate] = size
        if size is not None and size <= capacity:
            fits, in_a_row = candidate, 0
        else:
            refused, in_a_row = candidate, in_a_row + 1
        next_up = _round(fits, unit) + _grain(fits, unit)
        if refused is not None and refused <= max(next_up, fits * (1 + _TOLERANCE)):
            break
        # Once the line has been met, a step further tells that no more would fit.
        a_step = max(next_up, _round(fits * (1 + _TOLERANCE), unit))
        candidate = max(_round(_by_line(known, fits, refused, capacity), unit), a_step)
        # A bent line may creep down for long.
        if refused is not None and (in_a_row > 1 or candidate >= refused):
            candidate = max(next_up, _round((fits + refused) / 2, unit))
    return LargestBatch(fits, known[fits], refused)


def _grain(images: float, unit: int) -> int:
    """The distance between round numbers hereabouts."""
    return unit * min(8, 2 ** max(0, int(images / unit).bit_length() - 1))


def _round(images: float, unit: int) -> int:
    grain = _grain(images, unit)
    return int(images) // grain * grain


def _by_line(known: Mapping[int, int], fits: int, refused: int | None, capacity: int) -> float:
    """Where the line through the nearest known figures meets the capacity."""
    ends = sorted(n for n in known if n <= fits)[-2:]
    if refused is not None and refused in known:
        ends = [fits, refused]
    if len(ends) < 2:
        return 0.0
    slope = (known[ends[1]] - known[ends[0]]) / (ends[1] - ends[0])
    return fits + (capacity - known[fits]) / slope if slope > 0 else 2.0 * fits
