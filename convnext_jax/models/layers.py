"""The parts that blocks share: normalisations, stochastic depth, and the reference initialisers.

The dtype rule of every layer here: parameters are stored in `param_dtype`, statistics are computed
in float32, and the output leaves in `dtype`, the compute type. Nothing relies on implicit
promotion, so the layers also run under `jax_numpy_dtype_promotion="strict"`.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from convnext_jax.models.channelwise import normalise_channels, scale_channels, shift_channels

# The authors initialise with a truncated normal of σ = 0.02 whose bounds ±2 are ABSOLUTE values,
# that is ±100 σ: a plain normal. `nn.initializers.truncated_normal` would cut at ±2 σ instead.
reference_kernel_init = nn.initializers.normal(stddev=0.02)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with float32 statistics.

    The variance is the mean of squared deviations, not E[x²] − E[x]² (flax's default
    `use_fast_variance`): that difference cancels catastrophically where |mean| ≫ σ, and nothing
    centres the residual stream that downsampling and head normalise. `nn.LayerNorm` itself
    subtracts a float32 mean from a bfloat16 input, which strict promotion refuses.

    Attributes:
      epsilon: added to the variance.
      dtype: type of the output.
      param_dtype: type of `scale` and `bias`, each of shape (C,).
    """

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x (..., C), of any float type, into an array of its shape and type `dtype`."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), self.param_dtype)
        x = x.astype(jnp.float32)
        y = normalise_channels(x, self.epsilon)
        y = scale_channels(y, scale.astype(jnp.float32))
        return shift_channels(y, bias.astype(jnp.float32)).astype(self.dtype)


class GlobalResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2 (arXiv 2301.00808, section 4, algorithm 1).

    With G = ‖x‖₂ over height and width and N = G / (mean of G over channels + ε), returns
    γ·(x·N) + β + x. ε stands outside the square root; γ and β start at 0, so the layer starts as
    the identity.

    Attributes:
      epsilon: added to the mean of the channels' norms.
      dtype: type of the output.
      param_dtype: type of `gamma` and `beta`, each of shape (C,).
    """

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, C), of any float type, to an array of its shape and type `dtype`."""
        channels = x.shape[-1]
        gamma = self.param("gamma", nn.initializers.zeros_init(), (channels,), self.param_dtype)
        beta = self.param("beta", nn.initializers.zeros_init(), (channels,), self.param_dtype)
        gamma, beta = (_as_float32_row(p, x.ndim) for p in (gamma, beta))
        x = x.astype(jnp.float32)
        energy = jnp.square(x).sum(axis=(1, 2), keepdims=True)
        # A channel that is zero everywhere (a blank image has many) would give √0 an infinite
        # gradient, and 0 · ∞ = NaN upstream; as in PyTorch, its gradient is taken to be zero.
        alive = energy > 0
        norm = jnp.where(alive, jnp.sqrt(jnp.where(alive, energy, 1.0)), 0.0)
        response = norm / (norm.mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * (1.0 + gamma * response) + beta).astype(self.dtype)


class StochasticDepth(nn.Module):
    """Drops a residual branch per sample (arXiv 1603.09382), scaling the kept ones by 1/(1 − rate).

    Attributes:
      rate: probability of dropping, a Python float in [0, 1): never traced, so that at rate 0 the
        program contains no random numbers and needs no key.
    """

    rate: float

    @nn.compact
    def __call__(self, branch: jax.Array, train: bool) -> jax.Array:
        """Returns the branch (B, ...) with whole samples zeroed; unchanged when not training.

        Draws from the rng collection "dropout" when `train` and the rate is above 0.
        """
        if not train or self.rate == 0.0:
            return branch
        keep_rate = 1.0 - self.rate
        return drop_samples(branch, self.make_rng("dropout"), keep_rate, keep_rate)


def drop_samples(
    branch: jax.Array, key: jax.Array, keep_rate: jax.Array | float, divisor: jax.Array | float
) -> jax.Array:
    """Zeroes whole samples of a residual branch, and divides the others.

    Args:
      branch: (B, ...).
      key: random key.
      keep_rate: probability of keeping a sample; if an array, float32.
      divisor: the same number; if an array, of the branch's type.

    Returns:
      Of the branch's shape and type.
    """
    per_sample = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    keep = jax.random.bernoulli(key, keep_rate, per_sample)
    return jnp.where(keep, branch / divisor, 0.0)


def stochastic_depth_rates(rate: float, depths: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Rates that grow linearly from 0 at the first block to `rate` at the last.

    Args:
      rate: the last block's rate, in [0, 1).
      depths: number of blocks of each stage.

    Returns:
      One tuple of Python floats per stage, one float per block.
    """
    rates = iter(np.linspace(0.0, rate, sum(depths)).tolist())
    return tuple(tuple(next(rates) for _ in range(depth)) for depth in depths)


def _as_float32_row(parameter: jax.Array, ndim: int) -> jax.Array:
    return jnp.expand_dims(parameter.astype(jnp.float32), tuple(range(ndim - 1)))
