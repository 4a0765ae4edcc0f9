"""The fast decoder against Pillow: the same crops, and pixels within the bounds that it states."""

import importlib.util
import io
import pickle
import sys
import threading

import numpy as np
import pytest
from conftest import encode
from PIL import Image

from convnext_jax.data import fast_decoding
from convnext_jax.data.transforms import TrainTransform, UndecodableImageError
from convnext_jax.errors import UserError

INSTALLED = all(importlib.util.find_spec(p) for p in ("simplejpeg", "cykooz_resizer"))
needs_the_extra = pytest.mark.skipif(not INSTALLED, reason="the extra [fast] is not installed")


def differences(files, size, **options):
    """|fast - Pillow| of one crop of each file: (files, size, size, 3)."""
    exact = TrainTransform(size, **options)
    fast = TrainTransform(size, decoder="fast", **options)
    return np.stack(
        [
            np.abs(
                exact(encoded, np.random.default_rng(i)).astype(int)
                - fast(encoded, np.random.default_rng(i))
            )
            for i, encoded in enumerate(files)
        ]
    )


@needs_the_extra
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_photographs_differ_by_rounding_alone(photographs, interpolation):
    found = differences(photographs * 10, 224, interpolation=interpolation)
    assert found.max() <= 2
    assert 0 < (found > 0).mean() < 0.01


@needs_the_extra
def test_imagenet_files_differ_by_rounding_alone(imagenet_sample):
    found = differences([path.read_bytes() for path in imagenet_sample[::10]], 224)
    assert found.max() <= 2
    assert found.mean() < 0.004


@needs_the_extra
def test_the_passes_have_pillows_order():
    # Black and white at random: an overshoot that is cut off between the passes shows.
    rng = np.random.default_rng(0)
    for height, width in ((60, 300), (300, 60), (100, 64), (65, 64), (101, 80), (97, 80), (40, 40)):
        pixels = rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255)
        expected = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC))
        found = fast_decoding.resize(pixels, 64, "bicubic")
        assert np.abs(expected.astype(int) - found).max() <= 2


@needs_the_extra
def test_large_crops_are_decoded_smaller_within_the_stated_bound(photographs, monkeypatch):
    sizes = []
    decode_jpeg = fast_decoding._import("simplejpeg").decode_jpeg

    def recording(*arguments, **options):
        pixels = decode_jpeg(*arguments, **options)
        sizes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(fast_decoding._import("simplejpeg"), "decode_jpeg", recording)
    found = differences(photographs * 3, 48, scale=(0.5, 1.0))
    assert set(sizes) == {(214, 320), (107, 160)}  # of 427 × 640, rounded up
    assert found.mean() < 1.0
    assert found.mean(axis=(1, 2, 3)).max() < 2.0
    sizes.clear()
    differences(photographs, 224)
    assert set(sizes) == {(427, 640)}


@needs_the_extra
def test_what_is_no_plain_jpeg_is_decoded_by_pillow(photographs):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    for encoded in (encode(pixels), cmyk.getvalue()):
        assert differences([encoded], 32).max() == 0
    grey = encode(pixels[..., 0], "JPEG")
    assert differences([grey], 32).max() <= 2


@needs_the_extra
def test_what_libjpeg_warns_of_is_left_to_pillow(photographs):
    encoded = photographs[0]
    middle = len(encoded) // 2
    odd = encoded[:middle] + b"\xff\xd0" + encoded[middle:]  # a marker that does not belong there
    with pytest.raises(ValueError, match=r"orrupt JPEG data|marker"):
        fast_decoding._import("simplejpeg").decode_jpeg(odd)
    assert differences([odd], 64).max() <= 2
    with pytest.raises(UndecodableImageError):
        TrainTransform(64, decoder="fast")(encoded[:5000], np.random.default_rng(0))
    for garbage in (b"", b"not an image", encoded[:20]):
        with pytest.raises(UndecodableImageError):
            TrainTransform(64, decoder="fast")(garbage, np.random.default_rng(0))


@needs_the_extra
def test_flips_views_and_threads(photographs):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fast_decoding.flip(pixels), pixels[:, ::-1])
    transform = pickle.loads(pickle.dumps(TrainTransform(64, decoder="fast")))
    expected = transform.views(photographs[0], np.random.default_rng(0), 4)
    assert len({view.tobytes() for view in expected}) == 4
    results = {}

    def work(name):
        results[name] = [
            transform.views(photographs[0], np.random.default_rng(0), 4) for _ in range(5)
        ]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for made in results.values():
        for views in made:
            np.testing.assert_array_equal(views, expected)


@needs_the_extra
def test_a_filter_that_it_lacks_is_named():
    with pytest.raises(UserError, match="no interpolation 'hamming': use one of 'bilinear'"):
        TrainTransform(64, decoder="fast", interpolation="hamming")


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    fast_decoding._import.cache_clear()
    with pytest.raises(UserError, match=r"needs simplejpeg.*pip install 'convnext-jax\[fast\]'"):
        TrainTransform(64, decoder="fast")
    fast_decoding._import.cache_clear()
