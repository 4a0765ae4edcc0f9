"""Images and a model that agree on what a class looks like: a colour.

The model's answer to an image is the class whose colour is nearest, so a test knows by heart what
the model will say of an image, and why.
"""

import functools
import io

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from PIL import Image

MEAN = STD = (0.5, 0.5, 0.5)


def colours(num_classes: int) -> np.ndarray:
    """The classes' colours, uint8 (K, 3), far enough from each other to survive a JPEG."""
    levels = int(np.ceil(num_classes ** (1 / 3)))
    digits = np.stack(np.unravel_index(np.arange(num_classes), (levels,) * 3), axis=-1)
    return (255 * digits / max(levels - 1, 1)).astype(np.uint8)


def painted(label: int, num_classes: int = 1000, size: int = 24) -> bytes:
    """A JPEG in a class's colour."""
    pixels = np.broadcast_to(colours(num_classes)[label], (size, size, 3))
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=95)
    return file.getvalue()


@functools.cache
def squared_distances(num_classes: int = 1000) -> np.ndarray:
    """Between the colours of classes, (K, K), in units of the model's input."""
    x = 2 * colours(num_classes).astype(np.float64) / 255 - 1
    return ((x[:, None] - x) ** 2).sum(-1)


class ColourModel(nn.Module):
    """Logits are minus the squared distance of the mean colour from each class's, times 10."""

    num_classes: int = 1000

    @nn.compact
    def __call__(self, images, train=False):
        # One parameter, so that there is something to place on devices.
        scale = self.param("scale", nn.initializers.constant(10.0), (1,))
        mean = images.mean(axis=(1, 2))[:, None, :]
        known = 2 * jnp.asarray(colours(self.num_classes), jnp.float32)[None] / 255 - 1
        return -scale[None, :] * ((mean - known) ** 2).sum(-1)
