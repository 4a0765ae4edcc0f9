"""ConvNeXt-B on ImageNet-1K at 224 pixels, 300 epochs, from scratch.

    python -m convnext_jax.train --config configs/base.py --workdir runs/base

Meant for a TPU slice of 128 chips (32 images a chip); on fewer, raise
config.optim.accumulation_steps so that batch_size stays 4096. Expected top-1: 83.8 % with the whole
recipe (paper, table 1).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """Paper, table 5."""
    return recipes.imagenet_1k("convnext_base", drop_path_rate=0.5)
