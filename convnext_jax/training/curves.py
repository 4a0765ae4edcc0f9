"""The picture of a run: loss and accuracy against epochs, raw weights and EMA."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, told apart by colour-blind readers too.
_TRAIN, _RAW, _EMA = "#56B4E9", "#0072B2", "#D55E00"
_SMOOTH_FROM = 60  # points from which on the training curve is drawn with a running mean

Record = Mapping[str, Any]


def plot_curves(
    records: Sequence[Record],
    path: str | os.PathLike[str],
    *,
    steps_per_epoch: float,
    title: str = "",
) -> None:
    """Draws a run's curves into a PNG of 1500×600 pixels, replacing the file at once.

    Args:
      records: what `reporting.read_metrics` returned: `kind` "train" or "eval", `step`, and among
        the metrics `loss`, `accuracy`, `ema_loss`, `ema_accuracy`; an absent one has no curve.
      path: where the PNG goes.
      steps_per_epoch: turns steps into the epochs of the x axis.
      title: set above the panels.
    """
    # Half a second to import, and needed once a run. No pyplot: it would keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2, sharex=True)
    if title:
        figure.suptitle(title, fontsize=12)

    def series(kind: str, name: str) -> tuple[list[float], list[float]]:
        points = [(r["step"], r[name]) for r in records if r["kind"] == kind and name in r]
        return [step / steps_per_epoch for step, _ in points], [value for _, value in points]

    def draw(axes: Any, kind: str, name: str, label: str, color: str, percent: bool) -> None:
        x, y = series(kind, name)
        finite = [value for value in y if math.isfinite(value)]
        if not finite:
            return
        if percent:
            label += f": last {y[-1]:.2%}, best {max(finite):.2%}"
        smooth = kind == "train" and len(y) >= _SMOOTH_FROM
        marker = "o" if len(y) <= 30 and kind == "eval" else None
        axes.plot(
            x,
            y,
            color=color,
            label=None if smooth else label,
            linewidth=0.8 if smooth else 1.8,
            alpha=0.45 if smooth else 1.0,
            marker=marker,
            markersize=3.5,
        )
        if smooth:
            axes.plot(
                x, _running_mean(y, len(y) // 40 + 1), color=color, linewidth=1.8, label=label
            )

    for axes, name, percent in ((loss, "loss", False), (accuracy, "accuracy", True)):
        draw(axes, "train", name, "training batches", _TRAIN, percent)
        draw(axes, "eval", name, "evaluation", _RAW, percent)
        draw(axes, "eval", f"ema_{name}", "evaluation, EMA", _EMA, percent)
        axes.set_xlabel("epoch")
        axes.set_title(name.capitalize(), fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=None))

    draft = Path(path).with_suffix(".png.tmp")
    figure.savefig(draft, format="png")
    draft.replace(path)


def _running_mean(values: Sequence[float], half: int) -> list[float]:
    """The mean over up to `half` neighbours on either side; NaN and inf are left out."""
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means
