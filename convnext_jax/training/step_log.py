"""The metrics of the steps since the last report.

They stay on the devices until they are wanted, so that no step waits for its own loss to be looked
at. What has been fetched and not yet reported is part of a checkpoint: a run that is stopped
between two reports and goes on later reports what an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Metrics = dict[str, Any]


class Report(NamedTuple):
    """What the steps since the last report came to.

    Attributes:
      done: steps taken.
      steps: how many of them are reported on.
      left_out: those whose loss or gradient was not finite, by their number.
      metrics: "loss", the mean over finite steps, "grad_norm" of the last finite one,
        "learning_rate" of the last.
    """

    done: int
    steps: int
    left_out: list[int]
    metrics: dict[str, float]


class StepLog:
    """Collects what `make_train_step`'s step returns as metrics."""

    def __init__(self, pending: Iterable[tuple[int, Metrics]] = ()) -> None:
        """Begins, or goes on with `state()` of a checkpoint."""
        self._on_devices: list[tuple[int, Mapping[str, jax.Array]]] = []
        self._fetched: list[tuple[int, Metrics]] = [(done, dict(m)) for done, m in pending]

    def append(self, done: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of the step after which `done` steps have been taken."""
        self._on_devices.append((done, metrics))

    def hold_back(self, in_flight: int) -> None:
        """Waits until at most `in_flight` steps are still being computed."""
        if len(self._on_devices) > in_flight:
            jax.block_until_ready(self._on_devices[-1 - in_flight][1])

    def fetch(self) -> list[tuple[int, Metrics]]:
        """Brings the newest to the host.

        Returns:
          Those that had not been fetched before: (steps taken, "loss", "grad_norm",
          "learning_rate" as floats, "finite" as a bool).
        """
        # All at once, so that the copies run side by side.
        new = [
            (done, {name: value.item() for name, value in metrics.items()})
            for done, metrics in jax.device_get(self._on_devices)
        ]
        self._on_devices.clear()
        self._fetched += new
        return new

    def report(self) -> Report:
        """Sums up all that have been fetched, and forgets them."""
        good = [metrics for _, metrics in self._fetched if metrics["finite"]]
        left_out = [done for done, metrics in self._fetched if not metrics["finite"]]
        done, last = self._fetched[-1]
        summary = {
            "loss": float(np.mean([m["loss"] for m in good])) if good else float("nan"),
            "grad_norm": good[-1]["grad_norm"] if good else float("nan"),
            "learning_rate": last["learning_rate"],
        }
        report = Report(done, len(self._fetched), left_out, summary)
        self._fetched.clear()
        return report

    def state(self) -> list[tuple[int, Metrics]]:
        """JSON-able; what has been fetched and not yet reported."""
        return list(self._fetched)
