"""Translation, shear and rotation of one image, as Pillow's `Image.transform` does them.

Pillow looks up, for each pixel's centre, where it comes from, and interpolates there between the
nearest 2 × 2 pixels ("bilinear") or 4 × 4 ("bicubic", Keys' kernel with a = -1), without antialias.
A place outside of the image takes the fill colour; a neighbour outside of it is the pixel at the
edge. Results are cut off to whole grey levels, not rounded. So it is here; what differs is that
places and sums are computed in float32 rather than float64, which moves few pixels by one level.

No gathers: a TPU reads single pixels slowly, but multiplies matrices fast. Where pixels must only
be moved, by one-hot matrices, bfloat16 products are exact, since grey levels have eight bits.
Translation and shear move each row (or column) by a number of its own: blocks of rows by a whole
number, by a product; each row by the little that remains, by a weighted sum of neighbours. A
rotation takes the surroundings of each block of 32 × 32 pixels, by two products; interpolates along
the columns, by a product; and along the rows, by a weighted sum.
"""

import math

import jax
import jax.numpy as jnp

INTERPOLATIONS = ("bilinear", "bicubic")

# Rows that are sheared by one product. More of them need fewer products, but more neighbours each.
_SHEAR_ROWS = 4
# Pixels a side that are rotated by one product. Their surroundings, 56 pixels a side, in two
# bfloat16 terms, fit the 128 rows of a TPU's matrix unit.
_ROTATED_BLOCK = 32

# What a sum of weighted levels may lack through rounding. Without it a flat area, whose sums are
# whole numbers, would lose a level wherever the rounding goes down.
_TOLERANCE = 2.0**-8


def _kernel(distance: jax.Array, interpolation: str) -> jax.Array:
    """Weight of a neighbour at a distance in pixels, float32."""
    z = jnp.abs(distance)
    if interpolation == "bilinear":
        return jnp.maximum(0.0, 1.0 - z)
    near = 1.0 + z * z * (z - 2.0)
    far = 4.0 + z * (-8.0 + z * (5.0 - z))
    return jnp.where(z < 1.0, near, jnp.where(z < 2.0, far, 0.0))


def _to_levels(values: jax.Array, inside: jax.Array, fill: tuple[int, ...]) -> jax.Array:
    levels = jnp.clip(values + _TOLERANCE, 0.0, 255.0).astype(jnp.uint8)
    colour = jnp.asarray(fill, jnp.uint8)[:, None, None]
    return jnp.where(inside[None], levels, colour)


def _move_rows(
    image: jax.Array,
    offsets: jax.Array,
    fill: tuple[int, ...],
    interpolation: str,
    *,
    rows: int,
    span: int,
) -> jax.Array:
    """Row y of the result is row y of the image, read at x + offsets[y].

    Args:
      image: uint8 (3, H, W).
      offsets: float32 (H,), in pixels.
      fill: three levels.
      interpolation: "bilinear" or "bicubic".
      rows: how many are moved by one product.
      span: a bound, in whole pixels, of the difference between the offsets of that many rows.

    Returns:
      uint8 (3, H, W).
    """
    _, height, width = image.shape
    # Farther away there is nothing but fill.
    offsets = jnp.clip(offsets, -2.0 * width, 2.0 * width)
    blocks = -(-height // rows)
    padding = blocks * rows - height
    by_block = jnp.pad(offsets, (0, padding), mode="edge").reshape(blocks, rows)
    whole = jnp.floor(by_block.min(axis=1))
    rest = (by_block - whole[:, None]).reshape(-1)[:height]

    # From one neighbour before the leftmost pixel to two behind the rightmost.
    taps = 4 + span
    source = jnp.arange(width + taps - 1)[None, :] - 1 + whole.astype(jnp.int32)[:, None]
    source = jnp.clip(source, 0, width - 1)
    one_hot = jnp.arange(width)[None, :, None] == source[:, None, :]
    pixels = jnp.pad(image, ((0, 0), (0, padding), (0, 0))).astype(jnp.bfloat16)
    moved = jnp.einsum(
        "cbru,bux->bcrx",
        pixels.reshape(3, blocks, rows, width),
        one_hot.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    moved = moved.swapaxes(0, 1).reshape(3, blocks * rows, -1)[:, :height]

    weights = _kernel(jnp.arange(-1.0, taps - 1.0)[None, :] - rest[:, None], interpolation)
    total = jnp.zeros(image.shape, jnp.float32)
    for tap in range(taps):
        total += weights[None, :, tap, None] * moved[..., tap : tap + width]
    place = jnp.arange(width, dtype=jnp.float32)[None, :] + 0.5 + offsets[:, None]
    return _to_levels(total, (place >= 0) & (place < width), fill)


def _transposed(image: jax.Array) -> jax.Array:
    return image.swapaxes(1, 2)


def translate_x(
    image: jax.Array, pixels: jax.Array, fill: tuple[int, ...], interpolation: str
) -> jax.Array:
    """Moves an image to the left by a number of pixels.

    Args:
      image: uint8 (3, H, W).
      pixels: float32 scalar.
      fill: the levels of what comes in.
      interpolation: "bilinear" or "bicubic".

    Returns:
      uint8 (3, H, W).
    """
    offsets = jnp.full(image.shape[1], pixels)
    return _move_rows(image, offsets, fill, interpolation, rows=image.shape[1], span=0)


def translate_y(
    image: jax.Array, pixels: jax.Array, fill: tuple[int, ...], interpolation: str
) -> jax.Array:
    """Moves an image up; arguments as for `translate_x`."""
    return _transposed(translate_x(_transposed(image), pixels, fill, interpolation))


def shear_x(
    image: jax.Array, factor: jax.Array, fill: tuple[int, ...], interpolation: str
) -> jax.Array:
    """Moves each row to the left by `factor` times its distance from the upper edge.

    Args:
      image: uint8 (3, H, W).
      factor: float32 scalar in [-1, 1].
      fill: the levels of what comes in.
      interpolation: "bilinear" or "bicubic".

    Returns:
      uint8 (3, H, W).
    """
    height = image.shape[1]
    offsets = factor * (jnp.arange(height, dtype=jnp.float32) + 0.5)
    return _move_rows(image, offsets, fill, interpolation, rows=_SHEAR_ROWS, span=_SHEAR_ROWS)


def shear_y(
    image: jax.Array, factor: jax.Array, fill: tuple[int, ...], interpolation: str
) -> jax.Array:
    """Moves each column up; arguments as for `shear_x`."""
    return _transposed(shear_x(_transposed(image), factor, fill, interpolation))


def rotate(
    image: jax.Array, degrees: jax.Array, fill: tuple[int, ...], interpolation: str
) -> jax.Array:
    """Rotates an image about its centre, counterclockwise.

    Args:
      image: uint8 (3, H, W).
      degrees: float32 scalar.
      fill: the levels of the corners that come in.
      interpolation: "bilinear" or "bicubic".

    Returns:
      uint8 (3, H, W).
    """
    _, height, width = image.shape
    rows, columns = -(-height // _ROTATED_BLOCK), -(-width // _ROTATED_BLOCK)
    block_h, block_w = -(-height // rows), -(-width // columns)
    # What a block may come from, with a neighbour before and two behind; whole tiles of eight.
    window = 8 * math.ceil((math.hypot(block_h, block_w) + 5) / 8)

    # The centre of the pixel at (x, y) from the image's centre comes from (cos x - sin y,
    # sin x + cos y). Sources are counted from the first pixel's centre.
    angle = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    y = jnp.arange(rows * block_h, dtype=jnp.float32)[:, None] + (0.5 - height / 2)
    x = jnp.arange(columns * block_w, dtype=jnp.float32)[None, :] + (0.5 - width / 2)
    source_x = cos * x - sin * y + (width / 2 - 0.5)
    source_y = sin * x + cos * y + (height / 2 - 0.5)
    inside = (
        (source_x >= -0.5)
        & (source_x < width - 0.5)
        & (source_y >= -0.5)
        & (source_y < height - 0.5)
    )

    def by_block(grid: jax.Array) -> jax.Array:
        grid = grid.reshape(rows, block_h, columns, block_w).swapaxes(1, 2)
        return grid.reshape(rows * columns, block_h * block_w)

    source_x, source_y = by_block(source_x), by_block(source_y)
    first_x = jnp.floor(source_x.min(axis=1, keepdims=True)).astype(jnp.int32) - 1
    first_y = jnp.floor(source_y.min(axis=1, keepdims=True)).astype(jnp.int32) - 1

    def select(first: jax.Array, size: int) -> jax.Array:
        wanted = jnp.clip(first + jnp.arange(window)[None, :], 0, size - 1)
        return (wanted[:, :, None] == jnp.arange(size)[None, None, :]).astype(jnp.bfloat16)

    pixels = image.astype(jnp.bfloat16)
    strips = jnp.einsum("bvy,cyx->bcvx", select(first_y, height), pixels)
    windows = jnp.einsum("bux,bcvx->bcuv", select(first_x, width), strips)

    index = jnp.arange(window, dtype=jnp.float32)[None, :, None]
    near_x = (source_x - first_x.astype(jnp.float32))[:, None, :]
    near_y = (source_y - first_y.astype(jnp.float32))[:, None, :]
    weight_x = _kernel(index - near_x, interpolation)
    weight_y = _kernel(index - near_y, interpolation)
    # Weights are not exact in bfloat16: a second term carries what the first one lacks.
    high = weight_y.astype(jnp.bfloat16)
    low = (weight_y - high.astype(jnp.float32)).astype(jnp.bfloat16)
    along_y = jnp.einsum(
        "bcuv,bvp->bcup",
        jnp.concatenate([windows, windows], axis=3),
        jnp.concatenate([high, low], axis=1),
        preferred_element_type=jnp.float32,
    )
    total = (along_y * weight_x[:, None]).sum(axis=2)
    total = total.reshape(rows, columns, 3, block_h, block_w).transpose(2, 0, 3, 1, 4)
    total = total.reshape(3, rows * block_h, columns * block_w)[:, :height, :width]
    return _to_levels(total, inside[:height, :width], fill)
