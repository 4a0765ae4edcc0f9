"""Images too wide for VMEM, cut into pieces of columns that each reach into their neighbours.

A piece is an image of its own to the kernels. It is as wide as its own columns and the k // 2 on
each side that they depend on; what comes out at the latter is dropped.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from convnext_jax.models.depthwise_pallas_tiles import LANES, Tiling, tiling

# Every piece costs a copy of its part of the image; beyond these XLA's convolution does it.
_MOST_PIECES = 4
# A piece may be wider than it need be by this, where that makes for better products.
_SLACK = 16


@dataclasses.dataclass(frozen=True)
class Columns:
    """How an image is cut.

    Attributes:
      pieces: how many; 1 where the image is taken whole.
      own: columns of the image that a piece gives.
      tiling: of a piece.
    """

    pieces: int
    own: int
    tiling: Tiling

    def with_neighbours(self, x: jax.Array) -> list[jax.Array]:
        """The pieces of what is filtered, from (B, H, W, C)."""
        if self.pieces == 1:
            return [x]
        margin, width = self.tiling.margin, x.shape[2]
        right = self.pieces * self.own + margin - width
        x = jnp.pad(x, ((0, 0), (0, 0), (margin, right), (0, 0)))
        starts = range(0, self.pieces * self.own, self.own)
        return [x[:, :, start : start + self.tiling.width] for start in starts]

    def alone(self, gradient: jax.Array) -> list[jax.Array]:
        """The pieces of a result's gradient (B, H, W, C), zero at their neighbours' columns."""
        if self.pieces == 1:
            return [gradient]
        margin = self.tiling.margin
        pieces = []
        for start in range(0, self.pieces * self.own, self.own):
            piece = gradient[:, :, start : start + self.own]
            right = self.tiling.width - margin - piece.shape[2]
            pieces.append(jnp.pad(piece, ((0, 0), (0, 0), (margin, right), (0, 0))))
        return pieces

    def joined(self, pieces: list[jax.Array], width: int) -> jax.Array:
        """The result (B, H, W, C), from those of the pieces with their neighbours."""
        if self.pieces == 1:
            return pieces[0]
        margin = self.tiling.margin
        own = [piece[:, :, margin : margin + self.own] for piece in pieces]
        return jnp.concatenate(own, axis=2)[:, :, :width]


@functools.lru_cache(maxsize=256)
def columns(height: int, width: int, kernel_size: int) -> Columns | None:
    """Chooses how an image is cut.

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
      kernel_size: k, odd.

    Returns:
      The whole image where that fits VMEM, else the cut that takes the fewest cycles; None if none
      of at most four pieces fits.
    """
    if whole := tiling(height, width, kernel_size):
        return Columns(1, width, whole)
    reach = 2 * (kernel_size // 2)
    cuts = []
    for pieces in range(2, _MOST_PIECES + 1):
        least = -(-width // pieces)
        for own in range(least, least + _SLACK):
            # Beyond, none fits.
            if own + reach <= LANES and (piece := tiling(height, own + reach, kernel_size)):
                cuts.append(Columns(pieces, own, piece))
    return min(cuts, key=lambda cut: cut.pieces * cut.tiling.cycles, default=None)
