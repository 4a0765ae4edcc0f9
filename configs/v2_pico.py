"""ConvNeXt V2-Pico fine-tuned on ImageNet-1K at 224 pixels from FCMAE weights, 600 epochs.

    python -m convnext_jax.train --config configs/v2_pico.py --workdir runs/v2_pico \
        --config.init_from=CHECKPOINT

Meant for a TPU slice of 16 chips (64 images a chip). Expected top-1: 80.3 % from the authors' FCMAE
weights (README of ConvNeXt V2).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """ConvNeXt V2, appendix A."""
    return recipes.v2_finetune_small("convnextv2_pico")
