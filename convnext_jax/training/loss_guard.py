"""Notices when training has gone astray: a loss that is not finite, or one that stays high.

It looks at each step's loss in order. The loss is a mean over the global batch, the same number on
every process, so all of them come to the same verdict at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# A step's weight in the running average: some fifty steps are remembered.
_WEIGHT = 0.02


class LossGuard:
    """Watches the loss of one run."""

    def __init__(
        self,
        *,
        stop_at_nonfinite: bool,
        spike_factor: float | None = None,
        spike_steps: int = 20,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins, or goes on with `state()` of a checkpoint.

        Args:
          stop_at_nonfinite: whether a loss or gradient that is not finite is a reason to stop.
          spike_factor: a loss above this times its running average is a spike; None: none is.
          spike_steps: a spike of so many steps in a row is a reason to stop.
          state: of the guard in a checkpoint.
        """
        self._stop_at_nonfinite = stop_at_nonfinite
        self._factor, self._patience = spike_factor, spike_steps
        # The sum of weights corrects the average for its beginning at 0.
        self._state = {"average": 0.0, "weights": 0.0, "high": 0, "since": 0, **(state or {})}

    def check(self, done: int, metrics: Mapping[str, Any]) -> str | None:
        """Looks at one step.

        Args:
          done: steps taken.
          metrics: "loss" and "grad_norm", floats, and "finite".

        Returns:
          What is wrong if the run should stop, else None.
        """
        loss = metrics["loss"]
        if not metrics["finite"]:
            norm = metrics["grad_norm"]
            found = f"step {done}: the loss is {loss:g}, the gradient's norm {norm:g}"
            return found if self._stop_at_nonfinite else None
        state = self._state
        mean = state["average"] / state["weights"] if state["weights"] else math.inf
        if self._factor is not None and loss > self._factor * mean:
            # Left out of the average, or a long spike would become the rule.
            state["high"] += 1
            if state["high"] == 1:
                state["since"] = done
            if state["high"] < self._patience:
                return None
            return (
                f"step {done}: since step {state['since']} the loss has been more than "
                f"{self._factor:g} times its running average of {mean:.4g}; it is {loss:.4g}"
            )
        state["high"] = 0
        state["average"] += _WEIGHT * (loss - state["average"])
        state["weights"] += _WEIGHT * (1 - state["weights"])
        return None

    def state(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint."""
        return dict(self._state)
