"""The road from ResNet to ConvNeXt as text: a table with its notes, and as rows for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convnext_jax.analysis.estimate_cache import InferenceEstimate
from convnext_jax.analysis.roadmap_table import RoadmapRow
from convnext_jax.models.roadmap_steps import Road
from convnext_jax.tables import markdown_table

Estimates = Mapping[str, InferenceEstimate | None]

# What a reader must know of rows where paper and count differ.
_DIFFERENCE: dict[Road, tuple[str, ...]] = {
    "t": (
        "† The paper's GFLOPs are not those counted. Table 10 gives 4.46 and 4.49 for steps 15 and",
        "  16; 4.15 and 4.46 are counted. Table 11, for the same steps from ResNet-200, agrees",
        "  with the count. Swin-T was published as 4.5.",
    ),
    "b": ("† The paper's GFLOPs are not those counted.",),
}


def table(road: Road, rows: Sequence[RoadmapRow], estimates: Estimates, heading: str) -> str:
    """The table, and below it the notes on its marks.

    Args:
      road: "t" or "b".
      rows: its networks.
      estimates: by the networks' names; empty for no such column.
      heading: of the estimates' column.

    Returns:
      Markdown, padded.
    """
    header = ["step", "what changed", "parameters", "GFLOPs", "in the paper", "top-1, paper"]
    cells = []
    for row in rows:
        mark = "†" if row.differs else ""
        cells.append(
            [
                row.step + ("" if row.kept else " ×"),
                row.change,
                f"{row.parameters:,}",
                f"{row.gflops:.2f}",
                f"{row.published.gflops:.2f}{mark}",
                f"{row.published.top1:.2f}",
            ]
        )
        if estimates:
            cells[-1].append(_rate(estimates[row.model]))
    if estimates:
        header.append(heading)
    text = markdown_table(header, cells, left=(0, 1))
    notes = []
    if not all(row.kept for row in rows):
        notes.append("× Tried, and taken back later.")
    if any(row.differs for row in rows):
        notes += _DIFFERENCE[road]
    return "\n".join([text, *(["", *notes] if notes else [])])


def records(rows: Sequence[RoadmapRow], estimates: Estimates) -> list[dict[str, Any]]:
    """The table's rows with plain keys and values, for JSON or CSV."""
    result: list[dict[str, Any]] = []
    for row in rows:
        result.append(
            {
                "model": row.model,
                "change": row.change,
                "kept": row.kept,
                "parameters": row.parameters,
                "macs": row.macs,
                "gflops": row.gflops,
                "published_gflops": row.published.gflops,
                "published_top1": row.published.top1,
            }
        )
        if estimates:
            estimate = estimates[row.model]
            rate = None if estimate is None else estimate.images_per_second
            result[-1]["tpu_images_per_second_estimated"] = rate
    return result


def _rate(estimate: InferenceEstimate | None) -> str:
    return "too large" if estimate is None else f"{estimate.images_per_second:,.0f}"
