"""ResNet-50 on ImageNet-1K by procedure A1 of "ResNet strikes back", 600 epochs, from scratch.

    python -m convnext_jax.train --config configs/resnet50_a1.py --workdir runs/resnet50_a1

Meant for a TPU slice of 16 chips (126 images a chip). Expected top-1: 80.4 % at 224 pixels (ResNet
strikes back).
"""

from ml_collections import ConfigDict

from convnext_jax import comparison_recipes


def get_config() -> ConfigDict:
    """Table 2 of arXiv 2110.00476; docs/recipes.md says where this differs."""
    return comparison_recipes.strikes_back("a1", "resnet50")
