"""From an image file's bytes to its pixels, by Pillow, as the reference's recipe has them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

# JPEG's siblings that Pillow also opens (EPS, PDF, …) start other programs or are no photographs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")


class UndecodableImageError(ValueError):
    """The bytes are not an image that Pillow can decode whole."""


def decode(encoded: bytes) -> Image.Image:
    """Decodes an image file to RGB.

    As the reference does it: alpha is dropped, not blended; grey is repeated; EXIF orientation is
    not applied (the reference ignores it, and the published accuracies are those of ignoring it);
    JPEGs are decoded at full size, since the draft mode's pixels are others. 16-bit grey alone
    deviates: its high byte is taken, where Pillow's own conversion would clip all above 255.

    Args:
      encoded: a JPEG, PNG, WebP, BMP, PPM, TIFF or GIF file (of an animation, the first frame).

    Raises:
      UndecodableImageError: truncated, of no known format, or absurdly large.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as file:
            image: Image.Image = file
            if image.mode == "RGB":
                # Converting it to what it is would copy it, a twentieth of an image's whole cost.
                image.load()
                return image
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
                # Pillow warns when a palette with an alpha table goes to RGB directly.
                image = image.convert("RGBA")
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        # On corrupt bytes Pillow's readers raise nearly anything: OSError, SyntaxError,
        # struct.error, zlib.error, IndexError, DecompressionBombError, …
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error


def to_array(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image: (H, W, 3) uint8, read-only."""
    # NumPy's own way through Pillow's array interface takes twice as long.
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)
