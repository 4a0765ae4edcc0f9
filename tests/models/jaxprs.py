"""Looking into traced programs, sub-programs included."""

from collections.abc import Iterator
from typing import Any

# What JAX has called the primitive of `jax.checkpoint`, in one version and another.
CHECKPOINTS = ("checkpoint", "remat2")


def _sub_jaxprs(value: Any) -> Iterator[Any]:
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _sub_jaxprs(item)


def jaxprs_within(jaxpr: Any) -> Iterator[Any]:
    """The jaxpr itself and those of all calls, branches and checkpoints in it."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        params = dict(eqn.params)
        if params.get("branches_platforms"):
            # Of a choice by platform, what is neither the CPU's nor a TPU's.
            params["branches"] = params["branches"][-1]
        for value in params.values():
            for sub in _sub_jaxprs(value):
                yield from jaxprs_within(sub)


def equations(closed_jaxpr: Any) -> list[Any]:
    return [eqn for jaxpr in jaxprs_within(closed_jaxpr.jaxpr) for eqn in jaxpr.eqns]
