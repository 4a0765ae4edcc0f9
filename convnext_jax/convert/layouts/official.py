"""The authors' files: ConvNeXt, isotropic ConvNeXt, ConvNeXt V2 and its FCMAE encoders.

Their programs: https://github.com/facebookresearch/ConvNeXt and /ConvNeXt-V2. Meta's DINOv3 files
(https://github.com/facebookresearch/dinov3) bear the same names.
"""

from convnext_jax.convert.layouts.table import (
    AS_IS,
    CONV,
    LINEAR,
    LINEAR_KERNEL,
    NORM,
    ROW_2D,
    ROW_4D,
    SPARSE_DEPTHWISE_KERNEL,
    SPARSE_KERNEL,
    VECTOR,
    Kind,
    Layout,
)

_GRN: Kind = (("gamma", "gamma", ROW_4D), ("beta", "beta", ROW_4D))

_FIXES = {
    "kernel_size": 7,
    "norm_eps": 1e-6,
    "head_norm_first": False,
    "head_hidden": None,
    "feature_norms": False,
}

# FCMAE's decoder; DINOv3's second name of the final norm, and the heads of distilled encoders.
_BESIDES = ("decoder.*", "proj.*", "pred.*", "mask_token", "norms.*", "projectors.*")

# fmt: off
OFFICIAL = Layout(
    name="official",
    origin="official",
    modules=(
        ("downsample_layers.0.0",    "stem/conv",                      CONV),
        ("downsample_layers.0.1",    "stem/norm",                      NORM),
        ("downsample_layers.{i}.0",  "stages_{i}/downsample/norm",     NORM),
        ("downsample_layers.{i}.1",  "stages_{i}/downsample/conv",     CONV),
        ("stages.{i}.{j}.dwconv",    "stages_{i}/blocks_{j}/dwconv",   CONV),
        ("stages.{i}.{j}.norm",      "stages_{i}/blocks_{j}/norm",     NORM),
        ("stages.{i}.{j}.pwconv1",   "stages_{i}/blocks_{j}/pwconv1",  LINEAR),
        ("stages.{i}.{j}.grn",       "stages_{i}/blocks_{j}/grn",      _GRN),
        ("stages.{i}.{j}.pwconv2",   "stages_{i}/blocks_{j}/pwconv2",  LINEAR),
        ("stages.{i}.{j}.gamma",     "stages_{i}/blocks_{j}/gamma",    VECTOR),
        ("norm",                     "norm",                           NORM),
        ("head",                     "head",                           LINEAR),
    ),
    ignored=_BESIDES,
    implies={"isotropic": False},
    fixes={"stem_kernel_size": 4, **_FIXES},
    stages=4,
)

ISOTROPIC = Layout(
    name="official isotropic",
    origin="official",
    modules=(
        ("stem",                "stem/conv",                   CONV),
        ("blocks.{j}.dwconv",   "stages_0/blocks_{j}/dwconv",  CONV),
        ("blocks.{j}.norm",     "stages_0/blocks_{j}/norm",    NORM),
        ("blocks.{j}.pwconv1",  "stages_0/blocks_{j}/pwconv1", LINEAR),
        ("blocks.{j}.pwconv2",  "stages_0/blocks_{j}/pwconv2", LINEAR),
        ("blocks.{j}.gamma",    "stages_0/blocks_{j}/gamma",   VECTOR),
        ("norm",                "norm",                        NORM),
        ("head",                "head",                        LINEAR),
    ),
    implies={"isotropic": True},
    fixes={"stem_kernel_size": 16, "use_grn": False, **_FIXES},
)

# As the pre-training program saves its encoder, built with MinkowskiEngine.
_SPARSE_CONV: Kind = (("kernel", "kernel", SPARSE_KERNEL), ("bias", "bias", ROW_2D))
_SPARSE_DWCONV: Kind = (("kernel", "kernel", SPARSE_DEPTHWISE_KERNEL), ("bias", "bias", ROW_2D))
_SPARSE_NORM: Kind = (("ln.weight", "scale", AS_IS), ("ln.bias", "bias", AS_IS))
_SPARSE_LINEAR: Kind = (("linear.weight", "kernel", LINEAR_KERNEL), ("linear.bias", "bias", AS_IS))
_SPARSE_GRN: Kind = (("gamma", "gamma", ROW_2D), ("beta", "beta", ROW_2D))

FCMAE_SPARSE = Layout(
    name="FCMAE sparse",
    origin="official",
    modules=(
        ("downsample_layers.0.0",    "stem/conv",                      CONV),
        ("downsample_layers.0.1",    "stem/norm",                      NORM),
        ("downsample_layers.{i}.0",  "stages_{i}/downsample/norm",     _SPARSE_NORM),
        ("downsample_layers.{i}.1",  "stages_{i}/downsample/conv",     _SPARSE_CONV),
        ("stages.{i}.{j}.dwconv",    "stages_{i}/blocks_{j}/dwconv",   _SPARSE_DWCONV),
        ("stages.{i}.{j}.norm",      "stages_{i}/blocks_{j}/norm",     _SPARSE_NORM),
        ("stages.{i}.{j}.pwconv1",   "stages_{i}/blocks_{j}/pwconv1",  _SPARSE_LINEAR),
        ("stages.{i}.{j}.grn",       "stages_{i}/blocks_{j}/grn",      _SPARSE_GRN),
        ("stages.{i}.{j}.pwconv2",   "stages_{i}/blocks_{j}/pwconv2",  _SPARSE_LINEAR),
    ),
    ignored=_BESIDES,
)

# Made dense for fine-tuning; GRN keeps its two dimensions.
FCMAE_DENSE = Layout(
    name="FCMAE dense",
    origin="official",
    modules=tuple(
        (theirs, ours, _SPARSE_GRN if kind is _GRN else kind)
        for theirs, ours, kind in OFFICIAL.modules
    ),
    ignored=_BESIDES,
)
