"""Durations as configs give them: a number and a unit, `"300 epochs"`, `"2e6 examples"`."""

from convnext_jax.errors import UserError

_UNITS = ("steps", "epochs", "examples")


def to_steps(duration: str, *, steps_per_epoch: int, batch_size: int, field: str) -> int:
    """Converts a duration to a whole number of optimizer steps, rounded to the nearest.

    Args:
      duration: `"<number> <unit>"`, the unit one of steps, epochs, examples (singular is fine).
      steps_per_epoch: optimizer steps in one epoch, N // batch_size.
      batch_size: global batch size, in images.
      field: the config field that holds it, named in errors.

    Returns:
      Steps, at least 1 unless the number is 0.

    Raises:
      UserError: if it is not of that form, is negative or not finite.
    """
    parts = str(duration).split()
    unit = parts[1].rstrip("s") + "s" if len(parts) == 2 else ""
    try:
        amount = float(parts[0])
    except (ValueError, IndexError):
        amount = -1.0
    if unit not in _UNITS or not 0 <= amount < float("inf"):
        raise UserError(
            f"config.{field} is {duration!r}; write a number and a unit, "
            'such as "300 epochs", "5000 steps" or "2e6 examples"'
        )
    per_unit = {"steps": 1.0, "epochs": steps_per_epoch, "examples": 1.0 / batch_size}[unit]
    return max(1, round(amount * per_unit)) if amount else 0
