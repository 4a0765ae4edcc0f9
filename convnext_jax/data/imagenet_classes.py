"""The classes of ImageNet-1K: their WordNet ids, their names, and where else they occur.

The facts, and their sources, are in `imagenet_classes.tsv`.
"""

import functools
import importlib.resources
from typing import NamedTuple

NUM_CLASSES_22K = 21_841


class ImageNetClass(NamedTuple):
    """One class of ImageNet-1K.

    Attributes:
      wnid: WordNet's id of the noun, `"n"` and eight digits.
      index_22k: its place in the 21,841 classes of ImageNet-22K, None where it is none of them.
      subsets: of `{"a", "r"}`, whether ImageNet-A and ImageNet-R have it.
      words: its synonyms in WordNet, `"tench, Tinca tinca"`.
    """

    wnid: str
    index_22k: int | None
    subsets: frozenset[str]
    words: str


@functools.cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """The 1,000 classes in label order."""
    table = importlib.resources.files(__package__).joinpath("imagenet_classes.tsv")
    lines = table.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")][1:]
    return tuple(
        ImageNetClass(
            wnid,
            None if index == "-" else int(index),
            frozenset(subsets) - {"-"},
            words,
        )
        for wnid, index, subsets, words in rows
    )


def imagenet_wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids in label order, `"n01440764"` the first."""
    return tuple(c.wnid for c in imagenet_classes())


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """A short name a class, in label order, no two alike.

    That is the first of its words, or all of them where another class begins with the same word
    (`"maillot"` and `"maillot, tank suit"`).
    """
    first = [c.words.split(", ")[0] for c in imagenet_classes()]
    return tuple(
        c.words if first.count(word) > 1 else word
        for c, word in zip(imagenet_classes(), first, strict=True)
    )
