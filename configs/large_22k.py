"""ConvNeXt-L on ImageNet-22K at 224 pixels, 90 epochs: pre-training.

    python -m convnext_jax.train --config configs/large_22k.py --workdir runs/large_22k

Meant for a TPU slice of 128 chips (32 images a chip); the authors took 128 GPUs. The data set must
lie under the TFDS name imagenet21k, as ArrayRecord, with 21,841 classes. Nothing of it is held out;
expected top-1 on ImageNet-1K at 224 pixels, after configs/large_22k_ft_1k.py: 86.6 % (paper,
table 1).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """Paper, table 5."""
    return recipes.imagenet_22k("convnext_large", drop_path_rate=0.1)
