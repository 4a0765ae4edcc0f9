"""The device mesh, which part of each array lies where, and host arrays made global.

Two axes. Along "data" the parameters are replicated; along "fsdp" large parameters, their optimizer
moments and their average are cut. The batch is cut along both, so every device holds its own
images.
"""

import collections
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from convnext_jax.errors import UserError
from convnext_jax.training.optim import path_name

PyTree = Any

# The first pattern that a parameter's path matches decides; each cuts the dimension that holds
# most. Moments and averages live under the same paths as their parameters, hence the unanchored
# patterns.
RULES: tuple[tuple[str, P], ...] = (
    (r"conv/kernel$", P(None, None, None, "fsdp")),
    (r"(pwconv1|qkv|fc1)/kernel$", P(None, "fsdp")),
    (r"(pwconv2|proj|fc2|reduction)/kernel$", P("fsdp", None)),
    (r"(head|pre_logits)/kernel$", P("fsdp", None)),
    (r"/(bias|scale|gamma|beta|mean|var|relative_position_bias_table)$", P()),
    (r"(^|/)(step|count|skipped)$", P()),
)

# Below this a leaf costs more to gather than to keep whole on every device.
MIN_SHARDED_SIZE = 2**14


def create_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh with axes ("data", "fsdp").

    Args:
      data: devices along "data"; -1 for all that "fsdp" leaves.
      fsdp: devices along "fsdp".
      devices: all of `jax.devices()` by default.

    Returns:
      The mesh, both axes of type Auto.

    Raises:
      UserError: if the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    if fsdp < 1 or (data < 1 and data != -1):
        raise UserError(
            f"config.mesh has data = {data} and fsdp = {fsdp}; each must be 1 or more (data: or -1)"
        )
    if data == -1:
        data = max(count // fsdp, 1)
    if data * fsdp != count:
        raise UserError(
            f"config.mesh asks for data × fsdp = {data} × {fsdp} = {data * fsdp} devices, but "
            f"there are {count}; let data be -1 and fsdp a divisor of {count}"
        )
    return jax.make_mesh(
        (data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Cuts the leading dimension over every device."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def traced_over(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Lets a model know the devices: what XLA can't share out among them it does on each."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def state_sharding(
    tree: PyTree, mesh: Mesh | AbstractMesh, rules: Sequence[tuple[str, P]] = RULES
) -> PyTree:
    """The sharding of each leaf of a training state, by the first rule that matches its path.

    A leaf of fewer than `MIN_SHARDED_SIZE` elements, or whose dimension the axis does not divide,
    stays whole.

    Args:
      tree: arrays or ShapeDtypeStructs.
      mesh: from `create_mesh`, or an abstract one of these axes.
      rules: pairs of a regular expression, searched in the leaf's path, and a PartitionSpec.

    Returns:
      A tree of NamedShardings of the same structure.

    Raises:
      ValueError: if a leaf matches no rule; it names the leaf.
    """

    def leaf_sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            raise ValueError(
                f"no partition rule matches {name} {leaf.shape}; add one to the rules given"
            )
        if leaf.size < MIN_SHARDED_SIZE:
            spec = P()
        for dimension, axis in enumerate(spec):
            if axis is not None and leaf.shape[dimension] % mesh.shape[axis]:
                spec = P()
                break
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def to_global(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Joins each process's part of a batch into global arrays.

    Args:
      batch: this process's rows, NumPy arrays (B / processes, …).
      sharding: of the global arrays, from `batch_sharding`.

    Returns:
      Arrays (B, …), of which each process holds the rows that it gave.
    """
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
        for name, rows in batch.items()
    }


def prefetch_to_device(
    batches: Iterable[Mapping[str, np.ndarray]],
    sharding: NamedSharding,
    fields: Sequence[str],
    *,
    size: int = 2,
) -> Iterator[dict[str, jax.Array]]:
    """Keeps `size` batches on the devices ahead of the one in use: copies overlap the steps.

    Args:
      batches: host batches of this process.
      sharding: see `to_global`.
      fields: which arrays of a batch the devices want.
      size: batches in flight; each takes its uint8 size of device memory.

    Yields:
      Global batches, in order.
    """
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        queue.append(to_global({name: batch[name] for name in fields}, sharding))
        if len(queue) > size:
            yield queue.popleft()
    yield from queue
