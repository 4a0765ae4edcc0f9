"""Swin-S on ImageNet-1K at 224 pixels, 300 epochs, from scratch.

    python -m convnext_jax.train --config configs/swin_small.py --workdir runs/swin_small

Meant for a TPU slice of 16 chips (64 images a chip). Expected top-1: 83.0 % (Swin, table 1).
"""

from ml_collections import ConfigDict

from convnext_jax import comparison_recipes


def get_config() -> ConfigDict:
    """Swin, appendix A2.1, and the authors' config files."""
    return comparison_recipes.swin("swin_small", drop_path_rate=0.3)
