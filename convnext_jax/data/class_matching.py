"""Which of a model's classes each class of a data set is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from convnext_jax.data.imagenet_classes import (
    NUM_CLASSES_22K,
    imagenet_class_names,
    imagenet_classes,
    imagenet_wnids,
)
from convnext_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClassMatch:
    """How a data set's labels read in a model's numbering.

    Attributes:
      columns: int32 (D,), the model's class for each of the data set's; -1 where it has none.
      names: the data set's classes as a person reads them, D of them.
      model_names: the model's, K of them.
      answers: bool (K,), the model's classes among which its answer is looked for; None for all.
      note: what a person should know of the match, a sentence, or "".
    """

    columns: np.ndarray
    names: tuple[str, ...]
    model_names: tuple[str, ...]
    answers: np.ndarray | None
    note: str = ""


def match_classes(
    data_classes: Sequence[str],
    model_classes: Sequence[str] | None,
    num_classes: int,
    *,
    among: frozenset[str] | None = None,
) -> ClassMatch:
    """Finds the data set's classes among the model's.

    ImageNet's classes are matched by their WordNet ids, also those of a data set that holds only
    some of them, and also for a model of ImageNet-22K, whose answer is then looked for among
    ImageNet's 1,000 alone: most of the 21,841 contain one of these, or lie in one. All other
    classes are matched by name, or, where the model does not name its own, by their number.

    Args:
      data_classes: names in label order; ImageNet's are WordNet ids.
      model_classes: names in the order of the model's logits, or None where they aren't known.
      num_classes: K, the model's.
      among: names of the data set's classes to which the model's answers are restricted; None for
        no restriction.

    Returns:
      The match.

    Raises:
      UserError: if the data set has classes that can't be found among the model's.
    """
    imagenet = set(data_classes) <= set(imagenet_wnids())
    if imagenet and num_classes == NUM_CLASSES_22K:
        places = {c.wnid: -1 if c.index_22k is None else c.index_22k for c in imagenet_classes()}
        known = dict(zip(imagenet_wnids(), imagenet_class_names(), strict=True))
        model_names = [str(k) for k in range(num_classes)]
        for wnid, column in places.items():
            if column >= 0:
                model_names[column] = known[wnid]
        among = frozenset(imagenet_wnids()) if among is None else among
    elif imagenet and _is_imagenet(model_classes, num_classes):
        places = {wnid: k for k, wnid in enumerate(imagenet_wnids())}
        known = dict(zip(imagenet_wnids(), imagenet_class_names(), strict=True))
        model_names = list(imagenet_class_names())
    elif model_classes is not None:
        places = {name: k for k, name in enumerate(model_classes)}
        known = {name: name for name in data_classes}
        model_names = list(model_classes)
        if absent := [name for name in data_classes if name not in places]:
            raise UserError(
                f"the data set's class {absent[0]!r} is not one of the model's {num_classes} "
                f"({_some(model_classes)}); {len(absent)} of its {len(data_classes)} classes are "
                "not: give a data set with the classes that the model was trained on"
            )
    elif num_classes == len(data_classes):
        places = {name: k for k, name in enumerate(data_classes)}
        known = {name: name for name in data_classes}
        model_names = list(data_classes)
    else:
        raise UserError(
            f"the model has {num_classes} classes and the data set {len(data_classes)} "
            f"({_some(data_classes)}), and the model does not name its own: give a data set with "
            "the classes that the model was trained on"
        )

    columns = np.array([places[name] for name in data_classes], np.int32)
    answers = None
    if among is not None:
        answers = np.zeros(num_classes, bool)
        answers[[places[name] for name in among if places[name] >= 0]] = True
    return ClassMatch(
        columns=columns,
        names=tuple(known[name] for name in data_classes),
        model_names=tuple(model_names),
        answers=answers,
        note=_note([known[n] for n in data_classes if places[n] < 0], model_classes, imagenet),
    )


def _is_imagenet(model_classes: Sequence[str] | None, num_classes: int) -> bool:
    """Whether the model's 1,000 classes are ImageNet's, by whichever of their names."""
    if num_classes != 1000 or model_classes is None:
        return num_classes == 1000
    if tuple(model_classes) == imagenet_wnids():
        return True
    # transformers' configs give all words of a class, others the first, and a few were mended by
    # hand over the years, so a tenth may differ.
    same = sum(
        theirs.split(",")[0].casefold() == ours.words.split(" (")[0].split(",")[0].casefold()
        for theirs, ours in zip(model_classes, imagenet_classes(), strict=True)
    )
    return same >= 900


def _note(absent: Sequence[str], model_classes: Sequence[str] | None, imagenet: bool) -> str:
    if absent:
        return (
            f"{len(absent)} of the data set's classes ({_some(absent)}) is not among the model's: "
            "its images count as wrong"
        )
    if model_classes is None and not imagenet:
        return "the model does not name its classes; taken to be the data set's, in its order"
    return ""


def _some(names: Sequence[str], limit: int = 3) -> str:
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed}, …"
