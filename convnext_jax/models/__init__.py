"""The networks as Flax Linen modules; nothing here imports the rest of the project."""

from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import create_model, list_models

__all__ = ["ConvNeXt", "create_model", "list_models"]
