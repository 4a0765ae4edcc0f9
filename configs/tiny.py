"""ConvNeXt-T on ImageNet-1K at 224 pixels, 300 epochs, from scratch.

    python -m convnext_jax.train --config configs/tiny.py --workdir runs/tiny

Meant for a TPU slice of 64 chips (64 images a chip); on fewer, raise
config.optim.accumulation_steps so that batch_size stays 4096. Expected top-1: 82.1 % with the whole
recipe (paper, table 1).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """Paper, table 5."""
    return recipes.imagenet_1k("convnext_tiny", drop_path_rate=0.1)
