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
      batch_stats: float32 running averages of the batch norms, or None where the model has none.
      opt_state: the optimizer's.
      ema_params: moving average of the parameters, or None.
      ema_batch_stats: moving average of `batch_stats`, or None.
      skipped: int32 scalar, steps left out since their loss or gradient was not finite.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    ema_params: PyTree
    ema_batch_stats: PyTree
    skipped: jax.Array

    @property
    def variables(self) -> PyTree:
        """What the model is applied with: {"params": …}, and "batch_stats" where it has them."""
        return _variables(self.params, self.batch_stats)

    @property
    def ema_variables(self) -> PyTree:
        """The averaged variables, or None where no average is kept."""
        if self.ema_params is None:
            return None
        return _variables(self.ema_params, self.ema_batch_stats)


def _variables(params: PyTree, batch_stats: PyTree) -> PyTree:
    return {"params": params} | ({} if batch_stats is None else {"batch_stats": batch_stats})


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
    variables = model.init(key, jnp.zeros(images.shape, images.dtype), train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats")

    def average(tree: PyTree) -> PyTree:
        # A copy, since a donated buffer must not stand in two places of the state.
        return jax.tree.map(jnp.copy, tree) if ema else None

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema_params=average(params),
        ema_batch_stats=average(batch_stats),
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
