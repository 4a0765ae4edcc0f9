"""torchvision's files."""

from convnext_jax.convert.layouts.table import COLUMN, CONV, LINEAR, NORM, Layout

# fmt: off
TORCHVISION = Layout(
    name="torchvision",
    origin="torchvision",
    modules=(
        ("features.0.0",                 "stem/conv",                      CONV),
        ("features.0.1",                 "stem/norm",                      NORM),
        ("features.{2i}.0",              "stages_{i}/downsample/norm",     NORM),
        ("features.{2i}.1",              "stages_{i}/downsample/conv",     CONV),
        ("features.{2i+1}.{j}.block.0",  "stages_{i}/blocks_{j}/dwconv",   CONV),
        ("features.{2i+1}.{j}.block.2",  "stages_{i}/blocks_{j}/norm",     NORM),
        ("features.{2i+1}.{j}.block.3",  "stages_{i}/blocks_{j}/pwconv1",  LINEAR),
        ("features.{2i+1}.{j}.block.5",  "stages_{i}/blocks_{j}/pwconv2",  LINEAR),
        ("features.{2i+1}.{j}.layer_scale", "stages_{i}/blocks_{j}/gamma", COLUMN),
        ("classifier.0",                 "norm",                           NORM),
        ("classifier.2",                 "head",                           LINEAR),
    ),
    implies={"isotropic": False},
    fixes={
        "stem_kernel_size": 4,
        "kernel_size": 7,
        "use_grn": False,
        "norm_eps": 1e-6,
        "head_norm_first": False,
        "head_hidden": None,
        "feature_norms": False,
    },
    always=("gamma",),
)
