"""Files of full-size models whose tensors occupy no memory: shapes are all that detection reads."""

import numpy as np

from convnext_jax.convert.families import LAYOUTS
from convnext_jax.convert.mapping import variable_shapes

NAMED = {layout.name: layout for layout in LAYOUTS}


def shape_file(model, layout, *, in_channels=3, without=()):
    """The tensors of `model` in `layout`; `without` are parts of the tree that it lacks."""
    shapes = variable_shapes(model, in_channels)
    return {
        name: np.broadcast_to(np.float32(0), transform.their_shape(shapes[path]))
        for name, path, transform in NAMED[layout].tensors(model.depths)
        if path in shapes and path.split("/")[0] not in without
    }
