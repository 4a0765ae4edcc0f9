"""ConvNeXt-L on ImageNet-1K at 224 pixels, 300 epochs, from scratch.

    python -m convnext_jax.train --config configs/large.py --workdir runs/large

Meant for a TPU slice of 256 chips (16 images a chip); on fewer, raise
config.optim.accumulation_steps so that batch_size stays 4096. Expected top-1: 84.3 % with the whole
recipe (paper, table 1).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """Paper, table 5."""
    return recipes.imagenet_1k("convnext_large", drop_path_rate=0.5, mix_group_size=64)
