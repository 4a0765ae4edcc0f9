"""ConvNeXt-B on ImageNet-22K at 224 pixels, 90 epochs: pre-training.

    python -m convnext_jax.train --config configs/base_22k.py --workdir runs/base_22k

Meant for a TPU slice of 128 chips or more; the authors took 128 GPUs. The data set must be prepared
as a TFDS ArrayRecord one of 21,841 classes. There is no held-out part: fine-tuned by
configs/base_22k_ft_1k.py the published weights give 85.8 % on ImageNet-1K at 224 pixels (paper,
table 1).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """Paper, table 5."""
    return recipes.imagenet_22k("convnext_base", drop_path_rate=0.1)
