"""The steps of the road from ResNet to ConvNeXt, as the paper's tables 10 and 11 list them.

Two roads: "t" from ResNet-50 to ConvNeXt-T, "b" from ResNet-200 to ConvNeXt-B. The networks have
the paper's GFLOPs to two decimals but in two places: for the steps 15 and 16 of the road "t",
table 10 gives 4.46 and 4.49, where 4.15 and 4.46 are counted. Table 11 agrees with the count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

Road = Literal["t", "b"]
ROADS: tuple[Road, ...] = get_args(Road)


@dataclasses.dataclass(frozen=True)
class Published:
    """What the paper says of a step (arXiv 2201.03545, tables 10 and 11).

    Attributes:
      top1: ImageNet-1K accuracy in percent, at 224 × 224; the mean of three runs on the road "t".
      gflops: multiply-accumulates of one image, in 10⁹.
    """

    top1: float
    gflops: float


@dataclasses.dataclass(frozen=True)
class Step:
    """One step, and what the paper reports of it.

    Attributes:
      name: number and a word for it; the model is called `roadmap_t/{name}` or `roadmap_b/{name}`.
      change: what is new against the step before, in words.
      choices: the arguments of `ModernizedResNet` that it sets, on both roads.
      t: the paper's figures from ResNet-50 on.
      b: the paper's figures from ResNet-200 on.
      choices_t: arguments that it sets on the road "t" alone.
      choices_b: arguments that it sets on the road "b" alone.
    """

    name: str
    change: str
    t: Published
    b: Published
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices_t: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices_b: Mapping[str, Any] = dataclasses.field(default_factory=dict)


STEPS: tuple[Step, ...] = (
    Step(
        "00_resnet",
        "ResNet-50, ResNet-200 with their own recipe",
        t=Published(76.13, 4.09),
        b=Published(78.20, 15.01),
        choices_t={"depths": (3, 4, 6, 3)},
        choices_b={"depths": (3, 24, 36, 3)},
    ),
    Step(
        "01_modern_recipe",
        "the same network, trained by the modern recipe",
        t=Published(78.82, 4.09),
        b=Published(81.14, 15.01),
    ),
    Step(
        "02_stage_ratio",
        "blocks per stage in Swin's ratio, 1:1:3:1 and 1:1:9:1",
        t=Published(79.36, 4.53),
        b=Published(81.33, 14.52),
        choices_t={"depths": (3, 3, 9, 3)},
        choices_b={"depths": (3, 3, 27, 3), "width": 84},
    ),
    Step(
        "03_patchify_stem",
        "stem: a 4×4 convolution of stride 4",
        t=Published(79.51, 4.42),
        b=Published(81.59, 14.38),
        choices={"patchify_stem": True},
    ),
    Step(
        "04_depthwise_conv",
        "3×3 convolutions become depthwise",
        t=Published(78.28, 2.35),
        b=Published(80.54, 7.23),
        choices={"spatial_conv": "depthwise"},
    ),
    Step(
        "05_width",
        "Swin's width, 96 and 128",
        t=Published(80.50, 5.27),
        b=Published(81.85, 16.76),
        choices_t={"width": 96},
        choices_b={"width": 128},
    ),
    Step(
        "06_inverted_bottleneck",
        "blocks narrow at their ends and four times as wide inside",
        t=Published(80.64, 4.64),
        b=Published(82.64, 15.68),
        choices={"inverted_bottleneck": True},
    ),
    Step(
        "07_dw_first",
        "the depthwise convolution moves before both 1×1 convolutions",
        t=Published(79.92, 4.07),
        b=Published(82.04, 14.63),
        choices={"spatial_first": True},
    ),
    Step(
        "08_kernel_5",
        "5×5 depthwise convolutions",
        t=Published(80.35, 4.10),
        b=Published(82.32, 14.70),
        choices={"kernel_size": 5},
    ),
    Step(
        "09_kernel_7",
        "7×7 depthwise convolutions",
        t=Published(80.57, 4.15),
        b=Published(82.30, 14.81),
        choices={"kernel_size": 7},
    ),
    Step(
        "10_kernel_9",
        "9×9 depthwise convolutions",
        t=Published(80.57, 4.21),
        b=Published(82.27, 14.95),
        choices={"kernel_size": 9},
    ),
    Step(
        "11_kernel_11",
        "11×11 depthwise convolutions",
        t=Published(80.47, 4.29),
        b=Published(82.18, 15.13),
        choices={"kernel_size": 11},
    ),
    Step(
        "12_gelu",
        "GELU for ReLU; back to 7×7, where the gain had ended",
        t=Published(80.62, 4.15),
        b=Published(82.19, 14.81),
        choices={"activation": "gelu", "kernel_size": 7},
    ),
    Step(
        "13_fewer_activations",
        "one activation per block, between the 1×1 convolutions",
        t=Published(81.27, 4.15),
        b=Published(82.71, 14.81),
        choices={"num_activations": 1},
    ),
    Step(
        "14_fewer_norms",
        "one batch norm per block, after the depthwise convolution",
        t=Published(81.41, 4.15),
        b=Published(83.17, 14.81),
        choices={"num_norms": 1},
    ),
    Step(
        "15_layer_norm",
        "layer norm for batch norm, and biases in the convolutions",
        t=Published(81.47, 4.46),
        b=Published(83.35, 14.81),
        choices={"norm_type": "layer", "conv_bias": True},
    ),
    Step(
        "16_convnext",
        "downsampling between the stages, and norms there, at the stem and at the end",
        t=Published(81.97, 4.49),
        b=Published(83.60, 15.35),
        # With it come the layer scale, as the parameter count says, and ConvNeXt's initialisation.
        choices={
            "separate_downsampling": True,
            "layer_scale_init": 1e-6,
            "kernel_init": "normal",
        },
    ),
)


def choices_after(road: Road, name: str) -> dict[str, Any]:
    """All choices made up to a step.

    Args:
      road: "t" or "b".
      name: the step's, such as "07_dw_first".

    Returns:
      Arguments of `ModernizedResNet`, for all that differs from its defaults.

    Raises:
      ValueError: if there is no such step.
    """
    made: dict[str, Any] = {}
    for step in STEPS:
        made |= {**step.choices, **(step.choices_t if road == "t" else step.choices_b)}
        if step.name == name:
            return made
    raise ValueError(f"no step is called {name!r}; there are {', '.join(s.name for s in STEPS)}")
