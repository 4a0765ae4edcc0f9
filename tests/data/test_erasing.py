"""Random erasing's law and its three fillings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.data.erasing import Box, erase, erasing_box

SIZE = 224
IMAGES = 20_000


@pytest.fixture(scope="module")
def boxes():
    keys = jax.random.split(jax.random.key(0), IMAGES)
    return jax.jit(jax.vmap(lambda key: erasing_box(key, SIZE, SIZE, 0.25)))(keys)


def test_a_quarter_of_the_images_loses_a_box(boxes):
    share = np.asarray(boxes.exists).mean()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / IMAGES)
    np.testing.assert_array_equal(boxes.exists, boxes.rows.any(1))
    np.testing.assert_array_equal(boxes.exists, boxes.columns.any(1))


def test_areas_and_aspects_follow_their_law(boxes):
    """Against the same law drawn in NumPy: rejection leaves neither uniform."""
    rng = np.random.default_rng(0)
    area = rng.uniform(0.02, 1 / 3, 200_000)
    aspect = np.exp(rng.uniform(math.log(0.3), -math.log(0.3), 200_000))
    tall, wide = SIZE * np.sqrt(area * aspect), SIZE * np.sqrt(area / aspect)
    fits = (np.round(tall) < SIZE) & (np.round(wide) < SIZE)
    found = np.asarray(boxes.exists)
    rows = np.asarray(boxes.rows).sum(1)[found]
    columns = np.asarray(boxes.columns).sum(1)[found]
    assert rows.max() < SIZE
    assert columns.max() < SIZE
    levels = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(
        np.quantile(rows * columns / SIZE**2, levels), np.quantile(area[fits], levels), atol=0.012
    )
    np.testing.assert_allclose(
        np.quantile(np.log(rows / columns), levels),
        np.quantile(np.log(aspect[fits]), levels),
        atol=0.08,
    )


def test_places_are_uniform(boxes):
    found = np.asarray(boxes.exists)
    rows = np.asarray(boxes.rows)[found]
    # Where a box starts, as a share of where it may.
    start = rows.argmax(1) / (SIZE - rows.sum(1))
    assert start.min() == 0
    assert start.max() == 1
    assert abs(start.mean() - 0.5) < 5 / math.sqrt(12 * len(start))


def test_a_box_that_never_fits_is_left_out():
    # Of one pixel there is no smaller box with sides of whole pixels but the empty ones.
    keys = jax.random.split(jax.random.key(0), 50)
    boxes = jax.vmap(lambda key: erasing_box(key, 1, 1, 1.0))(keys)
    np.testing.assert_array_equal(boxes.exists & boxes.rows.any(1), False)


def box(rows, columns):
    return Box(jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(any(rows)))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_fillings(mode):
    image = jnp.full((3, 60, 80), 9.0)
    rows, columns = np.arange(60) < 40, np.arange(80) >= 20
    erased = np.asarray(erase(jax.random.key(1), image, box(rows, columns), mode))
    inside = rows[:, None] & columns[None, :]
    assert (erased[:, ~inside] == 9).all()
    filling = erased[:, inside]
    if mode == "const":
        assert (filling == 0).all()
    elif mode == "rand":
        assert (filling == filling[:, :1]).all()
        assert len(np.unique(filling)) == 3
    else:
        assert abs(filling.mean()) < 0.06
        assert abs(filling.std() - 1) < 0.05
        assert len(np.unique(filling)) > 0.99 * filling.size
    untouched = erase(jax.random.key(1), image, box(np.zeros(60, bool), np.zeros(80, bool)), mode)
    np.testing.assert_array_equal(untouched, image)
