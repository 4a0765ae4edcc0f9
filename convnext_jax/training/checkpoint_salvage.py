"""Reading a checkpoint that may be damaged, and putting such ones aside, by all processes alike."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from convnext_jax.training import checkpoint_reading

_SOUND, _DAMAGED, _FAILED = range(3)  # what a process made of a checkpoint, the worst last


def read_together(
    path: epath.Path, abstract_state: Any, *, partial: bool
) -> tuple[Any, dict[str, Any], str | None]:
    """Reads a checkpoint on every process, which agree on whether it is sound.

    Args:
      path: directory of the checkpoint.
      abstract_state: see `checkpoint_reading.read_state`.
      partial: see `checkpoint_reading.read_state`.

    Returns:
      State, metadata and None; or, as the third, what is damaged in it.

    Raises:
      UserError: if it does not fit `abstract_state`.
      RuntimeError: if another process failed for a reason that is not the checkpoint's.
    """
    state, metadata, failure = None, {}, None
    try:
        metadata = checkpoint_reading.read_beside(path)["metadata"]
        state = checkpoint_reading.read_state(path, abstract_state, partial=partial)
    except Exception as error:  # Orbax raises bare `Exception` when an array cannot be read.
        failure = error
    damage = None if failure is None else checkpoint_reading.describe_damage(failure)
    if jax.process_count() > 1:
        mine = _SOUND if failure is None else _DAMAGED if damage is not None else _FAILED
        every = multihost_utils.process_allgather(np.asarray(mine))
        worst = int(np.argmax(every))
        if every[worst] == _FAILED and (failure is None or damage is not None):
            raise RuntimeError(f"process {worst} failed to restore {path}; its log says why")
        if every[worst] == _DAMAGED and damage is None:
            damage = f"process {worst} could not read its part"
    if failure is not None and damage is None:
        raise failure
    return state, metadata, damage


def set_aside(paths: Sequence[epath.Path]) -> None:
    """Renames damaged checkpoints to `STEP.damaged`; returns, on every process, once that is done.

    Args:
      paths: their directories.
    """
    if jax.process_index() == 0:
        for path in paths:
            path.rename(_unused(path.with_name(f"{path.name}.damaged")))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("convnext_jax.checkpoints.set_aside")


def _unused(path: epath.Path) -> epath.Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
