"""How many images a second a host makes, with the loader, the workers and the data of the run."""

from __future__ import annotations

import contextlib
import time

import jax
from ml_collections import ConfigDict

from convnext_jax import experiment
from convnext_jax.data.loader import default_workers, train_loader
from convnext_jax.data.sources import Source
from convnext_jax.preflight.examination import Finding, Status

# A block of so many images is made at a time: the pace hardly depends on it, the wait for it does.
_ROWS = 32
# Rounds of one block from each worker, before the clock starts: their queues fill at the start.
_WARM_UP_ROUNDS = 4


def pace(
    config: ConfigDict, source: Source, wanted: float | None, seconds: float
) -> Finding[float]:
    """Decodes training batches for a while.

    Args:
      config: of the run.
      source: its training split.
      wanted: images a second that this process's devices will take, or None if nobody knows.
      seconds: how long to look; start-up comes on top.

    Returns:
      Images a second.

    Raises:
      UserError: whatever the loader has to say.
    """
    process, processes = jax.process_index(), jax.process_count()
    workers = default_workers() if config.data.workers is None else config.data.workers
    repeats = config.data.repeats
    rows = max(min(config.batch_size // processes, _ROWS) // repeats, 1) * repeats
    batches = train_loader(
        source,
        experiment.train_transform(config),
        batch_size=rows * processes,
        seed=config.seed,
        start_step=0,
        num_steps=2**31,
        repeats=repeats,
        process_index=process,
        process_count=processes,
        num_workers=config.data.workers,
        on_bad_image=config.data.on_bad_image,
    )
    with contextlib.closing(batches):
        begun = time.perf_counter()
        for _ in range(max(workers, 1) * _WARM_UP_ROUNDS):
            next(batches)
        count, warm = 0, time.perf_counter()
        # In whole rounds, since the loader takes from its workers in turn.
        while (elapsed := time.perf_counter() - warm) < seconds or not count:
            for _ in range(max(workers, 1)):
                next(batches)
                count += rows
    made = count / elapsed
    hands = {0: "threads of this process", 1: "one worker process"}.get(
        workers, f"{workers} worker processes"
    )
    return judged(made, wanted, f"{made:,.0f} images/s by {hands}, after {warm - begun:.1f} s")


def judged(made: float, wanted: float | None, detail: str) -> Finding[float]:
    """Holds a pace to what the devices take.

    Args:
      made: images a second.
      wanted: those that the devices take, or None.
      detail: says where they were made.

    Returns:
      A warning where the devices would wait, a failure where they would for more than half of the
      time.
    """
    if wanted is None:
        return Finding(detail, made, measure=made)
    detail += f"; by the plan the devices take {wanted:,.0f}"
    if made >= wanted:
        return Finding(detail, made, measure=made)
    return Finding(
        f"{detail}, so they would wait {1 - made / wanted:.0%} of the time",
        made,
        Status.FAILED if made < wanted / 2 else Status.WARNING,
        "if the host's cores are busy: more of them, or config.data.decoder='fast'; if they are "
        "not: a faster disk, or more config.data.workers",
        measure=made,
    )
