"""Image transforms on the host, one image at a time, with Pillow.

They are those of the reference's recipe (torchvision's, which timm repeats), to the bit: an image
is decoded whole, cropped, and only then resized. `Image.resize(box=…)` would save the copy, but its
filter reads pixels outside of the box, so the borders of its result differ.

Random transforms are called as `transform(encoded, rng)`, evaluation transforms as
`transform(encoded)`; both return (image_size, image_size, 3) uint8.
"""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
from PIL import Image

from convnext_jax.errors import UserError

# JPEG's siblings that Pillow also opens (EPS, PDF, …) start other programs or are no photographs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")

# At and above this size the reference evaluates on the whole image, resized, without a crop.
_WHOLE_IMAGE_FROM = 384


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


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random resized crop and horizontal flip (Inception-style; ConvNeXt, table 5).

    Attributes:
      image_size: side of the result, in pixels.
      scale: range of the crop's share of the image's area.
      ratio: range of the crop's width over height, drawn uniformly in its logarithm.
      interpolation: `"bicubic"`, `"bilinear"` or another of Pillow's filters; all antialiased but
        `"nearest"`.
      flip: probability of mirroring.
    """

    image_size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    flip: float = 0.5

    def __post_init__(self) -> None:
        _check(self.image_size, self.interpolation)
        if not 0 < self.scale[0] <= self.scale[1] or not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(
                f"scale and ratio are positive, rising ranges, not {self.scale} and {self.ratio}."
            )

    def __call__(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        """Decodes, crops, resizes and flips: (S, S, 3) uint8."""
        image = decode(encoded)
        left, top, width, height = random_crop_box(image.size, self.scale, self.ratio, rng)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.image_size,) * 2, _filter(self.interpolation))
        return np.asarray(_random_flip(image, self.flip, rng))


@dataclasses.dataclass(frozen=True)
class PadCropTrainTransform:
    """For small images (CIFAR, digits): zero padding, a random crop, and a horizontal flip.

    Attributes:
      image_size: side of the result; images of another size are resized to it first.
      padding: pixels added on every side before the crop.
      interpolation: Pillow's filter for that resizing.
      flip: probability of mirroring; 0 for what has no mirror image, like digits.
    """

    image_size: int
    padding: int = 4
    interpolation: str = "bicubic"
    flip: float = 0.5

    def __post_init__(self) -> None:
        _check(self.image_size, self.interpolation)
        if self.padding < 0:
            raise UserError(f"padding must not be negative, and it is {self.padding}.")

    def __call__(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        """Decodes, resizes where needed, shifts and flips: (S, S, 3) uint8."""
        image = _resize_whole(decode(encoded), self.image_size, self.interpolation)
        left, top = (int(x) for x in rng.integers(-self.padding, self.padding + 1, size=2))
        # Pillow fills with zeros what lies outside of the image.
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return np.asarray(_random_flip(image, self.flip, rng))


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The reference's evaluation: the short side to int(size / crop_ratio), then a centre crop.

    From 384 pixels on the whole image is resized to (size, size) instead, without a crop.

    Attributes:
      image_size: side of the result, in pixels.
      crop_ratio: the crop's share of the resized short side.
      interpolation: Pillow's filter.
    """

    image_size: int
    crop_ratio: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check(self.image_size, self.interpolation)
        if not 0 < self.crop_ratio <= 1:
            raise UserError(f"crop_ratio must be in (0, 1], not {self.crop_ratio}.")

    def __call__(self, encoded: bytes) -> np.ndarray:
        """Decodes, resizes and crops: (S, S, 3) uint8."""
        image, size = decode(encoded), self.image_size
        if size >= _WHOLE_IMAGE_FROM:
            return np.asarray(_resize_whole(image, size, self.interpolation))
        short = int(size / self.crop_ratio)
        width, height = image.size
        # The long side is rounded down, and a crop's odd pixel goes by Python's round (half to
        # even): torchvision's rules.
        if width <= height:
            resized = (short, int(short * height / width))
        else:
            resized = (int(short * width / height), short)
        image = image.resize(resized, _filter(self.interpolation))
        left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
        return np.asarray(image.crop((left, top, left + size, top + size)))


@dataclasses.dataclass(frozen=True)
class ResizeEvalTransform:
    """For small images: the whole image at the size asked for, resized only if it has another.

    Attributes:
      image_size: side of the result, in pixels.
      interpolation: Pillow's filter.
    """

    image_size: int
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check(self.image_size, self.interpolation)

    def __call__(self, encoded: bytes) -> np.ndarray:
        """Decodes and resizes: (S, S, 3) uint8."""
        return np.asarray(_resize_whole(decode(encoded), self.image_size, self.interpolation))


def random_crop_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draws the box of a random resized crop by torchvision's rule.

    Ten tries to place a box of random area and aspect ratio inside of the image; after them, the
    largest central box whose aspect ratio is in range.

    Args:
      size: the image's (width, height).
      scale: range of the box's share of the area.
      ratio: range of its width over height.
      rng: the generator to draw from.

    Returns:
      (left, top, width, height), in pixels.
    """
    width, height = size
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return left, top, w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(round(width / ratio[0]), 1)
    elif width / height > ratio[1]:
        w = max(round(height * ratio[1]), 1)
    return (width - w) // 2, (height - h) // 2, w, h


def _resize_whole(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    if image.size == (size, size):
        return image
    return image.resize((size, size), _filter(interpolation))


def _random_flip(image: Image.Image, probability: float, rng: np.random.Generator) -> Image.Image:
    # Drawn even where it cannot happen: the flip's setting then moves no other draw.
    if rng.random() < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _filter(interpolation: str) -> Image.Resampling:
    return Image.Resampling[interpolation.upper()]


def _check(image_size: int, interpolation: str) -> None:
    if image_size < 1:
        raise UserError(f"image_size must be positive, and it is {image_size}.")
    if interpolation.upper() not in Image.Resampling.__members__:
        names = ", ".join(repr(name.lower()) for name in Image.Resampling.__members__)
        raise UserError(f"There is no interpolation {interpolation!r}: use one of {names}.")
