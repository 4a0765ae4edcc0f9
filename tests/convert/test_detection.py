"""Which ConvNeXt a file holds, from names and shapes."""

import golden_layouts
import numpy as np
import pytest
from shape_files import shape_file

from convnext_jax.convert.detection import detect
from convnext_jax.errors import UserError
from convnext_jax.models import ConvNeXt, create_model, list_models

# A layout that can hold each published variant.
LAYOUT_OF = {
    "convnext_iso": "official isotropic",
    "convnextv2": "transformers V2",
    "convnext_tiny_hnf": "timm hnf conv_mlp",
    "convnext_large_mlp": "timm",
    "convnext": "torchvision",
}


def array(*shape):
    return np.broadcast_to(np.float32(0), shape)


def layout_for(name):
    return next(layout for start, layout in LAYOUT_OF.items() if name.startswith(start))


@pytest.mark.parametrize("name", list_models("convnext*"))
def test_every_published_variant_is_recognised(name):
    model = create_model(name, num_classes=21841)
    detected = detect(shape_file(model, layout_for(name)))
    assert detected.layout.name == layout_for(name)
    assert detected.model_name == name
    assert (detected.in_channels, detected.ignored, detected.notes) == (3, (), ())
    found = ConvNeXt(**detected.arguments)
    for argument in detected.arguments:
        if argument != "patch_size":
            assert getattr(found, argument) == getattr(model, argument)
    assert found.strides == model.strides


def test_xxlarge_has_an_epsilon_of_its_own():
    model = create_model("convnext_xxlarge")
    assert detect(shape_file(model, "timm")).arguments["norm_eps"] == 1e-5
    assert detect(shape_file(model, "CLIP", without=("head",))).arguments["norm_eps"] == 1e-5


@pytest.mark.parametrize("label", golden_layouts.recorded())
def test_names_of_the_libraries_themselves(label):
    tensors = golden_layouts.recorded()[label].tensors
    detected = detect(tensors)
    arguments = detected.arguments
    assert detected.layout.name == label.split(",")[0]
    assert detected.model_name is None
    if label != "official isotropic":
        assert (arguments["depths"], arguments["dims"]) == ((1, 2, 1, 1), (4, 5, 6, 8))
    has_grn = "V2" in label or "FCMAE" in label or "backbone" in label
    assert arguments["use_grn"] == has_grn
    assert (arguments["layer_scale_init"] is None) == has_grn
    assert arguments["isotropic"] == ("isotropic" in label)
    assert arguments["head_norm_first"] == ("hnf" in label)
    assert arguments["head_hidden"] == (12 if "hidden layer" in label else None)
    assert arguments["feature_norms"] == ("backbone" in label)
    no_head = any(x in label for x in ("FCMAE", "CLIP", "DINOv3", "without head"))
    assert arguments["num_classes"] == (0 if no_head else 10)


def test_what_lies_beside_the_convnext_is_named():
    def ignored(label):
        return set(detect(golden_layouts.recorded()[label].tensors).ignored)

    assert ignored("FCMAE sparse") == {
        "mask_token",
        "proj.weight",
        "decoder.0.dwconv.weight",
        "pred.bias",
    }
    assert ignored("official, DINOv3 of Meta") == {"norms.3.weight", "norms.3.bias"}
    assert "logit_scale" in ignored("CLIP")
    assert "visual.head.proj.weight" in ignored("CLIP")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.model."])
@pytest.mark.parametrize("label", ["official", "timm", "torchvision", "transformers"])
def test_names_that_a_wrapping_program_has_prefixed(prefix, label):
    tensors = golden_layouts.recorded()[label].tensors
    detected = detect({prefix + name: value for name, value in tensors.items()})
    assert detected.layout.name == label
    assert detected.prefix == prefix
    assert detected.arguments == detect(tensors).arguments


def test_sizes_that_are_not_published():
    model = ConvNeXt(
        num_classes=7, depths=(1, 3), dims=(8, 24), patch_size=2, kernel_size=5, use_grn=True
    )
    detected = detect(shape_file(model, "timm conv_mlp", in_channels=5))
    assert detected.model_name is None
    assert detected.in_channels == 5
    found = ConvNeXt(**detected.arguments)
    for argument in ("num_classes", "depths", "dims", "kernel_size", "use_grn"):
        assert getattr(found, argument) == getattr(model, argument)
    assert found.strides == (2, 4)
    assert found.layer_scale_init


def test_isotropic_with_and_without_layer_scale():
    for layer_scale in (None, 1e-6):
        model = create_model("convnext_iso_large", layer_scale_init=layer_scale)
        detected = detect(shape_file(model, "official isotropic"))
        assert detected.arguments["layer_scale_init"] == layer_scale
        assert detected.model_name == ("convnext_iso_large" if layer_scale else None)


def test_a_damaged_file_is_recognised_all_the_same():
    tensors = dict(shape_file(create_model("convnext_tiny"), "official"))
    del tensors["downsample_layers.0.0.weight"]
    del tensors["stages.2.8.dwconv.weight"]
    del tensors["stages.3.0.gamma"]
    tensors["stages.0.0.norm.weight"] = array(5)
    tensors["stages.1.0.pwconv1.weight"] = array(3)
    detected = detect(tensors)
    assert detected.layout.name == "official"
    assert detected.model_name == "convnext_tiny"


class TestBackbones:
    def test_norms_on_some_outputs_are_left_out(self):
        label = "transformers without head, backbone"
        tensors = dict(golden_layouts.recorded()[label].tensors)
        for name in [k for k in tensors if "stage1" in k]:
            del tensors[name]
        detected = detect(tensors)
        assert not detected.arguments["feature_norms"]
        assert len(detected.ignored) == 6
        assert "norms on some" in detected.notes[0]

    def test_no_norms(self):
        model = ConvNeXt(num_classes=0, depths=(1, 1), dims=(4, 6))
        assert not detect(shape_file(model, "transformers without head")).arguments["feature_norms"]


class TestConfig:
    MODEL = ConvNeXt(num_classes=3, depths=(1, 1), dims=(4, 6))

    def detect(self, layout, model=MODEL, **config):
        return detect(shape_file(model, layout), {"config": config})

    def test_transformers_default_epsilon_is_that_of_the_authors(self):
        detected = self.detect("transformers", layer_norm_eps=1e-12, hidden_act="gelu")
        assert (detected.arguments["norm_eps"], detected.notes) == (1e-6, ())

    def test_a_larger_one_is_noted(self):
        (note,) = self.detect("transformers", layer_norm_eps=1e-5).notes
        assert "1e-05" in note

    def test_in_dinov3_it_is_that_of_all_norms(self):
        headless = self.MODEL.clone(num_classes=0)
        detected = self.detect("transformers DINOv3", headless, layer_norm_eps=1e-5)
        assert detected.arguments["norm_eps"] == 1e-5

    def test_another_activation_is_refused(self):
        with pytest.raises(UserError, match=r"hidden_act is 'relu' \(config\.json\)"):
            self.detect("transformers", hidden_act="relu")

    def test_a_timm_config_says_nothing_here(self):
        assert self.detect("timm", hidden_act="relu").notes == ()


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("layer1.0.conv1.weight", "a ResNet of another kind"),
            ("module.layer4.2.conv3.weight", "a ResNet of another kind"),
            ("layers.0.blocks.1.attn.logit_scale", "a Swin transformer V2"),
            ("blocks.0.attn.qkv.weight", "a transformer"),
            ("vit.encoder.layer.0.attention.attention.query.weight", "a transformer"),
            ("blocks.1.0.conv_pw.weight", "an EfficientNet or MobileNet"),
            ("transformer.wte.weight", "a text model"),
            ("down_blocks.0.resnets.0.conv1.weight", "a U-Net"),
        ],
    )
    def test_other_models_are_named(self, name, kind):
        with pytest.raises(UserError) as caught:
            detect({name: array(8, 8, 3, 3), "norm.weight": array(8), "head.bias": array(5)})
        message = str(caught.value)
        assert f"it looks like {kind} (it has a tensor {name})" in message
        assert "torchvision" in message
        assert "\n" not in message

    def test_unknown_names(self):
        with pytest.raises(UserError, match=r"its tensors are called a, b, c, …; the layouts"):
            detect(dict.fromkeys("abcd", array(2)))

    def test_no_tensors(self):
        with pytest.raises(UserError, match="it holds no tensors"):
            detect({})

    def test_overlapping_stems(self):
        tensors = dict(shape_file(create_model("convnext_atto"), "timm conv_mlp"))
        del tensors["stem.1.bias"]
        tensors |= {"stem.0.weight": array(20, 3, 3, 3), "stem.1.weight": array(40, 20, 3, 3)}
        tensors |= {"stem.2.weight": array(40), "stem.2.bias": array(40)}
        with pytest.raises(UserError, match="overlapping stem"):
            detect(tensors)

    def test_rms_norms(self):
        tensors = shape_file(create_model("convnext_atto"), "timm conv_mlp")
        left = {k: v for k, v in tensors.items() if not k.endswith("norm.bias")}
        with pytest.raises(UserError, match="RMS norms"):
            detect({k: v for k, v in left.items() if k != "stem.1.bias" and ".0.bias" not in k})

    def test_timm_models_with_other_activations(self):
        model = ConvNeXt(depths=(1, 2, 4, 2), dims=(24, 32, 48, 64))
        with pytest.raises(UserError, match="test_convnext"):
            detect(shape_file(model, "timm"))

    def test_an_even_kernel(self):
        tensors = {
            k: array(*v.shape[:2], 4, 4) if k.endswith("dwconv.weight") else v
            for k, v in shape_file(create_model("convnext_atto"), "official").items()
        }
        with pytest.raises(UserError, match="kernel_size must be odd"):
            detect(tensors)
