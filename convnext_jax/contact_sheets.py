"""Images in rows and columns, each with a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SMALLEST = 96  # pixels a side below which an image is enlarged, its pixels kept visible
_LINE = 15
_GAP = 4


class Tile(NamedTuple):
    """One image of a sheet.

    Attributes:
      image: uint8 (H, W, 3).
      caption: lines of text.
    """

    image: np.ndarray
    caption: tuple[str, ...]


def contact_sheet(tiles: Sequence[Tile], columns: int) -> Image.Image:
    """Draws tiles row by row.

    Args:
      tiles: one or more, of one image size.
      columns: tiles in a row.

    Returns:
      An RGB image.
    """
    height, width = tiles[0].image.shape[:2]
    scale = -(-_SMALLEST // min(height, width)) if min(height, width) < _SMALLEST else 1
    height, width = height * scale, width * scale
    lines = max(len(tile.caption) for tile in tiles)
    step_y, step_x = height + lines * _LINE + _GAP, width + _GAP
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for i, tile in enumerate(tiles):
        left, top = _GAP + i % columns * step_x, _GAP + i // columns * step_y
        enlarged = tile.image.repeat(scale, axis=0).repeat(scale, axis=1)
        sheet.paste(Image.fromarray(enlarged), (left, top))
        for line, text in enumerate(tile.caption):
            place = (left, top + height + line * _LINE)
            draw.text(place, _fitted(draw, text, width, font), fill="black", font=font)
    return sheet


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: int, font: object) -> str:
    shown = text
    while len(shown) > 2 and draw.textlength(shown, font=font) > width:  # type: ignore[arg-type]
        shown = shown[:-2] + "…"
    return shown
