"""The embedded handwritten digits: the newcomer's first run, the same way that ImageNet goes.

    python -m convnext_jax.train --config configs/digits.py --workdir runs/digits

Meant for any laptop: 1,438 images of 8 × 8 pixels to train on, 359 held out, some two minutes on
two cores. Expected top-1: 99 % or a little less (98 % at least; `tests/test_digits.py` holds it
to that).
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    """The paper's recipe, scaled down to small grey images that must not be flipped."""
    config = recipes.base()
    config.batch_size = 128
    config.eval_batch_size = 360
    config.total = "200 epochs"
    config.ema_decay = 0.99

    config.model.name = "convnext_atto"
    config.model.dtype = "float32"
    config.model.drop_path_rate = 0.1
    config.model.overrides = {
        "depths": (1, 1, 2, 1),
        "dims": (16, 32, 64, 128),
        "patch_size": 1,
    }

    config.data.name = "digits"
    config.data.image_size = 8
    config.data.workers = 0

    # Of eight pixels a side no crop may lose much, and a mirrored digit is none.
    config.augment.crop_scale = (0.4, 1.0)
    config.augment.eval_crop_ratio = 1.0
    config.augment.flip = 0.0
    config.augment.policy = ""
    config.augment.erasing_prob = 0.0
    config.augment.mean = (0.305, 0.305, 0.305)
    config.augment.std = (0.376, 0.376, 0.376)

    config.optim.warmup = "5 epochs"
    config.mix.mixup_alpha = 0.4
    config.mix.cutmix_alpha = 0.0  # a pasted box hides a stroke of so small an image
    config.mix.group_size = 32

    config.log_every = "10 epochs"
    config.eval_every = "20 epochs"
    config.checkpoint_every = "20 epochs"
    return config
