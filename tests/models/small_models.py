"""Small models with values that hide nothing, made without compiling an initialisation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.models import ConvNeXt

DEPTHS, DIMS = (1, 1, 2, 1), (8, 10, 12, 14)


def small(**overrides: Any) -> ConvNeXt:
    return ConvNeXt(**{"num_classes": 5, "depths": DEPTHS, "dims": DIMS, **overrides})


def photos(height: int = 32, width: int | None = None, channels: int = 3, batch: int = 2):
    shape = (batch, height, width or height, channels)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def abstract_variables(model: ConvNeXt, images: jax.Array) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), images)


def random_variables(model: ConvNeXt, images: jax.Array) -> Any:
    """Variables in which no leaf is constant, so that none of them can go unused unnoticed."""
    rng = np.random.default_rng(2)

    def draw(path: Any, leaf: Any) -> jax.Array:
        centre = 1.0 if path[-1].key in ("scale", "gamma") else 0.0
        return jnp.asarray(rng.normal(centre, 0.3, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(model, images))


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` without XLA's optimisations, which take far longer here than what they speed up."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def initialised(model: ConvNeXt, images: jax.Array) -> Any:
    return jit(model.init)(jax.random.key(0), images)


def run(model: ConvNeXt, variables: Any, images: jax.Array, **arguments: Any) -> Any:
    """`model.apply`, jitted; arguments other than `rngs` are static."""
    rngs = arguments.pop("rngs", None)
    return jit(lambda v, x, r: model.apply(v, x, rngs=r, **arguments))(variables, images, rngs)
