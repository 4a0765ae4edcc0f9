"""The networks whose weights can be converted."""

import flax.linen as nn

from convnext_jax.convert.families.convnext import CONVNEXT
from convnext_jax.convert.families.family import Family, Match, Seen, Told
from convnext_jax.convert.families.resnet import RESNET
from convnext_jax.convert.families.swin import SWIN
from convnext_jax.convert.layouts import Layout

__all__ = [
    "CONVNEXT",
    "FAMILIES",
    "LAYOUTS",
    "WAYS_BACK",
    "Family",
    "Match",
    "Seen",
    "Told",
    "family_named",
    "family_of",
]

FAMILIES: tuple[Family, ...] = (CONVNEXT, RESNET, SWIN)
LAYOUTS: tuple[Layout, ...] = tuple(layout for family in FAMILIES for layout in family.layouts)
# The names of what can be written, whatever the network.
WAYS_BACK: tuple[str, ...] = tuple(dict.fromkeys(way for f in FAMILIES for way in f.ways_back))


def family_of(model: nn.Module) -> Family:
    """The family of a network.

    Raises:
      TypeError: if it is of none.
    """
    for family in FAMILIES:
        if isinstance(model, family.network):
            return family
    raise TypeError(f"{type(model).__name__} is none of the networks whose weights are converted")


def family_named(name: str) -> Family:
    """The family of this name.

    Raises:
      KeyError: if there is none.
    """
    return {family.name: family for family in FAMILIES}[name]
