"""The road from ResNet to ConvNeXt as a picture, after the paper's figure 2."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from convnext_jax.analysis.roadmap_table import RoadmapRow

# Okabe and Ito's palette, told apart by colour-blind readers too.
_KEPT, _TAKEN_BACK, _GFLOPS, _REFERENCE = "#0072B2", "#56B4E9", "#D55E00", "#009E73"
INCHES, DPI = (10.0, 6.6), 150


def draw_roadmap(
    rows: Sequence[RoadmapRow],
    reference: RoadmapRow,
    path: str | os.PathLike[str],
    *,
    title: str,
    reference_name: str,
) -> None:
    """Draws a road's accuracies as bars, and beside them its GFLOPs as a line of stars.

    Args:
      rows: the steps, first to last, from top to bottom. Bars of steps that were taken back are
        hatched. GFLOPs are those counted; where the paper's differ they stand beside as hollow
        stars.
      reference: the network that both are measured against, drawn as a line.
      path: where it goes, replacing the file at once: PNG, of 1500 × 990 pixels, or SVG.
      title: set above.
      reference_name: how the reference is called in the picture.
    """
    # Half a second to import, and needed once. No pyplot: it would keep global state.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    bars, line = figure.subplots(1, 2, sharey=True, width_ratios=(2.3, 1))
    figure.suptitle(title, fontsize=13, fontweight="bold")
    places = range(len(rows))

    top1 = [row.published.top1 for row in rows]
    everything = [*top1, reference.published.top1]
    # Bars from 0 would hide the steps; the axis says where they begin.
    begin = int(min(everything)) - 1
    for place, row in zip(places, rows, strict=True):
        bars.barh(
            place,
            row.published.top1 - begin,
            left=begin,
            height=0.72,
            color=_KEPT if row.kept else "white",
            edgecolor=_KEPT if row.kept else _TAKEN_BACK,
            hatch=None if row.kept else "////",
            linewidth=1.0,
        )
        bars.annotate(
            f"{row.published.top1:.2f}",
            (row.published.top1, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            # Else the reference's line would run through the figure.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    bars.set_xlim(begin, max(everything) + 0.09 * (max(everything) - begin))
    labels = [row.step.replace("_", " ") + ("" if row.kept else ", not kept") for row in rows]
    bars.set_yticks(places, labels, fontsize=9.5)
    bars.set_ylim(len(rows) - 0.4, -0.6)
    bars.set_xlabel(f"ImageNet-1K top-1 as published, %; the axis begins at {begin}")

    gflops = [row.gflops for row in rows]
    line.plot(gflops, places, color=_GFLOPS, marker="*", markersize=11, linewidth=1.4)
    differing = {p: row for p, row in zip(places, rows, strict=True) if row.differs}
    line.plot(
        [row.published.gflops for row in differing.values()],
        list(differing),
        linestyle="none",
        marker="*",
        markersize=11,
        color=_GFLOPS,
        fillstyle="none",
    )
    for place, row in zip(places, rows, strict=True):
        # In a column of their own, where no line runs.
        line.annotate(
            f"{row.gflops:.2f}" + (f" ({row.published.gflops:.2f})" if row.differs else ""),
            (1.03, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
        )
    line.set_xlim(0, 1.1 * max(*gflops, reference.published.gflops))
    line.set_xlabel("GFLOPs an image, counted" + ("\n(as published, hollow)" if differing else ""))

    for axes, value in (
        (bars, reference.published.top1),
        (line, reference.published.gflops),
    ):
        axes.axvline(value, color=_REFERENCE, linestyle="--", linewidth=1.4, zorder=0.5)
        axes.annotate(
            f"{reference_name} {value:.2f}",
            (value, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=_REFERENCE,
        )
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)

    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    draft = path.with_name(path.name + ".tmp")
    # The same rows give the same file: no date, and names in it that don't change.
    with matplotlib.rc_context({"svg.hashsalt": "roadmap", "hatch.linewidth": 1.0}):
        figure.savefig(draft, format=kind, metadata={"Date": None} if kind == "svg" else None)
    draft.replace(path)
