"""The training clock: throughput, time lost waiting for data, and the time that is left.

It leaves out what does not tell how fast training goes: compilation, evaluation and checkpointing.
Its state lies in every checkpoint, so that the time left and the total survive a restart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping


@dataclasses.dataclass(frozen=True)
class Window:
    """What passed between two laps, pauses left out.

    Attributes:
      steps: the steps taken.
      seconds: how long they took.
      waited: the seconds of it during which the loop waited for data.
      compiling: whether this is the first lap after a (re)start, which holds the compilation.
    """

    steps: int
    seconds: float
    waited: float
    compiling: bool

    @property
    def seconds_per_step(self) -> float | None:
        """None where the window says nothing about speed."""
        return self.seconds / self.steps if self.steps > 0 and not self.compiling else None

    @property
    def wait_fraction(self) -> float | None:
        """The share of the time spent waiting for data, 0 to 1; None as above."""
        return self.waited / self.seconds if self.seconds > 0 and not self.compiling else None


class Chrono:
    """Measures a training loop by laps.

    JAX dispatches steps asynchronously, so a lap means something only right after a step's result
    has been fetched, as when a loop logs. The first lap after a (re)start is taken for compilation
    and is not counted: end it after the very first step to keep it short.
    """

    def __init__(
        self,
        start_step: int = 0,
        state: Mapping[str, float] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the clock.

        Args:
          start_step: the step that the run starts or goes on from.
          state: what `state` returned before the restart, if there was one.
          clock: returns seconds from an arbitrary origin; given by tests.
        """
        earlier = dict(state or {})
        self._clock = clock
        self._earlier_seconds = float(earlier.get("train_seconds", 0.0))
        self._earlier_steps = int(earlier.get("train_steps", 0))
        self._earlier_waited = float(earlier.get("wait_seconds", 0.0))
        self._earlier_wall = float(earlier.get("wall_seconds", 0.0))
        self._seconds = self._waited = 0.0
        self._steps = 0
        self._start = self._last_time = clock()
        self._last_step = start_step
        self._compiling = True
        self._pauses = 0
        self._paused = self._waiting = 0.0
        self._lap_steps, self._lap_seconds, self._lap_waited = 0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Wraps the drawing of a batch."""
        began = self._clock()
        try:
            yield
        finally:
            if not self._pauses:
                self._waiting += self._clock() - began

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Wraps an evaluation or a save: its time belongs to no lap. Pauses may nest."""
        began = self._clock()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._paused += self._clock() - began

    def tick(self, step: int) -> None:
        """Counts what has passed until `step`, the number of steps taken, into the lap.

        Needed only where `state` should be exact between laps; `lap` ticks by itself.
        """
        now = self._clock()
        steps = step - self._last_step
        seconds = max(now - self._last_time - self._paused, 0.0)
        self._lap_steps += steps
        self._lap_seconds += seconds
        self._lap_waited += self._waiting
        if not self._compiling:
            self._steps += steps
            self._seconds += seconds
            self._waited += self._waiting
        self._last_step, self._last_time = step, now
        self._paused = self._waiting = 0.0

    def lap(self, step: int) -> Window:
        """Ends the lap at `step`, the number of steps taken, and begins the next."""
        self.tick(step)
        window = Window(self._lap_steps, self._lap_seconds, self._lap_waited, self._compiling)
        self._lap_steps, self._lap_seconds, self._lap_waited = 0, 0.0, 0.0
        self._compiling = False
        return window

    @property
    def seconds_per_step(self) -> float | None:
        """The mean since this start; until that is known, the mean before it; None before both.

        A restart may land on other hardware, so the former speed gives way to the present one.
        """
        if self._steps > 0:
            return self._seconds / self._steps
        return self._earlier_seconds / self._earlier_steps if self._earlier_steps > 0 else None

    def time_left(self, step: int, total_steps: int) -> float | None:
        """Seconds of training from `step` to `total_steps`, without pauses; None if unknown."""
        each = self.seconds_per_step
        return None if each is None else each * max(total_steps - step, 0)

    @property
    def wall_seconds(self) -> float:
        """Seconds since the first start, all included but the time between a kill and a restart."""
        return self._earlier_wall + self._clock() - self._start

    @property
    def train_seconds(self) -> float:
        """Seconds of training since the first start: compilation and pauses left out."""
        return self._earlier_seconds + self._seconds

    @property
    def train_steps(self) -> int:
        """The steps that `train_seconds` covers."""
        return self._earlier_steps + self._steps

    @property
    def wait_fraction(self) -> float | None:
        """The share of `train_seconds` spent waiting for data, 0 to 1; None if unknown."""
        if self.train_seconds <= 0:
            return None
        return (self._earlier_waited + self._waited) / self.train_seconds

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; JSON-able."""
        return {
            "train_seconds": self.train_seconds,
            "train_steps": self.train_steps,
            "wait_seconds": self._earlier_waited + self._waited,
            "wall_seconds": self.wall_seconds,
        }
