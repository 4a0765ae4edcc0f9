"""What a person reads on the terminal: the start-up block, the progress line, the summary."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from typing import Any, TextIO

_GAP = "  "


def duration(seconds: float | None) -> str:
    """`42s`, `3m07s`, `2h05m`, `3d04h`; `?` if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 24 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def number(value: Any) -> str:
    """An integer with its thousands set apart, a float to four figures, else `str`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}"


def metric(name: str, value: float) -> str:
    """A metric with its name; accuracies (`accuracy`, `top5`) are given in percent."""
    if "accuracy" in name or "top" in name:
        shown = f"{value:.2%}"
    elif isinstance(value, int):
        shown = number(value)
    else:
        shown = f"{value:.4f}" if 1e-2 <= abs(value) < 1e4 else number(value)
    return f"{name.replace('_', ' ')} {shown}"


def rate(images_per_second: float, device_count: int) -> str:
    """Images a second, of all devices and of each."""

    def short(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

    return f"{short(images_per_second)} img/s ({short(images_per_second / device_count)}/device)"


def block(sections: Mapping[str, Any]) -> str:
    """Lays out sections of labelled values, values aligned over all of them.

    Args:
      sections: section title -> (label -> value), or label -> value for a line of its own.

    Returns:
      One section after another, a title on a line of its own, its labels indented below.
    """
    rows: list[tuple[str, Any]] = []
    for title, section in sections.items():
        if isinstance(section, Mapping):
            rows.append((title, None))
            rows.extend((_GAP + label, value) for label, value in section.items())
        else:
            rows.append((title, section))
    width = max((len(label) for label, value in rows if value is not None), default=0)
    return "\n".join(
        label if value is None else f"{label:<{width}}{_GAP}{number(value)}"
        for label, value in rows
    )


def line(*parts: str) -> str:
    """Joins the parts of a progress line."""
    return _GAP.join(part for part in parts if part)


class Console:
    """A stream on which one line may be rewritten in place, where it is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._live = False

    def live(self, text: str) -> None:
        """Shows a line that the next live line replaces; a line of its own off the terminal."""
        if not self._terminal:
            self._stream.write(text + "\n")
        else:
            # A line that wraps could not be taken back.
            columns = shutil.get_terminal_size().columns
            self._stream.write("\r\x1b[2K" + text[: columns - 1])
            self._live = True
        self._stream.flush()

    def print(self, text: str) -> None:
        """Prints text that stays, below a live line if there is one."""
        self._stream.write(("\n" if self._live else "") + text + "\n")
        self._stream.flush()
        self._live = False
