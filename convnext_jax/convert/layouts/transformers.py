"""Hugging Face transformers' files: ConvNext, ConvNextV2 and DINOv3ConvNext."""

from convnext_jax.convert.layouts.table import CONV, LINEAR, NORM, ROW_4D, VECTOR, Kind, Layout

_GRN: Kind = (("weight", "gamma", ROW_4D), ("bias", "beta", ROW_4D))

# fmt: off
_MODEL = (
    ("embeddings.patch_embeddings",                     "stem/conv",                      CONV),
    ("embeddings.layernorm",                            "stem/norm",                      NORM),
    ("encoder.stages.{i}.downsampling_layer.0",         "stages_{i}/downsample/norm",     NORM),
    ("encoder.stages.{i}.downsampling_layer.1",         "stages_{i}/downsample/conv",     CONV),
    ("encoder.stages.{i}.layers.{j}.dwconv",            "stages_{i}/blocks_{j}/dwconv",   CONV),
    ("encoder.stages.{i}.layers.{j}.layernorm",         "stages_{i}/blocks_{j}/norm",     NORM),
    ("encoder.stages.{i}.layers.{j}.pwconv1",           "stages_{i}/blocks_{j}/pwconv1",  LINEAR),
    ("encoder.stages.{i}.layers.{j}.grn",               "stages_{i}/blocks_{j}/grn",      _GRN),
    ("encoder.stages.{i}.layers.{j}.pwconv2",           "stages_{i}/blocks_{j}/pwconv2",  LINEAR),
    ("encoder.stages.{i}.layers.{j}.layer_scale_parameter", "stages_{i}/blocks_{j}/gamma", VECTOR),
    ("layernorm",                                       "norm",                           NORM),
)
# fmt: on

_FIXES = {
    "kernel_size": 7,
    "norm_eps": 1e-6,
    "head_norm_first": False,
    "head_hidden": None,
}


def _classifier(name: str, prefix: str, use_grn: bool) -> Layout:
    return Layout(
        name=name,
        origin="transformers",
        modules=(
            *((prefix + theirs, ours, kind) for theirs, ours, kind in _MODEL),
            ("classifier", "head", LINEAR),
        ),
        implies={"isotropic": False, "use_grn": use_grn},
        fixes={"feature_norms": False, **_FIXES},
    )


V1 = _classifier("transformers", "convnext.", use_grn=False)
V2 = _classifier("transformers V2", "convnextv2.", use_grn=True)

# ConvNextModel and ConvNextV2Model, and their backbones with a norm on each output.
BARE = Layout(
    name="transformers without head",
    origin="transformers",
    modules=(*_MODEL, ("hidden_states_norms.stage{i+1}", "feature_norm_{i}", NORM)),
    ignored=("hidden_states_norms.stem.*",),
    implies={"isotropic": False},
    fixes={"num_classes": 0, **_FIXES},
)

# fmt: off
# transformers 5 has the stages under "model.".
DINOV3 = Layout(
    name="transformers DINOv3",
    origin="dinov3",
    modules=(
        ("stages.0.downsample_layers.0",           "stem/conv",                      CONV),
        ("stages.0.downsample_layers.1",           "stem/norm",                      NORM),
        ("stages.{i}.downsample_layers.0",         "stages_{i}/downsample/norm",     NORM),
        ("stages.{i}.downsample_layers.1",         "stages_{i}/downsample/conv",     CONV),
        ("stages.{i}.layers.{j}.depthwise_conv",   "stages_{i}/blocks_{j}/dwconv",   CONV),
        ("stages.{i}.layers.{j}.layer_norm",       "stages_{i}/blocks_{j}/norm",     NORM),
        ("stages.{i}.layers.{j}.pointwise_conv1",  "stages_{i}/blocks_{j}/pwconv1",  LINEAR),
        ("stages.{i}.layers.{j}.pointwise_conv2",  "stages_{i}/blocks_{j}/pwconv2",  LINEAR),
        ("stages.{i}.layers.{j}.gamma",            "stages_{i}/blocks_{j}/gamma",    VECTOR),
        ("layer_norm",                             "norm",                           NORM),
    ),
)
