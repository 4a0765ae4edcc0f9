"""Accuracy class by class, and what each class is mistaken for."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convnext_jax.data.class_matching import ClassMatch
from convnext_jax.training.scoring import Scores


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """How a model does on one class.

    Attributes:
      index: the class in the data set's numbering.
      label: its name there, a WordNet id in ImageNet's case.
      name: what a person calls it.
      count: images of it.
      top1: how many of them were answered right.
      top5: how many had a right answer among the best five.
      accuracy: top1 / count, "" without images.
      top5_accuracy: top5 / count, "" without images.
      mistaken_for: the most frequent wrong answer, of equals the first; "" if there was none.
      mistaken_count: how often that was.
    """

    index: int
    label: str
    name: str
    count: int
    top1: int
    top5: int
    accuracy: float | str
    top5_accuracy: float | str
    mistaken_for: str
    mistaken_count: int


def per_class(scores: Scores, labels: Sequence[str], match: ClassMatch) -> list[ClassRow]:
    """Breaks scores down by the data set's classes.

    Args:
      scores: of all examples.
      labels: the data set's class names, D of them.
      match: of its classes to the model's.

    Returns:
      One row a class, in the data set's order, those left out that its protocol does not ask for.
    """
    counts = np.bincount(scores.label, minlength=len(labels))
    top1 = np.bincount(scores.label[scores.top1], minlength=len(labels))
    top5 = np.bincount(scores.label[scores.top5], minlength=len(labels))
    wrong = ~scores.top1
    pairs, times = np.unique(
        np.stack([scores.label[wrong], scores.prediction[wrong]]), axis=1, return_counts=True
    )
    mistakes: dict[int, tuple[int, int]] = {}
    for (label, prediction), often in zip(pairs.T.tolist(), times.tolist(), strict=True):
        if often > mistakes.get(label, (0, 0))[1]:
            mistakes[label] = prediction, often
    rows = []
    for index, label in enumerate(labels):
        column = int(match.columns[index])
        if match.answers is not None and column >= 0 and not match.answers[column]:
            continue
        count = int(counts[index])
        prediction, often = mistakes.get(index, (-1, 0))
        rows.append(
            ClassRow(
                index,
                label,
                match.names[index],
                count,
                int(top1[index]),
                int(top5[index]),
                int(top1[index]) / count if count else "",
                int(top5[index]) / count if count else "",
                match.model_names[prediction] if often else "",
                often,
            )
        )
    return rows


def write_csv(path: Path, rows: Sequence[ClassRow]) -> None:
    """Writes the rows below a line of their attributes' names."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(ClassRow))
        writer.writerows(map(dataclasses.astuple, rows))
