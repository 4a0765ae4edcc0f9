"""From a file's tensors to the parameter tree, and back."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.convert.detection import Detected, match_names
from convnext_jax.convert.layouts import WAYS_BACK, Layout, Transform
from convnext_jax.errors import UserError
from convnext_jax.models.convnext import ConvNeXt

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """One tensor's way.

    Attributes:
      name: in the file.
      shape: in the file.
      dtype: of both.
      path: in the tree "params", such as "stages_0/blocks_1/pwconv1/kernel".
      our_shape: there.
      transform: how the one becomes the other.
    """

    name: str
    shape: Shape
    dtype: str
    path: str
    our_shape: Shape
    transform: Transform


def mapping_table(
    tensors: Mapping[str, np.ndarray], detected: Detected
) -> tuple[MappedTensor, ...]:
    """Says for each tensor of a file where in the tree it goes.

    Args:
      tensors: name → array.
      detected: what `detect` found in them.

    Returns:
      One row per parameter, in the file's order.

    Raises:
      UserError: if any tensor is missing, unexpected or misshapen; its message holds all of them in
        one table.
    """
    expected = parameter_shapes(ConvNeXt(**detected.arguments), detected.in_channels)
    names = [name for name in tensors if name not in detected.ignored]
    match = match_names(names, detected.layout, detected.prefix)
    present = {path for path, _ in match.found.values()}
    if not any(path.startswith(("norm/", "head/")) for path in present):
        # An encoder, of pre-training or a backbone's.
        expected = {k: v for k, v in expected.items() if not k.startswith("norm/")}

    rows, wrong = [], []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name in match.found:
            path, transform = match.found[name]
            ours = transform.our_shape(shape)
            if path not in expected:
                wrong.append(("unexpected", name, _text(shape), "–", "–"))
            elif ours != expected[path]:
                due = _text(transform.their_shape(expected[path]))
                wrong.append(
                    ("misshapen", name, f"{_text(shape)}, not {due}", path, _text(expected[path]))
                )
            else:
                rows.append(MappedTensor(name, shape, str(tensor.dtype), path, ours, transform))
        elif name in match.besides:
            wrong.append(("unexpected", name, _text(shape), "–", "–"))
    for name, path, transform in detected.layout.tensors(detected.arguments["depths"]):
        if path in expected and path not in present:
            due = _text(transform.their_shape(expected[path]))
            wrong.append(("missing", detected.prefix + name, due, path, _text(expected[path])))
    if wrong:
        model = detected.model_name or "the ConvNeXt that most of them make"
        noun = "tensor does" if len(wrong) == 1 else "tensors do"
        raise UserError(
            f"{len(wrong)} {noun} not fit {model} in the {detected.layout.name} layout; the file "
            "is damaged, or of another model:\n"
            + _columns([("", "in the file", "", "here", ""), *wrong])
        )
    return tuple(rows)


def to_params(tensors: Mapping[str, np.ndarray], detected: Detected) -> dict[str, Any]:
    """Nests a file's tensors as the parameters of a ConvNeXt.

    Args:
      tensors: name → array.
      detected: what `detect` found in them.

    Returns:
      The tree "params" of NumPy arrays in the file's dtypes: views, nothing is copied but the
      sparse files' kernels. An encoder's has no "norm" and no "head".

    Raises:
      UserError: see `mapping_table`; then nothing is returned.
    """
    params: dict[str, Any] = {}
    for row in mapping_table(tensors, detected):
        *parents, leaf = row.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = row.transform.forward(tensors[row.name])
    return params


def from_params(
    params: Mapping[str, Any], model: ConvNeXt, layout: str = "official"
) -> dict[str, np.ndarray]:
    """Names and shapes a model's parameters as other programs do: the way back.

    Args:
      params: the tree "params", of any arrays.
      model: the module that they belong to.
      layout: "official", "timm", "torchvision" or "transformers". timm stores the blocks' products
        as matrices or, in its models below `tiny` and in `tiny_hnf`, as 1×1 convolutions; "timm"
        does likewise, "timm-linear" and "timm-conv-mlp" are the one and the other in any case.

    Returns:
      name → contiguous array of the dtype that it has in `params`; under "transformers" the names
      of `…ForImageClassification`, or without a head those of the bare model.

    Raises:
      UserError: if there is no such layout, it has no place for this model, or the parameters are
        not the model's.
    """
    if layout not in WAYS_BACK:
        raise UserError(f"there is no layout {layout!r} to write; use {', '.join(WAYS_BACK)}")
    if layout == "timm" and model.dims[0] < 96:
        layout = "timm-conv-mlp"
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    _check_params(flat, model)
    obstacles = [(_obstacles(candidate, model), candidate) for candidate in WAYS_BACK[layout]]
    reasons, chosen = min(obstacles, key=lambda pair: len(pair[0]))
    if reasons:
        raise UserError(
            f"the {layout} layout can't hold this model: {'; '.join(reasons)}; choose another of "
            f"{', '.join(WAYS_BACK)}"
        )
    return {
        name: np.ascontiguousarray(transform.inverse(np.asarray(flat[path])))
        for name, path, transform in chosen.tensors(model.depths)
        if path in flat
    }


def format_mapping(rows: tuple[MappedTensor, ...]) -> str:
    """The table as text, a line per tensor, for people."""
    return _columns(
        [
            ("in the file", "", "here", "", ""),
        ]
        + [(r.name, _text(r.shape), r.path, _text(r.our_shape), r.dtype) for r in rows]
    )


def _obstacles(layout: Layout, model: ConvNeXt) -> list[str]:
    reasons = [
        f"its {argument} is {getattr(model, argument)!r}, and can only be {value!r} there"
        for argument, value in {**layout.implies, **layout.fixes}.items()
        if getattr(model, argument) != value
    ]
    if layout.stages and len(model.depths) != layout.stages:
        count = len(model.depths)
        noun = "stage" if count == 1 else "stages"
        reasons.append(f"it has {count} {noun}, and can only have {layout.stages} there")
    if model.strides[0] != model.stem_kernel_size:
        reasons.append(f"its stem_stride of {model.strides[0]} is recorded nowhere there")
    if "gamma" in layout.always and not model.layer_scale_init:
        reasons.append("its blocks have no layer scale, which they always have there")
    return reasons


def _check_params(flat: Mapping[str, Any], model: ConvNeXt) -> None:
    stem = flat.get("stem/conv/kernel")
    expected = parameter_shapes(model, 3 if stem is None else stem.shape[2])
    if not any(path.startswith(("norm/", "head/")) for path in flat):
        expected = {k: v for k, v in expected.items() if not k.startswith(("norm/", "head/"))}
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    wrong = [p for p in {**expected, **shapes} if expected.get(p) != shapes.get(p)]
    if wrong:
        rows = [(p, _text(shapes.get(p)), _text(expected.get(p))) for p in wrong]
        raise UserError(
            f"{len(wrong)} parameters are not those of the model:\n"
            + _columns([("", "given", "of the model"), *rows])
        )


@functools.lru_cache(maxsize=32)
def parameter_shapes(model: ConvNeXt, in_channels: int = 3) -> Mapping[str, Shape]:
    """The shapes of a model's parameters by path, such as "stages_0/blocks_1/pwconv1/kernel".

    Args:
      model: the unbound module.
      in_channels: channels of the images.
    """
    side = model.strides[-1]
    images = jax.ShapeDtypeStruct((1, side, side, in_channels), jnp.float32)
    # All blocks of a stage are alike, so one of each is traced.
    shallow = model.clone(depths=(1,) * len(model.depths))
    params = jax.eval_shape(shallow.init, jax.random.key(0), images)["params"]
    shapes: dict[str, Shape] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        stage = re.match(r"stages_(\d+)/blocks_0/", path)
        for j in range(model.depths[int(stage[1])] if stage else 1):
            shapes[path.replace("/blocks_0/", f"/blocks_{j}/")] = leaf.shape
    return MappingProxyType(shapes)


def _text(shape: Shape | None) -> str:
    return "–" if shape is None else f"({', '.join(str(n) for n in shape)})"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        ("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
