"""A config file for tests: the digits' recipe on a model that compiles in seconds.

All that a step can do is on, mixup, cutmix, stochastic depth and the average, and every step is
logged.
"""

from ml_collections import ConfigDict

from convnext_jax import recipes


def get_config() -> ConfigDict:
    config = recipes.base()
    config.batch_size = 32
    config.eval_batch_size = 200
    config.total = "40 steps"
    config.ema_decay = 0.9

    config.model.name = "convnext_atto"
    config.model.dtype = "float32"
    config.model.drop_path_rate = 0.2
    config.model.overrides = {"depths": (1, 1), "dims": (8, 16), "patch_size": 1}

    config.data.name = "digits"
    config.data.image_size = 8
    config.data.workers = 0

    config.augment.crop = "pad"
    config.augment.crop_padding = 1
    config.augment.flip = 0.0

    config.optim.warmup = "4 steps"
    config.mix.group_size = 8

    config.log_every = "1 step"
    config.eval_every = "10 steps"
    config.checkpoint_every = "10 steps"
    return config
