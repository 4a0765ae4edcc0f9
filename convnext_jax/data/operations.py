"""The operations of the augmentation policies by name, and a batch's worth of them applied.

Each image has its own short list of operations. They are applied image by image in a loop, where a
switch on a scalar is a real branch: an image costs what its own operations cost. Under `vmap` the
switch would become a selection among the results of every operation, for every image. On a TPU an
image of 224 pixels is work enough to fill the vector units, so nothing is lost by the loop; what
each operation costs there is in `benchmarks/README.md`.
"""

from collections.abc import Callable, Sequence

import chex
import jax

from convnext_jax.data import color_ops, filter_ops, geometry_ops, histogram_ops

# (image uint8 (3, H, W), argument float32 scalar, fill colour, interpolation) -> uint8 (3, H, W).
# The argument is an angle in degrees, a shear as a slope, a shift in pixels, a factor of
# `color_ops.blend`, bits, a level, or a sigma in pixels; some operations have none.
OperationFn = Callable[[jax.Array, jax.Array, tuple[int, ...], str], jax.Array]
OPERATIONS: dict[str, OperationFn] = {
    "Identity": lambda image, argument, fill, interpolation: image,
    "AutoContrast": lambda image, argument, fill, interpolation: histogram_ops.autocontrast(image),
    "Equalize": lambda image, argument, fill, interpolation: histogram_ops.equalize(image),
    "Invert": lambda image, argument, fill, interpolation: color_ops.invert(image),
    "Rotate": geometry_ops.rotate,
    "Posterize": lambda image, bits, fill, interpolation: color_ops.posterize(image, bits),
    "Solarize": lambda image, level, fill, interpolation: color_ops.solarize(image, level),
    "SolarizeAdd": lambda image, level, fill, interpolation: color_ops.solarize_add(image, level),
    "Color": lambda image, factor, fill, interpolation: color_ops.color(image, factor),
    "Contrast": lambda image, factor, fill, interpolation: color_ops.contrast(image, factor),
    "Brightness": lambda image, factor, fill, interpolation: color_ops.brightness(image, factor),
    "Sharpness": lambda image, factor, fill, interpolation: filter_ops.sharpness(image, factor),
    "ShearX": geometry_ops.shear_x,
    "ShearY": geometry_ops.shear_y,
    "TranslateX": geometry_ops.translate_x,
    "TranslateY": geometry_ops.translate_y,
    "Grayscale": lambda image, argument, fill, interpolation: color_ops.grayscale(image),
    "GaussianBlur": lambda image, sigma, fill, interpolation: filter_ops.gaussian_blur(
        image, sigma
    ),
}


def apply_operations(
    image: jax.Array,
    operations: jax.Array,
    arguments: jax.Array,
    row: jax.Array,
    *,
    names: Sequence[str],
    fill: tuple[int, ...],
    interpolation: str,
) -> jax.Array:
    """Applies one image's list of operations, in order.

    Between two operations the image is uint8, as Pillow would have it.

    Args:
      image: uint8 (3, H, W).
      operations: int32 (B, K), indices into `names`, of a whole batch.
      arguments: float32 (B, K).
      row: int32 scalar, the image's; numbers are best read where they are used.
      names: the operations that can come up, keys of `OPERATIONS`; only these are compiled.
      fill: three levels for what geometric operations bring in.
      interpolation: theirs, "bilinear" or "bicubic".

    Returns:
      uint8 (3, H, W).
    """
    chex.assert_shape(image, (3, None, None))
    chex.assert_equal_shape([operations, arguments])

    def branch(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda image, argument: OPERATIONS[name](image, argument, fill, interpolation)

    branches = [branch(name) for name in names]

    def step(k: jax.Array, image: jax.Array) -> jax.Array:
        return jax.lax.switch(operations[row, k], branches, image, arguments[row, k])

    return jax.lax.fori_loop(0, operations.shape[1], step, image)
