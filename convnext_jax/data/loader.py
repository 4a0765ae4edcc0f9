"""Batches from a source, as a pure function of (seed, step).

The data position is the step: no iterator state is saved, and none is needed. Examples are numbered
by a global position that runs through the epochs. An epoch is one shuffle of the source, cut to
whole global batches (`N // batch_size` steps, the reference's rule; what is cut off is another
remainder in each epoch, since the order is). The global batch of step s is positions
`s·B … s·B + B - 1`; each process makes its contiguous block of rows, so that the assembled global
array is the same, row by row, on any number of processes. The randomness of an image depends on
(seed, position) alone, not on the process or worker that happens to make it.

With repeated augmentation (R = `repeats` > 1) a position stands for R neighbouring rows: one image,
decoded once and cropped R times. A step then takes B / R images from the order, so that a pass over
the source lasts R times as many steps. What counts as an epoch elsewhere (the schedule, the
durations) stays N // B steps: an epoch shows the next N / R images R times each, as in DeiT and
timm. There they are drawn anew for each epoch; here R epochs show every image R times.
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
from pathlib import Path

import grain
import numpy as np
from absl import flags

from convnext_jax.data.batches import (
    BadImagePolicy,
    Batch,
    EvalBatch,
    FixedTransform,
    RandomTransform,
    TrainBatch,
)
from convnext_jax.data.sources import Source
from convnext_jax.errors import UserError

logger = logging.getLogger(__name__)

# Enough to feed the accelerators of any one host; each worker more makes whole batches ahead.
_MAX_DEFAULT_WORKERS = 64

# Where worker processes put their batches.
_SHARED_MEMORY = Path("/dev/shm")


def train_loader(
    source: Source,
    transform: RandomTransform,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    repeats: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int | None = 0,
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
      repeats: rows that show one image, each augmented on its own; must divide a process's rows.
      process_index: this process's number.
      process_count: number of processes; must divide `batch_size`.
      num_workers: worker processes; with 0, `prefetch` threads of this process do the work. None
        stands for `default_workers()`.
      prefetch: batches made ahead, of each worker.
      on_bad_image: `"skip"` replaces an undecodable image by the next record that decodes, and logs
        it; `"stop"` raises.

    Raises:
      UserError: the source is smaller than a batch, or the arguments contradict each other; while
        iterating, an undecodable image where `on_bad_image` is `"stop"`.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    _check_policy(on_bad_image)
    if repeats < 1 or rows % repeats:
        raise UserError(
            f"repeats must divide the {rows} images that each process adds to a batch, and it is "
            f"{repeats}."
        )
    images_per_step = batch_size // repeats
    if len(source) < images_per_step:
        raise UserError(
            f"The data set has {len(source):,} examples, fewer than one batch of "
            f"{images_per_step:,}: choose a smaller batch_size."
        )
    if not 0 <= start_step <= num_steps:
        raise UserError(f"start_step {start_step} must be from 0 to num_steps {num_steps}.")
    if seed < 0:
        raise UserError(f"seed must not be negative, and it is {seed}.")
    make_batch = TrainBatch(source, transform, rows, images_per_step, repeats, seed, on_bad_image)
    # Block k holds positions k·b … k·b + b - 1, so every process_count-th block is this process's.
    blocks = range(start_step * process_count + process_index, num_steps * process_count)
    return BatchIterator(make_batch, blocks[::process_count], source, num_workers, prefetch)


def eval_loader(
    source: Source,
    transform: FixedTransform,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int | None = 0,
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
      num_workers: worker processes; with 0, `prefetch` threads of this process do the work. None
        stands for `default_workers()`.
      prefetch: batches made ahead, of each worker.
      on_bad_image: `"skip"` masks an undecodable image out and logs it; `"stop"` raises.

    Raises:
      UserError: the arguments contradict each other; while iterating, an undecodable image where
        `on_bad_image` is `"stop"`.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    _check_policy(on_bad_image)
    make_batch = EvalBatch(source, transform, rows, on_bad_image)
    blocks = range(process_index, eval_steps(len(source), batch_size) * process_count)
    return BatchIterator(make_batch, blocks[::process_count], source, num_workers, prefetch)


def eval_steps(num_examples: int, batch_size: int) -> int:
    """Batches that cover `num_examples`, the last one padded."""
    return math.ceil(num_examples / batch_size)


def default_workers() -> int:
    """One worker process for each core that this process may use but one, and at least one."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # a scheduler may have left it fewer than there are
    else:
        cores = os.cpu_count() or 1
    return min(max(cores - 1, 1), _MAX_DEFAULT_WORKERS)


class BatchIterator(Iterator[Batch]):
    """Iterates over prefetched batches, and tells of bad images.

    Attributes:
      bad_images: indices of the undecodable records met so far by this process.
    """

    def __init__(
        self,
        make_batch: TrainBatch | EvalBatch,
        blocks: range,
        source: Source,
        num_workers: int | None,
        prefetch: int,
    ):
        """Starts prefetching when the first batch is asked for.

        Args:
          make_batch: makes a batch from its number.
          blocks: the numbers of the batches to make.
          source: for the description of bad images.
          num_workers: worker processes, 0 for threads of this one, None for `default_workers()`.
          prefetch: batches made ahead, of each worker.
        """
        if num_workers is None:
            num_workers = default_workers()
        if num_workers < 0 or prefetch < 1:
            raise UserError(
                f"num_workers must be at least 0 and prefetch at least 1, and they are "
                f"{num_workers} and {prefetch}."
            )
        # Grain's own default reads 500 elements ahead, which are batches here. A worker process
        # needs no threads: its queue is the buffer.
        ahead = 0 if num_workers else prefetch
        make_batch.in_shared_memory = num_workers > 0
        dataset = (
            grain.MapDataset.range(blocks.start, blocks.stop, blocks.step)
            .map(make_batch)
            .to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead))
        )
        if num_workers:
            _require_shared_memory(num_workers, prefetch, make_batch.image_bytes)
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


def _require_shared_memory(num_workers: int, prefetch: int, batch_bytes: int) -> None:
    """Sees to it that the workers' batches have room; without it they would die of a bus error."""
    if not _SHARED_MEMORY.is_dir():
        return
    # Of each worker: those in its queue, one in the making, and one on its way.
    needed = num_workers * (prefetch + 2) * batch_bytes
    status = os.statvfs(_SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise UserError(
            f"{num_workers} worker processes need up to {math.ceil(needed / 2**20):,} MiB of "
            f"shared memory for their batches, and {_SHARED_MEMORY} has {free // 2**20:,} MiB "
            "free: enlarge it (docker run --shm-size=…, or mount -o remount,size=…), or set fewer "
            "workers (0 for threads)."
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
