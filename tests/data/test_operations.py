"""Every operation against Pillow's, on photographs and on what is hard for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from convnext_jax.data import histogram_ops
from convnext_jax.data.color_ops import round_factor
from convnext_jax.data.operations import OPERATIONS, apply_operations
from convnext_jax.data.pillow_ops import AFFINE, POINTWISE, pillow

HEIGHT, WIDTH = 48, 64
FILL = (124, 116, 104)
FACTORS = [float(round_factor(jnp.float32(f))) for f in (0.0, 0.1, 0.55, 1.0, 1.37, 1.9)]
ARGUMENTS = {
    "Posterize": [0, 1, 2, 4, 8],
    "Solarize": [0, 26, 76.5, 128, 255, 256],
    "SolarizeAdd": [0, 11, 99, 110],
    "Color": FACTORS,
    "Contrast": FACTORS,
    "Brightness": FACTORS,
    "Sharpness": FACTORS,
    "GaussianBlur": [0.1, 0.5, 1.0, 1.4, 2.0],
    "Rotate": [0.0, -3.0, 27.0, -30.0, 100.0, 135.0, 180.0],
    "ShearX": [0.0, 0.03, -0.27, 0.3, 0.99, -0.99],
    "ShearY": [0.0, 0.03, -0.27, 0.3, 0.99, -0.99],
    "TranslateX": [0.0, 1.0, -2.5, 28.3, -28.3, 100.0],
    "TranslateY": [0.0, 1.0, -2.5, 20.3, -20.3, -100.0],
}


@functools.cache
def images() -> np.ndarray:
    """Two photographs, gradients, one colour, few colours, and dense noise of narrow range."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    found = [
        np.asarray(Image.fromarray(photo).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        for photo in load_sample_images().images
    ]
    found += [
        np.stack([4 * x, 5 * y, 2 * x + 2 * y], axis=-1),
        np.full((HEIGHT, WIDTH, 3), (0, 7, 255)),
        np.where((x + y)[..., None] % 2, (250, 3, 128), (4, 200, 128)),
        rng.integers((0, 1, 20), (106, 189, 126), (HEIGHT, WIDTH, 3)),
    ]
    return np.stack(found).astype(np.uint8)


@functools.cache
def compiled(name: str, interpolation: str):
    def one(image, argument):
        return OPERATIONS[name](image.transpose(2, 0, 1), argument, FILL, interpolation)

    return jax.jit(lambda batch, arguments: jax.lax.map(lambda row: one(*row), (batch, arguments)))


def both(name: str, interpolation: str) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """(argument, ours, Pillow's), the images int32 (H, W, 3), for every image and argument."""
    arguments = ARGUMENTS.get(name, [0.0])
    pairs = [(image, argument) for image in images() for argument in arguments]
    batch = np.stack([image for image, _ in pairs])
    given = np.array([argument for _, argument in pairs], np.float32)
    ours = np.asarray(compiled(name, interpolation)(batch, given)).transpose(0, 2, 3, 1)
    return [
        (argument, mine.astype(int), pillow(name, image, float(a), FILL, interpolation).astype(int))
        for (image, argument), a, mine in zip(pairs, given, ours, strict=True)
    ]


def test_every_operation_is_compared():
    assert set(POINTWISE) | set(AFFINE) | {"Rotate", "Identity"} == set(OPERATIONS)


@pytest.mark.parametrize("name", sorted(set(POINTWISE) - {"GaussianBlur"}))
def test_pointwise_and_histogram_operations_are_pillows_to_the_bit(name):
    for argument, ours, theirs in both(name, "bicubic"):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{name} {argument}")


def test_blur_is_pillows():
    for sigma, ours, theirs in both("GaussianBlur", "bicubic"):
        assert np.abs(ours - theirs).max() <= 1, sigma
        assert np.abs(ours - theirs).mean() < 0.01, sigma


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", [*sorted(AFFINE), "Rotate"])
def test_geometric_operations_are_within_a_tenth_of_a_level(name, interpolation):
    for argument, ours, theirs in both(name, interpolation):
        # Where fill begins is decided by coordinates in float32 here, float64 there.
        edge = (ours == FILL).all(-1) != (theirs == FILL).all(-1)
        assert edge.mean() < 0.005, (name, argument)
        difference = np.abs(ours - theirs)[~edge]
        assert difference.max() <= 1, (name, argument)
        assert difference.mean() < 0.1, (name, argument)


@pytest.mark.parametrize("name", [*sorted(AFFINE), "Rotate"])
def test_a_geometric_operation_by_nothing_is_the_identity(name):
    ours = compiled(name, "bicubic")(images(), np.zeros(len(images()), np.float32))
    np.testing.assert_array_equal(np.asarray(ours).transpose(0, 2, 3, 1), images())


def test_autocontrast_for_every_range():
    """Pillow's float64 table, with all its rounding, for a sample of all pairs (lo, hi)."""
    rng = np.random.default_rng(1)
    low = rng.integers(0, 255, (200, 3))
    high = rng.integers(low + 1, 256)
    ramps = low[..., None] + (np.arange(256) % (high - low + 1)[..., None])
    batch = ramps.astype(np.uint8).reshape(200, 3, 16, 16)
    ours = jax.jit(lambda batch: jax.lax.map(histogram_ops.autocontrast, batch))(batch)
    for image, mine in zip(batch, ours, strict=True):
        theirs = pillow("AutoContrast", image.transpose(1, 2, 0), 0.0, FILL, "bicubic")
        np.testing.assert_array_equal(mine, theirs.transpose(2, 0, 1))


def test_operations_are_applied_in_order_and_by_row():
    names = ("Identity", "Invert", "Posterize")
    operations = jnp.array([[0, 0], [1, 2], [2, 1]])
    arguments = jnp.array([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    image = images()[0].transpose(2, 0, 1)

    @jax.jit
    def run(row):
        return apply_operations(
            image, operations, arguments, row, names=names, fill=FILL, interpolation="bicubic"
        )

    np.testing.assert_array_equal(run(0), image)
    np.testing.assert_array_equal(run(1), (255 - image) & 0b11000000)
    np.testing.assert_array_equal(run(2), 255 - (image & 0b11000000))
