"""Parameters and multiply-accumulates of any network, counted in its traced program.

`macs.py` has the formula for ConvNeXt, which costs nothing to evaluate; a formula for each family
would be a second description of it, to be kept in step with the module. Here the module itself is
counted, at the price of tracing it: a second for the deepest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Counts(NamedTuple):
    """What a network amounts to.

    Attributes:
      parameters: trainable scalars; the running averages of batch norms are none.
      macs: multiply-accumulates of one image's forward pass.
    """

    parameters: int
    macs: int


def traced_counts(
    model: nn.Module, image_size: int | tuple[int, int], in_channels: int = 3
) -> Counts:
    """Counts a network's parameters and multiply-accumulates, without running it.

    As the papers' FLOPs columns do, it counts convolutions and matrix products, those of attention
    included (one product and its addition are one), padding included, and leaves out norms,
    activations and additions.

    Args:
      model: a module called as `model(images, train=False)`, unbound.
      image_size: side of a square image, or (height, width), in pixels.
      in_channels: channels of the image.

    Returns:
      The counts for a batch of one.

    Raises:
      ValueError: if a product stands in a loop whose length is not known.
    """
    # XLA's operations can be counted; the CPU's and the kernels' are others for the same numbers.
    choices: dict[str, Any] = {name: "xla" for name in ("depthwise", "mlp") if hasattr(model, name)}
    model = model.clone(**choices)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = jax.ShapeDtypeStruct((1, height, width, in_channels), jnp.float32)
    # The program that initialises and runs: one trace for both counts, and initialisers are no
    # products.
    program, (_, variables) = jax.make_jaxpr(model.init_with_output, return_shape=True)(
        jax.random.key(0), images
    )
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.get("params", {})))
    return Counts(parameters, _macs(program.jaxpr))


def _macs(jaxpr: Any) -> int:
    return sum(_equation_macs(equation) for equation in jaxpr.eqns)


def _equation_macs(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name in ("conv_general_dilated", "dot_general"):
        outputs = math.prod(equation.outvars[0].aval.shape)
        operand, kernel = (v.aval.shape for v in equation.invars)
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            return outputs * math.prod(operand[axis] for axis in contracted)
        # Each output takes all of the kernel that belongs to its channel.
        return outputs * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    inner = [_macs(jaxpr) for jaxpr in _jaxprs_in(params)]
    if name == "cond":
        # Of a choice by platform the last is what is neither the CPU's nor a TPU's.
        return inner[-1] if params.get("branches_platforms") else max(inner)
    if name == "while" and any(inner):
        raise ValueError("products in a while loop can't be counted, as its length is not known")
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs_in(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
