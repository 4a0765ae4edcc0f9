"""The blocks of a stage as one loop, so that XLA compiles one block instead of all of them.

The parameters stay as they are stored, a tensor for each block: they are stacked when the network
is applied, and their gradients come back one by one. So checkpoints, conversion, optimizer and
sharding rules know nothing of the loop, which can be switched on and off at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from convnext_jax.models.layers import StochasticDepth, drop_samples
from convnext_jax.models.remat import checkpoint_policy, named_outputs

PyTree = Any


class _Draw(NamedTuple):
    """What the stochastic depth of a block depends on; stacked, that of several.

    Attributes:
      key: that the block draws with.
      keep_rate: probability of keeping a sample, float32.
      divisor: the same, in the compute type.
    """

    key: jax.Array
    keep_rate: jax.Array
    divisor: jax.Array


class _StochasticDepthKey(nn.Module):
    @nn.compact
    def __call__(self) -> jax.Array:
        return self.make_rng("dropout")


class _BlockKey(nn.Module):
    """Stands in for a block of its name, to tell the key that the block would draw with.

    Flax makes a key of the path of the module that asks for it. In the loop all blocks are one
    module, so their keys are made beforehand, under the paths that they have without the loop.
    """

    @nn.compact
    def __call__(self) -> jax.Array:
        return _StochasticDepthKey(name="stochastic_depth")()


def scan_over_blocks(
    block: nn.Module,
    params: Mapping[str, PyTree],
    drop_rates: Sequence[float],
    x: jax.Array,
    *,
    train: bool,
    remat: bool | str,
    dtype: DTypeLike,
) -> jax.Array:
    """Applies blocks that differ in their parameters and stochastic depth alone.

    To be called by the module that the blocks belong to, since their random keys are its own.

    A scan keeps for the backward pass whatever the blocks' derivative asks for, the inner values of
    GELU and norms among it, since XLA can't fuse across two loops. So without rematerialisation the
    policy is "products", which keeps about what XLA keeps of blocks one by one.

    Args:
      block: unbound, called as `block(x, train)`.
      params: by the blocks' names, `blocks_0` and so on.
      drop_rates: of each block, in [0, 1).
      x: (B, H, W, C) of type `dtype`.
      train: whether stochastic depth is active.
      remat: see `ConvNeXt`.
      dtype: compute type.

    Returns:
      The last block's output, of x's shape and type.
    """
    names = [f"blocks_{i}" for i in range(len(drop_rates))]
    draws = None
    if train and any(drop_rates):
        keep_rates = 1.0 - np.asarray(drop_rates)
        draws = _Draw(
            jnp.stack([_BlockKey(name=name)() for name in names]),
            jnp.asarray(keep_rates, jnp.float32),
            jnp.asarray(keep_rates, dtype),
        )
    policy = remat or "products"

    def apply_one(x: jax.Array, params: PyTree, draw: _Draw | None) -> jax.Array:
        with named_outputs(policy), nn.intercept_methods(_drawing_with(draw)):
            output: Any = block.apply({"params": params}, x, train)
        return output

    # The barriers against common subexpressions are not needed in a loop, and hinder XLA.
    apply_one = jax.checkpoint(apply_one, policy=checkpoint_policy(policy), prevent_cse=False)
    cast = (_cast_kernels(params[name], dtype) for name in names)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cast)
    x, _ = jax.lax.scan(lambda x, each: (apply_one(x, *each), None), x, (stacked, draws))
    return x


def _cast_kernels(params: PyTree, dtype: DTypeLike) -> PyTree:
    """Kernels in the compute type, as the block itself would cast them: less to be stacked."""

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def _drawing_with(draw: _Draw | None) -> Callable[..., Any]:
    """An interceptor that lets `StochasticDepth` draw with a traced key and rate."""

    def intercept(
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if draw is None or not isinstance(context.module, StochasticDepth):
            return method(*args, **kwargs)
        return drop_samples(args[0], *draw)

    return intercept
