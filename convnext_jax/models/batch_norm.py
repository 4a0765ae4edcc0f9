"""Batch normalisation whose statistics are those of the global batch, or of each device's rows."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer


class BatchNorm(nn.Module):
    """Batch normalisation (arXiv 1502.03167) over all axes but the last, with float32 statistics.

    The running averages lie in the collection "batch_stats" as `mean` and `var`, float32 (C,), and
    start at 0 and 1. A training call normalises by the batch's own statistics and updates them, so
    it needs `mutable=["batch_stats"]`; any other call normalises by them.

    Under `jax.jit` an array is the whole batch wherever its parts lie, so the mean over its rows
    is that of the global batch, and XLA inserts the one sum over the devices. With `groups` the
    rows are cut into as many runs of neighbours, each normalised by its own statistics. A batch
    is cut among devices in the same way, so `groups` = number of devices is what data-parallel
    PyTorch does without SyncBatchNorm, and no activation or statistic of the forward pass crosses
    the network but the average that goes into the running ones.

    As in PyTorch the batch is normalised by its biased variance, and the running average takes
    the unbiased one. Of several groups the running averages take the mean; PyTorch keeps those of
    each device and stores the first's, timm averages them after each epoch.

    Attributes:
      epsilon: added to the variance.
      momentum: what the running averages keep of themselves at each step, 1 − PyTorch's.
      groups: how many parts of the batch have statistics of their own.
      scale_init: initialiser of `scale`; `bias` starts at 0.
      dtype: type of the output.
      param_dtype: type of `scale` and `bias`, each of shape (C,).
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    groups: int = 1
    scale_init: Initializer = nn.initializers.ones_init()
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x (B, ..., C), of any float type, into an array of its shape in `dtype`.

        Raises:
          ValueError: in training, if `groups` does not divide B, or leaves but one value per
            channel, which has no variance.
        """
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)

        groups = self._checked_groups(x) if train else 1
        rows = x.reshape(groups, x.shape[0] // groups, *x.shape[1:]).astype(jnp.float32)
        per_channel = (1,) * (rows.ndim - 1) + (channels,)
        if train:
            shift = jax.lax.stop_gradient(running_mean.value).reshape(per_channel)
            mean, var = _moments(rows, shift)
            if not self.is_initializing():
                count = rows.size // (groups * channels)
                for running, batch in (
                    (running_mean, mean),
                    (running_var, var * (count / (count - 1))),
                ):
                    average = jax.lax.stop_gradient(batch).reshape(groups, channels).mean(axis=0)
                    running.value = self.momentum * running.value + (1 - self.momentum) * average
        else:
            mean = running_mean.value.reshape(per_channel)
            var = running_var.value.reshape(per_channel)

        scale, bias = (p.astype(jnp.float32).reshape(per_channel) for p in (scale, bias))
        y = (rows - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(self.dtype).reshape(x.shape)

    def _checked_groups(self, x: jax.Array) -> int:
        if x.shape[0] % self.groups:
            raise ValueError(
                f"BatchNorm: groups = {self.groups} does not divide the batch of {x.shape[0]}"
            )
        if x.size == self.groups * x.shape[-1]:
            raise ValueError(
                f"BatchNorm: in groups of {x.shape[0] // self.groups} the input {x.shape} has one "
                f"value per channel, and so no variance; use larger batches, images or groups"
            )
        return self.groups


def _moments(rows: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance over all axes but the first and the last, which stay as they are.

    Both sums need one pass over the rows, where deviations from their own mean would need two, and
    across devices one message rather than two in turn. E[x²] − E[x]² cancels where |mean| ≫ σ, so
    it is taken about `shift`, an estimate of the mean: the running one, at hand on every device.
    """
    axes = tuple(range(1, rows.ndim - 1))
    deviations = rows - shift
    offset = deviations.mean(axis=axes, keepdims=True)
    square = jnp.square(deviations).mean(axis=axes, keepdims=True)
    return offset + shift, jnp.maximum(square - jnp.square(offset), 0.0)
