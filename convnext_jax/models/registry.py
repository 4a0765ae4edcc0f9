"""Published variants by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import Any

import flax.linen as nn

from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.roadmap import ModernizedResNet
from convnext_jax.models.roadmap_steps import ROADS, STEPS, choices_after
from convnext_jax.models.swin import SwinTransformer

Network = ConvNeXt | ModernizedResNet | SwinTransformer

# V1: arXiv 2201.03545, section 3; atto to nano, hnf, mlp and xxlarge as published in timm.
# V2: arXiv 2301.00808, appendix A.1. What an entry leaves out is the default of ConvNeXt.
_V1: dict[str, dict[str, Any]] = {
    "convnext_atto": {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)},
    "convnext_femto": {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384)},
    "convnext_pico": {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512)},
    "convnext_nano": {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640)},
    "convnext_tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "convnext_tiny_hnf": {
        "depths": (3, 3, 9, 3),
        "dims": (96, 192, 384, 768),
        "head_norm_first": True,
    },
    "convnext_small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "convnext_base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "convnext_large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
    "convnext_large_mlp": {
        "depths": (3, 3, 27, 3),
        "dims": (192, 384, 768, 1536),
        "head_hidden": 1536,
    },
    "convnext_xlarge": {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)},
    "convnext_xxlarge": {"depths": (3, 4, 30, 3), "dims": (384, 768, 1536, 3072), "norm_eps": 1e-5},
}
_ISOTROPIC: dict[str, dict[str, Any]] = {
    "convnext_iso_small": {"depths": (18,), "dims": (384,), "layer_scale_init": None},
    "convnext_iso_base": {"depths": (18,), "dims": (768,), "layer_scale_init": None},
    "convnext_iso_large": {"depths": (36,), "dims": (1024,)},
}
_V2: dict[str, dict[str, Any]] = {
    "convnextv2_atto": {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)},
    "convnextv2_femto": {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384)},
    "convnextv2_pico": {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512)},
    "convnextv2_nano": {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640)},
    "convnextv2_tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "convnextv2_base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "convnextv2_large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
    "convnextv2_huge": {"depths": (3, 3, 27, 3), "dims": (352, 704, 1408, 2816)},
}
# Swin: arXiv 2103.14030, section 3.3. Published were all sizes with windows of 7 at 224 × 224, and
# B and L with windows of 12 at 384 × 384.
_SWIN: dict[str, dict[str, Any]] = {
    "swin_tiny": {"depths": (2, 2, 6, 2), "width": 96, "num_heads": (3, 6, 12, 24)},
    "swin_small": {"depths": (2, 2, 18, 2), "width": 96, "num_heads": (3, 6, 12, 24)},
    "swin_base": {"depths": (2, 2, 18, 2), "width": 128, "num_heads": (4, 8, 16, 32)},
    "swin_large": {"depths": (2, 2, 18, 2), "width": 192, "num_heads": (6, 12, 24, 48)},
}
# ResNet: arXiv 1512.03385; ResNet-200 as in the roadmap, with the bottlenecks of ResNet-50.
_RESNET: dict[str, dict[str, Any]] = {
    "resnet50": {"depths": (3, 4, 6, 3)},
    "resnet200": {"depths": (3, 24, 36, 3)},
}


def _roadmap() -> dict[str, tuple[type[nn.Module], dict[str, Any]]]:
    """The steps of both roads; the last one is ConvNeXt itself, with all that it can do.

    `ModernizedResNet` with all choices made has the same tree and gives the same values, but the
    weights of others, configs and programs know the class `ConvNeXt`.
    """
    steps: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
        f"roadmap_{road}/{step.name}": (ModernizedResNet, choices_after(road, step.name))
        for road in ROADS
        for step in STEPS
    }
    last = STEPS[-1].name
    steps[f"roadmap_t/{last}"] = (ConvNeXt, _V1["convnext_tiny"])
    steps[f"roadmap_b/{last}"] = (ConvNeXt, _V1["convnext_base"])
    return steps


_VARIANTS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    **{name: (ConvNeXt, arguments) for name, arguments in _V1.items()},
    **{
        name: (ConvNeXt, dict(isotropic=True, **arguments))
        for name, arguments in _ISOTROPIC.items()
    },
    **{
        name: (ConvNeXt, dict(use_grn=True, layer_scale_init=None, **arguments))
        for name, arguments in _V2.items()
    },
    **{name: (SwinTransformer, arguments) for name, arguments in _SWIN.items()},
    **{
        f"{name}_window12": (SwinTransformer, dict(window_size=12, **arguments))
        for name, arguments in _SWIN.items()
    },
    **{name: (ModernizedResNet, arguments) for name, arguments in _RESNET.items()},
    **_roadmap(),
}


# `ConvNeXt | Any`, as typeshed writes it for a result that callers would otherwise have to narrow:
# which class it is depends on the name's text.
def create_model(name: str, **overrides: Any) -> ConvNeXt | Any:
    """Builds a published variant, without parameters: those come from `model.init`.

    Args:
      name: one of `list_models()`.
      **overrides: arguments of the variant's class that replace or add to its own, such as
        `num_classes`, `drop_path_rate`, `dtype` or `remat`.

    Returns:
      The unbound Flax module: a `ConvNeXt`, a `SwinTransformer` for `swin_*`, a `ModernizedResNet`
      for `resnet*` and the steps `roadmap_*/*` but the last, which is a `ConvNeXt`.

    Raises:
      ValueError: if there is no such variant, or an argument's value is out of range.
      TypeError: if the class has no argument of an override's name.
    """
    if name not in _VARIANTS:
        nearest = difflib.get_close_matches(name, _VARIANTS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "see list_models()"
        raise ValueError(f"no model is called {name!r}: {hint}")
    network, arguments = _VARIANTS[name]
    known = [f.name for f in dataclasses.fields(network) if f.name not in ("parent", "name")]
    unknown = [argument for argument in overrides if argument not in known]
    if unknown:
        raise TypeError(
            f"{network.__name__} has no argument {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return network(**{**arguments, **overrides})


def list_models(pattern: str = "*") -> list[str]:
    """Names of the variants that match a shell-style pattern such as "convnextv2_*".

    Args:
      pattern: as for `fnmatch`: `*`, `?` and `[...]`; upper and lower case differ.

    Returns:
      The names, by family and size; empty if none matches. Those of "convnext*" are `ConvNeXt`s.
    """
    return fnmatch.filter(_VARIANTS, pattern)
