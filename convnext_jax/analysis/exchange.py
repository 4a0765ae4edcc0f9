"""What the devices exchange in a step, and how long that takes at best."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from convnext_jax.analysis.hlo import Operation

# How often the bytes must leave a device in the best algorithm, for many devices: an all-reduce is
# a reduce-scatter and an all-gather (Thakur et al. 2005, section 4).
_TIMES_SENT = {"all-reduce": 2}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind in a step.

    Attributes:
      kind: "all-reduce", "all-gather", …
      count: how many.
      bytes: of the whole arrays, on each device.
    """

    kind: str
    count: float
    bytes: float

    def seconds(self, bandwidth: float) -> float:
        """The least time that they take.

        Args:
          bandwidth: bytes/s that a device can send over all its links.

        Returns:
          The bound; the true time depends on the torus and on the latency of each.
        """
        return _TIMES_SENT.get(self.kind, 1) * self.bytes / bandwidth


def exchanges(collectives: Sequence[Operation]) -> list[Exchange]:
    """Sums collectives by kind.

    Args:
      collectives: of a `hlo.Program`.

    Returns:
      The kinds, those of most bytes first.
    """
    totals: dict[str, tuple[float, float]] = {}
    for one in collectives:
        kind = one.opcode.removesuffix("-done")
        count, size = totals.get(kind, (0.0, 0.0))
        totals[kind] = count + one.runs, size + one.runs * one.result_bytes
    found = [Exchange(kind, count, size) for kind, (count, size) in totals.items()]
    return sorted(found, key=lambda exchange: (-exchange.bytes, exchange.kind))
