"""What a file of tensors is: whose layout, and which ConvNeXt, from names and shapes alone."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from convnext_jax.convert.layouts import LAYOUTS, Layout, Transform
from convnext_jax.errors import UserError
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import create_model, list_models

# What programs that wrap a model put before its names.
_WRAPPERS = (
    "",
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "model.",
    "module.model.",
    "backbone.",
    "encoder.",
    "module.encoder.",
)

# What else a file may be, by a name that such models have: the first that is found counts.
_OTHERS = (
    (r"relative_position_bias_table|patch_embed.*layers\.\d.*\.attn", "a Swin transformer"),
    (r"(^|\.)layer[1-4]\.\d+\.conv\d\.weight$", "a ResNet"),
    (r"denseblock\d", "a DenseNet"),
    (r"(^|\.)blocks\.\d+\.\d+\.(conv_dw|conv_pw|se)\b", "an EfficientNet or MobileNet"),
    (r"(^|\.)(_blocks|features)\.\d+\..*(_depthwise_conv|conv\.\d)", "a MobileNet"),
    (r"token_embedding|embed_tokens|wte\.weight|word_embeddings", "a text model"),
    (r"\.(attn|attention|self_attn|self_attention)\.", "a transformer"),
    (r"(^|\.)(down_blocks|up_blocks|input_blocks)\.", "a U-Net"),
)

# timm's own test models have other activations than GELU, which no tensor shows.
_OTHER_ACTIVATIONS: dict[tuple[tuple[int, ...], ...], str] = {
    ((1, 2, 4, 2), (24, 32, 48, 64)): "test_convnext",
    ((1, 1, 1, 1), (32, 64, 96, 128)): "test_convnext2 or test_convnext3",
}

_MATCHED_ARGUMENTS = (
    "depths",
    "dims",
    "isotropic",
    "stem_kernel_size",
    "kernel_size",
    "use_grn",
    "head_norm_first",
    "head_hidden",
)


@dataclasses.dataclass(frozen=True)
class Detected:
    """What a file holds.

    Attributes:
      layout: whose names it bears.
      arguments: of `ConvNeXt`, all that the tensors decide, `num_classes` (0 without a head) among
        them.
      model_name: the name of this architecture in the registry, or None.
      ignored: names of tensors that are no part of the ConvNeXt and are left out.
      prefix: what a wrapping program put before the layout's names.
      in_channels: channels of the images.
      notes: what else a user should know, one sentence each.
    """

    layout: Layout
    arguments: dict[str, Any]
    model_name: str | None
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    in_channels: int = 3
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Match:
    """A file's tensors seen through one layout's table.

    Attributes:
      found: name in the file → (our path, transform).
      besides: the names that are not in the table.
    """

    found: dict[str, tuple[str, Transform]]
    besides: tuple[str, ...]


def detect(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None = None
) -> Detected:
    """Finds out which layout a file has and which ConvNeXt it holds.

    A damaged file, with tensors missing or misshapen, is recognised too, by what most of it says;
    `to_params` then tells what is wrong with it.

    Args:
      tensors: name → array, of which nothing but shapes is looked at.
      metadata: what lies beside them; of it a transformers "config" is looked at, for what no
        tensor shows (activation and epsilon).

    Returns:
      What it is.

    Raises:
      UserError: if it is no ConvNeXt, or one that this library has no module for.
    """
    layout, prefix, match = _best_layout(tensors)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (path, transform) in match.found.items():
        shape = transform.our_shape(tensors[name].shape)
        if shape is not None:
            shapes[path] = shape
    _refuse_unsupported(layout, match, tensors)

    depths, dims = _stages(match, shapes)
    arguments: dict[str, Any] = {
        "num_classes": _width(shapes, "head") or 0,
        "depths": depths,
        "dims": dims,
        "isotropic": False,
        "patch_size": _side(shapes, "stem/conv/kernel"),
        "kernel_size": _side(shapes, "dwconv/kernel") or 7,
        "layer_scale_init": 1e-6 if _in_most_blocks(shapes, "gamma", depths) else None,
        "use_grn": _in_most_blocks(shapes, "grn/gamma", depths),
        "head_norm_first": False,
        "head_hidden": _width(shapes, "pre_logits"),
        "feature_norms": all(f"feature_norm_{i}/scale" in shapes for i in range(len(depths))),
        "norm_eps": 1e-6,
        **{k: v for k, v in layout.implies.items() if k != "use_grn"},
    }
    if layout.family == "timm" and (depths, dims) in _OTHER_ACTIVATIONS:
        raise UserError(
            f"these are the weights of timm's {_OTHER_ACTIVATIONS[depths, dims]}, which is no "
            "ConvNeXt with GELU; use a published one, such as hf://timm/convnext_atto.d2_in1k"
        )
    try:
        model = ConvNeXt(**arguments)
    except ValueError as error:
        raise UserError(
            f"the tensors, read as the {layout.name} layout, make no ConvNeXt: {error}"
        ) from error
    model_name = _registry_name(model)
    if model_name is not None:
        arguments["norm_eps"] = create_model(model_name).norm_eps
    notes = _read_config(arguments, layout, (metadata or {}).get("config") or {})

    ignored = [n for n in match.besides if _is_ignored(n, prefix, layout, tensors[n])]
    if not arguments["feature_norms"]:
        # A backbone of which only some outputs have a norm: its encoder is worth having still.
        norms = [n for n, (path, _) in match.found.items() if path.startswith("feature_norm_")]
        ignored += norms
        if norms:
            notes.append("the norms on some of the backbone's outputs are left out")
    stem = shapes.get("stem/conv/kernel")
    return Detected(
        layout=layout,
        arguments=arguments,
        model_name=model_name,
        ignored=tuple(ignored),
        prefix=prefix,
        in_channels=stem[2] if stem else 3,
        notes=tuple(notes),
    )


def match_names(names: Iterable[str], layout: Layout, prefix: str = "") -> Match:
    """Looks all names up in a layout's table.

    Args:
      names: as the file has them.
      layout: whose table.
      prefix: taken off the names that begin with it.

    Returns:
      What was found. Of two names for one tensor the first counts.
    """
    found: dict[str, tuple[str, Transform]] = {}
    besides, taken = [], set()
    for name in names:
        row = layout.find(name.removeprefix(prefix))
        if row is None or row[0] in taken:
            besides.append(name)
        else:
            found[name] = row
            taken.add(row[0])
    return Match(found, tuple(besides))


def _best_layout(tensors: Mapping[str, np.ndarray]) -> tuple[Layout, str, Match]:
    """That which explains the most tensors, by name and number of dimensions."""
    best, best_score = None, (0, 0)
    for prefix in _WRAPPERS:
        if not any(name.startswith(prefix) for name in tensors):
            continue
        for layout in LAYOUTS:
            match = match_names(tensors, layout, prefix)
            fitting = sum(tensors[n].ndim == t.ndim for n, (_, t) in match.found.items())
            score = (fitting, len(match.found))
            if score > best_score:
                best, best_score = (layout, prefix, match), score
    if best is None or not any("/dwconv/" in path for path, _ in best[2].found.values()):
        known = ", ".join(layout.name for layout in LAYOUTS)
        raise UserError(
            f"this file is no ConvNeXt, {_looks_like(tensors)}; the layouts known are {known}"
        )
    return best


def _looks_like(tensors: Mapping[str, np.ndarray]) -> str:
    if not tensors:
        return "it holds no tensors"
    for pattern, kind in _OTHERS:
        for name in tensors:
            if re.search(pattern, name):
                return f"it looks like {kind} (it has a tensor {name})"
    return f"its tensors are called {', '.join(list(tensors)[:3])}, …"


def _refuse_unsupported(layout: Layout, match: Match, tensors: Mapping[str, np.ndarray]) -> None:
    if layout.family not in ("timm", "clip"):
        return
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


def _stages(
    match: Match, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Depths by the last block named, widths by the vote of all vectors of a stage's blocks."""
    depths: Counter[int] = Counter()
    for path, _ in match.found.values():
        block = re.match(r"stages_(\d+)/blocks_(\d+)/", path)
        if block:
            i, j = (int(number) for number in block.groups())
            depths[i] = max(depths[i], j + 1)
    widths: dict[int, Counter[int]] = {}
    for path, shape in shapes.items():
        block = re.match(r"stages_(\d+)/blocks_\d+/(?!pwconv1|grn)", path)
        if block:
            widths.setdefault(int(block[1]), Counter())[shape[-1]] += 1
    stages = range(1 + max(depths))
    return (
        tuple(max(depths[i], 1) for i in stages),
        tuple(widths[i].most_common(1)[0][0] if i in widths else 1 for i in stages),
    )


def _in_most_blocks(
    shapes: Mapping[str, tuple[int, ...]], leaf: str, depths: tuple[int, ...]
) -> bool:
    return 2 * sum(bool(re.search(rf"/blocks_\d+/{leaf}$", p)) for p in shapes) > sum(depths)


def _side(shapes: Mapping[str, tuple[int, ...]], leaf: str) -> int | None:
    sides = Counter(shape[0] for path, shape in shapes.items() if path.endswith(leaf))
    return sides.most_common(1)[0][0] if sides else None


def _width(shapes: Mapping[str, tuple[int, ...]], module: str) -> int | None:
    shape = shapes.get(f"{module}/kernel") or shapes.get(f"{module}/bias")
    return shape[-1] if shape else None


def _registry_name(model: ConvNeXt) -> str | None:
    def key(candidate: ConvNeXt) -> list[Any]:
        values = [getattr(candidate, argument) for argument in _MATCHED_ARGUMENTS]
        return [*values, candidate.layer_scale_init is None]

    wanted = key(model)
    return next(
        (name for name in list_models("convnext*") if key(create_model(name)) == wanted), None
    )


def _read_config(arguments: dict[str, Any], layout: Layout, config: Mapping[str, Any]) -> list[str]:
    """Takes from a transformers config what no tensor shows; changes `arguments`."""
    if layout.family not in ("transformers", "dinov3"):
        return []
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(
            f"this model's hidden_act is {activation!r} (config.json), and ConvNeXt here has the "
            "exact GELU alone"
        )
    epsilon = config.get("layer_norm_eps")
    if layout.family == "dinov3":
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


def _is_ignored(name: str, prefix: str, layout: Layout, tensor: np.ndarray) -> bool:
    return (
        tensor.ndim == 0 or layout.is_ignored(name) or layout.is_ignored(name.removeprefix(prefix))
    )
