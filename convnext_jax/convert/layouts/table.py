"""What a layout's table is made of: names with numbers in them, and pairs of transforms."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

ArrayFn = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor lies in a foreign file and how it lies here. Both ways give views.

    Attributes:
      name: for messages, "theirs → ours".
      ndim: of the foreign tensor.
      forward: theirs → ours, or to the part of ours that it is.
      inverse: the way back, of that part.
      part: (k, n) where it is the k-th, from 0, of n equal parts of ours along the last axis.
    """

    name: str
    ndim: int
    forward: ArrayFn
    inverse: ArrayFn
    part: tuple[int, int] = (0, 1)

    def our_shape(self, theirs: Sequence[int]) -> tuple[int, ...] | None:
        """The shape that a foreign one becomes, or None if it can't be of this kind."""
        if len(theirs) != self.ndim:
            return None
        try:
            *leading, last = self.forward(_shaped(theirs)).shape
        except ValueError:
            return None
        return (*leading, last * self.part[1])

    def their_shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The foreign shape of a tensor of ours, or of this part of it."""
        return self.to_theirs(_shaped(ours)).shape

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """What a foreign file holds of a whole tensor of ours."""
        index, count = self.part
        width = ours.shape[-1] // count
        return self.inverse(ours[..., index * width : (index + 1) * width])

    def as_part(self, index: int, count: int) -> Transform:
        """The same for files that hold a tensor of ours in parts along the last axis.

        Args:
          index: which of them, from 0.
          count: how many they are.
        """
        name = f"{self.name}, part {index + 1} of {count}"
        return dataclasses.replace(self, name=name, part=(index, count))


def _shaped(shape: Sequence[int]) -> np.ndarray:
    """An array of this shape that occupies one byte."""
    return np.broadcast_to(np.zeros((), np.uint8), tuple(shape))


def _side(positions: int) -> int:
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(f"{positions} is no square")
    return side


AS_IS = Transform("(C) → (C)", 1, lambda a: a, lambda a: a)
# A depthwise kernel, (C, 1, k, k) → (k, k, 1, C), is the same permutation.
CONV_KERNEL = Transform(
    "(O, I, k, k) → (k, k, I, O)",
    4,
    lambda a: a.transpose(2, 3, 1, 0),
    lambda a: a.transpose(3, 2, 0, 1),
)
LINEAR_KERNEL = Transform("(O, I) → (I, O)", 2, lambda a: a.T, lambda a: a.T)
CONV1X1_KERNEL = Transform(
    "(O, I, 1, 1) → (I, O)",
    4,
    lambda a: a.reshape(a.shape[:2]).T,
    lambda a: a.T[:, :, None, None],
)
ROW_2D = Transform("(1, C) → (C)", 2, lambda a: a.reshape(a.shape[1]), lambda a: a[None])
ROW_4D = Transform(
    "(1, 1, 1, C) → (C)", 4, lambda a: a.reshape(a.shape[3]), lambda a: a[None, None, None]
)
COLUMN_3D = Transform(
    "(C, 1, 1) → (C)", 3, lambda a: a.reshape(a.shape[0]), lambda a: a[:, None, None]
)
# MinkowskiEngine numbers the positions of a kernel column by column.
SPARSE_KERNEL = Transform(
    "(k², I, O) → (k, k, I, O)",
    3,
    lambda a: a.reshape(_side(a.shape[0]), -1, *a.shape[1:]).transpose(1, 0, 2, 3),
    lambda a: a.transpose(1, 0, 2, 3).reshape(-1, *a.shape[2:]),
)
SPARSE_DEPTHWISE_KERNEL = Transform(
    "(k², C) → (k, k, 1, C)",
    2,
    lambda a: a.reshape(_side(a.shape[0]), -1, 1, a.shape[1]).transpose(1, 0, 2, 3),
    lambda a: a.transpose(1, 0, 2, 3).reshape(-1, a.shape[3]),
)
TABLE = Transform("(N, C) → (N, C)", 2, lambda a: a, lambda a: a)

# A module's tensors: (name there, name here, transform). A bare parameter has "" there.
Kind = tuple[tuple[str, str, Transform], ...]

CONV: Kind = (("weight", "kernel", CONV_KERNEL), ("bias", "bias", AS_IS))
LINEAR: Kind = (("weight", "kernel", LINEAR_KERNEL), ("bias", "bias", AS_IS))
CONV1X1: Kind = (("weight", "kernel", CONV1X1_KERNEL), ("bias", "bias", AS_IS))
NORM: Kind = (("weight", "scale", AS_IS), ("bias", "bias", AS_IS))
BATCH_NORM: Kind = (*NORM, ("running_mean", "mean", AS_IS), ("running_var", "var", AS_IS))
VECTOR: Kind = (("", "", AS_IS),)
COLUMN: Kind = (("", "", COLUMN_3D),)


# Of a module, what lies in the collection "batch_stats"; all else is in "params".
_STATISTICS = ("mean", "var")


def collection_of(path: str) -> str:
    """The collection of variables that one of our paths lies in: "params" or "batch_stats"."""
    return "batch_stats" if path.rpartition("/")[2] in _STATISTICS else "params"


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the files of one program name and shape the tensors of a network.

    Attributes:
      name: for users.
      origin: whose preprocessing goes with it: "official", "timm", "clip", "torchvision",
        "transformers" or "dinov3".
      modules: the table: (name there, path here, kind). `{i}` and `{j}` stand for the stage and the
        block, counted from 0; `{2i+1}` and the like for what they say. The first row that fits a
        name counts. A stage's downsampling is there from the second stage on.
      ignored: names, with `*` for anything, that such files hold besides the network.
      derived: names of what such files hold of the network that follows from its arguments, or
        counts its training.
      implies: arguments of the network that this layout stands for.
      fixes: attributes of the network that the layout's own program has fixed, so that no model
        with others can be written in it.
      stages: how many stages its own program has fixed; None for any number.
      always: parameters of a block that the layout's own program never goes without.
    """

    name: str
    origin: str
    modules: tuple[tuple[str, str, Kind], ...]
    ignored: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    implies: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stages: int | None = None
    always: tuple[str, ...] = ()

    def find(self, name: str) -> tuple[str, Transform] | None:
        """Our path, such as "stages_0/blocks_1/pwconv1/kernel", of a foreign tensor; or None."""
        numbers = [int(digits) for digits in re.findall(r"\d+", name)]
        for pattern, path, transform in self._by_skeleton.get(_skeleton(name), ()):
            values = _solve(pattern, numbers)
            if values is not None and not (ours := _fill(path, values)).startswith(_FIRST):
                return ours, transform
        return None

    def tensors(self, depths: Sequence[int]) -> Iterator[tuple[str, str, Transform]]:
        """All tensors of a model of these depths: (name there, path here, transform)."""
        beyond = f"stages_{len(depths)}/"
        for theirs, ours, transform in self._leaves:
            for i in range(len(depths)) if "{i" in ours else (0,):
                for j in range(depths[i]) if "{j}" in ours else (0,):
                    values = {"i": i, "j": j}
                    path = _fill(ours, values)
                    if not path.startswith((_FIRST, beyond)):
                        yield _fill(theirs, values), path, transform

    def is_ignored(self, name: str) -> bool:
        """Whether such files hold this tensor besides the network."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored)

    def is_derived(self, name: str) -> bool:
        """Whether this tensor follows from the network's arguments, or counts its training."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.derived)

    @functools.cached_property
    def _leaves(self) -> list[tuple[str, str, Transform]]:
        return [
            (f"{theirs}.{leaf}".rstrip("."), f"{ours}/{our_leaf}".rstrip("/"), transform)
            for theirs, ours, kind in self.modules
            for leaf, our_leaf, transform in kind
        ]

    @functools.cached_property
    def _by_skeleton(self) -> dict[str, list[tuple[str, str, Transform]]]:
        found: dict[str, list[tuple[str, str, Transform]]] = {}
        for row in self._leaves:
            found.setdefault(_skeleton(row[0]), []).append(row)
        return found


# No network has a downsampling before its first stage.
_FIRST = "stages_0/downsample/"
_SLOT = re.compile(r"\{(\d*)([ij])(?:\+(\d+))?\}")


def _skeleton(name: str) -> str:
    """The name with every number and every slot as `#`."""
    return re.sub(r"\d+", "#", _SLOT.sub("#", name))


def _fill(pattern: str, values: Mapping[str, int]) -> str:
    def number(slot: re.Match[str]) -> str:
        scale, variable, offset = slot.groups()
        return str(int(scale or 1) * values[variable] + int(offset or 0))

    return _SLOT.sub(number, pattern)


def _solve(pattern: str, numbers: Sequence[int]) -> dict[str, int] | None:
    """The values of i and j with which the pattern's numbers are these, or None."""
    values: dict[str, int] = {}
    slots = re.findall(r"\{[^}]*\}|\d+", pattern)
    for slot, number in zip(slots, numbers, strict=True):
        if slot.isdigit():
            if int(slot) != number:
                return None
            continue
        match = _SLOT.fullmatch(slot)
        assert match is not None
        scale, variable, offset = match.groups()
        value, remainder = divmod(number - int(offset or 0), int(scale or 1))
        if remainder or value < 0 or values.setdefault(variable, value) != value:
            return None
    return values
