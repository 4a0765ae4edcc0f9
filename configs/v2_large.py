"""ConvNeXt V2-Large fine-tuned on ImageNet-1K at 224 pixels from FCMAE weights, 100 epochs.

    python -m convnext_jax.train --config configs/v2_large.py --workdir runs/v2_large \
        --config.init_from=CHECKPOINT

Meant for a TPU slice of 64 chips (16 images a chip). Expected top-1: 85.8 % from the authors' FCMAE
weights (README of ConvNeXt V2).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """ConvNeXt V2, appendix A."""
    return recipes.v2_finetune(
        "convnextv2_large",
        base_learning_rate=6.25e-4,
        epochs=100,
        warmup_epochs=20,
        layer_decay=0.6,
        layer_decay_grouping="group",
        drop_path_rate=0.2,
    )
