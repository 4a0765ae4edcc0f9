"""The training step of a config, and the batches that devices can share."""

from collections.abc import Callable

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from convnext_jax.errors import UserError
from convnext_jax.experiment.augmentation import build_augmentation, build_mixing
from convnext_jax.experiment.optimization import build_loss
from convnext_jax.models.registry import Network
from convnext_jax.training.state import TrainState
from convnext_jax.training.step import Batch, Metrics, make_train_step


def build_train_step(
    config: ConfigDict,
    model: Network,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The training step of a config: what `train.py` runs, and `plan.py` compiles.

    Raises:
      UserError: as `build_mixing`, `build_augmentation` and `build_loss`.
    """
    return make_train_step(
        model,
        optimizer,
        schedule,
        num_classes=model.num_classes,
        mix_config=build_mixing(config),
        seed=config.seed,
        loss_function=build_loss(config),
        ema_decay=config.ema_decay,
        accumulation_steps=config.optim.accumulation_steps,
        augment_config=build_augmentation(config),
        mesh=mesh,
    )


def check_batch_sizes(config: ConfigDict, devices: int) -> None:
    """Holds both batch sizes to the number of devices.

    Raises:
      UserError: if a batch can't be cut into equal parts, or micro-batches.
    """
    if config.optim.accumulation_steps < 1:
        raise UserError(
            f"config.optim.accumulation_steps = {config.optim.accumulation_steps}; it must be 1 or "
            "more"
        )
    for field, parts, what in (
        ("batch_size", devices, f"{devices} devices"),
        ("eval_batch_size", devices, f"{devices} devices"),
        (
            "batch_size",
            devices * config.optim.accumulation_steps,
            f"{devices} devices × {config.optim.accumulation_steps} micro-batches",
        ),
    ):
        if config[field] < 1 or config[field] % parts:
            raise UserError(
                f"config.{field} = {config[field]} can't be divided evenly among {what}; "
                f"give a multiple of {parts}"
            )
    for field, other in (("on_nonfinite", "skip"), ("on_save_failure", "continue")):
        if config[field] not in ("stop", other):
            raise UserError(f'config.{field} is {config[field]!r}; it must be "stop" or "{other}"')
