"""A progress bar for work of known length."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from convnext_jax.training.console import Console, duration, line

_WIDTH = 24
# A terminal's line may change often; in a file each is a line of its own.
_SECONDS_BETWEEN = {True: 0.2, False: 30.0}


def rate_text(images_per_second: float) -> str:
    """A throughput to three figures or more."""
    digits = 0 if images_per_second >= 100 else 1
    return f"{images_per_second:,.{digits}f} img/s"


class ProgressBar:
    """Shows on a stream how much is done, how fast it goes, and how long it will take.

    The rate is of the time since the first batch came in, which leaves out the compilation.
    """

    def __init__(
        self,
        total: int,
        *,
        label: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Shows nothing yet.

        Args:
          total: how many images there are.
          label: stands before the bar.
          stream: standard error by default.
          clock: returns seconds from an arbitrary origin; given by tests.
        """
        stream = sys.stderr if stream is None else stream
        self._total, self._label, self._clock = total, label, clock
        self._stream, self._console = stream, Console(stream)
        self._pause = _SECONDS_BETWEEN[stream.isatty()]
        self._done = self._first = 0
        self._began: float | None = None
        self._latest = 0.0
        self._shown = float("-inf")

    @property
    def images_per_second(self) -> float | None:
        """Since the first batch; None before the second."""
        seconds = 0.0 if self._began is None else self._latest - self._began
        return (self._done - self._first) / seconds if seconds > 0 else None

    def advance(self, count: int, *notes: str) -> None:
        """Counts `count` images more and shows the bar, unless it was shown just now.

        Args:
          count: how many.
          *notes: what stands after the bar.
        """
        self._done += count
        now = self._latest = self._clock()
        if self._began is None:
            self._began, self._first = now, self._done
        last = self._done >= self._total
        if last or now - self._shown >= self._pause:
            self._shown = now
            self._console.live(self._text(notes))

    def close(self) -> None:
        """Leaves the bar's last state on a line of its own."""
        if self._began is not None and self._stream.isatty():
            self._stream.write("\n")
            self._stream.flush()

    def _text(self, notes: tuple[str, ...]) -> str:
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        filled = int(share * _WIDTH)
        rate = self.images_per_second
        parts = [
            self._label,
            f"[{'#' * filled}{'.' * (_WIDTH - filled)}]",
            f"{self._done:,}/{self._total:,}",
        ]
        if rate is not None:
            left = (self._total - self._done) / rate
            parts += [rate_text(rate)]
            parts += [f"ETA {duration(left)}"] if left > 0 else []
        return line(*parts, *notes)
