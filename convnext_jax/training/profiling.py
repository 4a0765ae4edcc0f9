"""A trace of a few training steps, for xprof and TensorBoard's profile plugin.

Steps bear the numbers of the log lines: the first one is step 1. The trace holds the steps
that were asked for and nothing of their neighbours, since the devices are waited for before it
begins and before it ends; and no compilation, since a process's first step is never part of it.

Of several processes the first alone traces. All run one program at one pace, so its host and its
devices stand for the others'.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from convnext_jax.errors import UserError


def parse_steps(text: str) -> range:
    """Reads the argument of --profile.

    Args:
      text: "steps=FIRST:END", without END itself: "steps=10:15" is steps 10 to 14.

    Returns:
      The steps' numbers.

    Raises:
      UserError: if it has another form, or names no step that can be traced.
    """
    match = re.fullmatch(r"steps=(\d+):(\d+)", text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    if not steps or steps.start < 2:
        raise UserError(
            f"--profile is {text!r}; write steps=FIRST:END, as steps=10:15 for steps 10 to 14; "
            "FIRST must be 2 or more, since the first step is the one that compiles, and END larger"
        )
    return steps


def check_steps(steps: range | None, total: int) -> None:
    """Holds the steps to be traced to the run's length.

    Raises:
      UserError: if the run ends before them.
    """
    if steps is not None and steps[-1] > total:
        raise UserError(
            f"--profile names steps {steps[0]} to {steps[-1]}, but the run has {total}; "
            f"END can be {total + 1} at most"
        )


class StepProfiler:
    """Traces steps of a training loop: `step` goes around each, and `finish` behind each."""

    def __init__(
        self,
        steps: range | None,
        directory: Path,
        *,
        start_step: int,
        tell: Callable[[str], None],
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Plans the trace; on all processes but the first, for nothing.

        Args:
          steps: the numbers of the steps to be traced; None for none. Of a run that goes on behind
            some of them, the rest is traced.
          directory: of TensorBoard's files; the trace is `plugins/profile/TIME` in it.
          start_step: steps that had been taken when the process started.
          tell: shows a line to the user.
          pause: whatever stops the clock while the trace is begun and written.
        """
        self._steps = range(0)
        self._directory = directory
        self._tell = tell
        self._pause = pause
        self._tracing = False
        if steps is None or jax.process_index() != 0:
            return
        # The process's first step compiles.
        self._steps = range(max(steps.start, start_step + 2), steps.stop)
        if not self._steps:
            tell(
                f"nothing is traced: steps {steps[0]} to {steps[-1]} do not lie behind step "
                f"{start_step + 1}, this start's first"
            )

    @contextlib.contextmanager
    def step(self, number: int, state: Any) -> Iterator[None]:
        """Wraps the drawing of a batch and the call of the step.

        Args:
          number: the step's, from 1.
          state: a pytree that is ready when the step before is done.
        """
        if self._steps and number == self._steps[0]:
            jax.block_until_ready(state)
            with self._pause():
                options = jax.profiler.ProfileOptions()
                # Each call of a Python function would be recorded: a trace of megabytes a step, and
                # a slower host.
                options.python_tracer_level = 0
                jax.profiler.start_trace(self._directory, profiler_options=options)
                self._tracing = True
        if not self._tracing:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def finish(self, number: int, state: Any) -> None:
        """Writes the trace behind its last step; call it when the step has been reported.

        Args:
          number: the step's, from 1.
          state: a pytree that is ready when it is done.
        """
        if self._tracing and number == self._steps[-1]:
            jax.block_until_ready(state)
            with self._pause():
                self.close()
            self._tell(
                f"traced steps {self._steps[0]} to {number}; to look at them: "
                f"pip install xprof && xprof --logdir {self._directory}"
            )

    def close(self) -> None:
        """Writes what has been traced so far, where a trace is under way."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
