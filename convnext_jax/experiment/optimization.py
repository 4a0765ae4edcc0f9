"""The optimizer, its schedule and the loss of a config."""

import functools
from typing import Any

import optax
from ml_collections import ConfigDict

from convnext_jax.errors import UserError
from convnext_jax.experiment.run_length import Durations
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import Network
from convnext_jax.training.durations import to_steps
from convnext_jax.training.losses import Loss, binary_cross_entropy, soft_target_cross_entropy
from convnext_jax.training.optim import adamw, all_mask, decay_mask, lamb, sgd
from convnext_jax.training.schedule import warmup_cosine, warmup_steps_down

_DECAYED = {"kernels": decay_mask, "all": all_mask}


def build_optimizer(
    config: ConfigDict, model: Network, steps: Durations
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a config, and the schedule inside it.

    Raises:
      UserError: for a value that does not exist, is out of range or does not go with the others.
    """
    fields = config.optim
    schedule = _build_schedule(config, steps)
    if fields.decayed not in _DECAYED:
        raise UserError(
            f"config.optim.decayed is {fields.decayed!r}; it must be one of {', '.join(_DECAYED)}"
        )
    if fields.layer_decay is not None and not (
        fields.name == "adamw" and isinstance(model, ConvNeXt)
    ):
        raise UserError(
            f"config.optim.layer_decay is {fields.layer_decay}, which goes with AdamW and a "
            f"ConvNeXt alone, not with {fields.name!r} and {config.model.name}; set it to None"
        )
    common: dict[str, Any] = {
        "weight_decay": fields.weight_decay,
        "decayed": _DECAYED[fields.decayed],
        "clip_norm": fields.clip_norm,
    }
    adaptive = {"b1": fields.b1, "b2": fields.b2, "eps": fields.eps}
    match fields.name:
        case "adamw":
            optimizer = adamw(
                schedule,
                depths=model.depths,
                layer_decay=fields.layer_decay,
                layer_decay_grouping=fields.layer_decay_grouping,
                **common,
                **adaptive,
            )
        case "lamb":
            optimizer = lamb(schedule, **common, **adaptive)
        case "sgd":
            optimizer = sgd(schedule, momentum=fields.momentum, nesterov=fields.nesterov, **common)
        case _:
            raise UserError(
                f'config.optim.name is {fields.name!r}; it must be "adamw", "lamb" or "sgd"'
            )
    return optimizer, schedule


def _build_schedule(config: ConfigDict, steps: Durations) -> optax.Schedule:
    fields = config.optim
    if fields.schedule == "cosine":
        return warmup_cosine(
            fields.learning_rate, fields.min_learning_rate, steps.warmup, steps.total
        )
    if fields.schedule != "step":
        raise UserError(
            f'config.optim.schedule is {fields.schedule!r}; it must be "cosine" or "step"'
        )
    decay_every = to_steps(
        fields.decay_every,
        steps_per_epoch=steps.steps_per_epoch,
        batch_size=config.batch_size,
        field="optim.decay_every",
    )
    if decay_every == 0:
        raise UserError(
            f"config.optim.decay_every is {fields.decay_every!r}; it must be more than 0"
        )
    return warmup_steps_down(
        fields.learning_rate,
        fields.min_learning_rate,
        steps.warmup,
        steps.total,
        decay_rate=fields.decay_rate,
        decay_every=decay_every,
    )


def build_loss(config: ConfigDict) -> Loss:
    """What the training step minimises.

    Raises:
      UserError: for an unknown loss, or a field that does not go with it.
    """
    fields = config.loss
    if fields.name == "binary_cross_entropy":
        return functools.partial(
            binary_cross_entropy,
            target_threshold=fields.target_threshold,
            smoothing=config.mix.label_smoothing,
            sum_classes=fields.sum_classes,
        )
    if fields.name != "cross_entropy":
        raise UserError(
            f'config.loss.name is {fields.name!r}; it must be "cross_entropy" or '
            '"binary_cross_entropy"'
        )
    for field, unset in (("target_threshold", None), ("sum_classes", False)):
        if fields[field] != unset:
            raise UserError(
                f"config.loss.{field} is {fields[field]}, which goes with "
                f'config.loss.name = "binary_cross_entropy" alone; set it to {unset}'
            )
    return soft_target_cross_entropy
