"""ConvNeXt-B fine-tuned from 224 to 384 pixels on ImageNet-1K, 30 epochs.

    python -m convnext_jax.train --config configs/base_384.py --workdir runs/base_384 \
        --config.init_from=runs/base

Meant for a TPU slice of 32 chips (16 images a chip). Expected top-1: 85.1 % (paper, table 1), from
the authors' weights of 224 pixels.
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """Paper, table 6."""
    return recipes.finetune("convnext_base", image_size=384, drop_path_rate=0.8, layer_decay=0.7)
