"""A depthwise convolution as matrix products, and how an image is cut for them.

One channel of one image, its pixels row by row as a vector, is convolved by a banded matrix: its
rows are output pixels, its columns input pixels. With the images of the batch as the columns of
the other operand that is a matrix product, for which a TPU has matrix units, while a multiply-add
for each of the k² taps would take the vector unit 2 k² operations a pixel. Most of the matrix is
zero, so it is made for a few output rows of the image alone and used again for the next ones.

All of its rows are shifts of one *band*, the part for a single output row of the image.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Sides of a matrix unit, and images in a register's lanes.
LANES = 128
# Sublanes of a register. One holds a float32 channel of a pixel or two neighbouring bfloat16 ones.
SUBLANES = 8
# What a core of a v4 has; the other chips have more, which XLA uses for other things.
VMEM_BYTES = 16 * 2**20
# Of it, for what the compiler keeps for itself.
_SPARE_BYTES = 2**20
# Up to this many pixels the whole image is one product.
_MAX_PIXELS_AT_ONCE = 256
# With fewer rows than about this, a product waits for its other operand to be loaded into the unit.
_ROWS_TO_HIDE_A_LOAD = 96
# bfloat16 is stored two rows to a sublane.
_ROWS_IN_REGISTER = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How an image of height × width pixels is cut.

    Attributes:
      height: of the image, in pixels.
      width: of the image, in pixels.
      margin: k // 2, the zeros on each side.
      rows: output rows of the image that one product gives.
      step_rows: rows of the image that one grid step takes, a multiple of `rows`.
      lead: pixels that are kept before and after those of a step for its products to reach into;
        0 where the whole image is one product.
    """

    height: int
    width: int
    margin: int
    rows: int
    step_rows: int
    lead: int

    @property
    def taps(self) -> int:
        """Side of the kernel, k."""
        return 2 * self.margin + 1

    @property
    def blocks(self) -> int:
        """Blocks of `step_rows` rows that an image has."""
        return -(-self.height // self.step_rows)

    @property
    def pixels(self) -> int:
        """Pixels of a block."""
        return self.step_rows * self.width

    @property
    def outputs(self) -> int:
        """Rows of the matrix: output pixels of a product."""
        return self.rows * self.width

    @property
    def inputs(self) -> int:
        """Columns of the matrix: input pixels of a product."""
        if not self.lead:
            return self.height * self.width
        return self.lead + (self.rows + self.margin) * self.width

    @property
    def band(self) -> int:
        """Width of the band: the k rows of the image that an output row depends on."""
        return self.taps * self.width

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """For each output row: from where to where of its band, and at which matrix column."""
        spans = []
        for row in range(self.rows):
            start = self.lead + (row - self.margin) * self.width
            first, last = max(start, 0), min(start + self.band, self.inputs)
            spans.append((first - start, last - start, first))
        return spans

    @property
    def vmem(self) -> int:
        """Bytes that the larger of the two kernels keeps in VMEM."""
        buffers, register = (1 if self.blocks == 1 else 2), SUBLANES * LANES * 4
        # Two blocks lie there twice, since the next is fetched meanwhile; one is parted by channel.
        blocks = (5 * self.pixels + buffers * (self.pixels + 2 * self.lead)) * register
        # Of at most 16 channels: one matrix in float32, or one in bfloat16 and two float32 bands.
        matrix = self.outputs * _up(self.inputs, LANES) * 2 * SUBLANES
        bands = _up(self.width, SUBLANES) * _up(self.band, LANES) * 2 * SUBLANES
        return blocks + max(4 * matrix, 2 * matrix + 2 * 4 * bands)

    @property
    def cycles(self) -> float:
        """About what an image's products and moves take, for 128 images and a block of channels."""
        passes = _up(self.inputs, LANES) // LANES
        products = 4 * passes * max(1, _ROWS_TO_HIDE_A_LOAD / self.outputs)
        return self.blocks * (self.pixels * (products + 3) + 2 * self.lead)


def tiling(height: int, width: int, kernel_size: int) -> Tiling | None:
    """Chooses how an image is cut.

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
      kernel_size: k, odd.

    Returns:
      The tiling that takes the fewest cycles; None if the image is too wide for VMEM.
    """
    margin = kernel_size // 2
    if height * width <= _MAX_PIXELS_AT_ONCE:
        return Tiling(height, width, margin, height, height, 0)
    lead = _up(max(margin, 1) * width, _ROWS_IN_REGISTER)
    candidates = (
        Tiling(height, width, margin, rows, step_rows, lead)
        for rows in range(1, height + 1)
        if rows * width % _ROWS_IN_REGISTER == 0
        for step_rows in range(rows, height + rows, rows)
        if step_rows * width >= lead
    )
    fitting = [tiling for tiling in candidates if tiling.vmem <= VMEM_BYTES - _SPARE_BYTES]
    return min(fitting, key=lambda tiling: (tiling.cycles, tiling.outputs), default=None)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def bands(kernel: jax.Array, width: int) -> jax.Array:
    """The matrices' part for one output row, of each channel.

    Args:
      kernel: (k, k, 1, C).
      width: of the image, W.

    Returns:
      (C, W, k · W) of the kernel's type; [c, j, u · W + b] is the tap that takes column b of the
      u-th of the k rows to column j, 0 where there is none.
    """
    k, channels = kernel.shape[0], kernel.shape[-1]
    columns = np.stack([np.eye(width, k=v - k // 2, dtype=kernel.dtype) for v in range(k)])
    band = jnp.einsum(
        "uvc,vjb->cjub",
        kernel.reshape(k, k, channels),
        columns,
        precision=jax.lax.Precision.HIGHEST,
    )
    return band.reshape(channels, width, k * width)


def taps(sums: jax.Array, kernel_size: int) -> jax.Array:
    """Adds up what each tap has contributed to the bands' gradient.

    Args:
      sums: (C, k, k · W) float32, that by tap of a row and by column of the band.
      kernel_size: k.

    Returns:
      (k, k, 1, C) float32.
    """
    by_tap = sums.reshape(-1, kernel_size, kernel_size, sums.shape[-1] // kernel_size).sum(-1)
    return by_tap.transpose(2, 1, 0)[:, :, None]
