"""Swin in the files of others."""

from __future__ import annotations

import math
import re
from typing import Any

from convnext_jax.convert.families.family import Family, Seen, Told, most_common, width_of
from convnext_jax.convert.layouts import swin
from convnext_jax.errors import UserError
from convnext_jax.models.swin import SwinTransformer


def _read(seen: Seen) -> Told:
    shapes, depths = seen.shapes(), seen.depths()
    widths, windows = [], []
    heads: list[list[int]] = [[] for _ in depths]
    for path, shape in shapes.items():
        block = re.match(r"stages_(\d+)/blocks_\d+/(.+)", path)
        if block is None:
            continue
        stage, leaf = int(block[1]), block[2]
        if leaf.endswith("relative_position_bias_table"):
            heads[stage].append(shape[1])
            windows.append((math.isqrt(shape[0]) + 1) // 2)
        elif leaf.startswith(("norm1/", "norm2/")):
            widths.append(shape[-1] // 2**stage)
    arguments: dict[str, Any] = {
        "num_classes": width_of(shapes, "head") or 0,
        "depths": depths,
        "width": most_common(widths) or 1,
        "num_heads": tuple(most_common(votes) or 1 for votes in heads),
        "window_size": most_common(windows) or 7,
        "patch_size": shapes.get("stem/conv/kernel", (4,))[0],
        "norm_eps": 1e-5,
    }
    _read_config(arguments, seen)
    return Told(arguments, image_size=_image_size(seen, arguments))


def _read_config(arguments: dict[str, Any], seen: Seen) -> None:
    """Takes from a transformers config what no tensor shows; changes `arguments`."""
    if seen.layout.origin != "transformers":
        return
    activation = seen.config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(
            f"this model's hidden_act is {activation!r} (config.json), and Swin here has the exact "
            "GELU alone"
        )
    arguments["norm_eps"] = seen.config.get("layer_norm_eps", 1e-5)


def _image_size(seen: Seen, arguments: dict[str, Any]) -> int | None:
    """The images' side, which the authors' masks show: one for each window of the first stage."""
    for name, tensor in seen.tensors.items():
        if re.fullmatch(r"(.*\.)?layers\.0\.blocks\.\d+\.attn_mask", name) and tensor.ndim == 3:
            return arguments["patch_size"] * arguments["window_size"] * math.isqrt(tensor.shape[0])
    return None


SWIN = Family(
    name="Swin",
    network=SwinTransformer,
    architecture=(
        "num_classes",
        "depths",
        "width",
        "num_heads",
        "window_size",
        "patch_size",
        "norm_eps",
    ),
    variant=("depths", "width", "num_heads", "window_size", "patch_size"),
    layouts=(
        swin.OFFICIAL,
        swin.TIMM,
        swin.TORCHVISION,
        swin.TRANSFORMERS,
        swin.TRANSFORMERS_BARE,
        swin.TRANSFORMERS_5,
    ),
    ways_back={
        "official": (swin.OFFICIAL,),
        "timm": (swin.TIMM,),
        "torchvision": (swin.TORCHVISION,),
        "transformers": (swin.TRANSFORMERS_BARE, swin.TRANSFORMERS),
    },
    hallmark=r"/attn/relative_position_bias_table",
    read=_read,
)
