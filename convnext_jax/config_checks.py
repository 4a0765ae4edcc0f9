"""What is asked of a config: its fields, the bounds of its numbers, and which may change later."""

import difflib

from ml_collections import ConfigDict

from convnext_jax import recipes
from convnext_jax.errors import UserError

# Fields that a run may change between stops. Most decide when it speaks, what makes it stop and how
# fast it is; another mesh, rematerialisation and the loop over blocks compute the same but for
# rounding.
FREE_FIELDS = (
    *("log_every", "checkpoints_kept", "data.workers", "data.data_dir", "eval_batch_size"),
    *("mesh", "spike_factor", "spike_steps", "on_save_failure"),
    *("model.remat", "model.scan_blocks"),
)

# Bounds, both included, of numbers that would otherwise train on nonsense without a word.
BOUNDS = {
    "ema_decay": (0.0, 1.0),
    "spike_factor": (1.0, float("inf")),
    "spike_steps": (1, float("inf")),
    "optim.learning_rate": (0.0, float("inf")),
    "optim.min_learning_rate": (0.0, float("inf")),
    "optim.weight_decay": (0.0, float("inf")),
    "optim.decay_rate": (0.0, 1.0),
    "optim.momentum": (0.0, 1.0),
    "optim.b1": (0.0, 1.0),
    "optim.b2": (0.0, 1.0),
    "augment.flip": (0.0, 1.0),
    "augment.color_jitter": (0.0, 2.0),
    "augment.erasing_prob": (0.0, 1.0),
    "data.validation_fraction": (0.0, 1.0),
    "data.eval_image_size": (1, float("inf")),
    "loss.target_threshold": (0.0, 1.0),
    "mix.mixup_alpha": (0.0, float("inf")),
    "mix.cutmix_alpha": (0.0, float("inf")),
}


def check_values(config: ConfigDict) -> None:
    """Holds a config's numbers to their bounds.

    Args:
      config: one whose fields have been checked.

    Raises:
      UserError: for the first number out of bounds, or a mean or std that is not one per channel.
    """
    for name, (low, high) in BOUNDS.items():
        section, _, key = name.rpartition(".")
        value = (config[section] if section else config)[key]
        if value is not None and not low <= value <= high:
            wanted = f"{low:g} or more" if high == float("inf") else f"in [{low:g}, {high:g}]"
            raise UserError(f"config.{name} is {value}; it must be {wanted}")
    for key in ("mean", "std"):
        if len(config.augment[key]) != 3:
            raise UserError(
                f"config.augment.{key} is {tuple(config.augment[key])}; it must hold three, "
                "one per colour channel"
            )


def check_fields(config: ConfigDict) -> None:
    """Holds a config to the fields of `base()`.

    Args:
      config: what a config file returned.

    Raises:
      UserError: for the first field that has no meaning or that is missing; it names the nearest.
    """

    def check(given: ConfigDict, known: ConfigDict, prefix: str) -> None:
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.0)
                raise UserError(
                    f"{prefix}.{key} is not a field; the nearest are "
                    + ", ".join(f"{prefix}.{name}" for name in near)
                )
        for key in known:
            if key not in given:
                raise UserError(
                    f"{prefix}.{key} is missing; begin from convnext_jax.recipes.base()"
                )
            if isinstance(known[key], ConfigDict) and key != "overrides":
                if not isinstance(given[key], ConfigDict):
                    raise UserError(f"{prefix}.{key} is {given[key]!r}; it must be a ConfigDict")
                check(given[key], known[key], f"{prefix}.{key}")

    check(config, recipes.base(), "config")
