"""What a run does about its checkpoints: when one can't be written, and when the run has to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from convnext_jax.errors import ProcessFailedError, RunInterruptedError, RunStoppedError
from convnext_jax.training.checkpoints import Checkpointer, SaveError


class SavePolicy:
    """Saves by a `Checkpointer`, and stops or goes on where that fails, as the config says."""

    def __init__(
        self, checkpointer: Checkpointer, *, on_failure: str, tell: Callable[[str], None]
    ) -> None:
        """Changes nothing yet.

        Args:
          checkpointer: of the run.
          on_failure: "stop", or "continue" to try again at the next checkpoint.
          tell: takes a line for the person at the console.
        """
        self._checkpointer, self._tell = checkpointer, tell
        self._goes_on = on_failure == "continue"

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        last: bool = False,
    ) -> None:
        """Starts to save.

        Args:
          step: as for `Checkpointer.save`, like the next three.
          state: as there.
          metadata: as there.
          metrics: as there.
          last: whether no other checkpoint will follow, so that this one must not fail.

        Raises:
          RunStoppedError: if this save could not be begun, or the one before failed, and the policy
            is to stop.
          ProcessFailedError: if this process alone knows of a failure, and the others would wait
            for it.
        """
        self.wait()
        self._goes_on &= not last
        self._trying(
            lambda: self._checkpointer.save(step, state, metadata=metadata, metrics=metrics)
        )

    def wait(self) -> None:
        """Waits for the save under way; raises as `save`."""
        self._trying(self._checkpointer.wait)

    def interruption(self) -> RunInterruptedError:
        """Waits for the save under way, and says how to go on later; raises as `save`."""
        self.wait()
        return RunInterruptedError(
            f"the platform announced that it will end this run; {self._last()}. The same command "
            "goes on from it"
        )

    def stop(self, reason: str) -> RunStoppedError:
        """Waits for the save under way, and says how a run that has gone astray can go on."""
        try:
            self._checkpointer.wait()
        except SaveError as error:
            reason = f"{reason}; {error}"
        return RunStoppedError(
            f"{reason}; {self._last()}. Start again with --allow_config_change and a lower "
            "--config.optim.learning_rate, or with --config.on_nonfinite=skip to leave out steps "
            "that are not finite"
        )

    def _trying(self, action: Callable[[], object]) -> None:
        try:
            action()
        except SaveError as error:
            if error.agreed and self._goes_on:
                self._tell(f"{error}; trying again at the next checkpoint")
                return
            kind = RunStoppedError if error.agreed else ProcessFailedError
            raise kind(
                f"{error}; {self._last()}. Mend that and give the same command again, or "
                "--config.on_save_failure=continue to go on without"
            ) from error

    def _last(self) -> str:
        last = self._checkpointer.latest_step()
        if last is None:
            return "no checkpoint had been written yet"
        return f"the last good checkpoint is that of step {last} in {self._checkpointer.directory}"
