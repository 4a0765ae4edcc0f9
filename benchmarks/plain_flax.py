"""ConvNeXt of Flax's own layers: what this library's are compared with."""

import contextlib
import functools
from unittest import mock

import flax.linen as nn
import jax.numpy as jnp

from convnext_jax.models import blocks


def exact_gelu():
    """In bfloat16 too, GELU as JAX has it."""
    gelu = functools.partial(nn.gelu, approximate=False)
    return mock.patch.object(blocks, "gelu", gelu)


@contextlib.contextmanager
def plain_flax():
    """Within it blocks have `nn.Conv`, `nn.LayerNorm`, `nn.Dense` and exact `nn.gelu`."""

    def depthwise(size, implementation, name, **options):
        def conv(x):
            return nn.Conv(
                x.shape[-1], (size, size), feature_group_count=x.shape[-1], name=name, **options
            )(x)

        return conv

    def patches(features, patch_size, **options):
        size = (patch_size, patch_size)
        return nn.Conv(features, size, strides=size, padding="VALID", **options)

    def norm(epsilon, dtype, param_dtype, name):
        return nn.LayerNorm(epsilon, dtype, param_dtype, name=name)

    def scale(x, gamma):
        return x * jnp.expand_dims(gamma, tuple(range(x.ndim - 1)))

    with (
        exact_gelu(),
        mock.patch.object(blocks, "DepthwiseConv", depthwise),
        mock.patch.object(blocks, "LayerNorm", norm),
        mock.patch.object(blocks, "PatchConv", patches),
        mock.patch.object(blocks, "Dense", nn.Dense),
        mock.patch.object(blocks, "scale_channels", scale),
    ):
        yield
