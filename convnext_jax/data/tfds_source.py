"""TFDS data sets that lie on disk as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters, read_only_builder, registered

from convnext_jax.data.sources import Record
from convnext_jax.errors import UserError

# TFDS reads these without TensorFlow, but writes and converts most data sets with it, and its
# programs import packages that it does not declare.
_PREPARATION_NEEDS_TENSORFLOW = (
    "this step alone needs `pip install tensorflow tensorflow-datasets apache-beam mlcroissant "
    "importlib_resources`, in an environment of its own if you like"
)


class TfdsSource:
    """One split of a prepared TFDS classification data set.

    Holds only the directory and the names it was opened by; files are opened on the first read,
    once in each process.
    """

    def __init__(self, directory: str, split: str):
        """Checks that the directory holds what is asked for.

        Args:
          directory: of one version of a data set, with its `dataset_info.json`.
          split: as TFDS takes it.

        Raises:
          UserError: wrong file format, absent split, missing shards, or no classification data set.
        """
        self._directory = directory
        self._split = split
        self._records: Any = None
        info = tfds.builder_from_directory(directory).info
        _require_array_record(info, directory)
        split_info = _find_split(info, split)
        self._image_key, self._label_key = _classification_keys(info)
        label = info.features[self._label_key]
        self.class_names: tuple[str, ...] = tuple(label.names)
        self._num_examples = int(split_info.num_examples)
        self._full_name = info.full_name
        self._file_name_key = "file_name" if "file_name" in info.features else None
        stored = [
            [name, list(s.shard_lengths), int(s.num_bytes)] for name, s in info.splits.items()
        ]
        self.identity: dict[str, str | int] = {
            "name": info.full_name.removesuffix(f"/{info.version}"),
            "version": str(info.version),
            "split": split,
            "num_examples": self._num_examples,
            "fingerprint": hashlib.sha256(json.dumps(stored).encode()).hexdigest()[:16],
        }

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> Record:
        example = self._read(index)
        label = int(example[self._label_key])
        if label < 0:
            raise UserError(
                f"{self.describe(index)} has no label (it is {label}): the labels of its split are "
                "not published, so choose another."
            )
        return Record(example[self._image_key], label)

    def describe(self, index: int) -> str:
        """Data set, split and position, and the original file name where that is stored."""
        place = f"{self._full_name} {self._split} record {index}"
        if self._file_name_key is None:
            return place
        return f"{place} ({self._read(index)[self._file_name_key].decode()})"

    def _read(self, index: int) -> dict[str, Any]:
        if self._records is None:
            builder = tfds.builder_from_directory(self._directory)
            self._records = builder.as_data_source(
                self._split,
                decoders={self._image_key: tfds.decode.SkipDecoding()},
                file_format=file_adapters.FileFormat.ARRAY_RECORD,
            )
        return self._records[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}


def open_directory(directory: str | os.PathLike[str], split: str) -> TfdsSource:
    """Opens a split of the data set in `directory`, that of one version."""
    return TfdsSource(os.fspath(directory), split)


def open_tfds(name: str, split: str, data_dir: str | None = None) -> TfdsSource:
    """Opens a split of a prepared TFDS data set by name.

    The data set's own code is not asked, only its files: data sets that TFDS does not know (a
    private ImageNet-21K, say) are read just as well.

    Args:
      name: `"name"`, `"name/config"`, `"name:version"` or `"name/config:version"`.
      split: as TFDS takes it, slices included.
      data_dir: the directory that holds the data sets; TFDS's own by default.

    Raises:
      UserError: the data set or the split is not there, or is of another format.
    """
    where = os.path.expanduser(data_dir or str(tfds.core.constants.DATA_DIR))
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except registered.DatasetNotFoundError:
        raise UserError(_not_prepared(name, where)) from None
    except ValueError as error:
        raise UserError(
            f"The data set {name!r} cannot be opened: {_first_line(error)} (Names read "
            "'name', 'name/config' or 'name/config:1.2.3'.)"
        ) from None
    return TfdsSource(str(builder.data_dir), split)


def _not_prepared(name: str, data_dir: str) -> str:
    """Says how to prepare a data set that is not on disk, or what was meant by its name."""
    bare_name = re.split("[/:]", name)[0]
    try:
        manual = tfds.builder_cls(bare_name).MANUAL_DOWNLOAD_INSTRUCTIONS
    except registered.DatasetNotFoundError:
        known = [*tfds.list_builders(with_community_datasets=False), "digits", "folder"]
        close = difflib.get_close_matches(bare_name, known, n=3)
        meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        return (
            f"There is no data set {name!r} under {data_dir!r}, and TFDS knows none of that "
            f"name{meant} (The project's own are 'digits' and 'folder'.)"
        )
    first = f" after putting its archives into {data_dir}/downloads/manual" if manual else ""
    return (
        f"The data set {name!r} is not under {data_dir!r}: prepare it{first} by `tfds build "
        f"{name} --data_dir={data_dir} --file_format=array_record` ({_PREPARATION_NEEDS_TENSORFLOW}"
        "), or set data_dir to where it lies."
    )


def _require_array_record(info: tfds.core.DatasetInfo, directory: str) -> None:
    formats = info.available_file_formats()
    if file_adapters.FileFormat.ARRAY_RECORD not in formats:
        found = ", ".join(sorted(f.value for f in formats)) or "no known format"
        raise UserError(
            f"The data set in {directory!r} is stored as {found}, which has no random access: "
            "convert it by `python -m tensorflow_datasets.scripts.convert_format "
            f"--dataset_version_dir={directory} --out_file_format=array_record` "
            f"({_PREPARATION_NEEDS_TENSORFLOW})."
        )
    if info.file_format != file_adapters.FileFormat.ARRAY_RECORD:
        # Converted in place: both lie there, and the splits' paths must be those of ArrayRecord.
        info.set_file_format(
            file_adapters.FileFormat.ARRAY_RECORD, override=True, override_if_initialized=True
        )


def _find_split(info: tfds.core.DatasetInfo, split: str) -> Any:
    """The split's sizes, when all of it is there."""
    names = [part.split("[")[0].strip() for part in split.split("+")]
    if absent := [name for name in names if name not in info.splits]:
        raise UserError(
            f"The data set {info.full_name} has no split {absent[0]!r}: it has "
            f"{', '.join(map(repr, info.splits))}."
        )
    try:
        found = info.splits[split]
    except ValueError as error:
        raise UserError(
            f"The split {split!r} of {info.full_name} cannot be read: {_first_line(error)} (Slices "
            "read 'train[:90%]' or 'train[100:200]'.)"
        ) from None
    for name in names:
        for path in map(os.fspath, info.splits[name].filepaths):
            if "://" not in path and not Path(path).exists():
                raise UserError(
                    f"The data set {info.full_name} is incomplete: {path!r} is missing; copy or "
                    "prepare it again."
                )
    if not found.num_examples:
        raise UserError(f"The split {split!r} of {info.full_name} holds no examples.")
    return found


def _classification_keys(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Finds the one image and the one class label of each example."""
    features = info.features
    if isinstance(features, tfds.features.FeaturesDict):
        images = [k for k, f in features.items() if type(f) is tfds.features.Image]
        labels = [k for k, f in features.items() if type(f) is tfds.features.ClassLabel]
        supervised = info.supervised_keys or ()
        image = _choose(images, "image", supervised)
        label = _choose(labels, "label", supervised)
        if image is not None and label is not None:
            return image, label
    raise UserError(
        f"The data set {info.full_name} is not one of image classification: its examples need one "
        f"Image and one ClassLabel feature, and they have {list(features)}."
    )


def _choose(keys: list[str], usual: str, supervised: Any) -> str | None:
    """The only key of its kind, else the one of the usual name, else the supervised one."""
    if len(keys) == 1 or usual in keys:
        return usual if usual in keys else keys[0]
    chosen = [key for key in keys if key in supervised]
    return chosen[0] if len(chosen) == 1 else None


def _first_line(error: Exception) -> str:
    """What TFDS says, without the paragraphs that follow it."""
    return str(error).splitlines()[0]
