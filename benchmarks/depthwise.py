"""The depthwise convolution on the CPU: written out, against XLA's own, side by side in one run.

    python benchmarks/depthwise.py

Prints milliseconds for the forward pass and for both gradients at the maps of ConvNeXt-T, 8 images
of 224 pixels, and of a small model on 32-pixel images, 128 of them; and the ratio. Every figure is
the median of its repetitions, the two ways taken in turn.
"""

import statistics
import time

import jax

from convnext_jax.models.depthwise import depthwise_conv

SHAPES = [
    (8, 56, 56, 96),
    (8, 28, 28, 192),
    (8, 14, 14, 384),
    (8, 7, 7, 768),
    (128, 16, 16, 32),
    (128, 8, 8, 64),
    (128, 4, 4, 128),
]
REPETITIONS = 5


def programs(implementation, x, kernel):
    """The forward pass, and both gradients, compiled."""

    def conv(x, kernel):
        return depthwise_conv(x, kernel, implementation=implementation)

    def gradients(x, kernel, cotangent):
        return jax.vjp(conv, x, kernel)[1](cotangent)

    return (
        (jax.jit(conv).lower(x, kernel).compile(), (x, kernel)),
        (jax.jit(gradients).lower(x, kernel, x).compile(), (x, kernel, x)),
    )


def milliseconds(program, arguments):
    """One call."""
    begun = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return 1e3 * (time.perf_counter() - begun)


def main():
    """Prints the table."""
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float32, 7 × 7")
    print(f"{'map':>20} {'pass':>9} {'XLA':>10} {'shifts':>10} {'ratio':>6}")
    for shape in SHAPES:
        x = jax.random.normal(jax.random.key(0), shape)
        kernel = jax.random.normal(jax.random.key(1), (7, 7, 1, shape[-1]))
        ways = {name: programs(name, x, kernel) for name in ("xla", "shifts")}
        for index, label in enumerate(("forward", "backward")):
            times = {name: [] for name in ways}
            for repetition in range(REPETITIONS + 1):
                for name, way in ways.items():
                    elapsed = milliseconds(*way[index])
                    if repetition:  # the first one warms up
                        times[name].append(elapsed)
            xla, shifts = (statistics.median(times[name]) for name in ("xla", "shifts"))
            print(f"{shape!s:>20} {label:>9} {xla:10.2f} {shifts:10.2f} {xla / shifts:6.1f}")


if __name__ == "__main__":
    main()
