"""The training step of this library that is measured against others' on CPUs and GPUs."""

import jax
import jax.numpy as jnp
import optax


def training_step(model, optimizer):
    """Forward pass, cross entropy, backward pass and update, with stochastic depth.

    Args:
      model: a network.
      optimizer: of optax.

    Returns:
      `initial(params)`, the state, and `step(state, images, labels)` to the next one and the loss;
      neither is compiled.
    """

    def loss_of(params, images, labels, key):
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def initial(params):
        return params, optimizer.init(params), jnp.zeros((), jnp.int32)

    def step(state, images, labels):
        params, opt_state, count = state
        key = jax.random.fold_in(jax.random.key(0), count)
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, count + 1), loss

    return initial, step
