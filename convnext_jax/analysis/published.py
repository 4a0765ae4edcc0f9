"""Accuracies as published: ImageNet-1K top-1 in percent, of networks of the registry."""

from __future__ import annotations

from collections.abc import Mapping

from convnext_jax.models.roadmap_steps import ROADS, STEPS

# Trained on ImageNet-1K alone and evaluated at 224 × 224. ConvNeXt and Swin: arXiv 2201.03545,
# table 1, isotropic ones table 2; V2: arXiv 2301.00808, FCMAE and fine-tuning; the road and its
# ResNets: 2201.03545, tables 10 and 11.
PUBLISHED_TOP1: Mapping[str, float] = {
    "convnext_tiny": 82.1,
    "convnext_small": 83.1,
    "convnext_base": 83.8,
    "convnext_large": 84.3,
    "convnext_iso_small": 79.7,
    "convnext_iso_base": 82.0,
    "convnext_iso_large": 82.6,
    "convnextv2_atto": 76.7,
    "convnextv2_femto": 78.5,
    "convnextv2_pico": 80.3,
    "convnextv2_nano": 81.9,
    "convnextv2_tiny": 83.0,
    "convnextv2_base": 84.9,
    "convnextv2_large": 85.8,
    "convnextv2_huge": 86.3,
    "swin_tiny": 81.3,
    "swin_small": 83.0,
    "swin_base": 83.5,
    "resnet50": STEPS[0].t.top1,
    "resnet200": STEPS[0].b.top1,
    **{
        f"roadmap_{road}/{step.name}": (step.t if road == "t" else step.b).top1
        for road in ROADS
        for step in STEPS
    },
}

# Trained on ImageNet-22K, fine-tuned on 1K, and evaluated at 224 and at 384 pixels; V2's huge has
# no weights at 224. ConvNeXt: arXiv 2201.03545, table 1; V2: the authors' README.
PUBLISHED_TOP1_FROM_22K: Mapping[str, tuple[float | None, float]] = {
    "convnext_tiny": (82.9, 84.1),
    "convnext_small": (84.6, 85.8),
    "convnext_base": (85.8, 86.8),
    "convnext_large": (86.6, 87.5),
    "convnext_xlarge": (87.0, 87.8),
    "convnextv2_nano": (82.1, 83.4),
    "convnextv2_tiny": (83.9, 85.1),
    "convnextv2_base": (86.8, 87.7),
    "convnextv2_large": (87.3, 88.2),
    "convnextv2_huge": (None, 88.7),
}
