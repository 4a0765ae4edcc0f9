"""What the policies draw: counts, magnitudes and arguments against their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.data.operations import OPERATIONS
from convnext_jax.data.policies import (
    ColorJitter,
    PolicySequence,
    RandAugment,
    ThreeAugment,
    TrivialAugmentWide,
    parse_policy,
)
from convnext_jax.errors import UserError

HEIGHT, WIDTH = 200, 100
IMAGES = 20_000


def draws(policy, images=IMAGES):
    keys = jax.random.split(jax.random.key(0), images)
    draw = jax.jit(jax.vmap(lambda key: policy.draw(key, HEIGHT, WIDTH)))
    return [np.asarray(x) for x in draw(keys)]


def assert_uniform(counts, trials):
    """All within five standard deviations of equal shares."""
    share = 1 / len(counts)
    deviation = np.sqrt(trials * share * (1 - share))
    assert np.abs(counts - trials * share).max() < 5 * deviation


def test_the_papers_notation():
    assert parse_policy("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 0.5, 2, 0.5, True)
    assert parse_policy("rand-m7-n3-mstd1-inc1") == RandAugment(7.0, 1.0, 3, 0.5, True)
    assert parse_policy("rand-p0.8-mstd101") == RandAugment(10.0, 101.0, 2, 0.8, False)
    assert parse_policy("ta_wide") == TrivialAugmentWide()
    assert parse_policy("3-augment") == ThreeAugment()
    assert parse_policy("") is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("augmix-m3", "config.augment.policy is 'augmix-m3'"),
        ("rand-m9-w0", "'w0' is unknown"),
        ("rand-m9-tweights", "'tweights' is unknown"),
        ("rand-m9-mmax30", "'mmax30' is unknown"),
        ("rand-m9-", "'' is unknown"),
        ("rand-m", "'m' is unknown"),
        ("rand-m11", "'m11' is out of range"),
        ("rand-n0", "'n0' is out of range"),
        ("rand-n1.5", "n must be a whole number"),
        ("rand-inc2", "'inc2' is out of range"),
        ("rand-p2", "'p2' is out of range"),
        ("rand-m9-m8", "m is given twice"),
    ],
)
def test_unknown_parts_are_named(text, wanted):
    with pytest.raises(UserError, match=wanted):
        parse_policy(text)


def test_all_names_are_operations():
    jitter = ColorJitter(0.3)
    for policy in (RandAugment(), TrivialAugmentWide(), ThreeAugment(), jitter):
        assert set(policy.names) <= set(OPERATIONS)
    assert len(RandAugment().names) == 16
    assert len(TrivialAugmentWide().names) == 14


# Arguments at whole magnitudes 0, 1, 5, 9 and 10, from the reference's table.
TABLE = {
    "Rotate": (0, 3, 15, 27, 30),
    "ShearX": (0, 0.03, 0.15, 0.27, 0.3),
    "ShearY": (0, 0.03, 0.15, 0.27, 0.3),
    "TranslateX": (0, 4.5, 22.5, 40.5, 45),
    "TranslateY": (0, 9, 45, 81, 90),
    "Posterize": (4, 4, 2, 1, 0),
    "Solarize": (256, 231, 128, 26, 0),
    "SolarizeAdd": (0, 11, 55, 99, 110),
    "Color": (1, 1.09, 1.45, 1.81, 1.9),
    "Contrast": (1, 1.09, 1.45, 1.81, 1.9),
    "Brightness": (1, 1.09, 1.45, 1.81, 1.9),
    "Sharpness": (1, 1.09, 1.45, 1.81, 1.9),
    "AutoContrast": (0, 0, 0, 0, 0),
}
NOT_INCREASING = {
    "Posterize": (0, 0, 2, 3, 4),
    "Solarize": (0, 25, 128, 230, 256),
    "Color": (0.1, 0.28, 1.0, 1.72, 1.9),
}


@pytest.mark.parametrize("increasing", [True, False])
def test_arguments_are_those_of_the_table(increasing):
    policy = RandAugment(increasing=increasing)
    magnitudes = jnp.array([0.0, 1.0, 5.0, 9.0, 10.0])
    for name, wanted in (TABLE if increasing else NOT_INCREASING).items():
        found = policy.argument(name, magnitudes, jnp.ones(5), HEIGHT, WIDTH)
        # Factors are multiples of 2⁻¹³.
        np.testing.assert_allclose(found, wanted, atol=2**-14 + 1e-5, err_msg=name)
    negative = policy.argument("Color", magnitudes, -jnp.ones(5), HEIGHT, WIDTH)
    if increasing:
        np.testing.assert_allclose(negative, (1, 0.91, 0.55, 0.19, 0.1), atol=2**-14 + 1e-6)


def test_rand_augment_counts_magnitudes_and_signs():
    policy = RandAugment(9.0, 0.5, 2, 0.5, True)
    operations, arguments = draws(policy)
    assert operations.shape == arguments.shape == (IMAGES, 2)
    counts = np.bincount(operations.ravel(), minlength=16)
    trials = operations.size
    assert abs(counts[0] - trials / 2) < 5 * np.sqrt(trials / 4)
    assert_uniform(counts[1:], counts[1:].sum())
    # Both draws are independent: both skipped in a quarter of the images.
    assert abs((operations == 0).all(1).mean() - 0.25) < 0.02
    assert abs((operations[:, 0] == operations[:, 1])[operations[:, 0] > 0].mean() - 1 / 30) < 0.01

    degrees = arguments[operations == policy.names.index("Rotate")]
    assert abs((degrees > 0).mean() - 0.5) < 0.07
    magnitudes = np.abs(degrees) / 3
    # N(9, .5) cut at 10, which is two standard deviations up: the mean and the share at the bound.
    assert magnitudes.max() == pytest.approx(10, rel=1e-6)
    assert abs(magnitudes.mean() - 8.996) < 0.07
    assert abs(magnitudes.std() - 0.487) < 0.05
    assert abs((magnitudes > 9.9999).mean() - 0.0228) < 0.02
    bits = arguments[operations == policy.names.index("Posterize")]
    assert set(bits) <= {0.0, 1.0, 2.0}
    factors = arguments[operations == policy.names.index("Color")]
    np.testing.assert_array_equal(factors * 2**13, np.round(factors * 2**13))
    assert set(np.sign(factors - 1)) == {-1.0, 1.0}


def test_rand_augment_with_uniform_magnitudes():
    policy = parse_policy("rand-m8-mstd101-n1-p1")
    operations, arguments = draws(policy)
    assert (operations > 0).all()
    magnitudes = np.abs(arguments[operations == policy.names.index("Rotate")]) / 3
    assert abs(magnitudes.mean() - 4) < 0.35
    assert magnitudes.max() < 8


def test_trivial_augment_wide():
    policy = TrivialAugmentWide()
    operations, arguments = draws(policy)
    assert operations.shape == (IMAGES, 1)
    assert_uniform(np.bincount(operations.ravel(), minlength=14), IMAGES)

    def of(name):
        return arguments[operations == policy.names.index(name)]

    # 31 strengths both ways, of which 0 is one.
    np.testing.assert_allclose(np.unique(of("Rotate")), np.linspace(-135, 135, 61), atol=1e-4)
    np.testing.assert_allclose(np.unique(of("ShearY")), np.linspace(-0.99, 0.99, 61), atol=1e-6)
    assert set(np.unique(of("TranslateX"))) == set(
        np.trunc(np.linspace(-32, 32, 61)).astype(np.float32)
    )
    assert set(np.unique(of("Posterize"))) == set(range(2, 9))
    assert of("Solarize").min() == 0
    assert of("Solarize").max() == 255
    np.testing.assert_allclose(
        np.unique(of("Contrast")), np.linspace(0.01, 1.99, 61), atol=2**-14 + 1e-6
    )
    assert not of("Equalize").any()


def test_three_augment_and_color_jitter_in_sequence():
    policy = PolicySequence((ThreeAugment(), ColorJitter(0.3)))
    assert policy.names == (
        *("Grayscale", "Solarize", "GaussianBlur"),
        *("Brightness", "Contrast", "Color"),
    )
    operations, arguments = draws(policy)
    assert operations.shape == (IMAGES, policy.length) == (IMAGES, 4)
    assert_uniform(np.bincount(operations[:, 0], minlength=3), IMAGES)
    assert set(arguments[operations == 1]) == {128.0}
    sigma = arguments[operations == 2]
    assert 0.1 <= sigma.min() < 0.11 < 1.99 < sigma.max() <= 2.0

    orders, counts = np.unique(operations[:, 1:], axis=0, return_counts=True)
    assert {tuple(sorted(order)) for order in orders.tolist()} == {(3, 4, 5)}
    assert_uniform(counts, IMAGES)
    factors = arguments[:, 1:]
    assert factors.min() >= 0.7 - 2**-14
    assert factors.max() <= 1.3 + 2**-14
    assert abs(factors.mean() - 1) < 0.005
