"""Whether a split of the data set is there, can be read, and how large it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from convnext_jax import experiment
from convnext_jax.data.decoding import UndecodableImageError
from convnext_jax.data.sources import Source
from convnext_jax.data.transforms import EvalTransform
from convnext_jax.errors import UserError
from convnext_jax.preflight.examination import Finding, Status

# Read of each split, evenly spread, the first and the last record among them.
_SAMPLES = 17


def train_split(config: ConfigDict) -> Finding[Source]:
    """Opens the training split and reads some of its records.

    Raises:
      UserError: if it is not there, or a record can't be read; a remedy is in it.
    """
    return _read(config.data.train_split, lambda: experiment.open_train_source(config))


def eval_split(config: ConfigDict, train_source: Source) -> Finding[Source | None]:
    """The same for the evaluation split, where the config names one.

    Raises:
      UserError: as `train_split`; also if its classes are not those of the training split.
    """

    def opened() -> Source:
        source = experiment.open_eval_source(config, train_source)
        assert source is not None
        return source

    if not config.data.eval_split:
        return Finding("none: config.data.eval_split is empty", None)
    return _read(config.data.eval_split, opened)


def _read(name: str, opened: Callable[[], Source]) -> Finding[Any]:
    source = opened()
    count = len(source)
    indices = sorted({i * (count - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)})
    decode = EvalTransform(32)
    total, undecodable = 0, []
    for index in indices:
        try:
            record = source[index]
        except UserError:
            raise
        except Exception as error:  # of whatever kind the format's reader raises
            raise UserError(
                f"record {index} of {count:,} can't be read ({type(error).__name__}: {error}); "
                f"copy the split {name!r} to this host again"
            ) from error
        total += len(record.image)
        try:
            decode(record.image)
        except UndecodableImageError as error:
            undecodable.append(f"{source.describe(index)} ({error})")
    # Orders of magnitude: sizes of single images differ by more than this sample's mean.
    size = total / len(indices) * count
    detail = (
        f"{count:,} images of {source.num_classes} classes, about {_bytes(size)}; {len(indices)} "
        "read and decoded, the first and the last among them"
    )
    if undecodable:
        return Finding(
            f"{len(undecodable)} of {len(indices)} images can't be decoded: {undecodable[0]}",
            source,
            Status.WARNING,
            "the run would leave such images out; copy the data set again if they are many",
        )
    return Finding(detail, source)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
