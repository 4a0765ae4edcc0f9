import pytest

from convnext_jax.analysis.corruption_error import (
    ALEXNET_ERRORS,
    SEVERITIES,
    corruption_errors,
    mean_corruption_error,
)


def of_alexnet(factor):
    return {(name, s): factor * e for name, e in ALEXNET_ERRORS.items() for s in SEVERITIES}


def test_alexnet_is_the_unit():
    assert len(ALEXNET_ERRORS) == 15
    assert mean_corruption_error(of_alexnet(1.0)) == pytest.approx(1.0)
    assert mean_corruption_error(of_alexnet(0.5)) == pytest.approx(0.5)


def test_severities_are_added_before_the_division():
    errors = of_alexnet(1.0)
    # AlexNet's own errors by severity, as the authors' users have published them.
    noise = (0.69528, 0.82542, 0.93554, 0.98138, 0.99452)
    errors |= {("gaussian_noise", s): e for s, e in zip(SEVERITIES, noise, strict=True)}
    assert corruption_errors(errors)["gaussian_noise"] == pytest.approx(1.0)
    errors["fog", 1] += 0.5
    assert corruption_errors(errors)["fog"] == pytest.approx(1 + 0.1 / ALEXNET_ERRORS["fog"])
    assert mean_corruption_error(errors) == pytest.approx(1 + 0.1 / ALEXNET_ERRORS["fog"] / 15)
