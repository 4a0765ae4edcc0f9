"""The recipes of the networks that ConvNeXt is compared with, and of the road that leads to it.

Where each figure comes from, and where these differ from the originals: docs/recipes.md.
"""

from ml_collections import ConfigDict

from convnext_jax import recipes
from convnext_jax.errors import UserError
from convnext_jax.models.roadmap_steps import ROADS, STEPS


def resnet_original(model: str) -> ConfigDict:
    """The ResNets' own recipe, as torchvision's reference has it: SGD, 90 epochs, three rates.

    Its learning rate is .1 per 256 images (arXiv 1706.02677). Batch norms saw the 32 images of one
    GPU, which 8 devices give here.

    Args:
      model: a name of the registry, of a network with batch norm.
    """
    config = recipes.base()
    config.model.name = model
    config.model.batch_norm = "per_device"
    config.batch_size = 256
    config.eval_batch_size = 256
    config.total = "90 epochs"
    config.augment.interpolation = "bilinear"
    config.augment.policy = ""
    config.augment.erasing_prob = 0.0
    config.mix.mixup_alpha = 0.0
    config.mix.cutmix_alpha = 0.0
    config.mix.label_smoothing = 0.0
    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.learning_rate = 0.1
    config.optim.min_learning_rate = 0.0
    config.optim.schedule = "step"
    config.optim.decay_rate = 0.1
    config.optim.decay_every = "30 epochs"
    config.optim.warmup = "0 epochs"
    config.optim.weight_decay = 1e-4
    config.optim.decayed = "all"
    return config


def roadmap_modern(model: str, *, drop_path_rate: float) -> ConfigDict:
    """The modern recipe on the road from ResNet: table 5 without the average (appendix A.1).

    The average is off, since it hurt the networks with batch norm.

    Args:
      model: a name of the registry.
      drop_path_rate: of table 5, by the regime: .1 as ConvNeXt-T, .5 as ConvNeXt-B.
    """
    config = recipes.imagenet_1k(model, drop_path_rate=drop_path_rate)
    config.ema_decay = None
    return config


def roadmap(step: str) -> ConfigDict:
    """The recipe of a step from ResNet to ConvNeXt: ResNet's own for the first, then the modern.

    Args:
      step: road and name, "t/07_dw_first".

    Raises:
      UserError: if there is no such step; it lists them all.
    """
    road, _, name = step.partition("/")
    names = [known.name for known in STEPS]
    if road not in ROADS or name not in names:
        what = f"the roadmap has no step {step!r}" if step else "a step of the roadmap is needed"
        raise UserError(
            f"{what}; give configs/roadmap.py:ROAD/STEP, the road t (ResNet-50 to ConvNeXt-T) or b "
            f"(ResNet-200 to ConvNeXt-B), the step one of {', '.join(names)}"
        )
    if name == names[0]:
        return resnet_original(f"roadmap_{step}")
    return roadmap_modern(f"roadmap_{step}", drop_path_rate={"t": 0.1, "b": 0.5}[road])


# "ResNet strikes back" (arXiv 2110.00476), table 2: where the three procedures differ.
_STRIKES_BACK = {
    "a1": {
        "total": "600 epochs",
        "batch_size": 2016,
        "eval_batch_size": 2016,
        "data.repeats": 3,
        "data.image_size": 224,
        "model.drop_path_rate": 0.05,
        "augment.policy": "rand-m7-mstd0.5-inc1",
        "mix.mixup_alpha": 0.2,
        "mix.label_smoothing": 0.1,
        "mix.group_size": 504,
        "optim.learning_rate": 5e-3,
        "optim.weight_decay": 0.01,
    },
    "a2": {
        "total": "300 epochs",
        "batch_size": 2016,
        "eval_batch_size": 2016,
        "data.repeats": 3,
        "data.image_size": 224,
        "model.drop_path_rate": 0.05,
        "augment.policy": "rand-m7-mstd0.5-inc1",
        "mix.mixup_alpha": 0.1,
        "mix.label_smoothing": 0.0,
        "mix.group_size": 504,
        "optim.learning_rate": 5e-3,
        "optim.weight_decay": 0.02,
    },
    "a3": {
        "total": "100 epochs",
        "batch_size": 2048,
        "eval_batch_size": 2048,
        "data.repeats": 1,
        "data.image_size": 160,
        "model.drop_path_rate": 0.0,
        "augment.policy": "rand-m6-mstd0.5-inc1",
        "mix.mixup_alpha": 0.1,
        "mix.label_smoothing": 0.0,
        "mix.group_size": 512,
        "optim.learning_rate": 8e-3,
        "optim.weight_decay": 0.02,
    },
}


def strikes_back(procedure: str, model: str) -> ConfigDict:
    """A procedure of "ResNet strikes back": LAMB, and both classes of a mixed image wholly there.

    The batch is 2048 images there. With three copies of each image it is 2016 here, 672 images,
    since 3 does not divide 2048. The groups under one λ are the parts of four GPUs.

    Args:
      procedure: "a1", "a2" or "a3" (table 2 of arXiv 2110.00476).
      model: a name of the registry, of a ResNet.

    Raises:
      UserError: for another procedure.
    """
    if procedure not in _STRIKES_BACK:
        raise UserError(f"there is no procedure {procedure!r}; it must be a1, a2 or a3")
    config = recipes.base()
    config.update_from_flattened_dict(_STRIKES_BACK[procedure])
    config.model.name = model
    config.model.overrides = {"zero_init_residual": True}  # timm's ResNets start so
    config.data.eval_image_size = 224
    config.augment.eval_crop_ratio = 0.95
    config.augment.erasing_prob = 0.0
    config.mix.cutmix_alpha = 1.0
    config.loss.name = "binary_cross_entropy"
    config.loss.target_threshold = 0.2
    config.optim.name = "lamb"
    config.optim.warmup = "5 epochs"
    config.optim.eps = 1e-6
    config.optim.clip_norm = 1.0  # timm's LAMB clips; the paper's table counts it as none
    return config


def swin(model: str, *, drop_path_rate: float) -> ConfigDict:
    """Swin's own training on ImageNet-1K, 300 epochs (arXiv 2103.14030, appendix A2.1).

    The modern recipe is close to it: ConvNeXt's has a batch four times as large, with the learning
    rate in proportion, a lower last rate, no clipping, and the average.

    Args:
      model: a name of the registry.
      drop_path_rate: .2, .3 and .5 for Swin-T, S and B.
    """
    config = recipes.base()
    config.model.name = model
    config.model.drop_path_rate = drop_path_rate
    config.batch_size = 1024
    config.eval_batch_size = 1024
    config.optim.learning_rate = 1e-3
    config.optim.min_learning_rate = 1e-5
    config.optim.clip_norm = 5.0
    return config
