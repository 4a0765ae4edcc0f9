"""A file's tensors into the tree and back; and what does not fit, all of it in one table."""

import golden_layouts
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from shape_files import shape_file

from convnext_jax.convert.detection import detect
from convnext_jax.convert.mapping import (
    format_mapping,
    from_params,
    mapping_table,
    to_variables,
    variable_shapes,
)
from convnext_jax.errors import UserError
from convnext_jax.models import ConvNeXt, create_model

RECORDED = golden_layouts.recorded()
# Label → the name under which it can be written.
WAYS_BACK = {
    "official": "official",
    "official, V2": "official",
    "official isotropic": "official",
    "timm": "timm-linear",
    "timm, V2": "timm-linear",
    "timm, hidden layer": "timm-linear",
    "timm hnf": "timm-linear",
    "timm conv_mlp": "timm-conv-mlp",
    "timm conv_mlp, V2": "timm",
    "timm hnf conv_mlp": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "transformers V2": "transformers",
    "transformers without head": "transformers",
    "transformers without head, V2": "transformers",
    "transformers without head, backbone": "transformers",
}
SMALL = ConvNeXt(num_classes=3, depths=(1, 1, 1, 1), dims=(4, 5, 6, 8))


def params_of(tensors, detected):
    return to_variables(tensors, detected)["params"]


def initial_params(model):
    side = model.strides[-1]
    images = jnp.zeros((1, side, side, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


@pytest.mark.parametrize("label", RECORDED)
def test_the_tree_is_that_of_the_model(label):
    tensors = RECORDED[label].tensors
    detected = detect(tensors)
    flat = traverse_util.flatten_dict(params_of(tensors, detected), sep="/")
    expected = variable_shapes(ConvNeXt(**detected.arguments))
    if "FCMAE" in label or "backbone" in label:
        expected = {k: v for k, v in expected.items() if not k.startswith("norm/")}
    assert {k: v.shape for k, v in flat.items()} == expected
    assert all(isinstance(v, np.ndarray) for v in flat.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("label", WAYS_BACK)
def test_there_and_back_is_the_identity_to_the_bit(label, dtype):
    tensors = {k: v.astype(dtype) for k, v in RECORDED[label].tensors.items()}
    detected = detect(tensors)
    model = ConvNeXt(**detected.arguments)
    back = from_params(params_of(tensors, detected), model, WAYS_BACK[label])
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == dtype
        assert back[name].shape == value.shape
        assert back[name].flags.c_contiguous
        assert back[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("layout", ["official", "timm", "torchvision", "transformers"])
def test_from_one_layout_to_another_and_on(layout):
    tensors = RECORDED["official"].tensors
    detected = detect(tensors)
    model = ConvNeXt(**detected.arguments)
    params = params_of(tensors, detected)
    other = from_params(params, model, layout)
    again = params_of(other, detect(other))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_nothing_is_copied():
    tensors = RECORDED["timm conv_mlp"].tensors
    params = params_of(tensors, detect(tensors))
    fc1 = tensors["stages.1.blocks.1.mlp.fc1.weight"]
    assert np.shares_memory(params["stages_1"]["blocks_1"]["pwconv1"]["kernel"], fc1)
    stem = tensors["stem.0.weight"]
    assert np.shares_memory(params["stem"]["conv"]["kernel"], stem)


def test_read_only_tensors_are_taken():
    tensors = dict(RECORDED["FCMAE sparse"].tensors)
    for value in tensors.values():
        value.flags.writeable = False
    assert params_of(tensors, detect(tensors))["stem"]["conv"]["kernel"].shape == (4, 4, 3, 4)


def test_rows_say_where_each_tensor_goes():
    tensors = RECORDED["torchvision"].tensors
    rows = mapping_table(tensors, detect(tensors))
    assert [row.name for row in rows] == list(tensors)
    (row,) = [row for row in rows if row.name == "features.3.1.layer_scale"]
    assert (row.path, row.shape, row.our_shape) == ("stages_1/blocks_1/gamma", (5, 1, 1), (5,))
    assert row.dtype == "float32"
    text = format_mapping(rows).splitlines()
    assert len(text) == 1 + len(rows)
    assert "features.3.1.layer_scale" in format_mapping(rows)


class TestMismatches:
    def fail(self, tensors):
        with pytest.raises(UserError) as caught:
            params_of(tensors, detect(tensors))
        sentence, *table = str(caught.value).splitlines()
        return sentence, [" ".join(line.split()) for line in table]

    def test_all_are_in_one_table(self):
        tensors = dict(shape_file(create_model("convnext_tiny"), "official"))
        del tensors["stages.2.8.gamma"]
        del tensors["head.bias"]
        tensors["stages.1.0.pwconv1.weight"] = np.zeros((768, 190), np.float32)
        tensors["norm.weight"] = np.zeros((1, 768), np.float32)
        tensors["stages.9.pos_embed"] = np.zeros((4, 4), np.float32)
        sentence, table = self.fail(tensors)
        assert sentence == (
            "5 tensors do not fit convnext_tiny in the official layout; the file is damaged, or of "
            "another model:"
        )
        assert table == [
            "in the file here",
            "misshapen stages.1.0.pwconv1.weight (768, 190), not (768, 192) "
            "stages_1/blocks_0/pwconv1/kernel (192, 768)",
            "misshapen norm.weight (1, 768), not (768) norm/scale (768)",
            "unexpected stages.9.pos_embed (4, 4) – –",
            "missing stages.2.8.gamma (384) stages_2/blocks_8/gamma (384)",
            "missing head.bias (1000) head/bias (1000)",
        ]

    def test_a_single_one(self):
        tensors = {**RECORDED["timm"].tensors, "teacher.weight": np.zeros(3)}
        sentence, table = self.fail(tensors)
        assert sentence.startswith("1 tensor does not fit the ConvNeXt that most of them make in ")
        assert table[1:] == ["unexpected teacher.weight (3) – –"]

    def test_a_missing_one_is_named_as_the_wrapping_program_would(self):
        tensors = {f"module.{k}": v for k, v in RECORDED["timm"].tensors.items()}
        del tensors["module.stem.0.bias"]
        assert self.fail(tensors)[1][1] == "missing module.stem.0.bias (4) stem/conv/bias (4)"

    def test_two_names_for_one_tensor(self):
        tensors = {f"module.{k}": v for k, v in RECORDED["timm"].tensors.items()}
        tensors["stem.0.bias"] = tensors["module.stem.0.bias"]
        assert self.fail(tensors)[1][1:] == ["unexpected stem.0.bias (4) – –"]

    def test_a_norm_is_missing_only_where_there_is_a_head(self):
        tensors = dict(RECORDED["official"].tensors)
        del tensors["norm.weight"], tensors["norm.bias"]
        assert len(self.fail(tensors)[1]) == 3
        del tensors["head.weight"], tensors["head.bias"]
        assert "norm" not in params_of(tensors, detect(tensors))


class TestWhatALayoutCanNotHold:
    @pytest.mark.parametrize(
        ("layout", "model", "reason"),
        [
            (
                "torchvision",
                SMALL.clone(use_grn=True, layer_scale_init=None),
                "its use_grn is True, and can only be False there",
            ),
            ("torchvision", SMALL.clone(layer_scale_init=None), "its blocks have no layer scale"),
            (
                "torchvision",
                ConvNeXt(depths=(2,), dims=(8,), isotropic=True),
                "its isotropic is True, and can only be False there",
            ),
            ("timm", ConvNeXt(depths=(2,), dims=(8,), isotropic=True), "its isotropic is True"),
            ("transformers", SMALL.clone(head_norm_first=True), "its head_norm_first is True"),
            ("official", SMALL.clone(head_hidden=12), "its head_hidden is 12"),
            ("official", SMALL.clone(norm_eps=1e-5), "its norm_eps is 1e-05"),
            ("official", SMALL.clone(kernel_size=5), "its kernel_size is 5"),
            ("timm", SMALL.clone(stem_stride=2), "its stem_stride of 2 is recorded nowhere"),
            ("timm", SMALL.clone(feature_norms=True), "its feature_norms is True"),
            ("official", ConvNeXt(depths=(1,), dims=(8,)), "it has 1 stage, and can only have 4"),
        ],
    )
    def test_one_sentence(self, layout, model, reason):
        with pytest.raises(UserError) as caught:
            from_params(initial_params(model), model, layout)
        message = str(caught.value)
        assert "layout can't hold this model: " in message
        assert reason in message
        assert "\n" not in message

    def test_unknown_layout(self):
        with pytest.raises(
            UserError, match="there is no layout 'keras' to write a ConvNeXt in; use official"
        ):
            from_params({}, SMALL, "keras")

    def test_parameters_of_another_model(self):
        params = initial_params(SMALL)
        with pytest.raises(UserError, match=r"2 parameters are not those of the model") as caught:
            from_params(params, SMALL.clone(num_classes=4))
        assert "head/kernel  (8, 3)  (8, 4)" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "ndim"),
    [
        ("convnext_atto", 4),
        ("convnext_nano", 4),
        ("convnext_tiny", 2),
        ("convnext_tiny_hnf", 4),
        ("convnext_large_mlp", 2),
        ("convnextv2_nano", 4),
        ("convnextv2_tiny", 2),
    ],
)
def test_timm_products_are_convolutions_where_timms_are(name, ndim):
    model = create_model(name, num_classes=2, depths=(1, 1, 1, 1))
    tensors = from_params(initial_params(model), model, "timm")
    assert tensors["stages.0.blocks.0.mlp.fc1.weight"].ndim == ndim
    assert detect(tensors).layout.origin == "timm"
