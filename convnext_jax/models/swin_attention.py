"""Attention within windows: the partition, the shift and its mask, the relative position bias."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype, PrecisionLike

from convnext_jax.models.layers import reference_kernel_init

# What the authors add where two tokens must not see each other.
_MASKED = -100.0


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows (arXiv 2103.14030, section 3.2).

    Windows of `window_size`² tokens lie on the map from its upper left corner on, or with `shifted`
    from half a window before it on: the map is rolled, and tokens of a window that were not
    neighbours before don't see each other. Each head adds a learned bias to its scores, by the
    distance in rows and columns.

    A map whose sides are not multiples of the window is padded with zeros on the right and at the
    bottom; as in the authors' code for detection and in transformers, these are tokens like others.
    On a map no larger than the window, in either direction, the windows are as large as its smaller
    side and are not shifted, as in the authors' code for classification.

    Parameters are `qkv` (queries, keys, values in this order, each by head), `proj` and
    `relative_position_bias_table` ((2 · window_size − 1)², num_heads), row by row.

    Attributes:
      num_heads: a divisor of the channels.
      window_size: side of a window in tokens.
      shifted: whether windows are shifted by half their size, rounded down.
      dtype: compute type, also of the output; scores and softmax are float32.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    num_heads: int
    window_size: int
    shifted: bool
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, C) of type `dtype` to the same shape and type."""
        batch, height, width, channels = x.shape
        size, shift = self.window_size, self.window_size // 2 if self.shifted else 0
        if min(height, width) <= size:
            size, shift = min(height, width), 0
        x = pad_to_multiples(x, size)
        rows, columns = x.shape[1] // size, x.shape[2] // size
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
        x = x.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * columns, size**2, channels)

        x = self._attend(x, self._bias(size), _mask(rows, columns, size, shift))

        x = x.reshape(batch, rows, columns, size, size, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * size, columns * size, channels)
        return jnp.roll(x, (shift, shift), axis=(1, 2))[:, :height, :width]

    def _attend(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Attention among the tokens of each window, x (B, windows, tokens, C)."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        products = dict(types, precision=self.precision, kernel_init=reference_kernel_init)
        *leading, tokens, channels = x.shape
        head_size = channels // self.num_heads
        qkv = nn.Dense(3 * channels, **products, name="qkv")(x)
        query, key, value = jnp.moveaxis(
            qkv.reshape(*leading, tokens, 3, self.num_heads, head_size), -3, 0
        )
        scores = jnp.einsum(
            "bwqhd,bwkhd->bwhqk",
            query * head_size**-0.5,
            key,
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )
        scores = scores + bias[None, None]
        if mask is not None:
            scores = scores + jnp.where(mask, _MASKED, 0.0)[None, :, None]
        weights = nn.softmax(scores, axis=-1).astype(self.dtype)
        y = jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value, precision=self.precision)
        return nn.Dense(channels, **products, name="proj")(y.reshape(x.shape))

    def _bias(self, size: int) -> jax.Array:
        """The bias between all tokens of a window of this size, float32 (heads, size², size²)."""
        side = 2 * self.window_size - 1
        table = self.param(
            "relative_position_bias_table",
            reference_kernel_init,
            (side**2, self.num_heads),
            self.param_dtype,
        )
        row, column = (grid.ravel() for grid in np.indices((size, size)))
        nearest = self.window_size - 1
        index = (row[:, None] - row + nearest) * side + (column[:, None] - column + nearest)
        bias = table.astype(jnp.float32)[index.ravel()]
        return bias.reshape(size**2, size**2, self.num_heads).transpose(2, 0, 1)


def _mask(rows: int, columns: int, size: int, shift: int) -> jax.Array | None:
    """True for the tokens of a window between which the shifted map has a seam, or None.

    Args:
      rows: windows above one another.
      columns: windows beside one another.
      size: side of a window in tokens.
      shift: by how many tokens the map was rolled to the upper left.

    Returns:
      bool (rows · columns, size², size²).
    """
    if not shift:
        return None

    def wrapped(windows: int) -> np.ndarray:
        # Of the last window, the tokens that came over from the other side.
        position = np.arange(windows * size).reshape(windows, size)
        return position >= windows * size - shift

    row = np.broadcast_to(wrapped(rows)[:, None, :, None], (rows, columns, size, size))
    column = np.broadcast_to(wrapped(columns)[None, :, None, :], (rows, columns, size, size))
    region = jnp.asarray((2 * row + column).reshape(rows * columns, size**2), jnp.int32)
    # Compared in the program: as a constant the mask would be its largest, 5 MB a block at 384².
    return region[:, :, None] != region[:, None, :]


def pad_to_multiples(x: jax.Array, of: int) -> jax.Array:
    """Adds zeros on the right and at the bottom of a map, until `of` divides its sides.

    Args:
      x: (B, H, W, C).
      of: what is to divide H and W.

    Returns:
      (B, H', W', C) with the smallest such H' ≥ H and W' ≥ W.
    """
    height, width = x.shape[1:3]
    return jnp.pad(x, ((0, 0), (0, -height % of), (0, -width % of), (0, 0)))
