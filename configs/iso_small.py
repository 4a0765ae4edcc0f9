"""Isotropic ConvNeXt-S on ImageNet-1K at 224 pixels, 300 epochs, from scratch.

    python -m convnext_jax.train --config configs/iso_small.py --workdir runs/iso_small

Meant for a TPU slice of 64 chips (64 images a chip); on fewer, raise
config.optim.accumulation_steps so that batch_size stays 4096. Expected top-1: 79.7 % with the whole
recipe (paper, table 2).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """Paper, table 5; the isotropic models warm up for 50 epochs."""
    return recipes.imagenet_1k("convnext_iso_small", drop_path_rate=0.1, warmup="50 epochs")
