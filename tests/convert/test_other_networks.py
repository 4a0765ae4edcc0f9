"""ResNet and Swin in the files of others: what they are, into the tree, and back."""

import chex
import foreign_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from foreign_files import CASES, CASES_RESNET, RESNET, SWIN, foreign_file, written
from shape_files import shape_file

from convnext_jax.convert.detection import detect
from convnext_jax.convert.families import family_of
from convnext_jax.convert.mapping import (
    format_mapping,
    from_params,
    mapping_table,
    to_variables,
    variable_shapes,
)
from convnext_jax.convert.preprocessing import preprocessing_for
from convnext_jax.convert.stored import find_weights
from convnext_jax.errors import UserError
from convnext_jax.models import create_model, list_models


def array(*shape):
    return np.broadcast_to(np.float32(0), shape)


class TestDetection:
    @pytest.mark.parametrize("name", list_models("swin*") + list_models("resnet*"))
    def test_every_published_variant_is_recognised(self, name):
        model = create_model(name, num_classes=21841)
        for layout in family_of(model).layouts:
            classes = layout.fixes.get("num_classes", 21841)
            detected = detect(shape_file(model.clone(num_classes=classes), layout.name))
            assert (detected.layout.name, detected.model_name) == (layout.name, name)
            assert detected.model == model.clone(num_classes=classes)
            assert (detected.in_channels, detected.notes) == (3, ())

    def test_a_step_of_the_road_has_torchvisions_names_too(self):
        model = create_model("roadmap_t/02_stage_ratio")
        detected = detect(shape_file(model, "torchvision ResNet"))
        assert detected.model_name == "roadmap_t/02_stage_ratio"
        model = create_model("roadmap_b/02_stage_ratio")
        assert detect(shape_file(model, "torchvision ResNet")).model == model

    @pytest.mark.parametrize("layout", CASES)
    def test_small_ones(self, layout):
        model, _ = CASES[layout]
        for prefix in ("", "module.", "backbone."):
            tensors = {prefix + k: v for k, v in foreign_file(model, layout).items()}
            detected = detect(tensors)
            assert (detected.layout.name, detected.prefix) == (layout, prefix)
            assert detected.model == model
            assert detected.model_name is None

    @pytest.mark.parametrize("layout", ["official Swin", "timm Swin"])
    def test_without_a_head_the_place_of_the_merging_tells(self, layout):
        headless = SWIN.clone(num_classes=0)
        detected = detect(foreign_file(headless, layout))
        assert (detected.layout.name, detected.model) == (layout, headless)

    def test_buffers_are_left_out_silently(self, tmp_path):
        window = "layers.0.blocks.1.attn"
        path = written(
            tmp_path,
            "official Swin",
            **{
                f"{window}.relative_position_index": np.zeros((9, 9), np.int64),
                "layers.0.blocks.1.attn_mask": np.zeros((16, 9, 9), np.float32),
            },
        )
        weights = find_weights(path)
        assert len(weights.detected.ignored) == 2
        assert weights.provenance.notes == ()
        path = written(tmp_path, "torchvision ResNet", **{"bn1.num_batches_tracked": np.array(7)})
        assert not any("left out" in note for note in find_weights(path).provenance.notes)

    def test_masks_show_the_size_of_the_images(self):
        model = create_model("swin_base_window12")
        tensors = shape_file(model, "official Swin")
        masks = {"layers.0.blocks.1.attn_mask": array(64, 144, 144)}
        assert detect(tensors).image_size is None
        assert detect({**tensors, **masks}).image_size == 384

    @pytest.mark.parametrize(
        ("changes", "kind"),
        [
            ({"layer1.0.conv3.weight": None}, "basic blocks"),
            ({"layer1.0.conv2.weight": array(64, 2, 3, 3)}, "ResNeXt"),
            ({"layer1.0.conv3.weight": array(256, 128, 1, 1)}, "Wide ResNet"),
            ({"conv1.weight": None, "conv1.0.weight": array(32, 3, 3, 3)}, "three convolutions"),
            ({"layer1.0.se.fc1.weight": array(8, 256, 1, 1)}, "squeeze and excitation"),
            ({"layer1.0.downsample.2.weight": array(256)}, "averages in its shortcuts"),
        ],
    )
    def test_other_resnets_are_named(self, changes, kind):
        tensors = dict(shape_file(create_model("resnet50", depths=(1, 1, 1, 1)), CASES_RESNET))
        for name, value in changes.items():
            for stage in range(1, 5):
                key = name.replace("layer1", f"layer{stage}")
                scale = 1 if stage == 1 else 2 ** (stage - 1)
                if value is None:
                    tensors.pop(key, None)
                else:
                    shape = tuple(n * scale if n > 3 else n for n in value.shape)
                    tensors[key] = array(*shape)
        if kind == "Wide ResNet":
            for stage in range(1, 5):
                width = 128 * 2 ** (stage - 1)
                incoming = 64 if stage == 1 else 128 * 2 ** (stage - 1)
                tensors[f"layer{stage}.0.conv1.weight"] = array(width, incoming, 1, 1)
                tensors[f"layer{stage}.0.conv2.weight"] = array(width, width, 3, 3)
        with pytest.raises(
            UserError, match=f"^this is .*{kind}.*, for which there is no"
        ) as refused:
            detect(tensors)
        assert "\n" not in str(refused.value)

    def test_a_resnet_without_running_averages(self):
        tensors = foreign_file(RESNET, CASES_RESNET)
        with pytest.raises(UserError, match="other norms than batch norms"):
            detect({k: v for k, v in tensors.items() if "running" not in k})

    def test_what_no_tensor_shows_is_in_timms_config(self):
        tensors = foreign_file(RESNET, CASES_RESNET)
        assert detect(tensors, {"config": {"architecture": "tv_resnet152"}}).model == RESNET
        with pytest.raises(UserError, match=r"timm's resnetaa50 \(config\.json\), for which"):
            detect(tensors, {"config": {"architecture": "resnetaa50"}})

    def test_another_activation_is_refused(self):
        tensors = foreign_file(SWIN, "transformers Swin")
        assert detect(tensors, {"config": {"layer_norm_eps": 1e-6}}).model.norm_eps == 1e-6
        with pytest.raises(UserError, match=r"hidden_act is 'relu' \(config\.json\)"):
            detect(tensors, {"config": {"hidden_act": "relu"}})

    def test_a_network_of_no_family(self):
        with pytest.raises(UserError, match=r"none of the networks known here \(ConvNeXt, ResNet"):
            detect({"transformer.wte.weight": array(8, 8)})


class TestMapping:
    @pytest.mark.parametrize("layout", CASES)
    def test_the_tree_is_that_of_the_model(self, layout):
        model, _ = CASES[layout]
        tensors = foreign_file(model, layout)
        variables = to_variables(tensors, detect(tensors))
        images = jnp.zeros((1, 32, 32, 3))
        expected = jax.eval_shape(model.init, jax.random.key(0), images)
        assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, expected)

    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    @pytest.mark.parametrize("layout", [k for k, (_, way) in CASES.items() if way])
    def test_there_and_back_is_the_identity_to_the_bit(self, layout, dtype):
        model, way = CASES[layout]
        tensors = foreign_file(model, layout, dtype)
        variables = to_variables(tensors, detect(tensors))
        back = from_params(
            variables["params"], model, way, batch_stats=variables.get("batch_stats")
        )
        assert back.keys() == tensors.keys()
        for name, value in tensors.items():
            assert (back[name].dtype, back[name].shape) == (dtype, value.shape)
            assert back[name].flags.c_contiguous
            assert back[name].tobytes() == value.tobytes()

    @pytest.mark.parametrize("layout", [k for k in CASES if k.endswith("Swin")])
    def test_all_layouts_hold_the_same_swin(self, layout):
        official = foreign_file(SWIN, "official Swin")
        variables = to_variables(official, detect(official))
        if CASES[layout][1]:
            other = from_params(variables["params"], SWIN, CASES[layout][1])
            chex.assert_trees_all_equal(to_variables(other, detect(other)), variables)

    def test_queries_keys_and_values_lie_side_by_side(self):
        tensors = foreign_file(SWIN, "transformers Swin")
        start = "swin.encoder.layers.1.blocks.0.attention.self."
        params = to_variables(tensors, detect(tensors))["params"]
        qkv = params["stages_1"]["blocks_0"]["attn"]["qkv"]
        for i, part in enumerate(("query", "key", "value")):
            columns = slice(8 * i, 8 * i + 8)
            np.testing.assert_array_equal(
                qkv["kernel"][:, columns], tensors[start + part + ".weight"].T
            )
            np.testing.assert_array_equal(qkv["bias"][columns], tensors[start + part + ".bias"])
        rows = mapping_table(tensors, detect(tensors))
        assert "stages_1/blocks_0/attn/qkv/kernel [2 of 3]" in format_mapping(rows)

    def test_running_averages_are_no_parameters(self):
        tensors = foreign_file(RESNET, CASES_RESNET)
        variables = to_variables(tensors, detect(tensors))
        flat = traverse_util.flatten_dict(variables, sep="/")
        np.testing.assert_array_equal(
            flat["batch_stats/stages_1/blocks_0/shortcut/norm/var"],
            tensors["layer2.0.downsample.1.running_var"],
        )
        np.testing.assert_array_equal(
            flat["params/stages_1/blocks_2/norm3/scale"], tensors["layer2.2.bn3.weight"]
        )
        kinds = {k.rpartition("/")[2] for k in flat if k.startswith("params")}
        assert kinds == {"kernel", "bias", "scale"}

    def test_variable_shapes_are_those_of_all_blocks(self):
        for model in (RESNET, SWIN):
            variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
            whole = {}
            for tree in variables.values():
                whole |= traverse_util.flatten_dict(tree, sep="/")
            assert variable_shapes(model) == {k: v.shape for k, v in whole.items()}

    @pytest.mark.parametrize(
        ("layout", "gone", "misshapen", "lines"),
        [
            (
                CASES_RESNET,
                "layer2.2.bn3.running_var",
                "layer1.0.conv1.weight",
                [
                    "misshapen layer1.0.conv1.weight (3, 3), not (4, 4, 1, 1) "
                    "stages_0/blocks_0/pwconv1/kernel (4, 4)",
                    "unexpected extra (2) – –",
                    "missing layer2.2.bn3.running_var (32) stages_1/blocks_2/norm3/var (32)",
                ],
            ),
            (
                "transformers Swin",
                "swin.encoder.layers.1.blocks.0.attention.self.value.bias",
                "swin.encoder.layers.0.blocks.0.attention.self.key.weight",
                [
                    "misshapen swin.encoder.layers.0.blocks.0.attention.self.key.weight (3, 3), "
                    "not (4, 4) stages_0/blocks_0/attn/qkv/kernel (4, 12)",
                    "unexpected extra (2) – –",
                    "missing swin.encoder.layers.1.blocks.0.attention.self.value.bias (8) "
                    "stages_1/blocks_0/attn/qkv/bias (24)",
                ],
            ),
        ],
    )
    def test_what_does_not_fit_is_in_one_table(self, layout, gone, misshapen, lines):
        tensors = foreign_file(CASES[layout][0], layout)
        del tensors[gone]
        tensors |= {misshapen: np.zeros((3, 3), np.float32), "extra": np.zeros(2, np.float32)}
        with pytest.raises(UserError) as refused:
            to_variables(tensors, detect(tensors))
        sentence, _, *table = str(refused.value).splitlines()
        family = detect(tensors).family.name
        assert sentence.startswith(f"3 tensors do not fit the {family} that most of them make in")
        assert [" ".join(line.split()) for line in table] == lines

    def test_what_can_not_be_written(self):
        tensors = foreign_file(RESNET, CASES_RESNET)
        variables = to_variables(tensors, detect(tensors))
        params, batch_stats = variables["params"], variables["batch_stats"]
        with pytest.raises(
            UserError, match="no layout 'official' to write a ResNet in; use torchv"
        ):
            from_params(params, RESNET, "official", batch_stats=batch_stats)
        with pytest.raises(UserError, match=r"stem/norm/mean +– +\(4\)"):
            from_params(params, RESNET)
        step = create_model("roadmap_t/07_dw_first", width=4, depths=(1, 1, 1, 1))
        variables = jax.eval_shape(step.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        with pytest.raises(UserError, match="its spatial_first is True, and can only be False"):
            from_params(variables["params"], step, batch_stats=variables["batch_stats"])


class TestPreprocessing:
    @pytest.mark.parametrize(
        ("layout", "name", "source", "expected"),
        [
            (CASES_RESNET, "resnet50", "resnet50-0676ba61.pth", (224, 256, "bilinear")),
            (CASES_RESNET, "resnet50", "resnet50-11ad3fa6.pth", (224, 232, "bilinear")),
            (CASES_RESNET, "resnet50", "mine.pth", (224, 256, "bilinear")),
            ("torchvision Swin", "swin_tiny", "swin_t-704ceda3.pth", (224, 232, "bicubic")),
            ("torchvision Swin", "swin_small", "swin_s-5e29d889.pth", (224, 246, "bicubic")),
            ("torchvision Swin", "swin_base", "swin_b-68c6b09e.pth", (224, 238, "bicubic")),
            ("official Swin", "swin_tiny", "swin_tiny.pth", (224, 256, "bicubic")),
            ("official Swin", "swin_base_window12", "mine.pth", (384, None, "bicubic")),
            ("official Swin", "swin_tiny", "x_patch4_window7_256.pth", (256, 292, "bicubic")),
            ("timm Swin", "swin_tiny", "model.safetensors", (224, 248, "bicubic")),
            ("timm Swin", "swin_large_window12", "model.safetensors", (384, 384, "bicubic")),
            ("transformers Swin", "swin_tiny", "model.safetensors", (224, 256, "bicubic")),
        ],
    )
    def test_defaults(self, layout, name, source, expected):
        found = self.found(layout, name, source)
        assert (found.image_size, found.resize_size, found.interpolation) == expected
        assert found.mean == (0.485, 0.456, 0.406)
        published = re_digest(source)
        assert bool(found.note) != published

    def test_of_a_swin_transformers_resizes_the_whole_image(self):
        processor = {"size": 224, "resample": 3, "image_mean": [0.485, 0.456, 0.406]}
        found = self.found("transformers Swin", "swin_tiny", preprocessor_config=processor)
        assert (found.image_size, found.resize_size) == (224, None)

    def test_timms_own_config_goes_first(self):
        config = {"pretrained_cfg": {"input_size": [3, 160, 160], "crop_pct": 0.95}}
        found = self.found(CASES_RESNET, "resnet50", config=config)
        assert (found.image_size, found.resize_size, found.interpolation) == (160, 168, "bicubic")

    @staticmethod
    def found(layout, name, source="model.safetensors", **metadata):
        return preprocessing_for(source, metadata, detect(shape_file(create_model(name), layout)))


def re_digest(source):
    """Whether a name is one of torchvision's published files."""
    return len(source.removesuffix(".pth").rpartition("-")[2]) == 8


def test_every_layout_of_these_networks_is_tried():
    found = {name for name in foreign_files.NAMED if name.endswith(("ResNet", "Swin"))}
    assert found | {"transformers Swin without head"} == CASES.keys()
