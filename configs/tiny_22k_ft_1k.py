"""ConvNeXt-T fine-tuned from ImageNet-22K to ImageNet-1K, at 224 or 384 pixels, 30 epochs.

    python -m convnext_jax.train --config configs/tiny_22k_ft_1k.py:384 \
        --workdir runs/tiny_22k_ft_384 --config.init_from=runs/tiny_22k

Meant for a TPU slice of 16 chips at 224 pixels, of 32 at 384. Expected top-1: 82.9 % at 224 pixels,
84.1 % at 384, from the authors' 22K weights (the authors' README).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config(image_size: str = "224") -> ConfigDict:
    """Paper, table 6; `image_size` in pixels is what follows the colon."""
    return recipes.finetune(
        "convnext_tiny", image_size=int(image_size), drop_path_rate=0.0, layer_decay=0.8
    )
