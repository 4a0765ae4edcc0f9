"""ResNet-50 on ImageNet-1K at 224 pixels by its original recipe, 90 epochs, from scratch.

    python -m convnext_jax.train --config configs/resnet50.py --workdir runs/resnet50

Meant for a TPU slice of 8 chips (32 images a chip); each chip's batch norms see its own 32 images,
as on torchvision's 8 GPUs. Expected top-1: 76.1 % (torchvision, 76.130; the ConvNeXt paper's own
baseline).
"""

from ml_collections import ConfigDict

from convnext_jax import comparison_recipes


def get_config() -> ConfigDict:
    """Torchvision's reference for its first ResNet weights."""
    return comparison_recipes.resnet_original("resnet50")
