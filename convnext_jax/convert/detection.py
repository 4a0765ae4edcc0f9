"""What a file of tensors is: whose layout, and which network, from names and shapes alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from convnext_jax.convert.families import FAMILIES, LAYOUTS, Family, Match, Seen
from convnext_jax.convert.layouts import Layout, Transform
from convnext_jax.errors import UserError

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
    (r"cpb_mlp|continuous_position_bias_mlp|\.attn\.logit_scale", "a Swin transformer V2"),
    (r"patch_embed.*layers\.\d.*\.attn", "a Swin transformer of another kind"),
    (r"(^|\.)layer[1-4]\.\d+\.conv\d\.weight$", "a ResNet of another kind"),
    (r"denseblock\d", "a DenseNet"),
    (r"(^|\.)blocks\.\d+\.\d+\.(conv_dw|conv_pw|se)\b", "an EfficientNet or MobileNet"),
    (r"(^|\.)(_blocks|features)\.\d+\..*(_depthwise_conv|conv\.\d)", "a MobileNet"),
    (r"token_embedding|embed_tokens|wte\.weight|word_embeddings", "a text model"),
    (r"\.(attn|attention|self_attn|self_attention)\.", "a transformer"),
    (r"(^|\.)(down_blocks|up_blocks|input_blocks)\.", "a U-Net"),
)


@dataclasses.dataclass(frozen=True)
class Detected:
    """What a file holds.

    Attributes:
      family: what kind of network.
      layout: whose names it bears.
      arguments: of the family's class, all that the tensors decide, `num_classes` (0 without a
        head) among them.
      model_name: the name of this architecture in the registry, or None.
      ignored: names of tensors that are no part of the network, or follow from its arguments, and
        are left out.
      prefix: what a wrapping program put before the layout's names.
      in_channels: channels of the images.
      image_size: side in pixels of the images that the network was made for, where tensors say it.
      notes: what else a user should know, one sentence each.
    """

    family: Family
    layout: Layout
    arguments: dict[str, Any]
    model_name: str | None
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    in_channels: int = 3
    image_size: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> Any:
        """The unbound module."""
        return self.family.network(**self.arguments)


def detect(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None = None
) -> Detected:
    """Finds out which layout a file has and which network it holds.

    A damaged file, with tensors missing or misshapen, is recognised too, by what most of it says;
    `to_variables` then tells what is wrong with it.

    Args:
      tensors: name → array, of which nothing but shapes is looked at.
      metadata: what lies beside them; of it a transformers "config" is looked at, for what no
        tensor shows (activation and epsilon).

    Returns:
      What it is.

    Raises:
      UserError: if it is of no family known here, or a network that there is no module for.
    """
    family, layout, prefix, match = _best_layout(tensors)
    seen = Seen(tensors, layout, prefix, match, (metadata or {}).get("config") or {})
    try:
        told = family.read(seen)
        model = family.network(**told.arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"the tensors, read as the {layout.name} layout, make no {family.name}: {error}"
        ) from error
    stem = seen.shapes().get("stem/conv/kernel")
    ignored = [n for n in match.besides if _is_ignored(n, prefix, layout, tensors[n])]
    return Detected(
        family=family,
        layout=layout,
        arguments=told.arguments,
        model_name=family.registry_name(model),
        ignored=(*ignored, *told.ignored),
        prefix=prefix,
        in_channels=stem[2] if stem else 3,
        image_size=told.image_size,
        notes=told.notes,
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
        if row is None or (row[0], row[1].part) in taken:
            besides.append(name)
        else:
            found[name] = row
            taken.add((row[0], row[1].part))
    return Match(found, tuple(besides))


def _best_layout(tensors: Mapping[str, np.ndarray]) -> tuple[Family, Layout, str, Match]:
    """That which explains the most tensors, by name and number of dimensions."""
    best, best_score = None, (0, 0)
    for prefix in _WRAPPERS:
        if not any(name.startswith(prefix) for name in tensors):
            continue
        for family in FAMILIES:
            for layout in family.layouts:
                match = match_names(tensors, layout, prefix)
                fitting = sum(
                    tensors[name].ndim == transform.ndim
                    for name, (path, transform) in match.found.items()
                    if not _is_nowhere(path, match)
                )
                score = (fitting, len(match.found))
                if score > best_score:
                    best, best_score = (family, layout, prefix, match), score
    if best is None or not any(re.search(best[0].hallmark, p) for p, _ in best[3].found.values()):
        networks = ", ".join(family.name for family in FAMILIES)
        layouts = ", ".join(layout.name for layout in LAYOUTS)
        raise UserError(
            f"this file is none of the networks known here ({networks}): {_looks_like(tensors)}; "
            f"the layouts known are {layouts}"
        )
    return best


def _is_nowhere(path: str, match: Match) -> bool:
    """Whether it is a downsampling before a stage without blocks: Swin's layouts differ in that."""
    downsample = re.match(r"(stages_\d+/)downsample/", path)
    return downsample is not None and not any(
        other.startswith(downsample[1] + "blocks_") for other, _ in match.found.values()
    )


def _looks_like(tensors: Mapping[str, np.ndarray]) -> str:
    if not tensors:
        return "it holds no tensors"
    for pattern, kind in _OTHERS:
        for name in tensors:
            if re.search(pattern, name):
                return f"it looks like {kind} (it has a tensor {name})"
    return f"its tensors are called {', '.join(list(tensors)[:3])}, …"


def _is_ignored(name: str, prefix: str, layout: Layout, tensor: np.ndarray) -> bool:
    return (
        tensor.ndim == 0
        or layout.is_derived(name)
        or layout.is_ignored(name)
        or layout.is_ignored(name.removeprefix(prefix))
    )
