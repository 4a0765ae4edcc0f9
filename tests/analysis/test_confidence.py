import math

import pytest

from convnext_jax.analysis.confidence import wilson_interval

Z = 1.959963984540054


@pytest.mark.parametrize(("hits", "trials"), [(1, 500), (41, 50), (41050, 50000), (499, 500)])
def test_the_limits_are_where_the_score_test_just_rejects(hits, trials):
    share = hits / trials
    for limit in (limits := wilson_interval(hits, trials)):
        assert abs(share - limit) == pytest.approx(
            Z * math.sqrt(limit * (1 - limit) / trials), rel=1e-9
        )
    assert limits[0] < share < limits[1]


def test_the_ends_stay_within_their_range():
    low, high = wilson_interval(0, 10)
    assert (low, high) == (0.0, pytest.approx(Z**2 / (10 + Z**2)))
    low, high = wilson_interval(10, 10)
    assert (low, high) == (pytest.approx(10 / (10 + Z**2)), 1.0)


def test_a_published_accuracy():
    """82.1 % of ImageNet's 50,000: a third of a percent either way."""
    low, high = wilson_interval(41050, 50000)
    assert (round(low, 4), round(high, 4)) == (0.8176, 0.8243)
