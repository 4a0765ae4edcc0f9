"""ResNet-50 on ImageNet-1K by procedure A3 of "ResNet strikes back", 100 epochs, from scratch.

    python -m convnext_jax.train --config configs/resnet50_a3.py --workdir runs/resnet50_a3

Meant for a TPU slice of 16 chips (128 images a chip). Expected top-1: 78.1 % at 224 pixels (ResNet
strikes back); it trains at 160.
"""

from ml_collections import ConfigDict

from convnext_jax import comparison_recipes


def get_config() -> ConfigDict:
    """Table 2 of arXiv 2110.00476; docs/recipes.md says where this differs."""
    return comparison_recipes.strikes_back("a3", "resnet50")
