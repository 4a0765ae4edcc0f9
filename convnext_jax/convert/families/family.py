"""What the converter knows of one kind of network: its class, its layouts, how files tell of it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from convnext_jax.convert.layouts import Layout, Transform
from convnext_jax.models.registry import create_model, list_models


@dataclasses.dataclass(frozen=True)
class Match:
    """A file's tensors seen through one layout's table.

    Attributes:
      found: name in the file → (our path, transform).
      besides: the names that are not in the table.
    """

    found: dict[str, tuple[str, Transform]]
    besides: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Seen:
    """A file as seen through the layout that explains it best.

    Attributes:
      tensors: name → array, of which only shapes are looked at.
      layout: whose names they bear.
      prefix: what a wrapping program put before the layout's names.
      match: what was found.
      config: of a transformers model, or empty.
    """

    tensors: Mapping[str, np.ndarray]
    layout: Layout
    prefix: str
    match: Match
    config: Mapping[str, Any]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our shapes by path, of the tensors that have the right number of dimensions."""
        found = {}
        for name, (path, transform) in self.match.found.items():
            shape = transform.our_shape(self.tensors[name].shape)
            if shape is not None:
                found[path] = shape
        return found

    def depths(self) -> tuple[int, ...]:
        """Blocks per stage, by the last one named."""
        depths: Counter[int] = Counter()
        for path, _ in self.match.found.values():
            block = re.match(r"stages_(\d+)/blocks_(\d+)/", path)
            if block:
                i, j = (int(number) for number in block.groups())
                depths[i] = max(depths[i], j + 1)
        return tuple(max(depths[i], 1) for i in range(1 + max(depths)))


@dataclasses.dataclass(frozen=True)
class Told:
    """What a file tells of its network.

    Attributes:
      arguments: of the network's class, all that the tensors decide, `num_classes` (0 without a
        head) among them.
      ignored: names in the table that are left out all the same.
      image_size: side in pixels of the images that the network was made for, where tensors say it.
      notes: what else a user should know, one sentence each.
    """

    arguments: dict[str, Any]
    ignored: tuple[str, ...] = ()
    image_size: int | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One class of networks, and what converting its weights takes.

    Attributes:
      name: for users, such as "ConvNeXt".
      network: the class.
      architecture: its arguments that decide the parameters and what they mean; the rest is the
        user's own choice.
      variant: of these, those that tell the published variants apart.
      layouts: whose files are read.
      ways_back: what can be written, by the name that a user gives; its authors' first. Of several
        layouts the first that can hold a model is taken.
      hallmark: a pattern that the path of some tensor of each of its blocks has; a file in which
        there is none is not of this family.
      read: finds out what network a file holds.
      first_block_differs: whether the first block of a stage has other parameters than the rest.
      unsaid: what of a model is recorded in no file of any layout, one clause each.
    """

    name: str
    network: type[Any]
    architecture: tuple[str, ...]
    variant: tuple[str, ...]
    layouts: tuple[Layout, ...]
    ways_back: Mapping[str, tuple[Layout, ...]]
    hallmark: str
    read: Callable[[Seen], Told]
    first_block_differs: bool = False
    unsaid: Callable[[Any], list[str]] = lambda model: []

    def arguments_of(self, model: nn.Module) -> dict[str, Any]:
        """The arguments of a model that decide its parameters, JSON-able."""
        return {
            name: list(value) if isinstance(value := getattr(model, name), tuple) else value
            for name in self.architecture
        }

    def registry_name(self, model: nn.Module) -> str | None:
        """The name under which the registry has a model with such parameters, or None."""

        def key(candidate: nn.Module) -> list[Any]:
            values = {name: getattr(candidate, name) for name in self.variant}
            # The initial value is no part of the network; whether there is a scale is.
            return [bool(v) if k == "layer_scale_init" else v for k, v in values.items()]

        candidates = ((name, create_model(name)) for name in list_models())
        return next(
            (
                name
                for name, candidate in candidates
                if isinstance(candidate, self.network) and key(candidate) == key(model)
            ),
            None,
        )


def most_common(values: Iterable[int]) -> int | None:
    """What most of them say, so that a damaged tensor is outvoted; None of nothing."""
    votes = Counter(values).most_common(1)
    return votes[0][0] if votes else None


def width_of(shapes: Mapping[str, tuple[int, ...]], module: str) -> int | None:
    """The output width of a linear map, by whichever of its tensors is there."""
    shape = shapes.get(f"{module}/kernel") or shapes.get(f"{module}/bias")
    return shape[-1] if shape else None
