"""AdamW as the paper uses it, LAMB and SGD: what decays, how the rate falls towards the stem.

Each optimizer is an optax chain, so that a user can put it together otherwise; what is ConvNeXt's
own are the functions from a parameter tree to a tree of the same form: `decay_mask`,
`layer_scales`. Here is the parameters' average, too.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import optax

from convnext_jax.errors import UserError
from convnext_jax.training.adam import scale_by_adam

PyTree = Any
LayerDecayGrouping = Literal["group", "single"]
# From a parameter tree to a tree of the same structure, a bool for each leaf.
Mask = Callable[[PyTree], PyTree]


def path_name(path: tuple[Any, ...]) -> str:
    """Joins a key path of `jax.tree_util` with slashes: `stages_2/blocks_5/dwconv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: to the kernels of convolutions and linear layers.

    Not to biases, norms, γ and GRN's γ, β, all of them vectors, nor to the biases of Swin's
    attention, a matrix. The head's kernel is decayed. Sources: section C of the recipe, the
    authors' `optim_factory.py`; Swin's `no_weight_decay_keywords`.

    Args:
      params: parameter tree of arrays or ShapeDtypeStructs.

    Returns:
      A tree of the same structure with a bool for each leaf.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim > 1 and not path_name(path).endswith("relative_position_bias_table"),
        params,
    )


def all_mask(params: PyTree) -> PyTree:
    """True for every parameter, as plain SGD decays them all."""
    return jax.tree.map(lambda _: True, params)


def layer_id(name: str, depths: Sequence[int], grouping: LayerDecayGrouping = "group") -> int:
    """The depth of a parameter in layer-wise learning-rate decay, 0 next to the image.

    Args:
      name: path of the parameter, `stages_2/blocks_5/dwconv/kernel`.
      depths: blocks per stage.
      grouping: `"group"` is ConvNeXt's: thirteen ids for every size, three blocks of the third
        stage to each; downsampling 1 goes with stage 1, downsampling 2 alone, downsampling 3 with
        stage 3. `"single"` is that of ConvNeXt V2 for its smaller sizes: each block is a layer of
        its own.

    Returns:
      The id, from 0 to 13 (`"group"`) or from 1 to sum(depths) + 1 (`"single"`).

    Raises:
      UserError: if the grouping has another name.
    """
    if grouping not in ("group", "single"):
        raise UserError(
            f'config.optim.layer_decay_grouping is {grouping!r}; it must be "group" or "single"'
        )
    block = re.match(r"stages_(\d+)/blocks_(\d+)/", name)
    downsample = re.match(r"stages_(\d+)/downsample/", name)
    stem = name.startswith("stem/")
    if grouping == "single":
        if block:
            return sum(depths[: int(block[1])]) + int(block[2]) + 1
        if downsample or stem:
            return sum(depths[: int(downsample[1]) if downsample else 0]) + 1
        return sum(depths) + 1
    if stem:
        return 0
    if block:
        stage = int(block[1])
        # An isotropic model is one stage; its blocks are taken three to a group like stage 2's.
        if len(depths) == 1:
            return min(1 + int(block[2]) // 3, 12)
        return (1, 2, 3 + int(block[2]) // 3, 12)[stage]
    if downsample:
        return (0, 2, 3, 12)[int(downsample[1])]
    return 13


def layer_scales(
    params: PyTree, depths: Sequence[int], decay: float, grouping: LayerDecayGrouping = "group"
) -> PyTree:
    """The factor on each parameter's learning rate, `decay ** (last id - id)`.

    Args:
      params: parameter tree of arrays or ShapeDtypeStructs.
      depths: blocks per stage.
      decay: the ratio between neighbouring layers, in (0, 1].
      grouping: see `layer_id`.

    Returns:
      A tree of the same structure with a float for each leaf; the head's is 1.
    """
    last = 13 if grouping == "group" else sum(depths) + 1
    return jax.tree_util.tree_map_with_path(
        lambda path, _: decay ** (last - layer_id(path_name(path), depths, grouping)), params
    )


def scale_by_tree(scales: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """Multiplies each update by a constant of its own.

    Args:
      scales: from the parameter tree to a tree of floats of the same structure. It must depend on
        the structure and shapes alone.

    Returns:
      A stateless transformation; its `update` must be given the parameters.
    """

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        if params is None:
            raise ValueError(
                "scale_by_tree needs the parameters: call update(updates, state, params)"
            )
        return jax.tree.map(lambda u, s: u * s, updates, scales(params)), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def adamw(
    schedule: optax.Schedule,
    *,
    depths: Sequence[int],
    weight_decay: float,
    decayed: Mask = decay_mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    layer_decay: float | None = None,
    layer_decay_grouping: LayerDecayGrouping = "group",
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW with the paper's decay mask and layer-wise decay (tables 5 and 6 of the paper).

    As in PyTorch's AdamW the weight decay is multiplied by the learning rate, the layer's factor
    included, and not by the adaptive step.

    Args:
      schedule: learning rate by step.
      depths: blocks per stage of the model, for the layer ids.
      weight_decay: λ.
      decayed: from the parameters to which of them decay.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      layer_decay: ratio of learning rates between neighbouring layers; None for none.
      layer_decay_grouping: see `layer_id`.
      clip_norm: bound on the gradient's global norm; None, as in the paper, for none.

    Returns:
      The optax transformation.

    Raises:
      UserError: for a value outside its range.
    """
    return optax.chain(
        *_clipping(clip_norm),
        scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        *_layer_decay(layer_decay, layer_decay_grouping, depths),
        optax.scale_by_learning_rate(schedule),
    )


def lamb(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    decayed: Mask = decay_mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    clip_norm: float | None = 1.0,
    always_adapt: bool = False,
) -> optax.GradientTransformation:
    """LAMB (arXiv 1904.00962) as timm has it, which trained "ResNet strikes back" (2110.00476).

    AdamW's step with the weight decay inside it, then scaled, tensor by tensor, by the ratio of the
    parameter's norm to the step's; by 1 where either is 0.

    Args:
      schedule: learning rate by step.
      weight_decay: λ.
      decayed: from the parameters to which of them decay.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      clip_norm: bound on the gradient's global norm, 1 in timm; None for none.
      always_adapt: scale the step of the tensors that do not decay, too. Without it they take
        Adam's own step.

    Returns:
      The optax transformation.

    Raises:
      UserError: for a value outside its range.
    """

    def adapted(params: PyTree) -> PyTree:
        if always_adapt:
            return all_mask(params)
        return jax.tree.map(lambda decays: decays and weight_decay != 0, decayed(params))

    return optax.chain(
        *_clipping(clip_norm),
        scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.masked(optax.scale_by_trust_ratio(), adapted),
        optax.scale_by_learning_rate(schedule),
    )


def sgd(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    decayed: Mask = all_mask,
    momentum: float = 0.9,
    nesterov: bool = False,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """SGD as in PyTorch, and as ResNets were trained: the weight decay is part of the gradient.

    Args:
      schedule: learning rate by step.
      weight_decay: λ, of an L2 penalty λ/2 ‖w‖².
      decayed: from the parameters to which of them decay; all of them in torchvision's reference.
      momentum: decay of the sum of past gradients; 0 for none.
      nesterov: look ahead by the momentum.
      clip_norm: bound on the gradient's global norm; None for none.

    Returns:
      The optax transformation.

    Raises:
      UserError: for a value outside its range.
    """
    return optax.chain(
        *_clipping(clip_norm),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.trace(decay=momentum, nesterov=nesterov),
        optax.scale_by_learning_rate(schedule),
    )


def _clipping(clip_norm: float | None) -> list[optax.GradientTransformation]:
    _check_positive("clip_norm", clip_norm)
    return [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]


def _layer_decay(
    decay: float | None, grouping: LayerDecayGrouping, depths: Sequence[int]
) -> list[optax.GradientTransformation]:
    _check_positive("layer_decay", decay)
    if decay is None:
        return []
    return [scale_by_tree(lambda params: layer_scales(params, depths, decay, grouping))]


def _check_positive(field: str, value: float | None) -> None:
    if value is not None and not (0 < value < math.inf):
        raise UserError(f"config.optim.{field} is {value}; it must be positive, or None for none")


def update_ema(ema: PyTree, params: PyTree, decay: float) -> PyTree:
    """One step of the parameters' exponential moving average, at a constant decay.

    It starts from the initial parameters and is taken right after each optimizer step (section D of
    the recipe: no warm-up of the decay, no bias correction).

    Args:
      ema: the average, float32 arrays.
      params: the new parameters, same structure and shapes.
      decay: weight of the old average.

    Returns:
      The new average.
    """
    return jax.tree.map(lambda e, p: e * decay + p * (1.0 - decay), ema, params)
