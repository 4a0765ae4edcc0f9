"""Batches from a source, as a pure function of (seed, step).

The data position is the step: no iterator state is saved, and none is needed. Examples are numbered
by a global position that runs through the epochs. An epoch is one shuffle of the source, cut to
whole global batches (`N // batch_size` steps, the reference's rule; what is cut off is another
remainder in each epoch, since the order is). The global batch of step s is positions
`s·B … s·B + B - 1`; each process makes its contiguous block of rows, so that the assembled global
array is the same, row by row, on any number of processes. The randomness of an image depends on
(seed, position) alone, not on the process or worker that happens to make it.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import weakref
from collections.abc import Generator, Iterator
from multiprocessing import connection, parent_process
from typing import Any, Literal, Protocol

import grain
import numpy as np
from absl import flags

from convnext_jax.data.sources import Source
from convnext_jax.data.transforms import UndecodableImageError
from convnext_jax.errors import UserError

logger = logging.getLogger(__name__)

BadImagePolicy = Literal["skip", "stop"]
Batch = dict[str, np.ndarray]

# So many undecodable images in a row are no accident: the wrong files, or a dead disk.
_MAX_SUCCESSIVE_BAD_IMAGES = 100


class RandomTransform(Protocol):
    """Turns an encoded image into (image_size, image_size, 3) uint8, at random."""

    @property
    def image_size(self) -> int: ...  # noqa: D102

    def __call__(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray: ...  # noqa: D102


class FixedTransform(Protocol):
    """Turns an encoded image into (image_size, image_size, 3) uint8."""

    @property
    def image_size(self) -> int: ...  # noqa: D102

    def __call__(self, encoded: bytes) -> np.ndarray: ...  # noqa: D102


def train_loader(
    source: Source,
    transform: RandomTransform,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    on_bad_image: BadImagePolicy = "skip",
) -> BatchIterator:
    """Yields this process's part of the batches of steps `start_step … num_steps - 1`.

    With b = batch_size / process_count and S = transform.image_size each batch holds

    - `image`: (b, S, S, 3) uint8;
    - `label`: (b,) int32;
    - `index`: (b,) int64, the record that the row shows;
    - `bad_index`: (b,) int64, the undecodable record that the row replaces, else -1.

    Args:
      source: the data set.
      transform: decodes and augments one image.
      batch_size: the GLOBAL batch, of all processes together.
      seed: of order and augmentation.
      start_step: the first step to make; the batches before it are never touched.
      num_steps: the step to stop before.
      process_index: this process's number.
      process_count: number of processes; must divide `batch_size`.
      num_workers: worker processes; with 0, `prefetch` threads of this process do the work.
      prefetch: batches made ahead, of each worker.
      on_bad_image: `"skip"` replaces an undecodable image by the next record that decodes, and logs
        it; `"stop"` raises.

    Raises:
      UserError: the source is smaller than a batch, or the arguments contradict each other; while
        iterating, an undecodable image where `on_bad_image` is `"stop"`.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    _check_policy(on_bad_image)
    if len(source) < batch_size:
        raise UserError(
            f"The data set has {len(source):,} examples, fewer than one batch of {batch_size:,}: "
            "choose a smaller batch_size."
        )
    if not 0 <= start_step <= num_steps:
        raise UserError(f"start_step {start_step} must be from 0 to num_steps {num_steps}.")
    if seed < 0:
        raise UserError(f"seed must not be negative, and it is {seed}.")
    # Given explicitly: Grain would derive them from how many transformations come before.
    order_seed, image_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    steps_per_epoch = len(source) // batch_size
    examples = (
        grain.MapDataset.range(len(source))
        .shuffle(seed=order_seed)[: steps_per_epoch * batch_size]
        .repeat(max(math.ceil(num_steps / steps_per_epoch), 1))
        .random_map(_TrainExample(source, transform, on_bad_image), seed=image_seed)
    )
    # Block k holds positions k·b … k·b + b - 1, so every process_count-th block is this process's.
    blocks = examples.batch(rows)[
        start_step * process_count + process_index : num_steps * process_count : process_count
    ]
    return BatchIterator(blocks, source, num_workers, prefetch)


def eval_loader(
    source: Source,
    transform: FixedTransform,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    on_bad_image: BadImagePolicy = "skip",
) -> BatchIterator:
    """Yields this process's part of one pass over a source: every example once, in order.

    All processes make `eval_steps(len(source), batch_size)` batches. With b = batch_size /
    process_count and S = transform.image_size each holds

    - `image`: (b, S, S, 3) uint8, zero where masked;
    - `label`: (b,) int32, 0 where masked;
    - `index`: (b,) int64, -1 in the padding of the last batch;
    - `mask`: (b,) float32, 1 for an example, 0 for padding and for an undecodable image.

    An undecodable image is masked out rather than replaced: a replacement would count some other
    example twice. The accuracy is then over the images that could be read, and the log names those
    that could not.

    Args:
      source: the data set.
      transform: decodes one image.
      batch_size: the GLOBAL batch, of all processes together.
      process_index: this process's number.
      process_count: number of processes; must divide `batch_size`.
      num_workers: worker processes; with 0, `prefetch` threads of this process do the work.
      prefetch: batches made ahead, of each worker.
      on_bad_image: `"skip"` masks an undecodable image out and logs it; `"stop"` raises.

    Raises:
      UserError: the arguments contradict each other; while iterating, an undecodable image where
        `on_bad_image` is `"stop"`.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    _check_policy(on_bad_image)
    padded = eval_steps(len(source), batch_size) * batch_size
    blocks = (
        grain.MapDataset.range(padded)
        .map(_EvalExample(source, transform, on_bad_image))
        .batch(rows)[process_index::process_count]
    )
    return BatchIterator(blocks, source, num_workers, prefetch)


def eval_steps(num_examples: int, batch_size: int) -> int:
    """Batches that cover `num_examples`, the last one padded."""
    return math.ceil(num_examples / batch_size)


class BatchIterator(Iterator[Batch]):
    """Iterates over prefetched batches, and tells of bad images.

    Attributes:
      bad_images: indices of the undecodable records met so far by this process.
    """

    def __init__(
        self, blocks: grain.MapDataset[Batch], source: Source, num_workers: int, prefetch: int
    ):
        """Starts prefetching when the first batch is asked for.

        Args:
          blocks: the batches, by random access.
          source: for the description of bad images.
          num_workers: worker processes, 0 for threads of this one.
          prefetch: batches made ahead, of each worker.
        """
        if num_workers < 0 or prefetch < 1:
            raise UserError(
                f"num_workers must be at least 0 and prefetch at least 1, and they are "
                f"{num_workers} and {prefetch}."
            )
        # Grain's own default reads 500 elements ahead, which are batches here. A worker process
        # needs no threads: its queue is the buffer.
        ahead = 0 if num_workers else prefetch
        dataset = blocks.to_iter_dataset(
            grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        )
        if num_workers:
            # Grain reads this flag of its own, which raises where absl has parsed no command line:
            # in notebooks, tests and programs that do not use absl.
            flags.FLAGS["grain_enable_multiprocess_worker_profiling"].present = True
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=num_workers, per_worker_buffer_size=prefetch
                ),
                worker_init_fn=_initialise_worker,
            )
        self._source = source
        self._batches = _closing(dataset)
        # Also at exit, where nobody calls close: left to the interpreter's shutdown, Grain's
        # iterators find their own modules gone, and complain.
        self._close = weakref.finalize(self, self._batches.close)
        self._in_shared_memory = num_workers > 0
        self.bad_images: set[int] = set()

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except UserError as error:
            # Without the notes on its traceback that Grain adds.
            raise UserError(str(error)) from None
        if self._in_shared_memory:
            # On the CPU JAX aliases host arrays: what outlives its batch must not fill /dev/shm.
            batch = {name: np.array(array) for name, array in batch.items()}
        if "bad_index" in batch:
            self._report(batch["bad_index"][batch["bad_index"] >= 0], "replaced by the next one")
        else:
            self._report(batch["index"][(batch["mask"] == 0) & (batch["index"] >= 0)], "left out")
        return batch

    def close(self) -> None:
        """Stops threads and worker processes; safe to call twice."""
        self._close()

    def _report(self, indices: np.ndarray, what_was_done: str) -> None:
        for index in map(int, indices):
            if index not in self.bad_images:
                self.bad_images.add(index)
                logger.warning(
                    "Cannot decode %s: %s (%d such so far).",
                    self._source.describe(index),
                    what_was_done,
                    len(self.bad_images),
                )


def _closing(dataset: grain.IterDataset[Batch]) -> Generator[Batch, None, None]:
    """Yields from a data set, and when closed lets go of all that works for it."""
    batches = iter(dataset)
    try:
        yield from batches
    finally:
        batches.close()


class _TrainExample:
    """Makes one row of a training batch from a record's index."""

    def __init__(self, source: Source, transform: RandomTransform, on_bad_image: BadImagePolicy):
        self._source = source
        self._transform = transform
        self._on_bad_image = on_bad_image

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        bad_index = -1
        for offset in range(min(len(self._source), _MAX_SUCCESSIVE_BAD_IMAGES)):
            shown = (index + offset) % len(self._source)
            record = self._source[shown]
            try:
                image = self._transform(record.image, rng)
            except UndecodableImageError as error:
                if self._on_bad_image == "stop":
                    raise _bad_image(self._source, shown, error) from error
                bad_index = index
                continue
            return {
                "image": image,
                "label": np.int32(record.label),
                "index": np.int64(shown),
                "bad_index": np.int64(bad_index),
            }
        raise UserError(
            f"From {self._source.describe(index)} on {offset + 1} images in a row cannot be "
            "decoded: check the data set."
        )


class _EvalExample:
    """Makes one row of an evaluation batch from a position, which may lie in the padding."""

    def __init__(self, source: Source, transform: FixedTransform, on_bad_image: BadImagePolicy):
        self._source = source
        self._transform = transform
        self._on_bad_image = on_bad_image

    def __call__(self, position: int) -> dict[str, Any]:
        if position >= len(self._source):
            return self._row(None, label=0, index=-1)
        record = self._source[position]
        try:
            return self._row(self._transform(record.image), record.label, position)
        except UndecodableImageError as error:
            if self._on_bad_image == "stop":
                raise _bad_image(self._source, position, error) from error
            return self._row(None, label=0, index=position)

    def _row(self, image: np.ndarray | None, label: int, index: int) -> dict[str, Any]:
        size = self._transform.image_size
        return {
            "image": np.zeros((size, size, 3), np.uint8) if image is None else image,
            "label": np.int32(label),
            "index": np.int64(index),
            "mask": np.float32(image is not None),
        }


def _bad_image(source: Source, index: int, error: UndecodableImageError) -> UserError:
    return UserError(
        f"Cannot decode {source.describe(index)} ({error}): repair or remove it, or set "
        "on_bad_image to 'skip'."
    )


def _initialise_worker(worker_index: int, worker_count: int) -> None:
    """Keeps a worker process from touching accelerators, and from outliving its parent.

    Workers are spawned, not forked, so they inherit no locks and no runtime; but whatever the main
    module imports they import too.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if (jax := sys.modules.get("jax")) is not None:
        jax.config.update("jax_platforms", "cpu")
    # Ctrl-C and a preemption notice go to the whole process group; what follows from them is the
    # parent's decision, which still needs its batches to get there.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    parent = parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes."
        )
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index {process_index} must be below {process_count}.")
    return batch_size // process_count


def _check_policy(on_bad_image: str) -> None:
    if on_bad_image not in ("skip", "stop"):
        raise UserError(f"on_bad_image must be 'skip' or 'stop', not {on_bad_image!r}.")
