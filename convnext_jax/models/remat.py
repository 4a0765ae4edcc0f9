"""What a rematerialised block keeps for its backward pass; all else it computes again.

A policy's name stands for some of the block's submodules, whose outputs are kept beside the block's
input. `jax.checkpoint` knows values by names that `checkpoint_name` gives them; here a submodule's
own name serves, given from outside by an interceptor, so that the blocks themselves know nothing of
policies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

# Of a block of width C, in units of its input's size: the depthwise output is 1, those of all three
# products are 1 + 4 + 1. What is left to be computed again are then norms, GELU and the like, which
# XLA fuses into the products and would not have written to memory either.
POLICIES: dict[str, tuple[str, ...]] = {
    "depthwise": ("dwconv",),
    "products": ("dwconv", "pwconv1", "pwconv2"),
}


def check_policy(remat: bool | str) -> None:
    """Holds an argument `remat` to its values.

    Raises:
      ValueError: if it is neither a bool nor a policy's name.
    """
    if not isinstance(remat, bool) and remat not in POLICIES:
        raise ValueError(
            f"remat must be False, True or one of {', '.join(POLICIES)}, but is {remat!r}"
        )


def checkpoint_policy(remat: bool | str) -> Callable[..., Any] | None:
    """The policy that `jax.checkpoint` and `nn.remat` take; None to save nothing within a block."""
    if isinstance(remat, bool):
        return None
    return jax.checkpoint_policies.save_only_these_names(*POLICIES[remat])


def named_outputs(remat: bool | str) -> contextlib.AbstractContextManager[None]:
    """A context in which submodules' outputs carry the names that the policy looks for."""
    if isinstance(remat, bool):
        return contextlib.nullcontext()
    names = POLICIES[remat]

    def name(
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        output = method(*args, **kwargs)
        module = context.module.name
        if module in names and context.method_name == "__call__":
            return checkpoint_name(output, module)
        return output

    return nn.intercept_methods(name)
