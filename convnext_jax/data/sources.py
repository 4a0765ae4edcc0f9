"""Random access to encoded images and their labels, whatever they are stored in."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from convnext_jax.errors import UserError


class Record(NamedTuple):
    """One example, as it is stored.

    Attributes:
      image: the encoded file (JPEG, PNG, …), undecoded.
      label: the class, in `[0, num_classes)`.
    """

    image: bytes
    label: int


class Source(Protocol):
    """A data set of which any record can be read at any time, in any process.

    Implementations are picklable, and open their files only when a record is first asked for: a
    source travels to the loader's worker processes without open file handles.
    """

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class, in label order."""

    @property
    def identity(self) -> dict[str, str | int]:
        """What this data set is, JSON-able: stored beside checkpoints and compared on resume.

        Keys: `name`, `version`, `split`, `num_examples`, and `fingerprint`, a digest of what can
        be known of the content without reading it (shard lengths and bytes, or file names).
        """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def describe(self, index: int) -> str:
        """Where record `index` lies, for a message: a path, or data set, split and position."""


def open_source(
    name: str,
    split: str,
    data_dir: str | None = None,
    *,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
) -> Source:
    """Opens one split of a data set.

    Args:
      name: `"digits"`, the digits embedded in scikit-learn; `"folder"`, images in class folders;
        or the name of a TFDS data set that lies on disk as ArrayRecord, such as `"imagenet2012"`,
        `"cifar10"` or `"imagenet_v2/matched-frequency:3.0.0"`.
      split: `"train"` or `"validation"` (folders also `"test"`, where there is such a folder). For
        TFDS data sets anything TFDS takes, slices such as `"train[:90%]"` included.
      data_dir: for `"folder"` the root folder; for TFDS the directory that holds the data sets,
        by default TFDS's own (`~/tensorflow_datasets`); for `"digits"` where to write them once,
        by default `$CONVNEXT_JAX_DATA_DIR` or `~/.cache/convnext_jax`.
      validation_fraction: share of each class that is held out of a folder without a validation
        part, in [0, 1).
      split_seed: which files of such a folder are held out.

    Returns:
      The source.

    Raises:
      UserError: the data set, or the split, is not there or cannot be read; the message says what
        to type.
    """
    # Each of these imports what only it needs; TFDS alone costs about half a second.
    if name == "folder":
        from convnext_jax.data import folder

        if data_dir is None:
            raise UserError(
                "The data set 'folder' needs data_dir: the folder that holds train/ and val/, or "
                "one folder of images for each class."
            )
        return folder.open_folder(
            data_dir, split, validation_fraction=validation_fraction, split_seed=split_seed
        )

    from convnext_jax.data import tfds_source

    if name == "digits":
        from convnext_jax.data import digits

        return tfds_source.open_directory(digits.prepare(data_dir), split)
    return tfds_source.open_tfds(name, split, data_dir)
