"""The road from ResNet to ConvNeXt as a table: what is counted, beside what the paper says."""

from __future__ import annotations

import dataclasses
from typing import Any

from convnext_jax.analysis.traced_counts import traced_counts
from convnext_jax.models.registry import create_model
from convnext_jax.models.roadmap import ModernizedResNet
from convnext_jax.models.roadmap_steps import STEPS, Published, Road, Step, choices_after

_IMAGE_SIZE = 224  # of all figures of the paper's tables 10 and 11

# What the paper measures a road's end against, with its figures (same tables, last row).
_REFERENCES: dict[Road, tuple[str, Published]] = {
    "t": ("swin_tiny", Published(81.30, 4.50)),
    "b": ("swin_base", Published(83.50, 15.43)),
}


@dataclasses.dataclass(frozen=True)
class RoadmapRow:
    """One network of the table.

    Attributes:
      model: its name in the registry.
      change: what is new against the row before, in words.
      kept: False for a step from which the road turns back.
      parameters: trainable scalars, counted.
      macs: multiply-accumulates of one image's forward pass at 224 × 224, counted.
      published: the paper's figures.
    """

    model: str
    change: str
    kept: bool
    parameters: int
    macs: int
    published: Published

    @property
    def step(self) -> str:
        """The name without the road's, "07_dw_first"."""
        return self.model.rpartition("/")[2]

    @property
    def gflops(self) -> float:
        """Multiply-accumulates in 10⁹, rounded as the paper's are."""
        return round(self.macs / 1e9, 2)

    @property
    def differs(self) -> bool:
        """Whether the paper's GFLOPs are others than those counted."""
        return self.gflops != self.published.gflops


def roadmap_rows(road: Road, steps: tuple[Step, ...] = STEPS) -> list[RoadmapRow]:
    """Counts the networks of a road; each is traced, which takes a fraction of a second.

    Args:
      road: "t" or "b".
      steps: those wanted.

    Returns:
      A row for each.
    """
    return [
        _row(f"roadmap_{road}/{step.name}", step.change, getattr(step, road), is_kept(road, step))
        for step in steps
    ]


def reference_row(road: Road) -> RoadmapRow:
    """Counts the Swin that the paper sets beside a road's end."""
    name, published = _REFERENCES[road]
    return _row(name, "for comparison", published, kept=True)


def is_kept(road: Road, step: Step) -> bool:
    """Whether the road goes on from a step.

    It does not where a later step takes back a choice of this one: kernels of 9 and 11 were tried,
    and it went on from 7.

    Args:
      road: "t" or "b".
      step: of it.

    Returns:
      False where a choice made here is none of the road's end, whose own had been made before.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(ModernizedResNet)}
    names = [s.name for s in STEPS]
    history: list[dict[str, Any]] = [defaults]
    history += [defaults | choices_after(road, n) for n in names[: names.index(step.name)]]
    here, end = choices_after(road, step.name), defaults | choices_after(road, names[-1])
    return not any(
        value != end[choice] and any(past[choice] == end[choice] for past in history)
        for choice, value in here.items()
    )


def _row(name: str, change: str, published: Published, kept: bool) -> RoadmapRow:
    counts = traced_counts(create_model(name), _IMAGE_SIZE)
    return RoadmapRow(name, change, kept, counts.parameters, counts.macs, published)
