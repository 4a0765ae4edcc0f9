"""Activations by name."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from convnext_jax.models.gelu import gelu

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "gelu": gelu}
