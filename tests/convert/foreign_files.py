"""Small files of ResNet and Swin in every layout, filled with random numbers."""

import numpy as np
from safetensors.numpy import save_file

from convnext_jax.convert.families import LAYOUTS
from convnext_jax.convert.mapping import variable_shapes
from convnext_jax.models import ModernizedResNet, SwinTransformer

NAMED = {layout.name: layout for layout in LAYOUTS}
RESNET = ModernizedResNet(num_classes=5, depths=(1, 3, 1, 1), width=4)
SWIN = SwinTransformer(
    num_classes=5, depths=(2, 1, 3), width=4, num_heads=(1, 2, 4), window_size=3, patch_size=2
)
CASES_RESNET = "torchvision ResNet"
# Layout → model, and the name under which it is written.
CASES = {
    CASES_RESNET: (RESNET, "torchvision"),
    "official Swin": (SWIN, "official"),
    "timm Swin": (SWIN, "timm"),
    "torchvision Swin": (SWIN, "torchvision"),
    "transformers Swin": (SWIN, "transformers"),
    "transformers Swin without head": (SWIN.clone(num_classes=0), "transformers"),
    "transformers 5 Swin": (SWIN, None),
}


def foreign_file(model, layout, dtype=np.float32, *, seed=0):
    """Name → array, as the layout's own program would save this model, but for its buffers."""
    rng = np.random.default_rng(seed)
    shapes = variable_shapes(model)

    def draw(path, shape):
        values = rng.uniform(0.5, 2.0, shape) if path.endswith("var") else rng.normal(size=shape)
        return values.astype(dtype)

    return {
        name: draw(path, transform.their_shape(shapes[path]))
        for name, path, transform in NAMED[layout].tensors(model.depths)
        if path in shapes
    }


def written(tmp_path, layout, **changes):
    """Writes the small model of a layout to a file, with further tensors."""
    path = tmp_path / f"{layout.replace(' ', '_')}.safetensors"
    save_file({**foreign_file(CASES[layout][0], layout), **changes}, path)
    return path
