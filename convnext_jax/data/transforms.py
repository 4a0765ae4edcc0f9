"""Image transforms on the host, one image at a time, with Pillow.

They are those of the reference's recipe (torchvision's, which timm repeats), to the bit: an image
is decoded whole, cropped, and only then resized. `Image.resize(box=…)` would save the copy, but its
filter reads pixels outside of the box, so the borders of its result differ.

Random transforms are called as `transform(encoded, rng)`, evaluation transforms as
`transform(encoded)`; both return (image_size, image_size, 3) uint8. `views` of a random transform
decodes once and draws several times.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

from convnext_jax.data import fast_decoding
from convnext_jax.data.decoding import UndecodableImageError, decode, to_array
from convnext_jax.errors import UserError

__all__ = [
    "EvalTransform",
    "PadCropTrainTransform",
    "ResizeEvalTransform",
    "TrainTransform",
    "UndecodableImageError",
    "decode",
    "random_crop_box",
]

# At and above this size the reference evaluates on the whole image, resized, without a crop.
_WHOLE_IMAGE_FROM = 384


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
      decoder: `"pillow"`, or `"fast"`, which takes two thirds of its time and differs from it by a
        grey level in some values of a thousand: see `fast_decoding`. Both draw the same crops.
    """

    image_size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    flip: float = 0.5
    decoder: str = "pillow"

    def __post_init__(self) -> None:
        _check(self.image_size, self.interpolation)
        if self.decoder not in ("pillow", "fast"):
            raise UserError(f"decoder must be 'pillow' or 'fast', not {self.decoder!r}.")
        if self.decoder == "fast":
            fast_decoding.check_available(self.interpolation)
        if not 0 < self.scale[0] <= self.scale[1] or not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(
                f"scale and ratio are positive, rising ranges, not {self.scale} and {self.ratio}."
            )

    def __call__(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        """Decodes, crops, resizes and flips: (S, S, 3) uint8."""
        return self.views(encoded, rng, 1)[0]

    def views(self, encoded: bytes, rng: np.random.Generator, count: int) -> list[np.ndarray]:
        """Decodes once, then crops, resizes and flips `count` times: each (S, S, 3) uint8."""
        size = fast_decoding.read_size(encoded) if self.decoder == "fast" else None
        image = None
        if size is None:
            image = decode(encoded)
            size = image.size
        boxes, flips = [], []
        for _ in range(count):
            boxes.append(random_crop_box(size, self.scale, self.ratio, rng))
            flips.append(rng.random() < self.flip)
        if image is None:
            crops = fast_decoding.crops(encoded, boxes, self.image_size, self.interpolation)
            return [fast_decoding.flip(c) if f else c for c, f in zip(crops, flips, strict=True)]
        return [self._view(image, *drawn) for drawn in zip(boxes, flips, strict=True)]

    def _view(
        self, image: Image.Image, box: tuple[int, int, int, int], flipped: bool
    ) -> np.ndarray:
        left, top, width, height = box
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.image_size,) * 2, _filter(self.interpolation))
        return to_array(_mirrored(image) if flipped else image)


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
        return self.views(encoded, rng, 1)[0]

    def views(self, encoded: bytes, rng: np.random.Generator, count: int) -> list[np.ndarray]:
        """Decodes once, then shifts and flips `count` times: each (S, S, 3) uint8."""
        size = self.image_size
        image = _resize_whole(decode(encoded), size, self.interpolation)
        views = []
        for _ in range(count):
            left, top = (int(x) for x in rng.integers(-self.padding, self.padding + 1, size=2))
            # Pillow fills with zeros what lies outside of the image.
            view = image.crop((left, top, left + size, top + size))
            views.append(to_array(_mirrored(view) if rng.random() < self.flip else view))
        return views


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The evaluation of timm and torchvision: the short side resized, then a centre crop.

    Attributes:
      image_size: side of the result, in pixels.
      crop_ratio: the crop's share of the resized short side, which is int(size / crop_ratio);
        not looked at where `resize_size` is given.
      interpolation: Pillow's filter.
      resize_size: the resized short side in pixels, at least `image_size`, as torchvision's
        published weights name it (236 for 224 pixels, …).
      squash: whether the whole image is resized to (size, size) instead, without a crop. None
        goes by the reference's rule: from 384 pixels on, unless `resize_size` is given.
    """

    image_size: int
    crop_ratio: float = 0.875
    interpolation: str = "bicubic"
    resize_size: int | None = None
    squash: bool | None = None

    def __post_init__(self) -> None:
        _check(self.image_size, self.interpolation)
        if not 0 < self.crop_ratio <= 1:
            raise UserError(f"crop_ratio must be in (0, 1], not {self.crop_ratio}.")
        if self.resize_size is not None:
            if self.squash:
                raise UserError("resize_size and squash exclude each other; give one of them.")
            if self.resize_size < self.image_size:
                raise UserError(
                    f"resize_size must be at least image_size, {self.image_size}, and it is "
                    f"{self.resize_size}."
                )

    def __call__(self, encoded: bytes) -> np.ndarray:
        """Decodes, resizes and crops: (S, S, 3) uint8."""
        return self.apply(decode(encoded))

    def apply(self, image: Image.Image) -> np.ndarray:
        """Resizes and crops what is decoded already (an RGB image): (S, S, 3) uint8."""
        size, squash = self.image_size, self.squash
        if squash is None:
            squash = self.resize_size is None and size >= _WHOLE_IMAGE_FROM
        if squash:
            return to_array(_resize_whole(image, size, self.interpolation))
        short = self.resize_size or int(size / self.crop_ratio)
        width, height = image.size
        # The long side is rounded down, and a crop's odd pixel goes by Python's round (half to
        # even): torchvision's rules.
        if width <= height:
            resized = (short, int(short * height / width))
        else:
            resized = (int(short * width / height), short)
        image = image.resize(resized, _filter(self.interpolation))
        left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
        return to_array(image.crop((left, top, left + size, top + size)))


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
        return self.apply(decode(encoded))

    def apply(self, image: Image.Image) -> np.ndarray:
        """Resizes what is decoded already (an RGB image): (S, S, 3) uint8."""
        return to_array(_resize_whole(image, self.image_size, self.interpolation))


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
        # What rng.uniform computes, at a quarter of its time.
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * rng.random())
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


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _filter(interpolation: str) -> Image.Resampling:
    return Image.Resampling[interpolation.upper()]


def _check(image_size: int, interpolation: str) -> None:
    if image_size < 1:
        raise UserError(f"image_size must be positive, and it is {image_size}.")
    if interpolation.upper() not in Image.Resampling.__members__:
        names = ", ".join(repr(name.lower()) for name in Image.Resampling.__members__)
        raise UserError(f"There is no interpolation {interpolation!r}: use one of {names}.")
