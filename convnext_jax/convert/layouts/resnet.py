"""torchvision's ResNet, whose names timm's has too, and the files of those who trained either."""

from convnext_jax.convert.layouts.table import BATCH_NORM, CONV, CONV1X1, LINEAR, Layout

# fmt: off
TORCHVISION = Layout(
    name="torchvision ResNet",
    origin="torchvision",
    modules=(
        ("conv1",                        "stem/conv",                            CONV),
        ("bn1",                          "stem/norm",                            BATCH_NORM),
        ("layer{i+1}.{j}.conv1",         "stages_{i}/blocks_{j}/pwconv1",        CONV1X1),
        ("layer{i+1}.{j}.bn1",           "stages_{i}/blocks_{j}/norm1",          BATCH_NORM),
        ("layer{i+1}.{j}.conv2",         "stages_{i}/blocks_{j}/conv",           CONV),
        ("layer{i+1}.{j}.bn2",           "stages_{i}/blocks_{j}/norm2",          BATCH_NORM),
        ("layer{i+1}.{j}.conv3",         "stages_{i}/blocks_{j}/pwconv2",        CONV1X1),
        ("layer{i+1}.{j}.bn3",           "stages_{i}/blocks_{j}/norm3",          BATCH_NORM),
        ("layer{i+1}.0.downsample.0",    "stages_{i}/blocks_0/shortcut/conv",    CONV),
        ("layer{i+1}.0.downsample.1",    "stages_{i}/blocks_0/shortcut/norm",    BATCH_NORM),
        ("fc",                           "head",                                 LINEAR),
    ),
    derived=("*.num_batches_tracked",),
    fixes={
        "patchify_stem": False,
        "spatial_conv": "dense",
        "inverted_bottleneck": False,
        "spatial_first": False,
        "kernel_size": 3,
        "activation": "relu",
        "num_activations": 3,
        "norm_type": "batch",
        "num_norms": 3,
        "conv_bias": False,
        "separate_downsampling": False,
        "layer_scale_init": None,
    },
    stages=4,
)
# fmt: on
