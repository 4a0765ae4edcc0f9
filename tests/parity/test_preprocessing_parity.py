"""The preprocessing found for timm's and torchvision's weights is that of the libraries."""

import math

import numpy as np
import pytest
from PIL import Image
from shape_files import shape_file

from convnext_jax.convert.detection import detect
from convnext_jax.convert.preprocessing import preprocessing_for
from convnext_jax.models import create_model

pytestmark = pytest.mark.parity
pytest.importorskip("torch")

from torchvision_operators import define_missing_operators  # noqa: E402  (it needs PyTorch)

define_missing_operators()


def found(name, layout, metadata, source=None):
    detected = detect(shape_file(create_model(name), layout))
    return preprocessing_for(source or name, metadata, detected)


def test_every_published_timm_config_gives_timms_pixels():
    timm = pytest.importorskip("timm")

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (310, 407, 3), dtype=np.uint8))
    names = timm.list_pretrained("convnext*")
    assert len(names) > 50
    for name in names:
        cfg = timm.get_pretrained_cfg(name).to_dict()
        ours = found("convnext_tiny", "timm", {"config": {"pretrained_cfg": cfg}})
        config = timm.data.resolve_data_config(pretrained_cfg=cfg)
        theirs = timm.data.create_transform(**config, use_prefetcher=True)(image)
        expected = np.asarray(theirs).transpose(1, 2, 0)
        np.testing.assert_array_equal(ours.transform().apply(image), expected, err_msg=name)
        assert (ours.mean, ours.std) == (config["mean"], config["std"])


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_torchvisions_weights_say_the_same(size):
    models = pytest.importorskip("torchvision").models

    theirs = getattr(models, f"ConvNeXt_{size.title()}_Weights").IMAGENET1K_V1.transforms()
    ours = found(f"convnext_{size}", "torchvision", {})
    assert ours.image_size == theirs.crop_size[0]
    assert ours.resize_size == theirs.resize_size[0]
    assert ours.interpolation == theirs.interpolation.value
    assert (ours.mean, ours.std) == (tuple(theirs.mean), tuple(theirs.std))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("resnet50", "resnet50"),
        ("swin_t", "swin_tiny"),
        ("swin_s", "swin_small"),
        ("swin_b", "swin_base"),
    ],
)
def test_torchvisions_other_weights_say_the_same(function, name):
    models = pytest.importorskip("torchvision").models

    layout = "torchvision ResNet" if name == "resnet50" else "torchvision Swin"
    for weights in models.get_model_weights(function):
        theirs, source = weights.transforms(), weights.url.rpartition("/")[2]
        ours = found(name, layout, {}, source)
        assert ours.image_size == theirs.crop_size[0]
        assert ours.resize_size == theirs.resize_size[0]
        assert ours.interpolation == theirs.interpolation.value
        assert (ours.mean, ours.std) == (tuple(theirs.mean), tuple(theirs.std))


def test_timms_swins_and_resnets_say_the_same():
    timm = pytest.importorskip("timm")

    swins = [n for n in timm.list_pretrained("swin_*_patch4_*") if "_cr_" not in n]
    assert len(swins) > 10
    for name in [*swins, *timm.list_pretrained("resnet50.*")]:
        cfg = timm.get_pretrained_cfg(name).to_dict()
        size, ratio = cfg["input_size"][-1], cfg["crop_pct"]
        if name in swins:
            suffix = "_window12" if "window12" in name else ""
            model, layout = f"swin_{name.split('_')[1]}{suffix}", "timm Swin"
        else:
            model, layout = "resnet50", "torchvision ResNet"
        given = [found(model, layout, {"config": {"pretrained_cfg": cfg}})]
        if name in swins:
            given.append(found(model, layout, {}))
        for ours in given:
            assert (ours.image_size, ours.resize_size) == (size, math.floor(size / ratio)), name
            assert ours.interpolation == cfg["interpolation"]
            assert (ours.mean, ours.std) == (cfg["mean"], cfg["std"])
