"""ConvNeXt in the files of others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from convnext_jax.convert.families.family import Family, Seen, Told, most_common, width_of
from convnext_jax.convert.layouts import Layout, official, timm, torchvision, transformers
from convnext_jax.errors import UserError
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import create_model

# timm's own test models have other activations than GELU, which no tensor shows.
_OTHER_ACTIVATIONS: dict[tuple[tuple[int, ...], ...], str] = {
    ((1, 2, 4, 2), (24, 32, 48, 64)): "test_convnext",
    ((1, 1, 1, 1), (32, 64, 96, 128)): "test_convnext2 or test_convnext3",
}


def _read(seen: Seen) -> Told:
    _refuse_unsupported(seen)
    layout, shapes, depths = seen.layout, seen.shapes(), seen.depths()
    dims = _widths(shapes, len(depths))
    arguments: dict[str, Any] = {
        "num_classes": width_of(shapes, "head") or 0,
        "depths": depths,
        "dims": dims,
        "isotropic": False,
        "patch_size": _side(shapes, "stem/conv/kernel"),
        "kernel_size": _side(shapes, "dwconv/kernel") or 7,
        "layer_scale_init": 1e-6 if _in_most_blocks(shapes, "gamma", depths) else None,
        "use_grn": _in_most_blocks(shapes, "grn/gamma", depths),
        "head_norm_first": False,
        "head_hidden": width_of(shapes, "pre_logits"),
        "feature_norms": all(f"feature_norm_{i}/scale" in shapes for i in range(len(depths))),
        "norm_eps": 1e-6,
        **{k: v for k, v in layout.implies.items() if k != "use_grn"},
    }
    if layout.origin == "timm" and (depths, dims) in _OTHER_ACTIVATIONS:
        raise UserError(
            f"these are the weights of timm's {_OTHER_ACTIVATIONS[depths, dims]}, which is no "
            "ConvNeXt with GELU; use a published one, such as hf://timm/convnext_atto.d2_in1k"
        )
    model_name = CONVNEXT.registry_name(ConvNeXt(**arguments))
    if model_name is not None:
        arguments["norm_eps"] = create_model(model_name).norm_eps
    notes = _read_config(arguments, layout, seen.config)

    norms = []
    if not arguments["feature_norms"]:
        # A backbone of which only some outputs have a norm: its encoder is worth having still.
        norms = [n for n, (p, _) in seen.match.found.items() if p.startswith("feature_norm_")]
        if norms:
            notes.append("the norms on some of the backbone's outputs are left out")
    return Told(arguments, ignored=tuple(norms), notes=tuple(notes))


def _refuse_unsupported(seen: Seen) -> None:
    if seen.layout.origin not in ("timm", "clip"):
        return
    tensors, match = seen.tensors, seen.match
    paths = {path: name for name, (path, _) in match.found.items()}
    if any(tensors[n].ndim == 4 for p, n in paths.items() if p == "stem/norm/scale") or any(
        tensors[n].ndim == 4 and n.endswith("stem.2.weight") for n in match.besides
    ):
        raise UserError(
            "this is a timm model with an overlapping stem of two convolutions (convnext_*_ols), "
            "for which there is no module here; take the one of the same size without _ols"
        )
    norms = [path for path in paths if "/norm/" in path]
    if norms and not any(path.endswith("/bias") for path in norms):
        raise UserError(
            "this is a timm model with RMS norms (convnext_*_rms), for which there is no module "
            "here; take one of the same size without _rms"
        )


def _widths(shapes: Mapping[str, tuple[int, ...]], stages: int) -> tuple[int, ...]:
    """Widths by the vote of all vectors of a stage's blocks."""
    widths: dict[int, Counter[int]] = {}
    for path, shape in shapes.items():
        block = re.match(r"stages_(\d+)/blocks_\d+/(?!pwconv1|grn)", path)
        if block:
            widths.setdefault(int(block[1]), Counter())[shape[-1]] += 1
    return tuple(widths[i].most_common(1)[0][0] if i in widths else 1 for i in range(stages))


def _in_most_blocks(
    shapes: Mapping[str, tuple[int, ...]], leaf: str, depths: tuple[int, ...]
) -> bool:
    return 2 * sum(bool(re.search(rf"/blocks_\d+/{leaf}$", p)) for p in shapes) > sum(depths)


def _side(shapes: Mapping[str, tuple[int, ...]], leaf: str) -> int | None:
    return most_common(shape[0] for path, shape in shapes.items() if path.endswith(leaf))


def _read_config(arguments: dict[str, Any], layout: Layout, config: Mapping[str, Any]) -> list[str]:
    """Takes from a transformers config what no tensor shows; changes `arguments`."""
    if layout.origin not in ("transformers", "dinov3"):
        return []
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(
            f"this model's hidden_act is {activation!r} (config.json), and ConvNeXt here has the "
            "exact GELU alone"
        )
    epsilon = config.get("layer_norm_eps")
    if layout.origin == "dinov3":
        # There it is the epsilon of every norm.
        if epsilon is not None:
            arguments["norm_eps"] = epsilon
        return []
    # There it is that of the final norm alone, and its default, 1e-12, is a slip: the published
    # weights were trained with 1e-6 throughout. On features of a variance near 1 the two differ by
    # less than float32 can show.
    if epsilon is not None and epsilon > 1e-6:
        return [
            f"config.json gives the final norm an epsilon of {epsilon:g}; here it is 1e-06, as in "
            "all other norms"
        ]
    return []


def _unsaid(model: ConvNeXt) -> list[str]:
    if model.strides[0] != model.stem_kernel_size:
        return [f"its stem_stride of {model.strides[0]} is recorded nowhere there"]
    return []


CONVNEXT = Family(
    name="ConvNeXt",
    network=ConvNeXt,
    architecture=(
        "num_classes",
        "depths",
        "dims",
        "isotropic",
        "patch_size",
        "stem_stride",
        "kernel_size",
        "layer_scale_init",
        "use_grn",
        "head_norm_first",
        "head_hidden",
        "feature_norms",
        "norm_eps",
    ),
    variant=(
        "depths",
        "dims",
        "isotropic",
        "stem_kernel_size",
        "kernel_size",
        "use_grn",
        "head_norm_first",
        "head_hidden",
        "layer_scale_init",
    ),
    layouts=(
        official.OFFICIAL,
        official.ISOTROPIC,
        official.FCMAE_DENSE,
        official.FCMAE_SPARSE,
        timm.TIMM,
        timm.TIMM_CONV_MLP,
        timm.TIMM_HNF,
        timm.TIMM_HNF_CONV_MLP,
        timm.CLIP,
        torchvision.TORCHVISION,
        transformers.V1,
        transformers.V2,
        transformers.BARE,
        transformers.DINOV3,
    ),
    ways_back={
        "official": (official.OFFICIAL, official.ISOTROPIC),
        "timm": (timm.TIMM, timm.TIMM_HNF_CONV_MLP),
        "timm-linear": (timm.TIMM, timm.TIMM_HNF),
        "timm-conv-mlp": (timm.TIMM_CONV_MLP, timm.TIMM_HNF_CONV_MLP),
        "torchvision": (torchvision.TORCHVISION,),
        "transformers": (transformers.BARE, transformers.V1, transformers.V2),
    },
    hallmark="/dwconv/",
    read=_read,
    unsaid=_unsaid,
)
