"""A network as StableHLO, by `jax.export`: any program with JAX runs it, on any backend.

The batch stays symbolic, so one file serves every batch size; so may the images' size. The file
keeps for six months at least of newer JAX versions (its calling convention's promise), and
holds one program for all platforms asked for: where their best depthwise convolutions differ, it
chooses when it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from convnext_jax.convert.pretrained import Pretrained
from convnext_jax.errors import UserError
from convnext_jax.exporting.interface import Interface
from convnext_jax.inference import forward
from convnext_jax.models.swin import SwinTransformer

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")

# Flatbuffers address by signed 32 bits; some room is left for the program itself.
_LARGEST_FILE = 2**31 - 2**26


@dataclasses.dataclass(frozen=True)
class StableHlo:
    """An exported network.

    Attributes:
      serialized: what `jax.export.deserialize` takes.
      weights: by flat name, "stages_2/blocks_5/dwconv/kernel", and for what is no parameter
        "batch_stats/stem/norm/mean": the first argument of the exported function. None where the
        weights lie within it, and the images are its only argument.
      calling_convention_version: of `jax.export`.
      platforms: that it runs on.
    """

    serialized: bytes
    weights: dict[str, np.ndarray] | None
    calling_convention_version: int
    platforms: tuple[str, ...]


def export_stablehlo(
    pretrained: Pretrained,
    interface: Interface,
    *,
    platforms: Sequence[str] = PLATFORMS[:3],
    weights_as_arguments: bool = False,
) -> StableHlo:
    """Lowers a network for several platforms at once.

    Args:
      pretrained: the network.
      interface: what goes in and comes out. Where it leaves the size open, any height and
        width from the model's stride on is taken.
      platforms: of `PLATFORMS`, each compiled from the same file.
      weights_as_arguments: give the weights to each call rather than write them into the program:
        for weights that change, and for more than 2 GB.

    Raises:
      UserError: if a platform is unknown, the weights are too large to be written into the
        program, or the network can't leave the images' size open.
    """
    for platform in platforms:
        if platform not in PLATFORMS:
            raise UserError(f"there is no platform {platform!r}: use any of {', '.join(PLATFORMS)}")
    if interface.image_size is None and isinstance(pretrained.model, SwinTransformer):
        raise UserError(
            "--size any: the windows of a Swin depend on the size of its images, so this file "
            "holds one size; give it, such as --size 224"
        )
    weights = _flat(pretrained.variables)
    size = sum(array.nbytes for array in weights.values())
    if size > _LARGEST_FILE and not weights_as_arguments:
        raise UserError(
            f"the weights are {size / 1e9:.1f} GB, and this file can hold 2 GB: give "
            "--weights_as_arguments, which writes them into a file of their own"
        )
    network = forward(pretrained, interface.output, interface.pixels)

    def apply(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        return network(_nested(weights), images)

    images = _abstract_images(interface, pretrained.model.strides[-1])
    if weights_as_arguments:
        abstract: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
        exported = export.export(jax.jit(apply), platforms=platforms)(abstract, images)
    else:
        exported = export.export(
            jax.jit(lambda images: apply(weights, images)), platforms=platforms
        )(images)
    return StableHlo(
        bytes(exported.serialize(vjp_order=0)),
        jax.device_get(weights) if weights_as_arguments else None,
        exported.calling_convention_version,
        exported.platforms,
    )


def _flat(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    """By path; of another collection than "params" it begins with its name."""
    others = {name: tree for name, tree in variables.items() if name != "params"}
    flat = {**traverse_util.flatten_dict(variables["params"]), **traverse_util.flatten_dict(others)}
    return {"/".join(path): array for path, array in flat.items()}


def _nested(weights: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The inverse of `_flat`."""
    paths = {tuple(name.split("/")): array for name, array in weights.items()}
    return traverse_util.unflatten_dict(
        {path if path[0] == "batch_stats" else ("params", *path): a for path, a in paths.items()}
    )


def _abstract_images(interface: Interface, smallest: int) -> jax.ShapeDtypeStruct:
    if interface.image_size is None:
        shape = export.symbolic_shape(
            "batch, height, width, 3",
            constraints=[f"height >= {smallest}", f"width >= {smallest}"],
        )
    else:
        shape = export.symbolic_shape(f"batch, {interface.image_size}, {interface.image_size}, 3")
    return jax.ShapeDtypeStruct(shape, jnp.dtype(interface.pixels))
