"""A run's durations in steps."""

from typing import NamedTuple

from ml_collections import ConfigDict

from convnext_jax.errors import UserError
from convnext_jax.training.durations import to_steps


class Durations(NamedTuple):
    """A run's durations in optimizer steps."""

    steps_per_epoch: int
    total: int
    warmup: int
    log_every: int
    eval_every: int
    checkpoint_every: int


def durations(config: ConfigDict, num_examples: int) -> Durations:
    """Converts a config's durations to steps, given the size of the training set.

    Raises:
      UserError: if a duration is malformed, the set smaller than a batch, or the warm-up too long.
    """
    if not 0 < config.batch_size <= num_examples:
        raise UserError(
            f"config.batch_size = {config.batch_size}, but the training set has {num_examples} "
            "images; a batch must hold between 1 and that many"
        )
    steps_per_epoch = num_examples // config.batch_size

    def steps(duration: str, field: str) -> int:
        return to_steps(
            duration, steps_per_epoch=steps_per_epoch, batch_size=config.batch_size, field=field
        )

    result = Durations(
        steps_per_epoch=steps_per_epoch,
        total=steps(config.total, "total"),
        warmup=steps(config.optim.warmup, "optim.warmup"),
        log_every=steps(config.log_every, "log_every"),
        eval_every=steps(config.eval_every, "eval_every"),
        checkpoint_every=steps(config.checkpoint_every, "checkpoint_every"),
    )
    if result.warmup >= result.total:
        raise UserError(
            f"config.optim.warmup is {config.optim.warmup!r}, {result.warmup} steps, and "
            f"config.total {config.total!r}, {result.total} steps; the warm-up must be the shorter"
        )
    for field in ("log_every", "eval_every", "checkpoint_every"):
        if getattr(result, field) == 0:
            raise UserError(f"config.{field} is {config[field]!r}; it must be more than 0")
    return result
