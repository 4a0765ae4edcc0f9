"""Runs a model with each kind of its parts compiled once per shape, instead of as a whole."""

import functools

import jax

from convnext_jax.models.blocks import Block, Downsample, Stem


@functools.partial(jax.jit, static_argnums=(0, 2))
def _run_part(part, params, train, x):
    return part.apply({"params": params}, x, *train)


def compile_parts(call, args, kwargs, context):
    """For `nn.intercept_methods`: XLA would take minutes to compile a deep model whole."""
    part = context.module
    if isinstance(part, Stem | Downsample | Block) and part.name is not None:
        x, *train = args
        params = part.variables["params"]
        return _run_part(part.clone(parent=None, name=None), params, tuple(train), x)
    return call(*args, **kwargs)
