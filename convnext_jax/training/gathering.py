"""Parameters that are cut over "fsdp", made whole where a step uses them (FSDP, ZeRO's stage 3).

Only the state is cut; each device computes its own images with whole kernels (arXiv 1910.02054,
section 5.3). XLA's partitioner would not see to that by itself: a kernel that is cut on its
channels looks to it like tensor parallelism, so it gathers the activations of many devices'
images, lets each compute some channels of all of them, and sorts the results back
(docs/collectives.md). Saying that the kernels are whole leaves it nothing to choose.
"""

import functools
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from convnext_jax.training.optim import path_name
from convnext_jax.training.sharding import state_sharding

PyTree = Any

# What the models compute in float32 whatever their compute type is; all other kernels they cast.
_IN_FLOAT32 = re.compile(r"(head|pre_logits)/kernel$")


def gathered(params: PyTree, mesh: Mesh, dtype: DTypeLike) -> PyTree:
    """The parameters as a model uses them, whole on every device; called within a jitted step.

    A kernel is cast before it is sent, as the model itself would do behind that, which halves the
    bytes and changes no bit. Its gradient comes back cut as the kernel is: summed over the devices
    by a reduce-scatter, so that no device holds all gradients.

    Args:
      params: float32 tree, laid out by `state_sharding`.
      mesh: the devices.
      dtype: the model's compute type.

    Returns:
      The tree, cut kernels whole and of type `dtype`, all else untouched; with "fsdp" of length 1
      the very tree.
    """
    if mesh.shape["fsdp"] == 1:
        return params

    def one(path: tuple[Any, ...], leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        if sharding.spec == P():
            return leaf
        if not _IN_FLOAT32.search(path_name(path)):
            leaf = jax.lax.with_sharding_constraint(leaf.astype(dtype), sharding)
        return _whole(leaf, sharding)

    return jax.tree_util.tree_map_with_path(one, params, state_sharding(params, mesh))


# By the plain rule the gradient of a constraint is constrained alike: made whole, that is, by an
# all-reduce, before all but one part of it is thrown away.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(part: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(part, NamedSharding(sharding.mesh, P()))


def _forward(part: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, None]:
    return _whole(part, sharding), None


def _backward(sharding: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, sharding),)


_whole.defvjp(_forward, _backward)
