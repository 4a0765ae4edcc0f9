"""A model with stored weights in it, in one call."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from convnext_jax.convert.preprocessing import Preprocessing
from convnext_jax.convert.stored import find_weights
from convnext_jax.errors import UserError
from convnext_jax.training.init_from import choose, describe_fresh

PyTree = Any

_log = logging.getLogger("convnext_jax")

# Of the fine-tuning recipes (paper, table 6): a fresh head on a trained trunk starts near zero.
_FRESH_HEAD_SCALE = 0.001


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with its weights, and what is known of them.

    Attributes:
      model: the unbound Flax module, a `ConvNeXt`, `SwinTransformer` or `ModernizedResNet`.
      variables: {"params": …}, and "batch_stats" of a model with batch norms; `jax.Array`s of the
        model's `param_dtype` on the first device, statistics in float32.
      preprocessing: what an image goes through before this model.
      model_name: its name in the registry, or None.
      class_names: one per output, or None where they are not known.
      source: where the weights came from first: a path, a URL or a hub name.
      sha256: of the foreign file, or None.
      notes: what was made anew, left out or guessed, one sentence each.
    """

    model: Any
    variables: PyTree
    preprocessing: Preprocessing
    model_name: str | None
    class_names: tuple[str, ...] | None
    source: str
    sha256: str | None
    notes: tuple[str, ...]


def open_pretrained(
    source: str | Path,
    *,
    sha256: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    dtype: Dtype = jnp.float32,
    averaged: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> Pretrained:
    """Loads weights, builds the model that they belong to, and says what is known of both.

    Args:
      source: a directory that `python -m convnext_jax.convert` wrote, the workdir of a run, a
        PyTorch or safetensors file, a directory of a sharded checkpoint, a URL, or
        `hf://owner/name`.
      sha256: what a foreign file must hash to.
      num_classes: None for the head as stored, 0 for none; with any other number than the stored
        one the head is made anew.
      in_channels: of the images; None for what the stem was stored for, 3 as a rule. It is summed
        over its channels for 1, and for other numbers repeated and scaled by 3 / in_channels, as
        timm does.
      dtype: compute type of the model; see its class.
      averaged: whether the moving average of a run of this library goes before its raw weights.
      seed: of what is made anew.
      **overrides: further arguments of the model's class, such as `drop_path_rate`, `remat`, or
        `head_init_scale` for a fresh head (.001 by default).

    Returns:
      Model, variables and provenance.

    Raises:
      UserError: if the source can't be read or is no network known here, or an argument
        contradicts it.
    """
    weights = find_weights(source, sha256=sha256, averaged=averaged)
    found = weights.provenance
    classes = found.model.num_classes if num_classes is None else num_classes
    if classes != found.model.num_classes:
        overrides.setdefault("head_init_scale", _FRESH_HEAD_SCALE)
    try:
        model = found.model.clone(num_classes=classes, dtype=dtype, **overrides)
    except (TypeError, ValueError) as error:
        raise UserError(f"{weights.description}: {error}") from error

    side = model.strides[-1]
    stem = weights.shapes["params"]["stem"]["conv"]["kernel"].shape
    channels = stem[2] if in_channels is None else in_channels

    def init(key: jax.Array) -> PyTree:
        return model.init(key, jnp.zeros((1, side, side, channels)))

    abstract = jax.eval_shape(init, jax.random.key(seed))
    notes = list(found.notes)
    # Read as it lies there, and adapted afterwards.
    conv = abstract["params"]["stem"]["conv"]
    shape = (*conv["kernel"].shape[:2], stem[2], stem[3])
    conv["kernel"] = conv["kernel"].update(shape=shape)
    taken, fresh = choose(abstract, weights, remedy="leave out the arguments that change them")
    variables = weights.restore(taken)
    params = variables["params"]
    if fresh:
        # Under jit what is not returned is not computed, so this costs the fresh parts alone.
        params |= jax.jit(lambda key: {k: init(key)["params"][k] for k in fresh})(
            jax.random.key(seed)
        )
        notes.append(describe_fresh(fresh))
    if channels != stem[2]:
        conv = params["stem"]["conv"]
        conv["kernel"] = adapt_channels(conv["kernel"], channels)
        notes.append(f"the stem takes {channels} channels instead of {stem[2]}")
    for note in notes[len(found.notes) :]:
        _log.info("%s: %s", weights.description, note)
    return Pretrained(
        model=model,
        variables=variables,
        preprocessing=found.preprocessing,
        model_name=found.model_name,
        class_names=found.class_names if classes == found.model.num_classes else None,
        source=found.source,
        sha256=found.sha256,
        notes=tuple(notes),
    )


def load_pretrained(source: str | Path, **arguments: Any) -> tuple[Any, PyTree]:
    """Loads weights and builds the model that they belong to.

    `model, variables = load_pretrained("convnext_tiny_1k_224_ema.pth", num_classes=10)`

    Args:
      source: see `open_pretrained`.
      **arguments: see `open_pretrained`.

    Returns:
      The unbound Flax module, and the variables for its `apply`.

    Raises:
      UserError: see `open_pretrained`.
    """
    pretrained = open_pretrained(source, **arguments)
    return pretrained.model, pretrained.variables


def adapt_channels(kernel: jax.Array, channels: int) -> jax.Array:
    """Makes the stem of an RGB model take another number of channels, as timm does.

    For one channel the three are summed, so that a grey image gives what it gave when repeated
    thrice; for others they are repeated in turn and scaled by 3 / channels, which keeps the size of
    the activations.

    Args:
      kernel: (k, k, 3, C).
      channels: of the images.

    Returns:
      (k, k, channels, C), of the same dtype.
    """
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    stored = kernel.shape[2]
    repeated = jnp.tile(kernel, (1, 1, -(-channels // stored), 1))[:, :, :channels]
    return repeated * jnp.asarray(stored / channels, kernel.dtype)
