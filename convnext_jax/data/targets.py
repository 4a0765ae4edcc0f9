"""The right answers beside each image of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from convnext_jax.data.benchmarks import Benchmark
from convnext_jax.data.class_matching import ClassMatch
from convnext_jax.errors import UserError


def add_targets(
    batches: Iterable[Mapping[str, np.ndarray]], benchmark: Benchmark, match: ClassMatch
) -> Iterator[dict[str, np.ndarray]]:
    """Adds to each batch of `eval_loader` which of the model's classes are right.

    Args:
      batches: with "image", "label", "index" and "mask".
      benchmark: the data set that they come from.
      match: of its classes to the model's K.

    Yields:
      The batches with "target", bool (B, K). An image of a multi-label data set that has no right
      label is masked out.

    Raises:
      UserError: at an image whose class is none of those that its data set's protocol asks for.
    """
    num_classes = len(match.model_names)
    for batch in batches:
        mask = np.array(batch["mask"])
        target = np.zeros((len(mask), num_classes), bool)
        for row in np.flatnonzero(mask):
            index = int(batch["index"][row])
            labels = batch["label"][row : row + 1]
            if benchmark.label_sets is not None:
                labels = benchmark.label_sets[index]
                mask[row] = len(labels) > 0
            columns = match.columns[labels]
            columns = columns[columns >= 0]
            if match.answers is not None and not match.answers[columns].all():
                raise UserError(
                    f"{benchmark.source.describe(index)} shows class "
                    f"{match.names[int(labels[0])]!r}, which is none of the "
                    f"{int(match.answers.sum())} classes of this data set: prepare it again"
                )
            target[row, columns] = True
        yield {**batch, "mask": mask, "target": target}
