"""The order of a data set of ImageNet's size: computed, not replayed, even, and without memory."""

import dataclasses
import itertools
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from convnext_jax.data.loader import train_loader
from convnext_jax.data.order import shuffled
from convnext_jax.data.sources import Record

IMAGENET = 1_281_167


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A source of so many records without content."""

    size: int

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        assert 0 <= index < self.size
        return Record(b"", index % 1000)

    def describe(self, index):
        return f"record {index}"


class Pixel:
    """In place of an image, one random pixel."""

    image_size = 1

    def views(self, encoded, rng, count):
        return [rng.integers(0, 256, (1, 1, 3), dtype=np.uint8) for _ in range(count)]


def loader(size, batch_size, start_step, num_steps, **options):
    return train_loader(
        Numbered(size),
        Pixel(),
        batch_size=batch_size,
        start_step=start_step,
        num_steps=num_steps,
        **({"seed": 0} | options),
    )


def indices(*arguments, **options):
    batches = loader(*arguments, **options)
    try:
        return np.concatenate([batch["index"] for batch in batches])
    finally:
        batches.close()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100, 101, 1438])
def test_an_order_is_a_permutation_of_which_any_part_can_be_had(size):
    for epoch in range(10):
        order = shuffled(np.arange(size), size, (1, epoch))
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
        some = np.array([[size - 1, size // 2], [0, size // 3]])
        np.testing.assert_array_equal(shuffled(some, size, (1, epoch)), order[some])


def test_all_orders_of_a_small_data_set_are_as_likely():
    orders = Counter(tuple(shuffled(np.arange(4), 4, (9, epoch))) for epoch in range(4800))
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 1e-4


def test_the_order_stays_what_it_is():
    """Another order would make a resumed run show some images twice and others not at all."""
    found = shuffled(np.arange(5), IMAGENET, (123, 4))
    assert found.tolist() == [1113626, 1187506, 249110, 1137929, 1083146]


def test_step_300_000_is_there_at_once():
    begun = time.monotonic()
    for start_step in (0, 300_000):
        batches = loader(IMAGENET, 1024, start_step, 375_300, process_index=3, process_count=64)
        assert len(next(batches)["index"]) == 16
        batches.close()
    assert time.monotonic() - begun < 2.0


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_record_is_shown_once_an_epoch_on_any_number_of_processes(processes):
    size, batch = 1200, 120
    for epoch in range(3):
        parts = [
            indices(
                size,
                batch,
                epoch * 10,
                (epoch + 1) * 10,
                process_index=process,
                process_count=processes,
            )
            for process in range(processes)
        ]
        assert {len(part) for part in parts} == {size // processes}
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(size))


@pytest.mark.parametrize("size", [50_000, IMAGENET])
def test_epochs_are_in_uncorrelated_orders(size):
    rows, epochs = 2500, 6
    steps_per_epoch = size // rows
    orders = [
        indices(size, rows, epoch * steps_per_epoch, epoch * steps_per_epoch + 1)
        for epoch in range(epochs)
    ]
    orders.append(indices(size, rows, 0, 1, seed=1))
    pairs = list(itertools.combinations(orders, 2))
    pairs += [(order, np.arange(rows)) for order in orders]
    pairs += [(order[1:], order[:-1]) for order in orders]
    # In standard deviations of the rank correlation of independent orders. That one of 35 such
    # numbers exceeds 4.5 happens by chance once in 4,000 times.
    found = [stats.spearmanr(a, b).statistic * np.sqrt(len(a)) for a, b in pairs]
    assert np.abs(found).max() < 4.5


def test_no_part_of_the_data_set_comes_first():
    """Any tenth of an epoch's steps holds about a tenth of each tenth of the records."""
    order = indices(IMAGENET, 5000, 100, 101)
    counts = np.bincount(order * 10 // IMAGENET, minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-4


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_300_epochs_of_imagenet_do_not_grow():
    """One process of 2,048 walks through all of a run's steps: 93,600, two rows each."""
    steps = 300 * (IMAGENET // 4096)
    batches = loader(IMAGENET, 4096, 0, steps, process_count=2048)
    curve = []
    for step, _ in enumerate(batches):
        if step % (steps // 20) == 0:
            curve.append(resident_bytes() / 2**20)
    assert step == steps - 1
    print("MiB resident:", " ".join(f"{size:.1f}" for size in curve))
    assert max(curve[4:]) - min(curve[2:4]) < 4.0
