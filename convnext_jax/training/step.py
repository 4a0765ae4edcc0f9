"""One training step and one evaluation step, pure functions of state and batch.

The very same functions run under `train.py`, in the tests and in an ahead-of-time compilation; they
know the state and the model, and nothing of files, clocks or processes.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from convnext_jax import compiler_options
from convnext_jax.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentConfig,
    by_planes,
    normalize,
)
from convnext_jax.data.mixing import MixConfig
from convnext_jax.errors import UserError
from convnext_jax.training.gathering import gathered
from convnext_jax.training.losses import Loss, soft_target_cross_entropy
from convnext_jax.training.preparation import Batch, on_each_device, prepare_batch
from convnext_jax.training.sharding import batch_sharding, replicated, traced_over
from convnext_jax.training.state import TrainState
from convnext_jax.training.update import make_update

PyTree = Any
Metrics = dict[str, jax.Array]


def micro_batches(batch: PyTree, count: int) -> PyTree:
    """Deals the rows of a batch out to `count` micro-batches, row i to micro-batch i % count.

    Dealt out, not cut into blocks, every device keeps the rows that it holds: no image crosses
    the network.

    Args:
      batch: arrays (B, …).
      count: A, a divisor of B.

    Returns:
      Arrays (A, B / A, …).
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )


def _as_used(model: nn.Module, params: PyTree, mesh: Mesh | None) -> PyTree:
    return params if mesh is None else gathered(params, mesh, getattr(model, "dtype", jnp.float32))


def _apply_in_training(
    model: nn.Module, params: PyTree, batch_stats: PyTree, images: jax.Array, key: jax.Array
) -> tuple[jax.Array, PyTree]:
    """The logits, and the running averages of the batch norms as they are after this batch."""
    call = functools.partial(model.apply, train=True, rngs={"dropout": key})
    if batch_stats is None:
        logits: Any = call({"params": params}, images)
        return logits, None
    logits, updated = call(
        {"params": params, "batch_stats": batch_stats}, images, mutable=["batch_stats"]
    )
    return logits, updated["batch_stats"]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    num_classes: int,
    mix_config: MixConfig,
    seed: int,
    loss_function: Loss = soft_target_cross_entropy,
    ema_decay: float | None = None,
    accumulation_steps: int = 1,
    augment_config: AugmentConfig = AugmentConfig(),  # noqa: B008 (a tuple, immutable)
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the training step.

    Augment and normalise, mix, forward, backward (in micro-batches), optimizer, average. The step's
    randomness is `fold_in(key(seed), step)`, and for what is drawn image by image also the image's
    row in the global batch, so it needs no state beyond the step's number and does not depend on
    the number of devices. Where the loss or the gradient is not finite, the variables, the
    optimizer and the averages stay as they were, the step is counted in `skipped`, and `finite` is
    False among the metrics: whether to go on is the caller's.

    Args:
      model: called as `model.apply(variables, images, train=True, rngs={"dropout": key})`; one with
        batch norms also with `mutable=["batch_stats"]`.
      optimizer: the optax transformation.
      schedule: learning rate by step, for the metrics; the one inside the optimizer.
      num_classes: K.
      mix_config: mixup, cutmix and label smoothing.
      seed: of augmentation and stochastic depth.
      loss_function: of logits and soft targets, the mean over a batch; see `losses.py`.
      ema_decay: of the variables' average; None for none.
      accumulation_steps: micro-batches per optimizer step, a divisor of the batch.
      augment_config: the policy, normalisation and random erasing.
      mesh: over whose devices batch and state are cut; None for one device.

    Returns:
      A function (state, batch) → (state, metrics). The batch holds "image", uint8 (B, H, W, C), and
      "label", int32 (B,). Metrics are scalars: "loss", "grad_norm", "learning_rate" float32,
      "finite" bool.

    Raises:
      UserError: when traced, if accumulation_steps does not divide the batch.
      AssertionError: when traced, if the batch has other types or shapes.
    """

    def loss_fn(
        params: PyTree, batch_stats: PyTree, images: jax.Array, targets: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        params = _as_used(model, params, mesh)
        with traced_over(mesh):
            logits, batch_stats = _apply_in_training(model, params, batch_stats, images, key)
        return loss_function(logits, targets), batch_stats

    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    update = make_update(optimizer, ema_decay)

    def loss_and_grads(
        params: PyTree, batch_stats: PyTree, images: jax.Array, targets: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, PyTree, PyTree]:
        if accumulation_steps == 1:
            (loss, batch_stats), grads = gradient_fn(params, batch_stats, images, targets, key)
            return loss, grads, batch_stats

        def body(carry: PyTree, micro: PyTree) -> tuple[PyTree, None]:
            # Batch norms see one micro-batch after the other, as in any program that accumulates.
            total, batch_stats = carry
            index, images, targets = micro
            (loss, batch_stats), grads = gradient_fn(
                params, batch_stats, images, targets, jax.random.fold_in(key, index)
            )
            return (jax.tree.map(jnp.add, total, (loss, grads)), batch_stats), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        micro = (
            jnp.arange(accumulation_steps),
            *micro_batches((images, targets), accumulation_steps),
        )
        (total, batch_stats), _ = jax.lax.scan(body, (zero, batch_stats), micro)
        loss, grads = jax.tree.map(lambda x: x / accumulation_steps, total)
        return loss, grads, batch_stats

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        size = batch["image"].shape[0]
        chex.assert_type([batch["image"], batch["label"]], [jnp.uint8, jnp.int32])
        if size % accumulation_steps:
            raise UserError(
                f"config.optim.accumulation_steps = {accumulation_steps} does not divide the batch "
                f"of {size} images"
            )
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key_batch, key_model = jax.random.split(key)
        images, targets = prepare_batch(
            key_batch,
            batch,
            num_classes=num_classes,
            augment_config=augment_config,
            mix_config=mix_config,
            mesh=mesh,
        )
        # Else a TPU takes mixing apart by pixels, where each image's mirror is far away.
        images = on_each_device(by_planes, mesh)(images)
        loss, grads, batch_stats = loss_and_grads(
            state.params, state.batch_stats, images, targets, key_model
        )

        updated = update(state, loss, grads, batch_stats)
        metrics = {
            "loss": loss,
            "grad_norm": updated.grad_norm,
            "learning_rate": schedule(state.step).astype(jnp.float32),
            "finite": updated.finite,
        }
        return updated.state, metrics

    return train_step


def make_eval_step(
    model: nn.Module,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    mesh: Mesh | None = None,
) -> Callable[[PyTree, Batch], Metrics]:
    """Makes the evaluation step, which returns sums, so that a whole set is evaluated exactly.

    Args:
      model: called as `model.apply(variables, images, train=False)`.
      mean: of the images, in units of [0, 1].
      std: of the images, in units of [0, 1].
      mesh: over whose devices batch and parameters are cut; None for one device, or for parameters
        that are whole on each.

    Returns:
      A function (variables, batch) → sums over the rows that count: "top1" and "top5" right
      answers, "loss" (plain cross entropy), "count", all float32 scalars. The batch holds "image",
      uint8 (B, H, W, C), "label", int32 (B,), and "mask", float32 (B,), 0 for rows of padding.
    """

    def eval_step(variables: PyTree, batch: Batch) -> Metrics:
        images = normalize(batch["image"], mean, std)
        variables = {**variables, "params": _as_used(model, variables["params"], mesh)}
        with traced_over(mesh):
            outputs: Any = model.apply(variables, images, train=False)
        logits = outputs.astype(jnp.float32)
        label = batch["label"]
        mask = batch["mask"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        # Rank of the right answer. Ties, and NaN, count against it: a dead model scores no hit.
        score = jnp.take_along_axis(logits, label[:, None], axis=-1)
        rank = (~(logits < score)).sum(axis=-1) - 1
        return {
            "top1": jnp.where(rank < 1, mask, 0.0).sum(),
            "top5": jnp.where(rank < 5, mask, 0.0).sum(),
            "loss": jnp.where(mask > 0, loss, 0.0).sum(),
            "count": mask.sum(),
        }

    return eval_step


def jit_train_step(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compiles the training step for a mesh, the state donated and its layout held.

    Args:
      train_step: from `make_train_step`.
      state: a state, or an abstract one, whose leaves carry their shardings.
      mesh: the devices.

    Returns:
      The jitted function; metrics come back replicated.
    """
    sharding = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        train_step,
        in_shardings=(sharding, batch_sharding(mesh)),
        out_shardings=(sharding, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options.for_network(mesh),
    )


def jit_eval_step(
    eval_step: Callable[[PyTree, Batch], Metrics], state: TrainState, mesh: Mesh
) -> Callable[[PyTree, Batch], Metrics]:
    """Compiles the evaluation step for a mesh; arguments as for `jit_train_step`."""
    sharding = jax.tree.map(lambda leaf: leaf.sharding, state.variables)
    return jax.jit(
        eval_step,
        in_shardings=(sharding, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options.for_network(mesh),
    )
