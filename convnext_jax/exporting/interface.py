"""What goes into an exported network and what comes out, and the JSON text that says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from convnext_jax.convert.pretrained import Pretrained
from convnext_jax.inference import Output, Pixels, class_names
from convnext_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class Interface:
    """The border between an exported network and its caller.

    Attributes:
      image_size: side of the images in pixels; None leaves it to each call.
      pixels: "uint8" takes RGB as decoded, and normalises inside; "float32" takes what is
        normalised already.
      features: whether the pooled features come out rather than the logits.
    """

    image_size: int | None
    pixels: Pixels = "uint8"
    features: bool = False

    @property
    def output(self) -> Output:
        """What comes out, which is also its name."""
        return "features" if self.features else "logits"


def describe(pretrained: Pretrained, interface: Interface) -> dict[str, Any]:
    """All that a caller needs to know, JSON-able: the same for every format of file."""
    model, preprocessing = pretrained.model, pretrained.preprocessing
    sides = [interface.image_size or name for name in ("height", "width")]
    has_classes = not interface.features and model.num_classes > 0
    values = (
        "RGB, 0 to 255; the network normalises them itself"
        if interface.pixels == "uint8"
        else "RGB, normalised: (x / 255 - mean) / std, with the mean and std below"
    )
    return {
        "input": {
            "name": "images",
            "shape": ["batch", *sides, 3],
            "dtype": interface.pixels,
            "values": values,
        }
        | ({} if interface.image_size else {"smallest_size": model.strides[-1]}),
        "output": {
            "name": interface.output,
            "shape": ["batch", model.num_classes if has_classes else model.dims[-1]],
            "dtype": "float32",
        },
        "preprocessing": preprocessing.to_dict(),
        "num_classes": model.num_classes,
        "class_names": list(class_names(pretrained) or ()) if has_classes else [],
        "model": pretrained.model_name,
        "weights": {"source": pretrained.source, "sha256": pretrained.sha256},
        "notes": list(pretrained.notes),
        "convnext_jax": __version__,
        "jax": jax.__version__,
    }
