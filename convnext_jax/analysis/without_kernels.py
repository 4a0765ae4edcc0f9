"""Networks as XLA alone computes them, for estimates."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import flax.linen as nn

Model = TypeVar("Model", bound=nn.Module)

_CHOICES = ("depthwise", "mlp")


def without_kernels(model: Model) -> Model:
    """Takes XLA's operations where "auto" might choose Pallas kernels.

    The TPU compiler estimates no time for a kernel. What it says of XLA's operations is more than
    the kernels take, of time and of memory (benchmarks/README.md).

    Args:
      model: any network.

    Returns:
      The same network, with "xla" for each of its implementations that is "auto".
    """
    fields = {field.name for field in dataclasses.fields(model)}
    automatic = [name for name in _CHOICES if name in fields and getattr(model, name) == "auto"]
    choices: dict[str, Any] = dict.fromkeys(automatic, "xla")
    return model.clone(**choices) if choices else model
