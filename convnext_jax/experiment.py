"""From a config to the objects that it describes; programs and tests alike build them here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from convnext_jax.data.augment import AugmentConfig
from convnext_jax.data.erasing import MODES, ErasingConfig
from convnext_jax.data.geometry_ops import INTERPOLATIONS
from convnext_jax.data.mixing import MixConfig
from convnext_jax.data.policies import (
    ColorJitter,
    Policy,
    PolicySequence,
    TrivialAugmentWide,
    parse_policy,
)
from convnext_jax.data.sources import Source, open_source
from convnext_jax.data.transforms import (
    EvalTransform,
    PadCropTrainTransform,
    ResizeEvalTransform,
    TrainTransform,
)
from convnext_jax.errors import UserError
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import create_model
from convnext_jax.training.durations import to_steps
from convnext_jax.training.optim import adamw
from convnext_jax.training.schedule import warmup_cosine
from convnext_jax.training.state import TrainState
from convnext_jax.training.step import Batch, Metrics, make_train_step

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Durations(NamedTuple):
    """A run's durations in optimizer steps."""

    steps_per_epoch: int
    total: int
    warmup: int
    log_every: int
    eval_every: int
    checkpoint_every: int


def durations(config: ConfigDict, num_examples: int) -> Durations:
    """Converts a config's durations to steps, given the size of the training set.

    Raises:
      UserError: if a duration is malformed, the set smaller than a batch, or the warm-up too long.
    """
    if not 0 < config.batch_size <= num_examples:
        raise UserError(
            f"config.batch_size = {config.batch_size}, but the training set has {num_examples} "
            "images; a batch must hold between 1 and that many"
        )
    steps_per_epoch = num_examples // config.batch_size

    def steps(duration: str, field: str) -> int:
        return to_steps(
            duration, steps_per_epoch=steps_per_epoch, batch_size=config.batch_size, field=field
        )

    result = Durations(
        steps_per_epoch=steps_per_epoch,
        total=steps(config.total, "total"),
        warmup=steps(config.optim.warmup, "optim.warmup"),
        log_every=steps(config.log_every, "log_every"),
        eval_every=steps(config.eval_every, "eval_every"),
        checkpoint_every=steps(config.checkpoint_every, "checkpoint_every"),
    )
    if result.warmup >= result.total:
        raise UserError(
            f"config.optim.warmup is {config.optim.warmup!r}, {result.warmup} steps, and "
            f"config.total {config.total!r}, {result.total} steps; the warm-up must be the shorter"
        )
    for field in ("log_every", "eval_every", "checkpoint_every"):
        if getattr(result, field) == 0:
            raise UserError(f"config.{field} is {config[field]!r}; it must be more than 0")
    return result


def build_model(config: ConfigDict, num_classes: int) -> ConvNeXt:
    """The model of a config.

    Args:
      config: its part `model` is read.
      num_classes: the data set's; `config.model.num_classes` goes before it.

    Raises:
      UserError: for an unknown name, dtype or argument.
    """
    fields = config.model
    if fields.num_classes is not None and fields.num_classes < num_classes:
        raise UserError(
            f"config.model.num_classes = {fields.num_classes}, but the data set has {num_classes} "
            "classes; give at least that many, or None for just these"
        )
    size = config.data.image_size
    if fields.dtype not in _DTYPES:
        raise UserError(
            f"config.model.dtype is {fields.dtype!r}; it must be one of {', '.join(_DTYPES)}"
        )
    try:
        model = create_model(
            fields.name,
            num_classes=num_classes if fields.num_classes is None else fields.num_classes,
            drop_path_rate=fields.drop_path_rate,
            head_init_scale=fields.head_init_scale,
            dtype=_DTYPES[fields.dtype],
            remat=fields.remat,
            **fields.overrides.to_dict(),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error
    if not isinstance(model, ConvNeXt):
        raise UserError(
            f"config.model.name is {fields.name!r}; this program trains ConvNeXts alone so far"
        )
    if size < model.strides[-1]:
        raise UserError(
            f"config.data.image_size = {size}, but the stride of this model is "
            f"{model.strides[-1]}; give at least that, or a smaller "
            "config.model.overrides.stem_stride"
        )
    return model


def build_optimizer(
    config: ConfigDict, model: nn.Module, steps: Durations
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a config, and the schedule inside it."""
    fields = config.optim
    schedule = warmup_cosine(
        fields.learning_rate, fields.min_learning_rate, steps.warmup, steps.total
    )
    optimizer = adamw(
        schedule,
        depths=model.depths,
        weight_decay=fields.weight_decay,
        b1=fields.b1,
        b2=fields.b2,
        eps=fields.eps,
        layer_decay=fields.layer_decay,
        layer_decay_grouping=fields.layer_decay_grouping,
        clip_norm=fields.clip_norm,
    )
    return optimizer, schedule


def build_mixing(config: ConfigDict) -> MixConfig:
    """Mixup, cutmix and smoothing of a config.

    Raises:
      UserError: if a group of images under one λ does not divide the batch, or a value is out of
        range.
    """
    mixing = MixConfig(**config.mix)
    for field, high in (("prob", 1.0), ("switch_prob", 1.0), ("label_smoothing", 1.0)):
        if not 0 <= getattr(mixing, field) <= high:
            raise UserError(f"config.mix.{field} is {getattr(mixing, field)}; it must be in [0, 1]")
    mixes = mixing.prob > 0 and (mixing.mixup_alpha > 0 or mixing.cutmix_alpha > 0)
    group = min(mixing.group_size or config.batch_size, config.batch_size)
    if mixes and config.batch_size % group:
        raise UserError(
            f"config.mix.group_size = {mixing.group_size} does not divide config.batch_size = "
            f"{config.batch_size}; give a divisor, or 0 to mix the whole batch under one λ"
        )
    return mixing


def build_augmentation(config: ConfigDict) -> AugmentConfig:
    """What the accelerators do to training images before mixing.

    Raises:
      UserError: for a policy, interpolation or mode that does not exist.
    """
    fields = config.augment
    policy = parse_policy(fields.policy)
    # What geometric operations bring in: the mean colour, as timm has it; torchvision's is black.
    fill = tuple(min(255, round(255 * mean)) for mean in fields.mean)
    if isinstance(policy, TrivialAugmentWide):
        fill = (0, 0, 0)
    for name, known in (("policy_interpolation", INTERPOLATIONS), ("erasing_mode", MODES)):
        if fields[name] not in known:
            raise UserError(
                f"config.augment.{name} is {fields[name]!r}; it must be one of {', '.join(known)}"
            )
    policies: list[Policy] = [] if policy is None else [policy]
    if fields.color_jitter:
        policies.append(ColorJitter(fields.color_jitter))
    return AugmentConfig(
        policy=PolicySequence(tuple(policies)) if len(policies) > 1 else next(iter(policies), None),
        fill=fill,
        interpolation=fields.policy_interpolation,
        mean=tuple(fields.mean),
        std=tuple(fields.std),
        erasing=ErasingConfig(fields.erasing_prob, fields.erasing_mode)
        if fields.erasing_prob
        else None,
    )


def build_train_step(
    config: ConfigDict,
    model: ConvNeXt,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The training step of a config: what `train.py` runs, and `plan.py` compiles.

    Raises:
      UserError: as `build_mixing` and `build_augmentation`.
    """
    return make_train_step(
        model,
        optimizer,
        schedule,
        num_classes=model.num_classes,
        mix_config=build_mixing(config),
        seed=config.seed,
        ema_decay=config.ema_decay,
        accumulation_steps=config.optim.accumulation_steps,
        augment_config=build_augmentation(config),
        mesh=mesh,
    )


def check_batch_sizes(config: ConfigDict, devices: int) -> None:
    """Holds both batch sizes to the number of devices.

    Raises:
      UserError: if a batch can't be cut into equal parts, or micro-batches.
    """
    if config.optim.accumulation_steps < 1:
        raise UserError(
            f"config.optim.accumulation_steps = {config.optim.accumulation_steps}; it must be 1 or "
            "more"
        )
    for field, parts, what in (
        ("batch_size", devices, f"{devices} devices"),
        ("eval_batch_size", devices, f"{devices} devices"),
        (
            "batch_size",
            devices * config.optim.accumulation_steps,
            f"{devices} devices × {config.optim.accumulation_steps} micro-batches",
        ),
    ):
        if config[field] < 1 or config[field] % parts:
            raise UserError(
                f"config.{field} = {config[field]} can't be divided evenly among {what}; "
                f"give a multiple of {parts}"
            )
    for field, other in (("on_nonfinite", "skip"), ("on_save_failure", "continue")):
        if config[field] not in ("stop", other):
            raise UserError(f'config.{field} is {config[field]!r}; it must be "stop" or "{other}"')


def open_train_source(config: ConfigDict) -> Source:
    """The training split of a config's data set."""
    return _open(config, config.data.train_split)


def open_eval_source(config: ConfigDict, train_source: Source) -> Source | None:
    """The evaluation split, or None where the config names none.

    Raises:
      UserError: if its classes are not those of the training split.
    """
    if not config.data.eval_split:
        return None
    source = _open(config, config.data.eval_split)
    if source.class_names != train_source.class_names:
        raise UserError(
            f"config.data.eval_split {config.data.eval_split!r} has {source.num_classes} classes "
            f"that differ from the {train_source.num_classes} of {config.data.train_split!r}; "
            "both must come from one data set"
        )
    return source


def _open(config: ConfigDict, split: str) -> Source:
    return open_source(
        config.data.name,
        split,
        config.data.data_dir,
        validation_fraction=config.data.validation_fraction,
    )


def train_transform(config: ConfigDict) -> TrainTransform | PadCropTrainTransform:
    """What the host does to a training image.

    Raises:
      UserError: if `config.augment.crop` has another value than "random_resized" and "pad".
    """
    augment, size = config.augment, config.data.image_size
    if augment.crop == "random_resized":
        return TrainTransform(
            size,
            scale=tuple(augment.crop_scale),
            interpolation=augment.interpolation,
            flip=augment.flip,
            decoder=config.data.decoder,
        )
    if augment.crop == "pad":
        if config.data.decoder != "pillow":
            raise UserError(
                f"config.data.decoder = {config.data.decoder!r} goes with config.augment.crop = "
                '"random_resized"; use "pillow" with "pad"'
            )
        return PadCropTrainTransform(
            size,
            padding=augment.crop_padding,
            interpolation=augment.interpolation,
            flip=augment.flip,
        )
    raise UserError(
        f'config.augment.crop is {augment.crop!r}; it must be "random_resized", or "pad" for small '
        "images"
    )


def eval_transform(config: ConfigDict) -> EvalTransform | ResizeEvalTransform:
    """What the host does to an image that is evaluated: small ones are seen whole."""
    augment, size = config.augment, config.data.image_size
    if augment.crop == "pad":
        return ResizeEvalTransform(size, interpolation=augment.interpolation)
    return EvalTransform(
        size, crop_ratio=augment.eval_crop_ratio, interpolation=augment.interpolation
    )


def check_identity(stored: dict[str, Any], current: dict[str, Any], *, allow: bool) -> None:
    """Holds a resumed run to the data that its checkpoint was made with.

    Args:
      stored: the identities beside the checkpoint, by role.
      current: those of the data sets that are open now.
      allow: whether another data set is accepted.

    Raises:
      UserError: naming what differs, unless allowed.
    """
    stored = {role: dict(identity) for role, identity in stored.items()}
    if allow or stored == current:
        return
    differences = [
        f"{role} {key}: {stored.get(role, {}).get(key)!r} -> {current.get(role, {}).get(key)!r}"
        for role in sorted(stored.keys() | current.keys())
        for key in sorted(stored.get(role, {}).keys() | current.get(role, {}).keys())
        if stored.get(role, {}).get(key) != current.get(role, {}).get(key)
    ]
    raise UserError(
        "the checkpoint was made with other data (" + "; ".join(differences) + "); give back "
        "the old data, take another --workdir, or give --allow_config_change"
    )
