"""The recipes that the files in configs/ are composed from; `base()` lists every field.

A config file names a recipe, then says what is its own. Figures: the ConvNeXt paper, tables 5 and 6
(arXiv 2201.03545, appendix A); ConvNeXt V2, appendix A (arXiv 2301.00808) and the authors'
commands. Those of the networks that ConvNeXt is compared with
are in `comparison_recipes.py`.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def base() -> ConfigDict:
    """Every field that a run has, with the values that all of the paper's ImageNet runs share.

    Returns:
      A ConfigDict of fixed fields; a value of None has a type nevertheless, so that the command
      line can set it.
    """
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 4096  # global, over all devices
    config.total = "300 epochs"  # durations: "… epochs", "… steps" or "… examples"
    config.ema_decay = placeholder(float)
    # Weights to start from: a run, a conversion, or a file of others; "" must be replaced by some.
    config.init_from = placeholder(str)
    config.on_nonfinite = "stop"  # or "skip": leave such steps out, and count them
    # Stop where the loss stays above this times its running average for so many steps; None: never.
    config.spike_factor = placeholder(float)
    config.spike_steps = 20
    config.on_save_failure = "stop"  # or "continue": try again at the next checkpoint

    config.model = ConfigDict()
    config.model.name = "convnext_tiny"
    config.model.num_classes = placeholder(int)  # the data set's own, where not given
    config.model.drop_path_rate = 0.0
    config.model.head_init_scale = 1.0
    config.model.dtype = "bfloat16"
    # Keep less of each block for the backward pass: False, True for its input alone, or a policy,
    # "depthwise" or "products".
    config.model.remat = FieldReference(False, field_type=object)
    config.model.scan_blocks = False
    # Over whose images batch norms, where the model has any, take their statistics: "global" or
    # "per_device".
    config.model.batch_norm = "global"
    config.model.overrides = ConfigDict()  # further arguments of the network

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # any TFDS name, "folder" or "digits"
    config.data.data_dir = placeholder(str)
    config.data.train_split = "train"
    config.data.eval_split = "validation"  # "" for none
    config.data.validation_fraction = 0.1  # of an image folder without one
    config.data.image_size = 224
    config.data.eval_image_size = placeholder(int)  # None: image_size
    config.data.workers = placeholder(int)  # processes; None: by the cores, 0: threads in this one
    config.data.decoder = "pillow"  # the reference's pixels; "fast": one value in 300 is off by one
    config.data.repeats = 1  # rows of a batch that show one image (repeated augmentation)
    config.data.on_bad_image = "skip"  # or "stop"

    config.augment = ConfigDict()
    config.augment.crop = "random_resized"  # or "pad", for small images
    config.augment.crop_scale = (0.08, 1.0)
    config.augment.crop_padding = 4
    config.augment.flip = 0.5
    config.augment.interpolation = "bicubic"
    config.augment.eval_crop_ratio = 0.875
    config.augment.mean = (0.485, 0.456, 0.406)
    config.augment.std = (0.229, 0.224, 0.225)
    # On the accelerators. RandAugment in timm's notation, "ta_wide", "3-augment", or "" for none.
    config.augment.policy = "rand-m9-mstd0.5-inc1"
    config.augment.policy_interpolation = "bicubic"  # or "bilinear"
    config.augment.color_jitter = 0.0  # after the policy: by how much factors differ from 1
    config.augment.erasing_prob = 0.25
    config.augment.erasing_mode = "pixel"  # what fills the box; or "rand" or "const"

    config.mix = ConfigDict()
    config.mix.mixup_alpha = 0.8
    config.mix.cutmix_alpha = 1.0
    config.mix.prob = 1.0
    config.mix.switch_prob = 0.5
    config.mix.label_smoothing = 0.1
    config.mix.group_size = 128  # images under one λ: the batch of one GPU in the reference
    config.mix.per_element = False  # a λ for each image

    config.loss = ConfigDict()
    config.loss.name = "cross_entropy"  # or "binary_cross_entropy"
    # Of binary cross entropy: targets above it are trained towards 1, others towards 0.
    config.loss.target_threshold = placeholder(float)
    config.loss.sum_classes = False  # of binary cross entropy: the sum over classes, not the mean

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # or "lamb" or "sgd"
    config.optim.learning_rate = 4e-3
    config.optim.min_learning_rate = 1e-6
    config.optim.schedule = "cosine"  # or "step"
    config.optim.warmup = "20 epochs"
    config.optim.decay_rate = 0.1  # of the schedule "step": factor on the learning rate
    config.optim.decay_every = "30 epochs"  # of the schedule "step", from the warm-up's end
    config.optim.weight_decay = 0.05
    config.optim.decayed = "kernels"  # or "all": biases and norms too
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.momentum = 0.9  # of "sgd"
    config.optim.nesterov = False  # of "sgd"
    config.optim.layer_decay = placeholder(float)
    config.optim.layer_decay_grouping = "group"
    config.optim.clip_norm = placeholder(float)
    config.optim.accumulation_steps = 1

    config.mesh = ConfigDict()
    config.mesh.data = -1  # all devices that fsdp leaves
    config.mesh.fsdp = 1

    config.eval_batch_size = 2048
    config.eval_every = "1 epoch"
    config.log_every = "50 steps"
    config.checkpoint_every = "1 epoch"
    config.checkpoints_kept = 3  # the newest; the best one is kept besides
    return config.lock()


def imagenet_1k(
    model: str, *, drop_path_rate: float, warmup: str = "20 epochs", mix_group_size: int = 128
) -> ConfigDict:
    """Training on ImageNet-1K from scratch, 300 epochs (paper, table 5)."""
    config = base()
    config.model.name = model
    config.model.drop_path_rate = drop_path_rate
    config.optim.warmup = warmup
    config.mix.group_size = mix_group_size
    config.ema_decay = 0.9999
    return config


def imagenet_22k(model: str, *, drop_path_rate: float) -> ConfigDict:
    """Pre-training on ImageNet-22K, 90 epochs, no average, no evaluation (paper, table 5)."""
    config = base()
    config.model.name = model
    config.model.num_classes = 21841
    config.model.drop_path_rate = drop_path_rate
    config.data.name = "imagenet21k"
    config.data.eval_split = ""
    config.total = "90 epochs"
    config.optim.warmup = "5 epochs"
    config.mix.group_size = 32  # 16 nodes of 8 GPUs
    return config


def finetune(
    model: str, *, image_size: int, drop_path_rate: float, layer_decay: float
) -> ConfigDict:
    """Fine-tuning on ImageNet-1K, 30 epochs (paper, table 6).

    From 22K weights layer decay is .8; from 1K weights, to 384 pixels, .7.
    """
    config = base()
    config.init_from = ""
    config.model.name = model
    config.model.drop_path_rate = drop_path_rate
    config.model.head_init_scale = 0.001
    config.data.image_size = image_size
    config.batch_size = 512
    config.eval_batch_size = 512
    config.total = "30 epochs"
    config.optim.learning_rate = 5e-5
    config.optim.warmup = "0 epochs"
    config.optim.weight_decay = 1e-8
    config.optim.layer_decay = layer_decay
    config.mix.mixup_alpha = 0.0
    config.mix.cutmix_alpha = 0.0
    config.mix.group_size = 32
    return config


def v2_finetune(
    model: str,
    *,
    base_learning_rate: float,
    epochs: int,
    warmup_epochs: int,
    layer_decay: float,
    layer_decay_grouping: str,
    drop_path_rate: float,
    image_size: int = 224,
) -> ConfigDict:
    """Fine-tuning ConvNeXt V2 on ImageNet-1K from FCMAE weights.

    Args:
      model: a name of the registry.
      base_learning_rate: per 256 images, as the authors give it.
      epochs: in all.
      warmup_epochs: of them.
      layer_decay: ratio of learning rates between neighbouring layers.
      layer_decay_grouping: "single" or "group".
      drop_path_rate: stochastic depth of the last block.
      image_size: in pixels.
    """
    config = base()
    config.init_from = ""
    config.model.name = model
    config.model.drop_path_rate = drop_path_rate
    config.model.head_init_scale = 0.001
    config.data.image_size = image_size
    config.batch_size = 1024
    config.eval_batch_size = 1024
    config.total = f"{epochs} epochs"
    config.optim.learning_rate = base_learning_rate * config.batch_size / 256
    config.optim.warmup = f"{warmup_epochs} epochs"
    config.optim.layer_decay = layer_decay
    config.optim.layer_decay_grouping = layer_decay_grouping
    config.ema_decay = 0.9999
    config.mix.group_size = 32
    return config


def v2_finetune_small(model: str) -> ConfigDict:
    """ConvNeXt V2 atto, femto, pico and nano: no mixing, more smoothing, much weight decay.

    The authors publish the command for atto; their table gives its learning rate, length and layer
    decay for all four.
    """
    config = v2_finetune(
        model,
        base_learning_rate=2e-4,
        epochs=600,
        warmup_epochs=0,
        layer_decay=0.9,
        layer_decay_grouping="single",
        drop_path_rate=0.1,
    )
    config.optim.weight_decay = 0.3
    config.mix.mixup_alpha = 0.0
    config.mix.cutmix_alpha = 0.0
    config.mix.label_smoothing = 0.2
    return config
