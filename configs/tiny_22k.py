"""ConvNeXt-T on ImageNet-22K at 224 pixels, 90 epochs: pre-training.

    python -m convnext_jax.train --config configs/tiny_22k.py --workdir runs/tiny_22k

Meant for a TPU slice of 128 chips (32 images a chip); the authors took 128 GPUs. The data set must
lie under the TFDS name imagenet21k, as ArrayRecord, with 21,841 classes. Nothing of it is held out;
expected top-1 on ImageNet-1K at 224 pixels, after configs/tiny_22k_ft_1k.py: 82.9 % (the authors'
README).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """Paper, table 5."""
    return recipes.imagenet_22k("convnext_tiny", drop_path_rate=0.0)
