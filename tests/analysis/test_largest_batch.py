"""The search for the largest batch, against devices whose memory is known."""

import pytest

from convnext_jax.analysis.largest_batch import largest_batch


class Device:
    """Takes images at a cost each, by a law; counts how often it is asked."""

    def __init__(self, law, says_figures=True):
        self.law, self.says_figures = law, says_figures
        self.asked = []

    def needed(self, images):
        self.asked.append(images)
        size = self.law(images)
        return size if size <= 1000 or self.says_figures else None


def linear(images):
    return 100 + 9 * images


def flat_near_the_limit(images):
    """What is saved near the limit by computing things twice, up to a point."""
    size = linear(images)
    return size if size < 900 else round(900 + (size - 900) / 10)


@pytest.mark.parametrize("law", [linear, flat_near_the_limit])
@pytest.mark.parametrize("says_figures", [True, False])
@pytest.mark.parametrize("start", [1, 32, 96, 100, 128, 512])
@pytest.mark.parametrize("unit", [1, 4])
def test_what_is_found_fits_and_hardly_more_would(law, says_figures, start, unit):
    device = Device(law, says_figures)
    start = max(start // unit * unit, unit)
    found = largest_batch(device.needed, 1000, start=start, unit=unit, fixed=100)
    most = max(n for n in range(0, 1000, unit) if law(n) <= 1000)
    tried = set(device.asked) - {start}
    assert all(n % (8 * unit) == 0 or n in (unit, 2 * unit, 4 * unit) for n in tried)
    assert device.asked[0] == start
    assert len(set(device.asked)) == len(device.asked)
    assert all(n % unit == 0 for n in device.asked)
    assert law(found.images) == found.needed <= 1000
    assert found.refused is not None
    assert law(found.refused) > 1000
    assert found.images >= most - max(8 * unit, most / 16)


def test_proportion_needs_few_attempts():
    device = Device(linear)
    found = largest_batch(device.needed, 1000, start=16, unit=1, fixed=100)
    assert (found.images, found.refused) == (96, 104)
    assert device.asked == [16, 96, 104]


def test_small_batches_are_powers_of_two():
    device = Device(lambda images: 100 + 160 * images)
    found = largest_batch(device.needed, 1000, start=8, unit=1, fixed=100)
    assert (found.images, found.refused) == (4, 8)


def test_nothing_fits():
    found = largest_batch(lambda _: None, 1000, start=8, unit=1, fixed=100)
    assert (found.images, found.refused) == (0, 1)


def test_attempts_are_bounded():
    device = Device(lambda images: 100)
    largest_batch(device.needed, 1000, start=1, unit=1, fixed=100, attempts=5)
    assert len(device.asked) == 5
