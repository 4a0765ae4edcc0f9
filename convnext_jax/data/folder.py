"""Images in folders, one folder a class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from convnext_jax.data.sources import Record
from convnext_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")

# The names under which data sets in the wild keep a split; of several, the first counts.
_SPLIT_FOLDERS = {
    "train": ("train",),
    "validation": ("val", "validation", "test"),
    "test": ("test",),
}


class FolderSource:
    """Image files below `root`, each with a label.

    A million file names as Python strings would weigh 100 MB in every worker process; as one NumPy
    array of bytes they weigh what their characters do, and pickle in milliseconds.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        split: str,
        class_names: Sequence[str],
        files: Sequence[bytes],
        labels: Sequence[int],
    ):
        """Holds the files of one split.

        Args:
          name: of the data set, for `identity`.
          root: the folder that `files` are relative to.
          split: its name, for `identity`.
          class_names: one name a class, in label order.
          files: paths relative to `root`, as the file system encodes them.
          labels: one label a file.
        """
        self._root = os.fsencode(root)
        self._files = np.array(files, dtype=np.bytes_)
        self._labels = np.array(labels, dtype=np.int32)
        self.class_names = tuple(class_names)
        digest = hashlib.sha256()
        digest.update("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        digest.update(b"\0\0" + b"\0".join(files))
        self.identity: dict[str, str | int] = {
            "name": name,
            "version": "",
            "split": split,
            "num_examples": len(files),
            "fingerprint": digest.hexdigest()[:16],
        }

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        with open(self._path(index), "rb") as file:
            return Record(file.read(), int(self._labels[index]))

    def describe(self, index: int) -> str:
        """The file's path."""
        return os.fsdecode(self._path(index))

    def _path(self, index: int) -> bytes:
        return os.path.join(self._root, bytes(self._files[index]))


def open_folder(
    data_dir: str, split: str, *, validation_fraction: float = 0.1, split_seed: int = 0
) -> FolderSource:
    """Opens a split of an image folder.

    Two layouts are read: `root/train/class/*.jpg` with `root/val/class/*.jpg` (or `validation`, or
    `test`), and `root/class/*.jpg`. In the latter, and where `root/train` has nothing beside it,
    the validation part is held out of each class by seed. Labels follow the sorted names of the
    class folders, as torchvision's ImageFolder numbers them. Names that begin with a dot are
    passed over.

    Args:
      data_dir: the root folder.
      split: `"train"`, `"validation"` or `"test"`.
      validation_fraction: share of each class that is held out, in [0, 1).
      split_seed: which files are held out.

    Raises:
      UserError: a folder is missing or holds no images, or train and validation name other classes.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(
            f"There is no image folder {str(root)!r}: give data_dir the folder that holds train/ "
            "and val/, or one folder of images for each class."
        )
    if split not in _SPLIT_FOLDERS:
        raise UserError(
            f"An image folder has no split {split!r}: use 'train', 'validation' or 'test'."
        )
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction must be in [0, 1), not {validation_fraction}.")

    train = root / "train"
    if not train.is_dir():
        if (alone := _split_folder(root, "validation")) is not None:
            raise UserError(
                f"{str(root)!r} holds {alone.name}/ but no train/: add it, or give data_dir the "
                "folder that holds one folder of images for each class."
            )
        train = root
    train_classes = _class_folders(train)

    held_out = _split_folder(root, "test" if split == "test" else "validation")
    folder = train if split == "train" else held_out
    # Also when train is opened: hours of training should not precede this message.
    if held_out is not None:
        _require_same_classes(train, train_classes, held_out, _class_folders(held_out))
    if split == "test" and folder is None:
        raise UserError(f"{str(root)!r} holds no test/ folder: use 'train' or 'validation'.")
    by_seed = held_out is None

    files: list[bytes] = []
    labels: list[int] = []
    folder = folder or train
    for label, name in enumerate(train_classes):
        in_class = _image_files(folder, name)
        if by_seed:
            chosen = held_out_files(in_class, validation_fraction, split_seed)
            in_class = [file for file in in_class if (file in chosen) == (split == "validation")]
        files += in_class
        labels += [label] * len(in_class)
    if not files:
        raise UserError(
            f"Nothing of {str(folder)!r} is held out for validation: add val/ beside train/, or "
            f"set validation_fraction above {validation_fraction}."
        )
    name = f"folder {root.resolve().name}"
    return FolderSource(name, folder, split, train_classes, files, labels)


def held_out_files(files: Sequence[bytes], fraction: float, seed: int) -> set[bytes]:
    """Chooses which members of one class are held out.

    Members are ranked by a digest of the seed and their name rather than drawn by a generator: the
    choice depends on no library's version, and hardly moves when files are added later.

    Args:
      files: the class's members.
      fraction: how many of them, as a share; at least one is chosen where the share is not 0, and
        at least one is left.
      seed: another seed, another choice.
    """
    count = min(max(round(len(files) * fraction), 1), len(files) - 1) if fraction else 0
    salt = f"{seed}\0".encode()
    return set(sorted(files, key=lambda name: hashlib.sha256(salt + name).digest())[:count])


def _split_folder(root: Path, split: str) -> Path | None:
    """The folder that keeps a split, in whichever of its names."""
    return next((root / name for name in _SPLIT_FOLDERS[split] if (root / name).is_dir()), None)


def _class_folders(folder: Path) -> list[str]:
    """Sorted names of the class folders."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(
            f"{str(folder)!r} holds no class folders: put the images of each class into a folder "
            f"of its own, such as {str(folder / 'cat')!r}."
        )
    return names


def _image_files(folder: Path, class_name: str) -> list[bytes]:
    """Sorted paths, relative to `folder`, of a class's images, in subfolders as well."""

    def walk(relative: str) -> Iterator[str]:
        # scandir tells files from folders without a stat call each: on network disks a million
        # of those take minutes.
        with os.scandir(folder / relative) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = f"{relative}/{entry.name}"
                if entry.name.lower().endswith(IMAGE_SUFFIXES):
                    yield path
                elif entry.is_dir():
                    yield from walk(path)

    files = sorted(os.fsencode(path) for path in walk(class_name))
    if not files:
        raise UserError(
            f"The class folder {str(folder / class_name)!r} holds no images "
            f"({', '.join(IMAGE_SUFFIXES)}): add some, or remove the folder."
        )
    return files


def _require_same_classes(
    train: Path, train_classes: Sequence[str], held_out: Path, held_out_classes: Sequence[str]
) -> None:
    """Train and validation must number their classes alike."""
    differences = [
        f"only in {str(folder)!r}: {_some(mine - others)}"
        for folder, mine, others in (
            (train, set(train_classes), set(held_out_classes)),
            (held_out, set(held_out_classes), set(train_classes)),
        )
        if mine - others
    ]
    if differences:
        raise UserError(
            f"The class folders differ ({'; '.join(differences)}): both must hold the same classes."
        )


def _some(names: set[str], limit: int = 5) -> str:
    listed = ", ".join(sorted(names)[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
