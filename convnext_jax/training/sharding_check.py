"""A look at the state's layout before a run: does "fsdp" save the memory that it is there for?"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from convnext_jax.training import sharding
from convnext_jax.training.optim import path_name
from convnext_jax.training.state import TrainState

PyTree = Any

# Vectors and small kernels stay whole by intention. In all published sizes they make up at most
# 6 % of the bytes for an axis of 2, 4, … 64 devices (0.6 % from convnext_tiny up). Where an axis
# does not divide the channels of whole stages it is 16 % and more, mostly 100 %.
TOLERATED_SHARE = 0.1

_NAMED_LEAVES = 3


def replicated_share(state: PyTree) -> float:
    """The share of a state's bytes that every device holds in full.

    Args:
      state: arrays or ShapeDtypeStructs with their shardings.

    Returns:
      A number in [0, 1].
    """
    return _replicated_bytes(state) / sum(map(_bytes, jax.tree.leaves(state)))


def replication_warning(state: TrainState, mesh: Mesh) -> str | None:
    """Says whether an unusual share of the state lies whole on every device although "fsdp" > 1.

    Args:
      state: from `abstract_state`, or arrays.
      mesh: that it is laid out on.

    Returns:
      A sentence with the share, the largest such parameters and the remedy; None if all is well.
    """
    fsdp = mesh.shape["fsdp"]
    share = replicated_share(state)
    if fsdp == 1 or share <= TOLERATED_SHARE:
        return None
    params, _ = jax.tree_util.tree_flatten_with_path(state.params)
    whole = [(path_name(path), leaf) for path, leaf in params if leaf.sharding.is_fully_replicated]
    whole.sort(key=lambda item: -item[1].size)
    names = ", ".join(
        f"{name} {'×'.join(map(str, leaf.shape))}" for name, leaf in whole[:_NAMED_LEAVES]
    )
    if whole[0][1].size < sharding.MIN_SHARDED_SIZE:
        reason = f"since arrays of fewer than {sharding.MIN_SHARDED_SIZE:,} elements are not cut"
    else:
        reason = f"since {fsdp} does not divide their channels"
    better = _largest_axis_that_cuts(state, mesh)
    if better > 1:
        remedy = f"give config.mesh.fsdp = {better}"
    else:
        remedy = (
            f"on {mesh.size} devices no other does better, so give config.mesh.fsdp = 1, which "
            "exchanges less"
        )
    return (
        f"config.mesh.fsdp = {fsdp} leaves {share:.0%} of the training state "
        f"({_replicated_bytes(state) / 1e6:,.0f} MB) whole on every device, the largest parameters "
        f"being {names}, {reason}; {remedy}"
    )


def _largest_axis_that_cuts(state: TrainState, mesh: Mesh) -> int:
    """The largest length of "fsdp" on as many devices that leaves no more than is tolerated."""
    for fsdp in range(mesh.size, 1, -1):
        if mesh.size % fsdp:
            continue
        other = AbstractMesh((mesh.size // fsdp, fsdp), ("data", "fsdp"))
        laid_out = jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
            state,
            sharding.state_sharding(state, other),
        )
        if replicated_share(laid_out) <= TOLERATED_SHARE:
            return fsdp
    return 1


def _replicated_bytes(state: PyTree) -> int:
    return sum(_bytes(x) for x in jax.tree.leaves(state) if x.sharding.is_fully_replicated)


def _bytes(leaf: jax.ShapeDtypeStruct | jax.Array) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
