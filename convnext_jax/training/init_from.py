"""Starting from stored weights: for fine-tuning, and for a larger resolution."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from convnext_jax.errors import UserError
from convnext_jax.training.state import TrainState

PyTree = Any

_log = logging.getLogger("convnext_jax")

# What published encoders may lack, and what another number of classes replaces.
_MAY_BE_NEW = re.compile(r"head|norm|feature_norm_\d+")


class StoredWeights(Protocol):
    """Variables that lie somewhere: in a checkpoint of this library, or in a foreign file.

    Attributes:
      description: what they are and where, for messages.
      shapes: {"params": …} and, of a model with batch norms, "batch_stats"; every leaf has a
        `shape` and a `dtype`.
    """

    @property
    def description(self) -> str:
        """What they are and where."""

    @property
    def shapes(self) -> PyTree:
        """The variables."""

    def restore(self, abstract: PyTree) -> PyTree:
        """Reads a part of the variables.

        Args:
          abstract: nested dicts of `jax.ShapeDtypeStruct` with shardings, a part of `shapes`.

        Returns:
          The same tree of arrays, of the dtype and on the sharding asked for.
        """


def start_from(state: TrainState, weights: StoredWeights) -> TrainState:
    """Puts stored weights in place of the initial ones.

    A head for another number of classes is not taken over, nor can a head or a final norm be that
    the source lacks (an encoder's): the state's own fresh ones stay, and the log says so. All else
    must fit.

    Args:
      state: the freshly initialised state.
      weights: where to start from.

    Returns:
      The state with these parameters and batch statistics, its averages starting from them too.

    Raises:
      UserError: if they are of another model; it lists every tensor that does not fit.
    """
    taken, fresh = choose(state.variables, weights)
    restored = weights.restore(taken)
    variables: dict[str, PyTree] = {
        name: {**tree, **restored[name]} for name, tree in state.variables.items()
    }
    _log.info("starting from %s%s", weights.description, f"; {describe_fresh(fresh)}" * bool(fresh))
    averages: dict[str, PyTree] = {}
    if state.ema_params is not None:
        copies = jax.tree.map(jax.numpy.copy, variables)
        averages = {f"ema_{name}": tree for name, tree in copies.items()}
    changes: Any = {**variables, **averages}
    return dataclasses.replace(state, **changes)


def choose(
    variables: Mapping[str, PyTree],
    weights: StoredWeights,
    *,
    remedy: str = "correct config.model or config.init_from",
) -> tuple[PyTree, dict[str, str]]:
    """Decides which parts of a model come from stored weights.

    Args:
      variables: the model's, of arrays or of `jax.ShapeDtypeStruct`.
      weights: where they are to come from.
      remedy: what a user whose weights don't fit is told to do.

    Returns:
      The part of the variables to restore, of `jax.ShapeDtypeStruct`, and for each part of "params"
      that stays as initialised the reason.

    Raises:
      UserError: if a tensor has another shape, is missing, or is left over.
    """
    params, stored = variables["params"], dict(weights.shapes["params"])
    fresh = {}
    if "head" not in params:
        stored.pop("pre_logits", None)
    for part in filter(_MAY_BE_NEW.fullmatch, {**params, **stored}):
        if part not in params:
            del stored[part]
        elif part not in stored:
            fresh[part] = "which the source does not have"
        elif part == "head" and _shapes(params[part]) != _shapes(stored[part]):
            now, before = _width(params[part]), _width(stored.pop(part))
            fresh[part] = f"for {now} classes instead of {before}"
    # A hidden layer belongs to its head: neither is of use with another's.
    if "head" in fresh and "pre_logits" in params and "pre_logits" not in stored:
        fresh["pre_logits"] = fresh["head"]
    taken = {**variables, "params": {k: v for k, v in params.items() if k not in fresh}}
    ours, theirs = _leaves(taken), _leaves({**weights.shapes, "params": stored})
    wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if wrong:
        rows = [
            f"\n  {name}: {_text(theirs.get(name))} in the source, {_text(ours.get(name))} here"
            for name in wrong
        ]
        raise UserError(
            f"{weights.description}: {len(wrong)} tensors do not fit the model that is wanted; "
            f"{remedy}:{''.join(rows)}"
        )
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        taken,
    )
    return abstract, fresh


def describe_fresh(fresh: Mapping[str, str]) -> str:
    """One clause on the parts that stay as initialised: "the head is new, for 10 outputs …"."""
    return "; ".join(f"the {part} is new, {reason}" for part, reason in fresh.items())


def _leaves(variables: Mapping[str, PyTree]) -> dict[str, tuple[int, ...]]:
    """By path, without the collection's name: statistics are called otherwise than parameters."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for tree in variables.values()
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


def _width(dense: Mapping[str, np.ndarray]) -> int:
    return dense["bias"].shape[0]


def _text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
