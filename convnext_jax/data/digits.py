"""The embedded data set: scikit-learn's 1,797 handwritten digits as a TFDS ArrayRecord data set.

Written on first use by a TFDS builder, so that the first run goes the way that ImageNet goes:
ArrayRecord shards, encoded images, Grain. TFDS needs no TensorFlow for this.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from convnext_jax.data.folder import held_out_files

VALIDATION_FRACTION = 0.2

# The digits' pixels are counts from 0 to 16. 15 is the largest whole factor that keeps 16 within
# a byte, and a whole factor keeps the pixels exactly proportional to the counts.
PIXEL_SCALE = 15


class Digits(tfds.core.GeneratorBasedBuilder):
    """Optical recognition of handwritten digits (UCI), the test part: 8x8 grey, ten classes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "80 % train, 20 % validation, stratified."}  # noqa: RUF012
    # Beside its code a builder may keep checksums of what it downloads. This one downloads nothing,
    # and the search for them imports a package that TFDS does not declare.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits of 43 people, as scikit-learn ships them.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Iterator[Any]]:
        # Only whoever writes the data set pays for this import.
        from sklearn.datasets import load_digits

        digits = load_digits()
        held_out = set[bytes]()
        for label in range(10):
            members = [str(i).encode() for i in np.flatnonzero(digits.target == label)]
            held_out |= held_out_files(members, VALIDATION_FRACTION, seed=0)

        def examples(validation: bool) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
                if (str(i).encode() in held_out) == validation:
                    yield i, {"image": _png(image.astype(np.uint8)), "label": int(label)}

        return {"train": examples(validation=False), "validation": examples(validation=True)}

    def _generate_examples(self) -> Iterator[Any]:
        raise NotImplementedError("the splits' generators are made in _split_generators")


def prepare(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Writes the digits, unless they are there already.

    Any number of processes may call this at once: each writes to a directory of its own, and the
    first to finish moves it into place in one step.

    Args:
      data_dir: where data sets are kept; by default `$CONVNEXT_JAX_DATA_DIR`, else
        `~/.cache/convnext_jax`.

    Returns:
      The directory of the data set, for `tfds.builder_from_directory`.
    """
    root = Path(
        data_dir
        or os.environ.get("CONVNEXT_JAX_DATA_DIR")
        or Path.home() / ".cache" / "convnext_jax"
    ).expanduser()
    target = root / Digits.name / str(Digits.VERSION)
    if target.is_dir():
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-digits-", dir=root))
    try:
        builder = Digits(data_dir=str(scratch), file_format="array_record")
        # TFDS prints its progress to both streams, for a job of a tenth of a second.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            builder.download_and_prepare()
        try:
            os.rename(scratch / Digits.name / str(Digits.VERSION), target)
        except OSError:
            # Renaming onto a directory that is not empty fails: another process was first.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _png(counts: np.ndarray) -> io.BytesIO:
    """Encodes (8, 8) uint8 counts as a grey PNG."""
    file = io.BytesIO()
    Image.fromarray(counts * np.uint8(PIXEL_SCALE)).save(file, "PNG")
    file.seek(0)
    return file
