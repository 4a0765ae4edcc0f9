"""Isotropic ConvNeXt-L on ImageNet-1K at 224 pixels, 300 epochs, from scratch.

    python -m convnext_jax.train --config configs/iso_large.py --workdir runs/iso_large

Meant for a TPU slice of 256 chips (16 images a chip); on fewer, raise
config.optim.accumulation_steps so that batch_size stays 4096. Expected top-1: 82.6 % with the whole
recipe (paper, table 2). It alone of the three isotropic models has layer scale.
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """Paper, table 5; the isotropic models warm up for 50 epochs."""
    return recipes.imagenet_1k(
        "convnext_iso_large", drop_path_rate=0.5, warmup="50 epochs", mix_group_size=64
    )
