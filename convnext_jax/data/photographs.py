"""Opening a person's image file so that the network sees what the person sees.

`transforms.decode` repeats what the reference does to ImageNet, oddities included, since published
accuracies are those of its pixels. A file that someone hands over is another matter: here the
camera's orientation is applied, what is transparent shows white, colours go by their profile, and
a CMYK file is no negative.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from convnext_jax.data.transforms import UndecodableImageError
from convnext_jax.errors import UserError

# By Pillow's names; its JPEG opens MPO too. The readers of EPS, PDF, WMF, … start other programs or
# draw no photographs.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")

# What a folder is searched for. HEIC is among them although it can't be read: whoever hands over a
# folder from a telephone must learn that its photographs were left out.
PHOTOGRAPH_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".heic", ".heif"),
)

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_WHITE = (255, 255, 255)


def find_photographs(patterns: Sequence[str]) -> Iterator[Path]:
    """Resolves what a person names to image files.

    Args:
      patterns: files, folders (searched with their subfolders, in sorted order, for
        `PHOTOGRAPH_SUFFIXES`; names that begin with a dot are passed over), and glob patterns
        (`**` for any depth). A file that is named by itself is taken whatever its suffix.

    Yields:
      Paths, each once, in the order of the arguments. What names nothing that exists is yielded as
      it stands: `open_photograph` says so of it, and the others go on.

    Raises:
      UserError: if a folder that is named holds no image.
    """
    seen: set[Path] = set()
    for pattern in patterns:
        there = Path(pattern).expanduser()
        matches = [] if os.path.lexists(there) else sorted(glob.glob(str(there), recursive=True))
        for path in [Path(match) for match in matches] or [there]:
            files = list(_below(path)) if path.is_dir() else [path]
            # A glob's other matches may well be folders without images.
            if not files and not matches:
                raise UserError(
                    f"the folder {pattern} holds no images; their names end in one of "
                    f"{', '.join(PHOTOGRAPH_SUFFIXES)}"
                )
            for file in files:
                if file not in seen:
                    seen.add(file)
                    yield file


def _below(folder: Path) -> Iterator[Path]:
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(PHOTOGRAPH_SUFFIXES) and not name.startswith("."):
                yield Path(directory, name)


def open_photograph(path: str | Path) -> Image.Image:
    """Opens an image file as a person would see it, in 8-bit RGB.

    The first image is taken of an animation, a multi-page TIFF or a multi-picture JPEG. EXIF
    orientation is applied, and so is a colour profile (into sRGB). Transparency is laid over
    white, the page that cut-out pictures are made for; dropping it, as the reference does, would
    bring back whatever colours lie hidden under it. Of 16 bits the upper eight count. A CMYK JPEG
    is taken for inverted if it bears Adobe's marker, and as it stands if not. Floating-point
    pixels are read as 0 for black to 1 for white.

    Args:
      path: a JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, PPM, PFM or JPEG 2000 file.

    Raises:
      UndecodableImageError: one sentence without the path: the file is missing, empty, truncated,
        of another format, too large, or its pixels have no defined black and white.
    """
    try:
        encoded = Path(path).read_bytes()
    except OSError as error:
        raise UndecodableImageError(f"can't be read: {error.strerror or error}") from error
    if not encoded:
        raise UndecodableImageError("the file is empty")
    if encoded[4:8] == b"ftyp" and encoded[8:12] in _HEIC_BRANDS:
        raise UndecodableImageError(
            "is a HEIC photograph, which Pillow can't decode: convert it to JPEG first"
        )
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            image.load()
            _turn_upright(image)
            return _to_rgb(image)
    except (MemoryError, UndecodableImageError):
        raise
    except UnidentifiedImageError as error:
        raise UndecodableImageError(
            f"is no image of a known format ({', '.join(_FORMATS)}), or its header is damaged"
        ) from error
    except Image.DecompressionBombError as error:
        raise UndecodableImageError(f"is too large to decode safely: {error}") from error
    except Exception as error:
        # On corrupt bytes Pillow's readers raise nearly anything: OSError, SyntaxError,
        # struct.error, zlib.error, IndexError, …
        raise UndecodableImageError(f"can't be decoded: {error or type(error).__name__}") from error


def central_part(image: Image.Image, max_aspect: int = 8) -> Image.Image:
    """Cuts the ends off an image that is more than `max_aspect` times as long as it is wide.

    For a transform that resizes the short side and then crops the centre: of a strip of
    1 × 60,000 pixels it would resize the whole to some gigabytes, to show a single part in 60,000.
    What lies within the crop stays as it was, up to rounding.

    Args:
      image: of any mode and size.
      max_aspect: long side over short side, at most (one pixel may come on top).
    """
    width, height = image.size
    if max(image.size) <= max_aspect * min(image.size):
        return image
    # Of the same parity as before, so that the centre stays where it was.
    new_width = min(width, max_aspect * height + (width - max_aspect * height) % 2)
    new_height = min(height, max_aspect * width + (height - max_aspect * width) % 2)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        # The pixels are whole; EXIF that can't be parsed merely says nothing of the orientation.
        return


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_levels(np.asarray(image) >> 8)
    # Pillow scales a deep PGM to 16 bits; of another file's 32-bit integers nobody knows the white.
    if image.mode == "I" and image.format in ("PPM", "PNG"):
        return _from_levels(np.asarray(image) >> 8)
    if image.mode in ("I", "F"):
        return _from_unbounded(np.asarray(image))
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for an inverted one; only Adobe's marker says so.
        image = _keeping_info(ImageChops.invert(image), image)
    if image.has_transparency_data:
        image = _keeping_info(image.convert("RGBA"), image)
        page = Image.new("RGB", image.size, _WHITE)
        page.paste(_to_srgb(image), mask=image.getchannel("A"))
        return page
    return _to_srgb(image)


def _keeping_info(image: Image.Image, original: Image.Image) -> Image.Image:
    if "icc_profile" in original.info:
        image.info["icc_profile"] = original.info["icc_profile"]
    return image


def _from_levels(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).convert("RGB")


def _from_unbounded(pixels: np.ndarray) -> Image.Image:
    low, high = float(pixels.min()), float(pixels.max())
    if np.issubdtype(pixels.dtype, np.floating) and low >= 0 and high <= 1:
        return _from_levels(np.rint(pixels * 255))
    # NaN fails the comparisons above and is refused here with the rest.
    raise UndecodableImageError(
        f"its {pixels.dtype} pixels go from {low:g} to {high:g}, of which no one knows the white: "
        "save them as 8 or 16 bits, or as floats between 0 and 1"
    )


def _to_srgb(image: Image.Image) -> Image.Image:
    """Applies the image's colour profile, and gives RGB without alpha."""
    profile = image.info.get("icc_profile")
    plain = image.convert("RGB") if image.mode not in ("RGB", "L", "CMYK") else image
    if not profile:
        return plain.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # The usual case; its conversion into itself would cost time and the odd grey level.
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return plain.convert("RGB")
        converted = ImageCms.profileToProfile(
            plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (OSError, ImageCms.PyCMSError, ImportError):
        # A damaged profile, or one of another colour space than the pixels'; viewers ignore it too.
        return plain.convert("RGB")
    return plain.convert("RGB") if converted is None else converted
