"""Sizes of training sets, for a machine on which they don't lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from convnext_jax.errors import UserError


class TrainingSet(NamedTuple):
    """What a plan must know of a training set.

    Attributes:
      examples: images in it.
      classes: their classes.
    """

    examples: int
    classes: int


# The split "train" of each. ImageNet-1K: Russakovsky et al. 2015 (arXiv 1409.0575), table 2;
# ImageNet-22K: the fall 2011 release. Of the digits a fifth is held out.
KNOWN: Mapping[str, TrainingSet] = {
    "imagenet2012": TrainingSet(1_281_167, 1000),
    "imagenet21k": TrainingSet(14_197_122, 21_841),
    "cifar10": TrainingSet(50_000, 10),
    "digits": TrainingSet(1_438, 10),
}


def training_set(config: ConfigDict, examples: int | None = None) -> TrainingSet:
    """The size of a config's training set.

    Args:
      config: the run.
      examples: as the user gives it; None for what is known.

    Returns:
      The images and classes.

    Raises:
      UserError: if the data set is not known, and its size or classes are not given.
    """
    name, split = config.data.name, config.data.train_split
    known = KNOWN.get(name)
    if examples is None:
        if known is None or split != "train":
            raise UserError(
                f"how many images config.data.name = {name!r} has in {split!r} is not known here; "
                f'give --examples N (known is "train" of {", ".join(KNOWN)})'
            )
        examples = known.examples
    elif examples < 1:
        raise UserError(f"--examples is {examples}; it must be 1 or more")
    classes = known.classes if known is not None else config.model.num_classes
    if classes is None:
        raise UserError(
            f"how many classes config.data.name = {name!r} has is not known here; give "
            "--config.model.num_classes=K"
        )
    return TrainingSet(examples, classes)
