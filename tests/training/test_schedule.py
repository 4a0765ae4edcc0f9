import math

import jax
import numpy as np
import pytest

from convnext_jax.training.schedule import warmup_cosine, warmup_steps_down


@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
def test_is_the_closed_form_at_every_step(warmup):
    total, peak, low = 100, 4e-3, 1e-6
    # `linspace` and a cosine over the rest, in double precision, as the authors' code builds its
    # table.
    cosine = [
        low + 0.5 * (peak - low) * (1 + math.cos(math.pi * i / (total - warmup)))
        for i in range(total - warmup)
    ]
    expected = np.concatenate([np.linspace(0, peak, warmup), cosine])
    schedule = warmup_cosine(peak, low, warmup, total)
    got = jax.vmap(schedule)(np.arange(total, dtype=np.int32))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def test_the_paper_run_from_end_to_end():
    schedule = jax.jit(warmup_cosine(4e-3, 1e-6, 20 * 312, 300 * 312))
    assert schedule(0) == 0
    assert float(schedule(20 * 312 - 1)) == pytest.approx(4e-3, rel=1e-6)
    assert float(schedule(20 * 312)) == pytest.approx(4e-3, rel=1e-6)
    # The last step stands one step before the cosine's end.
    assert float(schedule(300 * 312 - 1)) == pytest.approx(1e-6, rel=1e-4)


def test_a_warmup_that_takes_it_all_is_refused():
    with pytest.raises(ValueError, match="takes 10 of 10 steps"):
        warmup_cosine(1.0, 0.0, 10, 10)


@pytest.mark.parametrize("warmup", [0, 1, 6])
def test_the_rate_falls_by_steps_from_the_warmup_on(warmup):
    total, every, peak, low = 50, 10, 0.1, 2e-4
    schedule = warmup_steps_down(peak, low, warmup, total, decay_rate=0.1, decay_every=every)
    got = jax.vmap(schedule)(np.arange(total, dtype=np.int32))
    flat = [max(peak * 0.1 ** (i // every), low) for i in range(total - warmup)]
    expected = np.concatenate([np.linspace(0, peak, warmup), flat])
    assert got.dtype == np.float32
    # Held to the last bit, since the rates are from a table; the warm-up has its rounding.
    np.testing.assert_array_equal(got[warmup:], np.float32(expected)[warmup:])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert schedule(total + 1000) == got[-1]


def test_a_rate_that_never_falls_is_refused():
    with pytest.raises(ValueError, match="every 0 steps"):
        warmup_steps_down(1.0, 0.0, 0, 10, decay_rate=0.1, decay_every=0)
    with pytest.raises(ValueError, match="takes 10 of 10 steps"):
        warmup_steps_down(1.0, 0.0, 10, 10, decay_rate=0.1, decay_every=2)
