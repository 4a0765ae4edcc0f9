"""Checkpoints by Orbax: written in the background, kept by count and metric, restored on any mesh.

This file and those named `checkpoint_…` alone import Orbax for it. They stand on
`orbax.checkpoint.CheckpointManager` and its handlers, not on `orbax.checkpoint.experimental.v1`: in
0.12 the latter still says of itself that it is "subject to change without notice", and its
`Checkpointer` drives this same manager and writes the same format, so a later move costs these
files alone and no checkpoint.

One checkpoint is one directory named by its step:

    DIRECTORY/1200/state/         the arrays (OCDBT/zarr), readable on any topology
    DIRECTORY/1200/metadata/      one JSON file: what the caller gave, and the step's metrics

Orbax names a directory by its bare step only once all of it has been written, which is how a
checkpoint that a killed run left half-written is told from a whole one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

from convnext_jax.errors import UserError
from convnext_jax.training import checkpoint_reading
from convnext_jax.training.checkpoint_policy import NewestAndBest
from convnext_jax.training.checkpoint_reading import METADATA, STATE
from convnext_jax.training.checkpoint_room import obstacle
from convnext_jax.training.checkpoint_salvage import read_together, set_aside
from convnext_jax.training.workdir import absolute_path

_log = logging.getLogger("convnext_jax")

_STEP_NAME = re.compile(r"(0|[1-9]\d*)(\.orbax-checkpoint-tmp.*)?")


class SaveError(RuntimeError):
    """A checkpoint that could not be written; those before it are as they were.

    Attributes:
      agreed: whether every process knows of it, and all can go on.
    """

    def __init__(self, message: str, *, agreed: bool) -> None:
        """Takes a sentence that names the checkpoint and the reason."""
        super().__init__(message)
        self.agreed = agreed


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` found.

    Attributes:
      step: the step after which the checkpoint was saved.
      state: a pytree like the abstract state asked for; every leaf a `jax.Array` sharded as asked.
      metadata: the JSON-able dict that was given to `save`.
    """

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpointer:
    """Saves, keeps and restores the checkpoints of one run. Call it on every process alike.

    The newest `max_to_keep` checkpoints are kept, and the best one by `best_metric` besides.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int = 3,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        read_only: bool = False,
    ) -> None:
        """Opens, and unless `read_only` creates, a directory of checkpoints.

        Args:
          directory: a local or shared path, or a URL that `etils.epath` reads (`gs://…`).
          max_to_keep: how many of the newest checkpoints stay, at least 1.
          best_metric: the key in `save`'s `metrics` by which the best checkpoint is told. Of equals
            the newest counts as best; steps without the metric, or with NaN, never do.
          best_mode: whether more or less of the metric is better.
          read_only: for programs that look at another run's checkpoints, which may still be
            writing: nothing in the directory is created, renamed or removed.

        Raises:
          UserError: if `max_to_keep` is below 1 or `best_mode` is unknown.
        """
        if max_to_keep < 1:
            raise UserError(f"max_to_keep is {max_to_keep}, but at least 1 checkpoint must be kept")
        if best_mode not in ("max", "min"):
            raise UserError(f"best_mode is {best_mode!r}; it must be 'max' or 'min'")
        self.directory = absolute_path(directory)
        self._read_only = read_only
        self._best_metric = best_metric
        self._sign = 1.0 if best_mode == "max" else -1.0
        self._scores: dict[int, float] = {}
        self._under_way: int | None = None
        logging.getLogger("absl").addFilter(_not_from_orbax)
        # Listed before the manager starts to clean up what a killed run left.
        present = _names(self.directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=NewestAndBest(max_to_keep, self._scores),
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                save_root_metadata=False,
                # The metrics lie in the metadata file, so that an unreadable one costs a
                # checkpoint its rank and not the program its start.
                lightweight_initialize=True,
            ),
        )
        whole = {str(step) for step in self._manager.all_steps()}
        self._half_written = sorted(
            name for name in present if _STEP_NAME.fullmatch(name) and name not in whole
        )
        if best_metric is not None:
            for step in self._manager.all_steps():
                self._rank(step, self._stored_metrics(step))

    def latest_step(self) -> int | None:
        """The newest step with a finished checkpoint, or None."""
        return max(self._manager.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best `best_metric`, or None if no checkpoint carries that metric."""
        present = [step for step in self._manager.all_steps() if step in self._scores]
        return max(present, key=lambda step: (self._scores[step], step), default=None)

    def all_steps(self) -> list[int]:
        """Every step with a checkpoint, ascending; one that is still being written included."""
        return sorted(self._manager.all_steps())

    def shapes(self, step: int) -> Any:
        """What the checkpoint of a step holds, before any of its arrays is read.

        Args:
          step: one of `all_steps()`.

        Returns:
          The saved tree as nested dicts, whose leaves have a `shape` and a `dtype`.

        Raises:
          UserError: if the checkpoint can't be read.
        """
        return checkpoint_reading.shapes(self.directory / str(step))

    def metadata(self, step: int) -> dict[str, Any]:
        """What the caller of `save` gave as metadata, without reading any array.

        Args:
          step: one of `all_steps()`.

        Raises:
          UserError: if the checkpoint can't be read.
        """
        return checkpoint_reading.metadata(self.directory / str(step))

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Starts to save `state`, and returns once it is copied off the devices.

        The caller may donate `state`'s buffers to the next step at once. A save still under way
        is waited for first; `wait` beforehand, to tell its failure from this one's.

        Args:
          step: the number of steps taken to reach `state`.
          state: a pytree of `jax.Array`, raw or typed PRNG keys among them, of any sharding.
          metadata: what is to lie beside the arrays, JSON-able; it is copied at once.
          metrics: this step's figures; `best_metric` is looked up here.

        Returns:
          False if a checkpoint of this step already lies there, which then stays as it is.

        Raises:
          SaveError: if the directory is not writable, or the disk too full; if writing the
            checkpoint before, or beginning this one, failed.
          TypeError: if `metadata` is not JSON-able.
          ValueError: if the checkpointer is read-only.
        """
        if self._read_only:
            raise ValueError(f"the checkpointer of {self.directory} was opened read-only")
        if step in self._manager.all_steps():
            return False
        finite = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
        beside = json.loads(json.dumps({"metadata": dict(metadata), "metrics": finite}))
        self.wait()
        if (what := obstacle(self.directory, state)) is not None:
            raise SaveError(
                f"the checkpoint of step {step} could not be written: {what}", agreed=True
            )
        self._rank(step, finite)
        self._under_way = step
        # A loop under `transfer_guard("disallow")` means its own arrays, not this copy.
        with jax.transfer_guard("allow"), self._failing_as_save_error():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{STATE: ocp.args.PyTreeSave(state), METADATA: ocp.args.JsonSave(beside)}
                ),
                # The caller decides when to save; also at a step before a damaged newer one.
                force=True,
            )
        return True

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives a finished checkpoint figures that were not known when it was saved.

        Args:
          step: of the checkpoint.
          metrics: replace those given to `save`.
        """
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._rank(step, finite)
        if jax.process_index() == 0:
            checkpoint_reading.replace_metrics(self.directory / str(step), finite)

    def restore(
        self, abstract_state: Any, step: int | None = None, *, partial: bool = False
    ) -> Restored | None:
        """Reads the newest whole checkpoint, bit for bit, onto the shardings asked for.

        A checkpoint that was left half-written, or whose files are missing, cut short or
        unreadable, is passed over with one log line that names it, and the next older one is
        taken. Once an older one has been read, each damaged one is renamed to `STEP.damaged`
        (unless `read_only`), so that training can write that step anew; none is deleted.

        Args:
          abstract_state: a pytree of `jax.ShapeDtypeStruct` that carry shardings; typed PRNG keys
            have their key dtype. The mesh need not be the one that the checkpoint was saved on.
          step: take exactly this checkpoint.
          partial: allow the checkpoint to hold more than `abstract_state` asks for, as when an
            evaluation wants the parameters without the optimizer's moments.

        Returns:
          The checkpoint, or None if none was ever finished.

        Raises:
          UserError: if the checkpoint does not fit `abstract_state` (the first few leaves are
            named with both shapes and dtypes); if `step` is given and is absent or damaged; or if
            checkpoints are there but every one is damaged.
        """
        steps = self.all_steps()[::-1]
        if step is not None:
            if step not in steps:
                raise UserError(
                    f"{self.directory} holds no checkpoint of step {step}; "
                    f"it has {', '.join(map(str, steps[::-1])) or 'none'}"
                )
            steps = [step]
        self._report_half_written()
        damaged: list[int] = []
        for candidate in steps:
            path = self.directory / str(candidate)
            state, metadata, damage = read_together(path, abstract_state, partial=partial)
            if damage is None:
                if damaged and not self._read_only:
                    set_aside([self.directory / str(one) for one in damaged])
                    self._manager.reload()
                return Restored(candidate, state, metadata)
            if step is None and jax.process_index() == 0:
                _log.warning("passing over the damaged checkpoint %s: %s", path, damage)
            damaged.append(candidate)
        if damaged:
            which = f"the checkpoint of step {step} is" if step is not None else "every one is"
            raise UserError(
                f"no checkpoint could be restored from {self.directory}: {which} damaged "
                f"({damage}); bring the files back, or start in a new workdir"
            )
        return None

    def wait(self) -> None:
        """Returns once every save has been finished.

        Raises:
          SaveError: if the last one failed. It is told once.
        """
        with self._failing_as_save_error():
            self._manager.wait_until_finished()
        self._under_way = None

    def close(self) -> None:
        """Waits for saves under way and releases the background threads."""
        try:
            self._manager.close()
        except Exception as error:  # Orbax raises whatever its threads ended by.
            _log.error("%s", self._save_error(error))
        logging.getLogger("absl").removeFilter(_not_from_orbax)

    @contextlib.contextmanager
    def _failing_as_save_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as above
            failure = self._save_error(error)
            self._scores.pop(self._under_way or 0, None)
            self._under_way = None
            raise failure from error

    def _save_error(self, error: Exception) -> SaveError:
        return SaveError(
            f"the checkpoint of step {self._under_way} could not be written: "
            f"{checkpoint_reading.one_line(error)}",
            agreed=jax.process_count() == 1,
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _rank(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._best_metric is not None and self._best_metric in metrics:
            self._scores[step] = self._sign * metrics[self._best_metric]

    def _stored_metrics(self, step: int) -> dict[str, float]:
        try:
            return dict(checkpoint_reading.read_beside(self.directory / str(step))["metrics"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _report_half_written(self) -> None:
        if jax.process_index() == 0:
            for name in self._half_written:
                _log.warning(
                    "passing over the half-written checkpoint %s: it was never finished",
                    self.directory / name,
                )
        self._half_written = []


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Leaves out the stack that each of Orbax's threads prints when a save fails: it is raised."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _names(directory: epath.Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.exists() else []
