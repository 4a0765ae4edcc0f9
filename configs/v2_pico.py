"""ConvNeXt V2-Pico fine-tuned on ImageNet-1K at 224 pixels from FCMAE weights, 600 epochs.

    python -m convnext_jax.train --config configs/v2_pico.py --workdir runs/v2_pico \
        --config.init_from=CHECKPOINT

Meant for a TPU slice of 16 chips. Expected top-1: 80.3 % (the published model of this size).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """ConvNeXt V2, appendix A."""
    return recipes.v2_finetune_small("convnextv2_pico")
