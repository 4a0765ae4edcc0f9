"""What a run carries from step to step, and how it comes into being already sharded."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from convnext_jax.training.sharding import state_sharding

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """The state of training; a pytree, donated to each step.

    Attributes:
      step: int32 scalar, optimizer steps so far, the ones left out included.
      params: float32 parameter tree.
      opt_state: the optimizer's.
      ema_params: moving average of the parameters, or None.
      skipped: int32 scalar, steps left out since their loss or gradient was not finite.
    """

    step: jax.Array
    params: PyTree
    opt_state: optax.OptState
    ema_params: PyTree
    skipped: jax.Array


def initial_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    images: jax.Array | jax.ShapeDtypeStruct,
    key: jax.Array,
    *,
    ema: bool,
) -> TrainState:
    """The state before the first step; a pure function, for `jax.eval_shape` or `jax.jit`.

    Args:
      model: a module called as `model(images, train=False)`.
      optimizer: the optax transformation.
      images: floats (1, H, W, C); only shape and dtype matter.
      key: random key of the initialisation.
      ema: whether an average is kept; it starts from the initial parameters.

    Returns:
      The state at step 0.
    """
    # One image suffices: parameters depend on its shape alone.
    params = model.init(key, jnp.zeros(images.shape, images.dtype), train=False)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # A copy, since a donated buffer must not stand in two places of the state.
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        skipped=jnp.zeros((), jnp.int32),
    )


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    mesh: Mesh,
    *,
    ema: bool,
) -> TrainState:
    """Shapes, dtypes and shardings of the state, at no cost of memory.

    Args:
      model: see `initial_state`.
      optimizer: see `initial_state`.
      image_shape: (H, W, C).
      mesh: the devices.
      ema: see `initial_state`.

    Returns:
      A TrainState of ShapeDtypeStructs that carry NamedShardings.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(
        lambda key: initial_state(model, optimizer, images, key, ema=ema), jax.random.key(0)
    )
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, mesh),
    )


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    mesh: Mesh,
    *,
    seed: int,
    ema: bool,
) -> TrainState:
    """Initialises the state under its shardings, so that no device ever holds the whole of it.

    Args:
      model: see `initial_state`.
      optimizer: see `initial_state`.
      image_shape: (H, W, C).
      mesh: the devices.
      seed: of the initialisation; equal seeds give equal states on any mesh.
      ema: see `initial_state`.

    Returns:
      The state at step 0.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    abstract = abstract_state(model, optimizer, image_shape, mesh, ema=ema)

    def init() -> TrainState:
        return initial_state(model, optimizer, images, jax.random.key(seed), ema=ema)

    # On the CPU, XLA would optimise this program, which runs once, for longer than all the rest.
    quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else {}
    shardings = jax.tree.map(lambda s: s.sharding, abstract)
    return jax.jit(init, out_shardings=shardings, compiler_options=quick)()
