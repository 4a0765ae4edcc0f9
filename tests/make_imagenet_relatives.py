"""Builds small stand-ins for ImageNet's relatives in TFDS: same names, features, splits, formats.

Each is its own TFDS builder, fed with given examples in place of its archives. See
data/make_imagenet_like.py for the same of imagenet2012 itself, from a folder.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered


def build(
    name: str,
    split: str,
    examples: Iterable[dict[str, Any]],
    data_dir: Path,
    config: str | None = None,
) -> Path:
    """Writes one data set as ArrayRecord and returns its directory.

    Args:
      name: of TFDS's builder, "imagenet_a" or another.
      split: the one that it has.
      examples: as its features want them; "file_name" tells them apart.
      data_dir: the directory of data sets.
      config: of the builder, where it has several.
    """
    base = tfds.builder_cls(name)

    # Their names are taken in TFDS's registry, by what they stand in for.
    with registered.skip_registration():

        class StandIn(base):
            code_path = None  # nothing is downloaded, so there are no checksums to look for
            MANUAL_DOWNLOAD_INSTRUCTIONS = None

            def _split_generators(self, dl_manager):
                return {split: ((example["file_name"], example) for example in examples)}

    StandIn.name = name
    builder = StandIn(data_dir=str(data_dir), config=config, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)
