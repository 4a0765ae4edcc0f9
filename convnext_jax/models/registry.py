"""Published variants by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import Any

from convnext_jax.models.convnext import ConvNeXt

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
_VARIANTS: dict[str, dict[str, Any]] = {
    **_V1,
    **{name: dict(isotropic=True, **arguments) for name, arguments in _ISOTROPIC.items()},
    **{
        name: dict(use_grn=True, layer_scale_init=None, **arguments)
        for name, arguments in _V2.items()
    },
}
_ARGUMENTS = [f.name for f in dataclasses.fields(ConvNeXt) if f.name not in ("parent", "name")]


def create_model(name: str, **overrides: Any) -> ConvNeXt:
    """Builds a published variant, without parameters: those come from `model.init`.

    Args:
      name: one of `list_models()`.
      **overrides: arguments of `ConvNeXt` that replace or add to the variant's own, such as
        `num_classes`, `drop_path_rate`, `dtype` or `remat`.

    Returns:
      The unbound Flax module.

    Raises:
      ValueError: if there is no such variant, or an argument's value is out of range.
      TypeError: if ConvNeXt has no argument of an override's name.
    """
    if name not in _VARIANTS:
        nearest = difflib.get_close_matches(name, _VARIANTS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "see list_models()"
        raise ValueError(f"no model is called {name!r}: {hint}")
    unknown = [argument for argument in overrides if argument not in _ARGUMENTS]
    if unknown:
        raise TypeError(
            f"ConvNeXt has no argument {', '.join(unknown)}; it has {', '.join(_ARGUMENTS)}"
        )
    return ConvNeXt(**{**_VARIANTS[name], **overrides})


def list_models(pattern: str = "*") -> list[str]:
    """Names of the variants that match a shell-style pattern such as "convnextv2_*".

    Args:
      pattern: as for `fnmatch`: `*`, `?` and `[...]`; upper and lower case differ.

    Returns:
      The names, by family and size; empty if none matches.
    """
    return fnmatch.filter(_VARIANTS, pattern)
