"""A person's image files, made with Pillow: the pixels must mean what the person sees."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms, ImageFilter, ImageOps

from convnext_jax.data.photographs import central_part, find_photographs, open_photograph
from convnext_jax.data.transforms import EvalTransform, UndecodableImageError
from convnext_jax.errors import UserError

RED, GREEN, BLUE = (230, 20, 30), (30, 200, 40), (20, 40, 220)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)

# What one sees: red left above, green right above, blue left below, white right below.
SCENE = np.zeros((32, 48, 3), np.uint8)
SCENE[:16, :24], SCENE[:16, 24:], SCENE[16:, :24], SCENE[16:, 24:] = RED, GREEN, BLUE, WHITE

# A ramp of grey from left to right, and the greys that one sees in it.
RAMP = np.tile(np.linspace(0, 1, 64), (32, 1))


def seen(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours of the four quarters' centres, row by row."""
    assert image.mode == "RGB"
    width, height = image.size
    return [image.getpixel((width * x // 4, height * y // 4)) for y in (1, 3) for x in (1, 3)]


def assert_sees(image: Image.Image, colours, tolerance: int = 0) -> None:
    np.testing.assert_allclose(np.array(seen(image)), np.array(colours), rtol=0, atol=tolerance)


def assert_ramp(image: Image.Image, tolerance: float = 1) -> None:
    pixels = np.asarray(image)
    assert pixels.shape == (32, 64, 3)
    np.testing.assert_allclose(
        pixels, np.repeat(RAMP[..., None] * 255, 3, axis=2), rtol=0, atol=tolerance
    )


@pytest.fixture
def saved(tmp_path):
    """Saves an image and opens it as a photograph."""

    def save(image: Image.Image, name: str, **options) -> Image.Image:
        image.save(tmp_path / name, **options)
        return open_photograph(tmp_path / name)

    return save


@pytest.mark.parametrize(
    "name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.webp", "a.avif", "a.jp2", "a.jpg", "a.gif"]
)
def test_formats(saved, name):
    image = Image.fromarray(SCENE)
    options = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 95, "subsampling": 0}}
    lossy = {"a.avif": 8, "a.jpg": 6, "a.jp2": 2}
    if name == "a.gif":
        image = image.quantize(8)
    opened = saved(image, name, **options.get(name, {}))
    assert opened.size == (48, 32)
    assert_sees(opened, [RED, GREEN, BLUE, WHITE], lossy.get(name, 0))


# How a camera stores what one sees: the inverse of what a viewer must do for the orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation(saved, orientation, suffix):
    image = Image.fromarray(SCENE)
    if STORED[orientation] is not None:
        image = image.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = saved(image, f"a.{suffix}", exif=exif)
    assert opened.size == (48, 32)
    assert_sees(opened, [RED, GREEN, BLUE, WHITE], 0 if suffix in ("png", "tif") else 45)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_is_none(saved, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_sees(saved(Image.fromarray(SCENE), "a.png", exif=exif), [RED, GREEN, BLUE, WHITE])


def test_damaged_exif_does_not_lose_the_image(saved):
    opened = saved(Image.fromarray(SCENE), "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fnonsense")
    assert_sees(opened, [RED, GREEN, BLUE, WHITE])


def with_alpha(mode: str) -> Image.Image:
    """Opaque red, green at half, and below nothing, over hidden black and hidden blue."""
    pixels = np.zeros((32, 48, 4), np.uint8)
    pixels[:16, :24], pixels[:16, 24:] = (*RED, 255), (*GREEN, 128)
    pixels[16:, :24], pixels[16:, 24:] = (*BLACK, 0), (*BLUE, 0)
    return Image.fromarray(pixels).convert(mode)


HALF_GREEN = tuple(round((c * 128 + 255 * 127) / 255) for c in GREEN)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.gif"])
def test_transparency_shows_white(saved, name):
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    opened = saved(with_alpha("RGBA"), name, **options)
    if name == "a.gif":  # knows no half
        assert seen(opened)[0] == RED
        assert seen(opened)[2:] == [WHITE, WHITE]
    else:
        assert_sees(opened, [RED, HALF_GREEN, WHITE, WHITE], 1)


def test_grey_with_alpha(saved):
    opened = saved(with_alpha("LA"), "a.png")
    grey = Image.new("RGB", (1, 1), RED).convert("L").getpixel((0, 0))
    assert seen(opened)[0] == (grey,) * 3
    assert seen(opened)[2:] == [WHITE, WHITE]


def test_palette(saved):
    image = Image.fromarray(SCENE).quantize(4)
    assert image.mode == "P"
    assert_sees(saved(image, "opaque.png"), [RED, GREEN, BLUE, WHITE])
    blue = image.getpixel((12, 24))
    # One colour is transparent, or each has an alpha of its own.
    assert_sees(saved(image, "one.png", transparency=blue), [RED, GREEN, WHITE, WHITE])
    table = bytes(0 if i == blue else 255 for i in range(4))
    assert_sees(saved(image, "table.png", transparency=table), [RED, GREEN, WHITE, WHITE])


def test_a_transparent_colour_in_rgb_and_in_grey(saved):
    opened = saved(Image.fromarray(SCENE), "rgb.png", transparency=BLUE)
    assert_sees(opened, [RED, GREEN, WHITE, WHITE])
    grey = np.full((32, 48), 90, np.uint8)
    grey[:16] = 7
    opened = saved(Image.fromarray(grey), "grey.png", transparency=7)
    assert_sees(opened, [WHITE, WHITE, (90,) * 3, (90,) * 3])


def test_grey_and_black_and_white(saved):
    assert_ramp(saved(Image.fromarray((RAMP * 255).astype(np.uint8)), "grey.png"))
    opened = saved(Image.fromarray(SCENE[..., 2] > 230).convert("1"), "bits.png")
    assert_sees(opened, [BLACK, BLACK, BLACK, WHITE])


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_16_bit_grey(saved, name):
    assert_ramp(saved(Image.fromarray((RAMP * 65535).astype(np.uint16)), name), 1.5)


def test_16_bit_grey_of_the_other_byte_order(tmp_path):
    image = Image.frombytes("I;16B", (64, 32), (RAMP * 65535).astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    assert_ramp(open_photograph(tmp_path / "a.tif"))


def png_16_bit(pixels: np.ndarray) -> bytes:
    """Pillow reads RGB of 16 bits but doesn't write it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_colour(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_16_bit(SCENE.astype(np.uint16) * 257))
    assert_sees(open_photograph(path), [RED, GREEN, BLUE, WHITE])
    with_alpha_16 = np.asarray(with_alpha("RGBA")).astype(np.uint16) * 257
    path.write_bytes(png_16_bit(with_alpha_16))
    assert_sees(open_photograph(path), [RED, HALF_GREEN, WHITE, WHITE], 1)


def as_cmyk() -> Image.Image:
    image = Image.fromarray(SCENE).convert("CMYK")
    assert image.getpixel((40, 24)) == (0, 0, 0, 0)  # white is no ink
    return image


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    (length,) = struct.unpack(">H", jpeg[at + 2 : at + 4])
    assert jpeg[at + 4 : at + 9] == b"Adobe"
    return jpeg[:at] + jpeg[at + 2 + length :]


def test_cmyk(saved, tmp_path):
    options = {"quality": 95, "subsampling": 0}
    assert_sees(saved(as_cmyk(), "adobe.jpg", **options), [RED, GREEN, BLUE, WHITE], 8)
    assert_sees(saved(as_cmyk(), "a.tif"), [RED, GREEN, BLUE, WHITE])

    # Without the marker ink is stored as ink. Pillow inverts when it saves, so this inverts first.
    stored = io.BytesIO()
    ImageChops.invert(as_cmyk()).save(stored, "JPEG", **options)
    (tmp_path / "plain.jpg").write_bytes(without_adobe_marker(stored.getvalue()))
    assert_sees(open_photograph(tmp_path / "plain.jpg"), [RED, GREEN, BLUE, WHITE], 8)


def swapped_profile() -> bytes:
    """An RGB profile in which the numbers for red mean blue, and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_profile(saved, mode):
    stored = Image.fromarray(np.ascontiguousarray(SCENE[..., ::-1])).convert(mode)
    assert_sees(
        saved(stored, "a.png", icc_profile=swapped_profile()), [RED, GREEN, BLUE, WHITE], 12
    )


@pytest.mark.parametrize("profile", [b"nonsense", swapped_profile()[:200]])
def test_a_damaged_profile_is_ignored(saved, profile):
    opened = saved(Image.fromarray(SCENE), "a.png", icc_profile=profile)
    assert_sees(opened, [RED, GREEN, BLUE, WHITE])


def test_a_profile_of_another_colour_space_is_ignored(saved):
    grey = Image.fromarray((RAMP * 255).astype(np.uint8))
    assert_ramp(saved(grey, "a.png", icc_profile=swapped_profile()))


def test_the_usual_profile_changes_nothing(saved):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    opened = saved(Image.fromarray(noise), "a.png", icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(opened), noise)


def test_first_frame(saved):
    first, second = Image.fromarray(SCENE), Image.new("RGB", (48, 32), BLACK)
    for name in ("a.gif", "a.tif", "a.webp", "a.png"):
        options = {"lossless": True} if name == "a.webp" else {}
        opened = saved(first, name, save_all=True, append_images=[second], **options)
        assert_sees(opened, [RED, GREEN, BLUE, WHITE])
    opened = saved(first, "a.mpo", save_all=True, append_images=[second], quality=95)
    assert_sees(opened, [RED, GREEN, BLUE, WHITE], 20)


def test_float(saved):
    assert_ramp(saved(Image.fromarray(RAMP.astype(np.float32)), "a.tif"), 0.51)
    assert_ramp(saved(Image.fromarray(RAMP.astype(np.float32)), "a.pfm"), 0.51)


@pytest.mark.parametrize(
    "pixels",
    [
        (RAMP * 255).astype(np.float32),
        (RAMP - 0.5).astype(np.float32),
        np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32),
        (RAMP * 1e6).astype(np.int32),
    ],
)
def test_pixels_without_a_known_white_are_refused(saved, pixels):
    with pytest.raises(UndecodableImageError, match=r"no one knows the white: save them as 8"):
        saved(Image.fromarray(pixels), "a.tif")


def test_tiny(saved):
    assert saved(Image.new("RGB", (1, 1), RED), "a.png").getpixel((0, 0)) == RED


def test_a_strip_is_cut_before_it_is_resized():
    transform = EvalTransform(28)
    rng = np.random.default_rng(0)
    for shape in ((20, 1000, 3), (1001, 21, 3), (9, 100, 3)):
        noise = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        strip = ImageOps.autocontrast(noise.filter(ImageFilter.GaussianBlur(2)))
        whole = transform.apply(strip).astype(int)
        part = transform.apply(central_part(strip)).astype(int)
        # The long side's length is rounded to whole pixels in both, and so their scales differ.
        assert whole.std() > 20
        assert np.abs(whole - part).mean() < 3
    assert central_part(Image.new("L", (60_001, 1))).size == (9, 1)
    assert central_part(Image.new("L", (1, 60_000))).size == (1, 8)
    same = Image.new("L", (80, 10))
    assert central_part(same) is same


def reason(path: Path) -> str:
    with pytest.raises(UndecodableImageError) as error:
        open_photograph(path)
    message = str(error.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "file"
    assert "No such file" in reason(path)
    assert "directory" in reason(tmp_path)
    path.write_bytes(b"")
    assert reason(path) == "the file is empty"
    path.write_bytes(b"<svg/>" * 100)
    assert "is no image of a known format (JPEG, " in reason(path)
    for brand in (b"heic", b"mif1"):
        path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0" * 100)
        assert "convert it to JPEG" in reason(path)
    # PostScript would start Ghostscript.
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert "is no image of a known format" in reason(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.gif", "a.bmp", "a.avif"])
def test_truncated(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(noise)
    image.save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in (len(whole) // 2, 20):
        (tmp_path / name).write_bytes(whole[:length])
        assert reason(tmp_path / name)


def test_too_large(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert reason(tmp_path / "a.png").startswith("is too large to decode safely")


def test_finding(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "sub/deep/d.heic", "notes.txt", ".hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").touch()
    (tmp_path / "[1].jpg").touch()

    def found(*patterns):
        paths = find_photographs([str(tmp_path / pattern) for pattern in patterns])
        return [str(path.relative_to(tmp_path)) for path in paths]

    everything = ["[1].jpg", "a.PNG", "b.jpg", "sub/c.webp", "sub/deep/d.heic"]
    assert found("") == everything
    assert found("sub", "b.jpg") == ["sub/c.webp", "sub/deep/d.heic", "b.jpg"]
    assert found("*.jpg") == ["[1].jpg", "b.jpg"]
    assert found("**/*.webp") == ["sub/c.webp"]
    assert found("[1].jpg", "notes.txt") == ["[1].jpg", "notes.txt"]
    assert found("b.jpg", "*.jpg", "b.jpg") == ["b.jpg", "[1].jpg"]
    assert found("missing.jpg", "no*thing") == ["missing.jpg", "no*thing"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no images"):
        found("empty")
