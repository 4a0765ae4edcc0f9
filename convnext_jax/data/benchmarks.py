"""The data sets that a trained model is evaluated on, each by its own protocol.

TFDS labels every relative of ImageNet by ImageNet's 1,000 WordNet ids, even where only 200 of them
occur. What differs:

- ImageNet-A and ImageNet-R ask for one of the 200 classes that they have, so the model's answer is
  looked for among those (the authors' eval.py of either).
- ImageNet-C's images are stored as the 224 × 224 pixels that a model is shown: they are neither
  resized to something larger nor cropped again.
- ReaL gives an image a set of right labels, of which the model must hit one, and leaves out images
  without any (Beyer et al. 2020, arXiv:2006.07159, section 4).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convnext_jax.data.imagenet_classes import imagenet_classes
from convnext_jax.data.sources import Source, open_source
from convnext_jax.errors import UserError

# By the data set's name; the feature that holds an image's right labels.
_LABEL_SETS = {"imagenet2012_real": "real_label"}
_SUBSETS = {"imagenet_a": "a", "imagenet_r": "r"}
_CORRUPTED = "imagenet2012_corrupted"

# The name under which all of ImageNet-C is asked for; TFDS has a data set for each part of it.
IMAGENET_C = "imagenet_c"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A data set to be evaluated on, and how.

    Attributes:
      source: its images, each with one label.
      label_sets: the right labels of each image, where there may be several; else None.
      among: the classes, by name, among which the model's answer is looked for; None for all.
      cropped: whether the stored images are what a model is shown, so that none is cropped again.
    """

    source: Source
    label_sets: LabelSets | None = None
    among: frozenset[str] | None = None
    cropped: bool = False


class LabelSets:
    """The right labels of each image of a multi-label data set, read on demand."""

    def __init__(self, name: str, split: str, data_dir: str | None, feature: str):
        """Says where they are; the data set must have been opened before.

        Args:
          name: of the TFDS data set.
          split: as TFDS takes it.
          data_dir: as for `open_source`.
          feature: a sequence of labels.
        """
        self._where = name, split, data_dir
        self._feature = feature
        self._records: Any = None

    def __getitem__(self, index: int) -> np.ndarray:
        """The labels of record `index`, integers (L,), none where L is 0."""
        if self._records is None:
            import tensorflow_datasets as tfds
            from tensorflow_datasets.core import file_adapters, read_only_builder

            name, split, data_dir = self._where
            builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
            array_record = file_adapters.FileFormat.ARRAY_RECORD
            if builder.info.file_format != array_record:
                builder.info.set_file_format(
                    array_record, override=True, override_if_initialized=True
                )
            self._records = builder.as_data_source(
                split,
                decoders={"image": tfds.decode.SkipDecoding()},
                file_format=array_record,
            )
        return np.asarray(self._records[index][self._feature], np.int64)


def default_split(name: str, data_dir: str | None = None) -> str:
    """The split to evaluate on: `"validation"`, or `"test"` for a TFDS data set without one."""
    if name not in ("folder", "digits"):
        from tensorflow_datasets.core import read_only_builder, registered

        try:
            splits = read_only_builder.builder_from_files(name, data_dir=data_dir).info.splits
        except (registered.DatasetNotFoundError, ValueError):
            return "validation"  # opening it will say what is wrong
        if "validation" not in splits and "test" in splits:
            return "test"
    return "validation"


def open_benchmark(
    name: str,
    split: str | None = None,
    data_dir: str | None = None,
    *,
    restrict: bool = False,
) -> Benchmark:
    """Opens a data set together with its protocol.

    Args:
      name: as for `open_source`. TFDS's `imagenet_a`, `imagenet_r`, `imagenet2012_real` and
        `imagenet2012_corrupted/…` have protocols of their own.
      split: as for `open_source`; `default_split` where None. Of a folder also `"all"`: every image
        below `data_dir`, which holds one folder a class.
      data_dir: as for `open_source`.
      restrict: whether to look for the model's answer among the data set's classes only, where the
        data set itself does not say so.

    Raises:
      UserError: the data set or the split is not there.
    """
    split = default_split(name, data_dir) if split is None else split
    if name == "folder" and split == "all":
        source = open_source(name, "train", data_dir, validation_fraction=0.0)
    else:
        source = open_source(name, split, data_dir)
    bare_name = re.split("[/:]", name)[0]
    among = frozenset(source.class_names) if restrict else None
    if bare_name in _SUBSETS:
        subset = _SUBSETS[bare_name]
        among = frozenset(c.wnid for c in imagenet_classes() if subset in c.subsets)
    label_sets = None
    if bare_name in _LABEL_SETS:
        label_sets = LabelSets(name, split, data_dir, _LABEL_SETS[bare_name])
    return Benchmark(source, label_sets, among, cropped=bare_name == _CORRUPTED)


def open_imagenet_c(
    corruptions: Sequence[str],
    severities: Sequence[int],
    split: str | None = None,
    data_dir: str | None = None,
) -> dict[tuple[str, int], Benchmark]:
    """Opens all parts of ImageNet-C, before any of them is evaluated.

    Args:
      corruptions: their names.
      severities: 1 to 5.
      split: of TFDS's data sets, `"validation"` by default.
      data_dir: where TFDS's data sets lie, or the folder that holds the authors' own files,
        unpacked as `corruption/severity/wnid/*.JPEG`.

    Returns:
      Each part by corruption and severity.

    Raises:
      UserError: a part is missing.
    """
    own_files = data_dir is not None and (Path(data_dir).expanduser() / "fog" / "1").is_dir()
    parts = {}
    for corruption in corruptions:
        for severity in severities:
            if own_files:
                assert data_dir is not None
                folder = Path(data_dir) / corruption / str(severity)
                part = open_benchmark("folder", "all", str(folder))
                parts[corruption, severity] = dataclasses.replace(part, cropped=True)
                continue
            try:
                name = f"{_CORRUPTED}/{corruption}_{severity}"
                parts[corruption, severity] = open_benchmark(name, split, data_dir)
            except UserError as error:
                raise UserError(
                    f"ImageNet-C needs all {len(corruptions) * len(severities)} parts: {error}"
                ) from None
    return parts
