"""The networks as Flax Linen modules; nothing here imports the rest of the project."""

from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import create_model, list_models
from convnext_jax.models.roadmap import ModernizedResNet
from convnext_jax.models.swin import SwinTransformer

__all__ = ["ConvNeXt", "ModernizedResNet", "SwinTransformer", "create_model", "list_models"]
