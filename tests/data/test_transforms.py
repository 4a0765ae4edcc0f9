import io
import math
import warnings

import numpy as np
import pytest
from conftest import encode
from PIL import Image

from convnext_jax.data.transforms import (
    EvalTransform,
    PadCropTrainTransform,
    ResizeEvalTransform,
    TrainTransform,
    UndecodableImageError,
    decode,
    random_crop_box,
)
from convnext_jax.errors import UserError

BICUBIC = Image.Resampling.BICUBIC


def pillow(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def torchvision_box(size, scale, ratio, rng):
    """RandomResizedCrop.get_params, written out with its draws in its order."""
    width, height = size
    area = height * width
    for _ in range(10):
        target_area = area * rng.uniform(scale[0], scale[1])
        aspect_ratio = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            i = int(rng.integers(0, height - h, endpoint=True))
            j = int(rng.integers(0, width - w, endpoint=True))
            return j, i, w, h
    in_ratio = float(width) / float(height)
    if in_ratio < min(ratio):
        w = width
        h = round(w / min(ratio))
    elif in_ratio > max(ratio):
        h = height
        w = round(h * max(ratio))
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def expected_train(encoded: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    image = pillow(encoded)
    j, i, w, h = torchvision_box(image.size, (0.08, 1.0), (3 / 4, 4 / 3), rng)
    image = image.crop((j, i, j + w, i + h)).resize((size, size), BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def expected_eval_224(encoded: bytes, short: int = 256) -> np.ndarray:
    image = pillow(encoded)
    w, h = image.size
    # torchvision: new_short = short, new_long = int(short * long / short side).
    if w <= h:
        image = image.resize((short, int(short * h / w)), BICUBIC)
    else:
        image = image.resize((int(short * w / h), short), BICUBIC)
    w, h = image.size
    top, left = round((h - 224) / 2.0), round((w - 224) / 2.0)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


ODD_SIZES = [(1, 1), (1, 500), (3, 2), (33, 257), (255, 256), (301, 223), (640, 17)]


@pytest.mark.parametrize(("height", "width"), ODD_SIZES)
def test_odd_sizes_equal_pillow(height, width):
    encoded = encode(noise(height, width))
    for seed in range(5):
        actual = TrainTransform(64)(encoded, np.random.default_rng(seed))
        np.testing.assert_array_equal(
            actual, expected_train(encoded, 64, np.random.default_rng(seed))
        )
    np.testing.assert_array_equal(EvalTransform(224)(encoded), expected_eval_224(encoded))
    whole = np.asarray(pillow(encoded).resize((384, 384), BICUBIC))
    np.testing.assert_array_equal(EvalTransform(384)(encoded), whole)


@pytest.mark.parametrize("resize_size", [224, 230, 236, 300])
def test_a_short_side_may_be_given(resize_size):
    for height, width in ((301, 223), (40, 97), (224, 224), (1, 500)):
        encoded = encode(noise(height, width))
        expected = expected_eval_224(encoded, resize_size)
        np.testing.assert_array_equal(
            EvalTransform(224, resize_size=resize_size)(encoded), expected
        )
        # The ratio does not matter then.
        other = EvalTransform(224, crop_ratio=0.5, resize_size=resize_size)
        np.testing.assert_array_equal(other(encoded), expected)


def test_the_whole_image_or_a_crop_may_be_asked_for():
    encoded = encode(noise(300, 500))
    whole = np.asarray(pillow(encoded).resize((224, 224), BICUBIC))
    np.testing.assert_array_equal(EvalTransform(224, squash=True)(encoded), whole)
    resized = pillow(encoded).resize((640, 384), BICUBIC)
    middle = np.asarray(resized.crop((128, 0, 512, 384)))
    for transform in (
        EvalTransform(384, crop_ratio=1.0, squash=False),
        EvalTransform(384, resize_size=384),
    ):
        np.testing.assert_array_equal(transform(encoded), middle)


def test_what_is_decoded_already_goes_the_same_way():
    encoded = encode(noise(300, 500))
    for transform in (EvalTransform(224), EvalTransform(384), ResizeEvalTransform(32)):
        np.testing.assert_array_equal(transform.apply(pillow(encoded)), transform(encoded))


@pytest.mark.parametrize("transform", [TrainTransform(32), PadCropTrainTransform(32)])
def test_views_are_drawn_one_after_another_from_one_decoding(transform, photographs, monkeypatch):
    from convnext_jax.data import transforms

    decoded = []
    monkeypatch.setattr(transforms, "decode", lambda e: decoded.append(e) or decode(e))
    views = transform.views(photographs[0], np.random.default_rng(1), 3)
    assert len(decoded) == 1
    assert len({view.tobytes() for view in views}) == 3
    rng = np.random.default_rng(1)
    for view in views:
        np.testing.assert_array_equal(view, transform(photographs[0], rng))


def test_photographs_equal_pillow(photographs):
    for encoded in photographs:
        for seed in range(10):
            actual = TrainTransform(224)(encoded, np.random.default_rng(seed))
            expected = expected_train(encoded, 224, np.random.default_rng(seed))
            np.testing.assert_array_equal(actual, expected)
            assert actual.dtype == np.uint8
            assert actual.shape == (224, 224, 3)
        np.testing.assert_array_equal(EvalTransform(224)(encoded), expected_eval_224(encoded))


def test_imagenet_files_equal_pillow(imagenet_sample):
    for seed, path in enumerate(imagenet_sample[::25]):
        encoded = path.read_bytes()
        actual = TrainTransform(176)(encoded, np.random.default_rng(seed))
        np.testing.assert_array_equal(
            actual, expected_train(encoded, 176, np.random.default_rng(seed))
        )
        np.testing.assert_array_equal(EvalTransform(224)(encoded), expected_eval_224(encoded))


def test_resize_with_a_box_is_not_crop_then_resize(photographs):
    """Why the crop is made first: the other way is tempting, and wrong at the borders."""
    image, box = pillow(photographs[0]), (100, 120, 400, 300)
    with_box = np.asarray(image.resize((64, 64), BICUBIC, box=box))
    cropped = np.asarray(image.crop(box).resize((64, 64), BICUBIC))
    assert (with_box != cropped).any()


def test_crop_boxes_have_the_range_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [random_crop_box((500, 400), (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(2000)]
    )
    left, top, width, height = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 500).all()
    assert (top + height <= 400).all()
    area, aspect = width * height / (500 * 400), width / height
    assert area.min() == pytest.approx(0.08, abs=0.01)
    assert area.max() > 0.9
    assert aspect.min() == pytest.approx(3 / 4, abs=0.02)
    assert aspect.max() == pytest.approx(4 / 3, abs=0.02)


def test_an_extreme_image_gets_the_central_crop():
    # A crop of the full width at ratio 4/3 would be higher than the image: all ten tries fail.
    box = random_crop_box((1000, 10), (0.5, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert box == (493, 0, 13, 10)


def test_half_of_the_images_are_flipped():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    transform = PadCropTrainTransform(8, padding=0)
    rng = np.random.default_rng(0)
    flipped = [transform(encode(pixels), rng)[0, 0, 0] == 255 for _ in range(400)]
    assert 0.4 < np.mean(flipped) < 0.6
    never = PadCropTrainTransform(8, padding=0, flip=0.0)
    assert all((never(encode(pixels), rng) == pixels).all() for _ in range(20))


def test_pad_and_crop_shifts_by_at_most_the_padding():
    pixels = noise(8, 8)
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 8, x : x + 8].tobytes(): (y, x) for y in range(5) for x in range(5)}
    transform, rng = PadCropTrainTransform(8, padding=2, flip=0.0), np.random.default_rng(0)
    seen = {windows[transform(encode(pixels), rng).tobytes()] for _ in range(600)}
    assert seen == set(windows.values())


def test_small_images_are_resized_only_where_needed():
    pixels = noise(32, 32)
    np.testing.assert_array_equal(ResizeEvalTransform(32)(encode(pixels)), pixels)
    resized = np.asarray(Image.fromarray(pixels).resize((16, 16), BICUBIC))
    np.testing.assert_array_equal(ResizeEvalTransform(16)(encode(pixels)), resized)


def test_every_mode_becomes_rgb():
    pixels = noise(6, 5)
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(decode(encode(grey)), np.repeat(grey[..., None], 3, axis=2))
    # Alpha is dropped: what is transparent keeps its colour.
    rgba = np.dstack([pixels, np.zeros((6, 5), np.uint8)])
    np.testing.assert_array_equal(decode(encode(rgba)), pixels)
    np.testing.assert_array_equal(decode(encode(noise(6, 5), "BMP")), pixels)
    deep = np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000
    np.testing.assert_array_equal(np.asarray(decode(encode(deep)))[..., 0], deep >> 8)
    cmyk = io.BytesIO()
    image.convert("CMYK").save(cmyk, "JPEG")
    np.testing.assert_array_equal(decode(cmyk.getvalue()), pillow(cmyk.getvalue()))


def test_palettes_with_alpha_do_not_warn():
    image = Image.fromarray(noise(6, 5)).quantize(8)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes([0, 128] + [255] * 6))
    with pytest.warns(UserWarning, match="Palette images with Transparency"):
        direct = pillow(file.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(file.getvalue()), direct)


def test_exif_orientation_is_ignored_as_the_reference_does():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° to view
    assert decode(encode(noise(20, 30), "JPEG", exif=exif)).size == (30, 20)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 broken"])
def test_garbage_is_undecodable(content):
    with pytest.raises(UndecodableImageError):
        decode(content)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_truncated_files_are_undecodable(file_format):
    encoded = encode(noise(64, 64), file_format)
    with pytest.raises(UndecodableImageError):
        decode(encoded[: len(encoded) // 2])


def test_wrong_arguments_are_the_users_mistakes():
    with pytest.raises(UserError, match="no interpolation 'cubic': use one of"):
        TrainTransform(224, interpolation="cubic")
    with pytest.raises(UserError, match="image_size must be positive"):
        EvalTransform(0)
    with pytest.raises(UserError, match="crop_ratio"):
        EvalTransform(224, crop_ratio=1.5)
    with pytest.raises(UserError, match="resize_size must be at least image_size, 224"):
        EvalTransform(224, resize_size=223)
    with pytest.raises(UserError, match="resize_size and squash"):
        EvalTransform(224, resize_size=256, squash=True)
    with pytest.raises(UserError, match="'pillow' or 'fast', not 'quick'"):
        TrainTransform(224, decoder="quick")
    with pytest.raises(UserError, match="padding"):
        PadCropTrainTransform(32, padding=-1)
    with pytest.raises(UserError, match="rising ranges"):
        TrainTransform(224, scale=(1.0, 0.08))
