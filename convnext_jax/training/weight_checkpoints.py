"""Writing weights alone as a checkpoint, array by array, in little more memory than the largest.

What it writes is a checkpoint like those of training (see `checkpoints.py`), of step 0, with the
parameters under "params" and the batch statistics, if any, under "batch_stats"; `Checkpointer`
reads it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from convnext_jax.errors import UserError
from convnext_jax.training.checkpoint_reading import METADATA, STATE
from convnext_jax.training.workdir import absolute_path

PyTree = Any

STEP = 0


def save_weights(
    directory: str | os.PathLike[str],
    variables: Mapping[str, PyTree],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Writes variables as NumPy arrays; returns once all of them are on disk.

    Args:
      directory: where the checkpoint goes; made anew.
      variables: {"params": …} and, of a model with batch norms, "batch_stats": nested dicts of
        NumPy arrays, which may be views of a mapped file: each is read only when its turn comes.
      metadata: what is to lie beside the arrays, JSON-able.
      overwrite: replace what lies there.
      written: called after each array, so that a mapped file may let go of its pages.

    Raises:
      UserError: if something lies there already, unless `overwrite`, or it can't be written.
      TypeError: if `metadata` is not JSON-able.
    """
    beside = json.loads(json.dumps({"metadata": dict(metadata), "metrics": {}}))
    target = absolute_path(directory)
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists already; give another path, or --overwrite")
    # Beside the target, and renamed as the last act: a conversion that fails leaves nothing. The
    # process's number keeps it from being anything of the user's.
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _OneByOne(written)),
        # Unused, but Orbax warns where it is missing.
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    try:
        with ocp.CheckpointManager(
            partial,
            options=ocp.CheckpointManagerOptions(
                enable_async_checkpointing=False, save_root_metadata=False
            ),
            item_handlers={
                STATE: ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
                METADATA: ocp.JsonCheckpointHandler(),
            },
        ) as manager:
            manager.save(
                STEP,
                args=ocp.args.Composite(
                    **{
                        STATE: ocp.args.PyTreeSave(dict(variables)),
                        METADATA: ocp.args.JsonSave(beside),
                    }
                ),
            )
        if target.exists():
            target.rmtree()
        partial.rename(target)
    except OSError as error:
        raise UserError(
            f"{target} can't be written: {error.strerror or error}; give another path"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Orbax's own would first copy every array, and then write all of them at once."""

    def __init__(self, written: Callable[[], None]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._written = written

    async def serialize(
        self,
        values: Sequence[np.ndarray],
        infos: Sequence[Any],
        args: Sequence[Any] | None = None,
    ) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            for future in await super().serialize([value], [info], [arg]):
                future.result()
            self._written()
        return []
