"""A small network with random weights, as `open_pretrained` would give it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.convert.preprocessing import Preprocessing
from convnext_jax.convert.pretrained import Pretrained
from convnext_jax.models import ConvNeXt

# Another mean and std than ImageNet's, so that nobody may take those for granted.
PREPROCESSING = Preprocessing(32, 40, "bilinear", (0.4, 0.5, 0.3), (0.2, 0.3, 0.25))


def tiny_pretrained(
    *,
    model: nn.Module | None = None,
    preprocessing: Preprocessing = PREPROCESSING,
    class_names: tuple[str, ...] | None = None,
    **arguments: Any,
) -> Pretrained:
    """Weights in which no leaf is constant, so that none of them can go unused unnoticed."""
    if model is None:
        tiny = {"depths": (1, 1), "dims": (8, 12), "num_classes": 7, "kernel_size": 3}
        model = ConvNeXt(**{**tiny, **arguments})
    images = jnp.zeros((1, 32, 32, 3))
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        if path[-1].key == "var":
            return jnp.asarray(rng.uniform(0.5, 2.0, leaf.shape), leaf.dtype)
        centre = 1.0 if path[-1].key in ("scale", "gamma") else 0.0
        return jnp.asarray(rng.normal(centre, 0.3, leaf.shape), leaf.dtype)

    abstract = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree_util.tree_map_with_path(draw, abstract)
    return Pretrained(
        model=model,
        variables=variables,
        preprocessing=preprocessing,
        model_name="convnext_test",
        class_names=class_names,
        source="weights.pth",
        sha256="0" * 64,
        notes=(),
    )
