"""ConvNeXt V2-Tiny fine-tuned on ImageNet-1K at 224 pixels from FCMAE weights, 300 epochs.

    python -m convnext_jax.train --config configs/v2_tiny.py --workdir runs/v2_tiny \
        --config.init_from=CHECKPOINT

Meant for a TPU slice of 32 chips (32 images a chip). Expected top-1: 83.0 % from the authors' FCMAE
weights (README of ConvNeXt V2).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """ConvNeXt V2, appendix A."""
    return recipes.v2_finetune(
        "convnextv2_tiny",
        base_learning_rate=8e-4,
        epochs=300,
        warmup_epochs=40,
        layer_decay=0.9,
        layer_decay_grouping="single",
        drop_path_rate=0.2,
    )
