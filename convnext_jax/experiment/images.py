"""The data sets of a config, and what the hosts do to their images."""

from typing import Any

import jax
from ml_collections import ConfigDict

from convnext_jax.data.loader import BatchIterator, eval_loader, train_loader
from convnext_jax.data.sources import Source, open_source
from convnext_jax.data.transforms import (
    EvalTransform,
    PadCropTrainTransform,
    ResizeEvalTransform,
    TrainTransform,
)
from convnext_jax.errors import UserError


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


def eval_image_size(config: ConfigDict) -> int:
    """Side of the images that are evaluated, in pixels; that of training where not given."""
    size = config.data.eval_image_size
    return int(config.data.image_size if size is None else size)


def eval_transform(config: ConfigDict) -> EvalTransform | ResizeEvalTransform:
    """What the host does to an image that is evaluated: small ones are seen whole."""
    augment, size = config.augment, eval_image_size(config)
    if augment.crop == "pad":
        return ResizeEvalTransform(size, interpolation=augment.interpolation)
    return EvalTransform(
        size, crop_ratio=augment.eval_crop_ratio, interpolation=augment.interpolation
    )


def train_batches(
    config: ConfigDict,
    source: Source,
    transform: TrainTransform | PadCropTrainTransform,
    *,
    start_step: int,
    num_steps: int,
) -> BatchIterator:
    """This process's part of the training batches; arguments as for `data.loader.train_loader`."""
    return train_loader(
        source,
        transform,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        num_steps=num_steps,
        repeats=config.data.repeats,
        **_loading(config),
    )


def eval_batches(config: ConfigDict, source: Source) -> BatchIterator:
    """This process's part of the evaluation batches, every example once."""
    return eval_loader(
        source, eval_transform(config), batch_size=config.eval_batch_size, **_loading(config)
    )


def _loading(config: ConfigDict) -> dict[str, Any]:
    return {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "num_workers": config.data.workers,
        "on_bad_image": config.data.on_bad_image,
    }


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
