"""Pallas kernels over several devices: each works on its own images.

A compiler that shares out a program among devices can't cut a Pallas call in parts. So the kernels
are called within `jax.shard_map`, which needs to know the mesh: it is the one that is traced under,
see `jax.sharding.use_abstract_mesh`. The batch is taken to be cut along all of its axes of type
Auto, as `training/sharding.py` cuts it; one that is cut otherwise would be moved.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
from jax.sharding import AbstractMesh, AxisType


@dataclasses.dataclass(frozen=True)
class MeshOfImages:
    """The devices over which images are cut.

    Attributes:
      mesh: None for a single device, or where each has its own images already.
      axes: of the mesh, those along which the batch is cut.
    """

    mesh: AbstractMesh | None = None
    axes: tuple[str, ...] = ()

    @classmethod
    def surrounding(cls, **fields: Any) -> Self:
        """That of the mesh that is traced under; `fields` are a subclass's own."""
        mesh = jax.sharding.get_abstract_mesh()
        axes = tuple(
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Auto
        )
        return cls(mesh if axes else None, axes, **fields)

    @property
    def count(self) -> int:
        """Parts that the batch is cut into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.axes)

    def lacks(self, shape: tuple[int, ...]) -> str | None:
        """What kernels for images of such a shape (B, H, W, C) would need; None for nothing."""
        mesh = jax.sharding.get_abstract_mesh()
        if not all(isinstance(n, int) for n in shape):
            return f"images of a known shape, but theirs is {shape}"
        if AxisType.Explicit in mesh.axis_types:
            return f"a mesh without axes of type Explicit, but it is {mesh}"
        if shape[0] % self.count:
            return f"a batch that {self.count} devices divide, but it has {shape[0]} images"
        return None

    def mapped(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        """The function on each device's part; itself where there is nothing to be cut."""
        if self.mesh is None:
            return function
        # The derivatives are written out, so what `check_vma` is for isn't needed.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.axes),
            check_vma=False,
        )

    def summed(self, partial: Any) -> Any:
        """The sum over the devices, within a function that is mapped."""
        return partial if self.mesh is None else jax.lax.psum(partial, self.axes)
