"""How the kernels of a block's second half cut their arrays, and what they need of a chip."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.experimental import pallas as pl

T = TypeVar("T")

# Images in a register's lanes, and sides of a matrix unit.
LANES = 128
# What the compiler may need besides the arrays: registers put aside within a chunk.
_SPARE_BYTES = 4 * 2**20
# A step's block of one array; larger ones would hide no more of the memory's latency.
_BLOCK_BYTES = 2**20
# Narrower ones have their chunks written out, so that one's products run beside another's GELU; of
# wider ones a single chunk has products enough, and all would be too much code.
_WIDTH_FOR_A_LOOP = 640
# By the static schedule: with less at a time, products wait for each other's results.
_GROUP_CHANNELS = 768


@dataclasses.dataclass(frozen=True)
class MlpTiling:
    """How (pixels, channels, images) and the hidden layer are cut.

    Attributes:
      pixels: of an image, H · W.
      channels: C, a multiple of 32; the hidden layer has 4 C.
      images: a multiple of 128.
      itemsize: bytes of a number.
      epsilon: of the layer norm.
      step_pixels: pixels that one grid step takes; a divisor of `pixels`.
      group: pixels that go through the hidden layer together; a divisor of `step_pixels`.
      chunk: hidden channels at a time; a divisor of 4 C.
    """

    pixels: int
    channels: int
    images: int
    itemsize: int
    epsilon: float
    step_pixels: int
    group: int
    chunk: int

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of images, and of pixels."""
        return self.images // LANES, self.pixels // self.step_pixels

    @property
    def chunks(self) -> int:
        """Of the hidden layer."""
        return 4 * self.channels // self.chunk

    @property
    def pixel_block(self) -> pl.BlockSpec:
        """What a step has of (pixels, channels, images)."""
        return pl.BlockSpec((self.step_pixels, self.channels, LANES), lambda b, p: (p, 0, b))

    @property
    def image_block(self) -> pl.BlockSpec:
        """What a step has of (1, images)."""
        return pl.BlockSpec((1, LANES), lambda b, p: (0, b))

    @property
    def vmem(self) -> int:
        """Bytes of VMEM that the larger kernel, that of the gradients, may take."""
        weights = 4 * self.channels * max(self.channels, LANES)
        resident = weights * (3 * self.itemsize + 2 * 4)
        biases = (2 * 4 + 3) * self.channels * LANES * 4
        blocks = 3 * 2 * self.step_pixels * self.channels * LANES * self.itemsize
        # Of a group: the normalised pixels, the gradient, and the sums over chunks.
        columns = self.group * self.channels * LANES * (2 * self.itemsize + 4 * 4)
        return resident + biases + blocks + columns + _SPARE_BYTES

    def cost(self, products: int, arrays: int) -> pl.CostEstimate:
        """Of a call.

        Args:
          products: how many of the size of the block's two it takes.
          arrays: how many of (pixels, channels, images) it reads or writes.
        """
        numbers = self.pixels * self.channels * self.images
        weights = 8 * self.channels**2 * self.itemsize
        return pl.CostEstimate(
            flops=products * 2 * numbers * 4 * self.channels,
            transcendentals=(1 if products == 2 else 2) * 4 * numbers,
            bytes_accessed=arrays * numbers * self.itemsize + weights,
        )

    def over_groups(self, body: Callable[[Any], None]) -> None:
        """Runs the body on the first pixel of each of a step's groups."""

        @pl.loop(0, self.step_pixels // self.group)
        def _(i: Any) -> None:
            body(i * self.group)

    def over_chunks(self, body: Callable[[Any, T], T], start: T) -> T:
        """Runs the body on the number of each chunk, and what the one before it gave."""
        if self.channels >= _WIDTH_FOR_A_LOOP:
            return jax.lax.fori_loop(0, self.chunks, body, start)
        for i in range(self.chunks):
            start = body(i, start)
        return start


def mlp_tiling(pixels: int, channels: int, images: int, itemsize: int, epsilon: float) -> MlpTiling:
    """Chooses how the arrays are cut.

    Args:
      pixels: of an image.
      channels: a multiple of 32.
      images: a multiple of 128.
      itemsize: bytes of a number.
      epsilon: of the layer norm.

    Returns:
      The tiling.
    """
    most = max(1, _BLOCK_BYTES // (channels * LANES * itemsize))
    step_pixels = max(n for n in range(1, min(pixels, most) + 1) if pixels % n == 0)
    group = max(
        n
        for n in (1, 2, 4, 8)
        if step_pixels % n == 0 and n * channels <= max(channels, _GROUP_CHANNELS)
    )
    wanted = LANES if channels < 256 else 2 * LANES if channels < 512 else 4 * LANES
    chunk = math.gcd(wanted, 4 * channels)
    return MlpTiling(pixels, channels, images, itemsize, epsilon, step_pixels, group, chunk)
