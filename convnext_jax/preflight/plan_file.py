"""What `python -m convnext_jax.plan --json` expects the chips to take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from convnext_jax.errors import UserError
from convnext_jax.preflight.examination import Finding, Status


def images_per_second(path: Path | None, config: ConfigDict) -> Finding[float | None]:
    """Reads a plan, and holds it to the run.

    Args:
      path: of the file, or None where there is no plan.
      config: of the run.

    Returns:
      Images a second that the devices of this process will take, by the compiler's estimate; None
      without a plan.

    Raises:
      UserError: if there is no such file, it is no plan, or that of other chips.
    """
    if path is None:
        return Finding("none given, so the pace of decoding is held to nothing (--plan FILE)", None)
    try:
        plan = _of_these_devices(json.loads(path.read_text()), path)
        chips, rate = int(plan["chips"]), plan["images_per_second"]
        name = f"{plan['model']} on {plan['topology']}"
        planned = {
            "config.model.name": plan["model"],
            "config.batch_size": plan["batch_size"],
            "config.data.image_size": plan["image_size"],
            "config.optim.accumulation_steps": plan["accumulation_steps"],
            "the number of devices": chips,
        }
    except FileNotFoundError:
        raise UserError(f"there is no plan {path}; write one by `plan --json {path}`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is no plan ({type(error).__name__}: {error}); write one by `python -m "
            f"convnext_jax.plan --json {path}`"
        ) from error
    if rate is None:
        raise UserError(f"the plan {path} says that {name} does not fit; see what would help there")
    mine = {
        "config.model.name": config.model.name,
        "config.batch_size": config.batch_size,
        "config.data.image_size": config.data.image_size,
        "config.optim.accumulation_steps": config.optim.accumulation_steps,
        "the number of devices": jax.device_count(),
    }
    detail = f"{rate:,.0f} images/s a chip of {name}, by the compiler's estimate"
    wanted = rate * jax.local_device_count()
    other = [
        f"{key} is {mine[key]}, there {planned[key]}" for key in mine if mine[key] != planned[key]
    ]
    if other:
        return Finding(
            f"{detail}; but {', '.join(other)}",
            wanted,
            Status.WARNING,
            "write the plan of this very run, or take its pace for what it is",
        )
    return Finding(detail, wanted)


def _of_these_devices(plans: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """The only plan, or the only one for so many chips."""
    if len(plans) == 1:
        return plans[0]
    fitting = [plan for plan in plans if plan["chips"] == jax.device_count()]
    if len(fitting) != 1:
        raise UserError(
            f"{path} holds {len(plans)} plans, {len(fitting)} of them for {jax.device_count()} "
            "chips; give the plan of one topology"
        )
    return fitting[0]
