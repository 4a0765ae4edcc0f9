"""Starting from the weights of another run: for fine-tuning, and for a larger resolution."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax

from convnext_jax.errors import UserError
from convnext_jax.training.checkpoints import Checkpointer
from convnext_jax.training.state import TrainState

PyTree = Any

_log = logging.getLogger("convnext_jax")


def _checkpoint_directory(path: str) -> Path:
    root = Path(path).expanduser()
    for candidate in (root / "checkpoints", root):
        if candidate.is_dir():
            return candidate
    raise UserError(
        f"config.init_from is {path!r}, and there is no such directory; give the workdir of a run"
    )


def start_from(state: TrainState, path: str) -> TrainState:
    """Puts the weights of another run's checkpoint in place of the initial ones.

    The best checkpoint is taken, where the run has evaluated, else the newest; of it the moving
    average, where there is one, else the raw weights. A head for another number of classes is not
    taken over: this state's own fresh head stays, and the log says so. All else must fit.

    Args:
      state: the freshly initialised state.
      path: workdir of the run, or the directory of its checkpoints.

    Returns:
      The state with these parameters, its average starting from them too.

    Raises:
      UserError: if there is no checkpoint, or it is of another model.
    """
    with Checkpointer(_checkpoint_directory(path), read_only=True, best_metric="score") as reader:
        step = reader.best_step()
        step = reader.latest_step() if step is None else step
        if step is None:
            raise UserError(
                f"config.init_from is {path!r}, and {reader.directory} holds no checkpoint"
            )
        saved = reader.shapes(step)
        group = "ema_params" if saved.get("ema_params") else "params"
        wanted = dict(state.params)
        fresh_head = "head" in wanted and _shapes(wanted["head"]) != _shapes(
            saved[group].get("head")
        )
        if fresh_head:
            del wanted["head"]
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted
        )
        restored = reader.restore({group: abstract}, step, partial=True)
    assert restored is not None
    params = {**state.params, **restored.state[group]}
    _log.info(
        "starting from the %s of step %d in %s%s",
        "averaged weights" if group == "ema_params" else "weights",
        step,
        reader.directory,
        f"; the head for {_classes(state.params['head'])} classes is new" if fresh_head else "",
    )
    ema_params = None if state.ema_params is None else jax.tree.map(jax.numpy.copy, params)
    return dataclasses.replace(state, params=params, ema_params=ema_params)


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


def _classes(head: PyTree) -> int:
    return head["bias"].shape[0]
