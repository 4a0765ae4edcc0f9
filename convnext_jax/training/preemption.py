"""The platform's announcement that a run will be stopped, heard by all processes at one step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Listens for SIGTERM, with which platforms announce a preemption or a maintenance.

    With several processes JAX's preemption service listens: a notice to any of them reaches all,
    and they agree on the poll at which each of them says so. Alone, this process handles the signal
    itself while it is inside the context; a second signal ends it at once.
    """

    def __init__(self) -> None:
        """Listens to nothing yet."""
        self._polls = 0
        self._reached = self._signalled = self._listening = False
        self._previous: Any = None

    def __enter__(self) -> Preemption:
        alone = not jax.distributed.is_initialized()
        if alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
            self._listening = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listening:
            # None stands for a handler that was not set from Python, and can't be set again.
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
            self._listening = False

    def reached(self) -> bool:
        """Whether it is time to stop. Ask at every step and every batch, on every process alike.

        Returns:
          True from one and the same call on, on every process.
        """
        if not self._reached:
            # The processes agree on a number that is still to come, so none may be left out.
            self._polls += 1
            self._reached = self._signalled or (
                jax.distributed.is_initialized()
                and multihost_utils.reached_preemption_sync_point(self._polls)
            )
        return self._reached

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled = True
