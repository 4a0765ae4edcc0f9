"""Networks side by side as text, and as rows for a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from convnext_jax.analysis.estimate_cache import InferenceEstimate
from convnext_jax.analysis.throughput import Spread
from convnext_jax.tables import markdown_table


@dataclasses.dataclass(frozen=True)
class Compared:
    """What is known of one network.

    Attributes:
      model: its name in the registry.
      parameters: trainable scalars.
      macs: multiply-accumulates of one image's forward pass.
      published_top1: percent, at 224 × 224, trained on ImageNet-1K alone; None where none is known.
      images_per_second: measured, by round.
      estimate: the TPU compiler's; None where it does not fit, or none was asked for.
    """

    model: str
    parameters: int
    macs: int
    published_top1: float | None
    images_per_second: tuple[float, ...]
    estimate: InferenceEstimate | None

    @property
    def measured(self) -> Spread:
        """Images a second over the rounds."""
        return Spread.of(self.images_per_second)


def table(networks: Sequence[Compared], device: str, tpu_heading: str) -> str:
    """One row a network.

    Args:
      networks: in the order of the rows.
      device: that was measured on.
      tpu_heading: of the estimates' column; "" for none.

    Returns:
      Markdown, padded.
    """
    header = ["model", "parameters", "GMACs", "top-1, published", f"{device} images/s", "range"]
    rows = []
    for one in networks:
        measured = one.measured
        rows.append(
            [
                one.model,
                f"{one.parameters:,}",
                f"{one.macs / 1e9:.2f}",
                "" if one.published_top1 is None else f"{one.published_top1:.1f}",
                _rate(measured.median),
                f"{_rate(measured.low)} to {_rate(measured.high)}",
            ]
        )
        if tpu_heading:
            estimate = one.estimate
            rows[-1].append("too large" if estimate is None else _rate(estimate.images_per_second))
    return markdown_table([*header, *([tpu_heading] if tpu_heading else [])], rows)


def record(one: Compared) -> dict[str, Any]:
    """A network's row with plain keys and values, every round's figure in it, for JSON."""
    return dataclasses.asdict(one) | {"measured": dataclasses.asdict(one.measured)}


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:#.3g}"
