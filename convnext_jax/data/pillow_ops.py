"""The operations by Pillow: what those on the accelerator are held against and shown beside."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    # Pillow refuses 0 bits since version 11; before, they gave black.
    return ImageOps.posterize(image, int(bits)) if bits else Image.new("RGB", image.size)


def _solarize_add(image: Image.Image, addend: float) -> Image.Image:
    table = [min(255, v + int(addend)) if v < 128 else v for v in range(256)]
    return image.point(table * 3)


POINTWISE: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Posterize": _posterize,
    "Solarize": lambda image, level: ImageOps.solarize(image, level),  # type: ignore[arg-type]
    "SolarizeAdd": _solarize_add,
    "Color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "Contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "Brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "Sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "Grayscale": lambda image, _: image.convert("L").convert("RGB"),
    "GaussianBlur": lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
}
AFFINE: dict[str, Callable[[float], tuple[float, ...]]] = {
    "ShearX": lambda a: (1, a, 0, 0, 1, 0),
    "ShearY": lambda a: (1, 0, 0, a, 1, 0),
    "TranslateX": lambda a: (1, 0, a, 0, 1, 0),
    "TranslateY": lambda a: (1, 0, 0, 0, 1, a),
}


def pillow(
    name: str, pixels: np.ndarray, argument: float, fill: tuple[int, ...], interpolation: str
) -> np.ndarray:
    """Applies one operation to one image.

    Args:
      name: of the operation.
      pixels: uint8 (H, W, 3).
      argument: as for the operation of that name in `convnext_jax.data.operations`.
      fill: three levels for what geometric operations bring in.
      interpolation: theirs, "bilinear" or "bicubic".

    Returns:
      uint8 (H, W, 3).
    """
    image = Image.fromarray(pixels)
    resample = _RESAMPLE[interpolation]
    if name in POINTWISE:
        result = POINTWISE[name](image, argument)
    elif name == "Rotate":
        result = image.rotate(argument, resample, fillcolor=fill)
    else:
        matrix = AFFINE[name](argument)
        method = Image.Transform.AFFINE
        result = image.transform(image.size, method, matrix, resample, fillcolor=fill)
    return np.asarray(result)
