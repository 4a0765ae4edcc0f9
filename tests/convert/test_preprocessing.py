"""Each family's preprocessing, from what lies beside the weights or from their name."""

import json
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image
from shape_files import shape_file

from convnext_jax.convert.detection import detect
from convnext_jax.convert.preprocessing import Preprocessing, preprocessing_for
from convnext_jax.data.transforms import EvalTransform
from convnext_jax.errors import UserError
from convnext_jax.models import create_model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DETECTED = {
    layout: detect(shape_file(create_model("convnext_tiny", num_classes=0), layout))
    for layout in (
        "official",
        "timm",
        "CLIP",
        "torchvision",
        "transformers without head",
        "transformers DINOv3",
    )
}


def found(layout, source="weights.pth", detected=None, **metadata):
    detected = detected or DETECTED[layout]
    return preprocessing_for(source, metadata, detected)


def resizing(preprocessing):
    return (preprocessing.image_size, preprocessing.resize_size, preprocessing.interpolation)


def statistics(preprocessing):
    return (preprocessing.mean, preprocessing.std)


class TestAuthors:
    @pytest.mark.parametrize(
        ("source", "image_size", "resize_size"),
        [
            ("convnext_tiny_1k_224_ema.pth", 224, 256),
            ("/weights/convnext_base_1k_384.pth", 384, None),
            ("https://host/convnext/convnext_xlarge_22k_1k_384_ema.pth", 384, None),
            ("convnextv2_huge_22k_512_ema.pt", 512, None),
            ("convnextv2_atto_1k_224_fcmae.pt", 224, 256),
            ("/runs/384/mine.pth", 224, 256),
            ("/runs/base-384/checkpoint.pth", 384, None),
            ("model3840.pth", 224, 256),
        ],
    )
    def test_size_by_name(self, source, image_size, resize_size):
        preprocessing = found("official", source)
        assert resizing(preprocessing) == (image_size, resize_size, "bicubic")
        assert statistics(preprocessing) == IMAGENET

    def test_a_guess_is_called_one(self):
        note = found("official", "mine.pth").note
        assert note == (
            "the preprocessing is the authors' own evaluation, for 224 pixels, the usual one, "
            "since its name says none"
        )
        assert found("official", "x_384.pth").note.endswith("for 384 pixels, which its name says")


class TestTimm:
    CFG = MappingProxyType(
        {"input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bicubic"}
    )

    def found(self, **changes):
        return found("timm", config={"pretrained_cfg": {**self.CFG, **changes}})

    def test_its_config_counts(self):
        preprocessing = self.found(mean=[0.5] * 3, std=[0.5] * 3)
        assert resizing(preprocessing) == (224, 235, "bicubic")
        assert statistics(preprocessing) == HALF
        assert preprocessing.note == ""

    def test_a_crop_of_all(self):
        assert resizing(self.found(crop_pct=1.0)) == (224, 224, "bicubic")

    def test_squash(self):
        squashed = self.found(input_size=[3, 384, 384], crop_pct=1.0, crop_mode="squash")
        assert resizing(squashed) == (384, None, "bicubic")
        cropped = self.found(input_size=[3, 384, 384], crop_pct=1.0)
        assert resizing(cropped) == (384, 384, "bicubic")

    def test_its_test_size_is_noted(self):
        note = self.found(test_input_size=[3, 288, 288], test_crop_pct=1.0).note
        assert note == "timm also evaluates it at 288 pixels with crop ratio 1.0"

    @pytest.mark.parametrize("changes", [{"crop_mode": "border"}, {"crop_mode": "squash"}])
    def test_what_can_not_be_done_is_refused(self, changes):
        with pytest.raises(UserError, match=r"pretrained_cfg \(config\.json\) asks for crop_mode"):
            self.found(**changes)

    @pytest.mark.parametrize(
        ("source", "expected", "mean_std"),
        [
            ("hf://timm/convnext_tiny.fb_in1k", (224, 256, "bicubic"), IMAGENET),
            ("hf://timm/convnext_base.fb_in22k_ft_in1k_384", (384, None, "bicubic"), IMAGENET),
            ("convnext_nano.r384_in12k", (384, None, "bicubic"), IMAGENET),
            ("timm/convnext_base.clip_laion2b/model.safetensors", (256, 256, "bicubic"), CLIP),
            ("convnext_base.clip_laiona_320.pt", (320, 320, "bicubic"), CLIP),
            ("timm/convnext_tiny.dinov3_lvd1689m", (224, 224, "bicubic"), IMAGENET),
        ],
    )
    def test_without_a_config(self, source, expected, mean_std):
        preprocessing = found("timm", source)
        assert resizing(preprocessing) == expected
        assert statistics(preprocessing) == mean_std


class TestClip:
    def test_default(self):
        assert resizing(found("CLIP")) == (256, 256, "bicubic")
        assert statistics(found("CLIP")) == CLIP

    def test_by_name_and_config(self):
        preprocessing = found(
            "CLIP",
            "laion/CLIP-convnext_large_d_320.laion2B",
            open_clip_config={"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}},
        )
        assert resizing(preprocessing) == (320, 320, "bicubic")
        assert statistics(preprocessing) == HALF


@pytest.mark.parametrize(
    ("name", "resize_size"),
    [
        ("convnext_tiny", 236),
        ("convnext_small", 230),
        ("convnext_base", 232),
        ("convnext_large", 232),
    ],
)
def test_torchvision(name, resize_size):
    detected = detect(shape_file(create_model(name), "torchvision"))
    preprocessing = found("torchvision", f"{name}-0123_384.pth", detected)
    assert resizing(preprocessing) == (224, resize_size, "bilinear")
    assert statistics(preprocessing) == IMAGENET


class TestTransformers:
    LAYOUT = "transformers without head"

    def found(self, **processor):
        return found(self.LAYOUT, preprocessor_config=processor)

    def test_facebooks_files(self):
        published = {
            "crop_pct": 0.875,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
        }
        for size in (224, {"shortest_edge": 224}):
            preprocessing = self.found(**published, size=size)
            assert resizing(preprocessing) == (224, 256, "bicubic")
            assert statistics(preprocessing) == IMAGENET
            assert preprocessing.note == ""
        assert resizing(self.found(**published, size=384)) == (384, None, "bicubic")

    def test_its_default_statistics_are_not_imagenets(self):
        preprocessing = self.found(size={"shortest_edge": 224}, resample=2)
        assert resizing(preprocessing) == (224, 256, "bilinear")
        assert statistics(preprocessing) == HALF
        assert "names no image_mean" in preprocessing.note

    def test_without_a_config_it_is_facebooks(self):
        preprocessing = found(self.LAYOUT, "hf://facebook/convnext-base-384-22k-1k")
        assert resizing(preprocessing) == (384, None, "bicubic")
        assert statistics(preprocessing) == IMAGENET


class TestDinov3:
    def test_default(self):
        preprocessing = found("transformers DINOv3")
        assert resizing(preprocessing) == (224, None, "bilinear")
        assert statistics(preprocessing) == IMAGENET

    def test_its_config_counts(self):
        processor = {"size": {"height": 256, "width": 256}, "resample": 3}
        preprocessing = found("transformers DINOv3", preprocessor_config=processor)
        assert resizing(preprocessing) == (256, None, "bicubic")
        assert statistics(preprocessing) == IMAGENET


class TestPreprocessing:
    def test_to_dict_and_back(self):
        for preprocessing in (Preprocessing(), Preprocessing(384, None, note="a guess")):
            stored = json.loads(json.dumps(preprocessing.to_dict()))
            assert Preprocessing.from_dict(stored) == preprocessing

    def test_at_another_size_the_crop_keeps_its_share(self):
        assert resizing(Preprocessing().at_size(288)) == (288, 329, "bicubic")
        assert resizing(Preprocessing(224, 224).at_size(320)) == (320, 320, "bicubic")
        assert resizing(Preprocessing(384, None).at_size(224)) == (224, None, "bicubic")

    def test_transform(self):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        cropped = Preprocessing(16, 20, "bilinear").transform()
        assert cropped == EvalTransform(16, resize_size=20, interpolation="bilinear")
        expected = image.resize((30, 20), Image.Resampling.BILINEAR).crop((7, 2, 23, 18))
        np.testing.assert_array_equal(cropped.apply(image), np.asarray(expected))
        whole = Preprocessing(16, None).transform().apply(image)
        expected = image.resize((16, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(whole, np.asarray(expected))
