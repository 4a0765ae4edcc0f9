import jax.numpy as jnp
import pytest

from convnext_jax.analysis.macs import count_parameters
from convnext_jax.models import ConvNeXt, create_model, list_models

PARAMETERS = {
    "convnext_atto": 3_695_520,
    "convnext_femto": 5_217_784,
    "convnext_pico": 9_045_672,
    "convnext_nano": 15_593_560,
    "convnext_tiny": 28_589_128,
    "convnext_tiny_hnf": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "convnext_large_mlp": 200_128_168,
    "convnext_xlarge": 350_196_968,
    "convnext_xxlarge": 846_471_016,
    "convnext_iso_small": 22_308_712,
    "convnext_iso_base": 87_083_752,
    "convnext_iso_large": 305_942_504,
    "convnextv2_atto": 3_708_400,
    "convnextv2_femto": 5_233_240,
    "convnextv2_pico": 9_066_280,
    "convnextv2_nano": 15_623_800,
    "convnextv2_tiny": 28_635_496,
    "convnextv2_base": 88_717_800,
    "convnextv2_large": 197_956_840,
    "convnextv2_huge": 660_289_640,
}
PARAMETERS_22K = {
    "convnext_tiny": 44_615_857,
    "convnext_small": 66_250_417,
    "convnext_base": 109_953_489,
    "convnext_large": 229_799_953,
    "convnext_xlarge": 392_900_177,
}


def test_every_variant_has_a_reference_count():
    assert list_models("convnext*") == list(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert count_parameters(create_model(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS_22K)
def test_parameter_count_with_22k_head(name):
    assert count_parameters(create_model(name, num_classes=21841)) == PARAMETERS_22K[name]


def test_xxlarge_has_its_own_epsilon():
    assert create_model("convnext_xxlarge").norm_eps == 1e-5


def test_overrides_replace_the_variants_arguments():
    model = create_model(
        "convnextv2_atto", num_classes=7, drop_path_rate=0.2, dtype=jnp.bfloat16, remat=True
    )
    assert model == ConvNeXt(
        num_classes=7,
        depths=(2, 2, 6, 2),
        dims=(40, 80, 160, 320),
        use_grn=True,
        layer_scale_init=None,
        drop_path_rate=0.2,
        dtype=jnp.bfloat16,
        remat=True,
    )
    assert create_model("convnext_iso_small", layer_scale_init=1e-6).layer_scale_init == 1e-6


def test_list_models_by_pattern():
    assert list_models("convnextv2_*ge") == ["convnextv2_large", "convnextv2_huge"]
    assert list_models("convnext_iso_?ase") == ["convnext_iso_base"]
    assert list_models("vgg*") == []


def test_unknown_name_answers_with_the_nearest():
    with pytest.raises(ValueError, match=r"'convnext_tinny': did you mean convnext_tiny or"):
        create_model("convnext_tinny")
    with pytest.raises(ValueError, match=r"'': see list_models"):
        create_model("")


def test_unknown_argument_is_named_with_the_valid_ones():
    with pytest.raises(TypeError, match=r"no argument drop_path; it has num_classes, depths, .*"):
        create_model("convnext_tiny", drop_path=0.1)
