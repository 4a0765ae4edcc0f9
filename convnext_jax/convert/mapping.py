"""From a file's tensors to the variables of a network, and back."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.convert.detection import Detected, match_names
from convnext_jax.convert.families import Family, family_of
from convnext_jax.convert.layouts import Layout, Transform, collection_of
from convnext_jax.errors import UserError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """One tensor's way.

    Attributes:
      name: in the file.
      shape: in the file.
      dtype: of both.
      path: in the collection "params" or, of a batch norm's "mean" and "var", "batch_stats": such
        as "stages_0/blocks_1/pwconv1/kernel".
      our_shape: there, of the whole tensor.
      transform: how the one becomes the other, or a part of it.
    """

    name: str
    shape: Shape
    dtype: str
    path: str
    our_shape: Shape
    transform: Transform

    @property
    def place(self) -> str:
        """The path, and which part of the tensor there it is, for people."""
        index, count = self.transform.part
        return self.path if count == 1 else f"{self.path} [{index + 1} of {count}]"


def mapping_table(
    tensors: Mapping[str, np.ndarray], detected: Detected
) -> tuple[MappedTensor, ...]:
    """Says for each tensor of a file where in the tree it goes.

    Args:
      tensors: name → array.
      detected: what `detect` found in them.

    Returns:
      One row per tensor that is taken, in the file's order.

    Raises:
      UserError: if any tensor is missing, unexpected or misshapen; its message holds all of them in
        one table.
    """
    expected = variable_shapes(detected.model, detected.in_channels)
    names = [name for name in tensors if name not in detected.ignored]
    match = match_names(names, detected.layout, detected.prefix)
    present = {(path, transform.part) for path, transform in match.found.values()}
    if not any(path.startswith(("norm/", "head/")) for path, _ in present):
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
        if path in expected and (path, transform.part) not in present:
            due = _text(transform.their_shape(expected[path]))
            wrong.append(("missing", detected.prefix + name, due, path, _text(expected[path])))
    if wrong:
        model = detected.model_name or f"the {detected.family.name} that most of them make"
        noun = "tensor does" if len(wrong) == 1 else "tensors do"
        raise UserError(
            f"{len(wrong)} {noun} not fit {model} in the {detected.layout.name} layout; the file "
            "is damaged, or of another model:\n"
            + _columns([("", "in the file", "", "here", ""), *wrong])
        )
    return tuple(rows)


def to_variables(tensors: Mapping[str, np.ndarray], detected: Detected) -> dict[str, Any]:
    """Nests a file's tensors as the variables of a network.

    Args:
      tensors: name → array.
      detected: what `detect` found in them.

    Returns:
      {"params": …} and, of a network with batch norms, "batch_stats": NumPy arrays in the file's
      dtypes. They are views; copied are the sparse files' kernels, and what a file holds in parts.
      An encoder's params have no "norm" and no "head".

    Raises:
      UserError: see `mapping_table`; then nothing is returned.
    """
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for row in mapping_table(tensors, detected):
        array = row.transform.forward(tensors[row.name])
        parts.setdefault(row.path, []).append((row.transform.part[0], array))
    variables: dict[str, Any] = {}
    for path, arrays in parts.items():
        *parents, leaf = path.split("/")
        node = variables.setdefault(collection_of(path), {})
        for key in parents:
            node = node.setdefault(key, {})
        ordered = [array for _, array in sorted(arrays, key=lambda part: part[0])]
        node[leaf] = ordered[0] if len(ordered) == 1 else np.concatenate(ordered, axis=-1)
    return variables


def from_params(
    params: Mapping[str, Any],
    model: nn.Module,
    layout: str | None = None,
    *,
    batch_stats: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Names and shapes a model's variables as other programs do: the way back.

    Args:
      params: the tree "params", of any arrays.
      model: the module that they belong to: a `ConvNeXt`, `SwinTransformer` or `ModernizedResNet`.
      layout: "official", "timm", "torchvision" or "transformers", of a ResNet "torchvision" or
        "timm"; None for that of its authors. Of a ConvNeXt timm stores the blocks' products
        as matrices or, in its models below `tiny` and in `tiny_hnf`, as 1×1 convolutions; "timm"
        does likewise, "timm-linear" and "timm-conv-mlp" are the one and the other in any case.
      batch_stats: the tree "batch_stats" of a model with batch norms.

    Returns:
      name → contiguous array of the dtype that it has in `params`; under "transformers" the names
      of `…ForImageClassification`, or without a head those of the bare model.

    Raises:
      UserError: if there is no such layout, it has no place for this model, or the parameters are
        not the model's.
    """
    family = family_of(model)
    ways = family.ways_back
    if layout is None:
        layout = next(iter(ways))
    if layout not in ways:
        raise UserError(
            f"there is no layout {layout!r} to write a {family.name} in; use {', '.join(ways)}"
        )
    network: Any = model
    flat = _by_path(params) | _by_path(batch_stats or {})
    _check_variables(flat, network)
    obstacles = [(_obstacles(way, network, family), way) for way in _ways(layout, network, family)]
    reasons, chosen = min(obstacles, key=lambda pair: len(pair[0]))
    if reasons:
        raise UserError(
            f"the {layout} layout can't hold this model: {'; '.join(reasons)}; choose another of "
            f"{', '.join(ways)}"
        )
    return {
        name: np.ascontiguousarray(transform.to_theirs(np.asarray(flat[path])))
        for name, path, transform in chosen.tensors(network.depths)
        if path in flat
    }


def format_mapping(rows: tuple[MappedTensor, ...]) -> str:
    """The table as text, a line per tensor, for people."""
    return _columns(
        [
            ("in the file", "", "here", "", ""),
        ]
        + [(r.name, _text(r.shape), r.place, _text(r.our_shape), r.dtype) for r in rows]
    )


def _ways(layout: str, model: Any, family: Family) -> tuple[Layout, ...]:
    if layout == "timm" and "timm-conv-mlp" in family.ways_back and model.dims[0] < 96:
        layout = "timm-conv-mlp"
    return family.ways_back[layout]


def _obstacles(layout: Layout, model: Any, family: Family) -> list[str]:
    reasons = [
        f"its {argument} is {getattr(model, argument)!r}, and can only be {value!r} there"
        for argument, value in {**layout.implies, **layout.fixes}.items()
        if getattr(model, argument) != value
    ]
    if layout.stages and len(model.depths) != layout.stages:
        count = len(model.depths)
        noun = "stage" if count == 1 else "stages"
        reasons.append(f"it has {count} {noun}, and can only have {layout.stages} there")
    reasons += family.unsaid(model)
    if "gamma" in layout.always and not model.layer_scale_init:
        reasons.append("its blocks have no layer scale, which they always have there")
    return reasons


def _by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _check_variables(flat: Mapping[str, Any], model: nn.Module) -> None:
    stem = flat.get("stem/conv/kernel")
    expected = variable_shapes(model, 3 if stem is None else stem.shape[2])
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
def variable_shapes(model: Any, in_channels: int = 3) -> Mapping[str, Shape]:
    """The shapes of a model's variables by path, such as "stages_0/blocks_1/pwconv1/kernel".

    Parameters and batch statistics lie side by side: their paths end in other names.

    Args:
      model: the unbound module.
      in_channels: channels of the images.
    """
    side = model.strides[-1]
    images = jax.ShapeDtypeStruct((1, side, side, in_channels), jnp.float32)
    # Blocks of a stage are alike, but for the first of some: so one of each kind is traced.
    kinds = 2 if family_of(model).first_block_differs else 1
    shallow = model.clone(depths=tuple(min(depth, kinds) for depth in model.depths))
    variables = jax.eval_shape(shallow.init, jax.random.key(0), images)
    shapes: dict[str, Shape] = {}
    for collection in ("params", "batch_stats"):
        for path, leaf in _by_path(variables.get(collection, {})).items():
            shapes[path] = leaf.shape
            block = re.match(rf"stages_(\d+)/blocks_{kinds - 1}/", path)
            for j in range(kinds, model.depths[int(block[1])] if block else 0):
                shapes[path.replace(f"/blocks_{kinds - 1}/", f"/blocks_{j}/")] = leaf.shape
    return MappingProxyType(shapes)


def _text(shape: Shape | None) -> str:
    return "–" if shape is None else f"({', '.join(str(n) for n in shape)})"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        ("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
