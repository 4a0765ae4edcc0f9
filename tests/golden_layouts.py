"""Reads parity/golden/layouts.npz: a tiny model in every layout, with what PyTorch made of it."""

import dataclasses
import functools
import math
import pathlib

import numpy as np

_GOLDEN = pathlib.Path(__file__).parent / "parity" / "golden" / "layouts.npz"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A file's tensors (float32), and logits and NHWC feature maps of the common image."""

    tensors: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@functools.cache
def image():
    """(1, 47, 33, 3) float32 in [−1, 1]."""
    with np.load(_GOLDEN, allow_pickle=False) as file:
        return file["image"].astype(np.float32) / np.float32(127.5) - np.float32(1)


@functools.cache
def recorded():
    """Label, which begins with the layout's name → `Recorded`."""
    with np.load(_GOLDEN, allow_pickle=False) as file:
        arrays = dict(file)
    models = {}
    for key in arrays:
        if not key.endswith("/names"):
            continue
        label = key.removesuffix("/names")
        flat = (arrays[f"{label}/weights"].astype(np.uint32) << 16).view(np.float32)
        tensors = {}
        for line in arrays[key].tolist():
            name, _, dimensions = line.partition(" ")
            shape = tuple(int(n) for n in dimensions.split(",") if n)
            size = math.prod(shape)
            tensors[name], flat = flat[:size].reshape(shape), flat[size:]
        start = f"{label}/outputs/"
        outputs = {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}
        models[label] = Recorded(tensors, outputs)
    return models
