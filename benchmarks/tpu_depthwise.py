"""What the depthwise convolutions cost on a TPU v5e: XLA's, and the Pallas kernels; no TPU needed.

    pip install libtpu
    python benchmarks/tpu_depthwise.py

For each stage of ConvNeXt-T at 224 pixels, 256 images in bfloat16, it compiles the convolution, its
gradient by the input and that by the kernel. For XLA it adds up the cycles that the compiler
estimates. For a Pallas kernel there is no estimate: its bundles are counted, see `tpu_bundles.py`,
and to them the estimate for what XLA makes of the kernel's parameters is added.

Beside them stand three bounds of one such product: the vector unit's for a multiplication and an
addition a tap, 4 operations of 1,024 float32 numbers a cycle; the matrix units' for the banded
matrices that the kernels use; and the memory's for reading and writing the images once.

`--stages 3` does the last stage alone, `--images 32` a smaller batch, `--dtype float32` the other
type. A stage takes minutes. The table is in benchmarks/README.md.
"""

import argparse
import atexit
import importlib.metadata
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from tpu_bundles import dump_bundles, mosaic_kernels

from convnext_jax.analysis.hlo import operations
from convnext_jax.analysis.tpu import compile_for_tpu, tpu_topology
from convnext_jax.models.depthwise import depthwise_conv
from convnext_jax.models.depthwise_pallas_filter import filter_call
from convnext_jax.models.depthwise_pallas_gradient import gradient_call
from convnext_jax.models.depthwise_pallas_tiles import LANES, bands, taps, tiling
from convnext_jax.models.depthwise_pallas_words import channels_in_block

KERNEL_SIZE = 7
STAGES = ((56, 96, 3), (28, 192, 3), (14, 384, 9), (7, 768, 3))  # side, channels, blocks
TOPOLOGY = "v5e:2x2"
DUMP = Path(tempfile.mkdtemp(prefix="tpu_depthwise_"))


def program(function, dtype, *shapes):
    """The optimised program's text; its kernels' bundles are left under DUMP."""
    for file in DUMP.iterdir():
        file.unlink()
    sharding = SingleDeviceSharding(tpu_topology(TOPOLOGY).devices[0])
    operands = [jax.ShapeDtypeStruct(s, dtype, sharding=sharding) for s in shapes]
    return compile_for_tpu(jax.jit(function), *operands).as_text()


def estimate(text, kernels=()):
    """Cycles of XLA's operations, all but the kernels, by the compiler's estimate."""
    names = {kernel.name for kernel in kernels}
    return round(sum(one.total_cycles for one in operations(text) if one.name not in names))


def counts(cut, channel_blocks, image_blocks):
    """For each kernel: its grid steps, and how often its guarded parts run, in their order."""
    images = channel_blocks * image_blocks
    steps = []
    if cut.blocks > 1:
        # Clear above the image, load, clear below it, pass on the halos, multiply.
        steps = [images, images * cut.blocks]
        if cut.height % cut.step_rows:
            steps.append(images)
        steps += [images, images * (cut.blocks - 1), images * cut.blocks]
    grid = images * (1 if cut.blocks == 1 else cut.blocks + 1)
    # Each begins a block of channels: the one makes the matrices, the other clears the sums, which
    # it writes at the end.
    return {
        "depthwise_filter": (grid, [channel_blocks, *steps]),
        "depthwise_gradient": (grid, [channel_blocks, *steps, channel_blocks]),
    }


def kernel_cycles(text, cut, channels, images, dtype):
    """Static cycles of the kernels in a program, and the estimate for the rest of it."""
    blocks = channels // channels_in_block(dtype)
    table = counts(cut, blocks, -(-images // LANES))
    kernels = mosaic_kernels(text, DUMP, lambda name, shape: table[name])
    return round(sum(kernel.cycles * kernel.runs for kernel in kernels)) + estimate(text, kernels)


def bounds(cut, channels, images, dtype):
    """Cycles of the vector unit, of the matrix units, and of the memory, of one product."""
    chip = tpu_topology(TOPOLOGY).chip
    values = cut.height * cut.width * channels * images
    passes = -(-cut.inputs // LANES)
    vector = values * KERNEL_SIZE**2 * 2 / (4 * 1024)
    matrix = values * passes / (4 * LANES)
    memory = 2 * values * jnp.dtype(dtype).itemsize / chip.hbm_bandwidth * chip.clock
    return vector, matrix, memory


def stage(side, channels, images, dtype):
    """XLA's cycles forward, by the input and by the kernel; the two kernels'; and the bounds."""
    image, kernel = (images, side, side, channels), (KERNEL_SIZE, KERNEL_SIZE, 1, channels)

    def forward(x, kernel):
        return depthwise_conv(x, kernel, implementation="xla")

    def by_input(x, kernel, g):
        return jax.vjp(lambda x: forward(x, kernel), x)[1](g)

    def by_kernel(x, kernel, g):
        return jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](g)

    xla = [
        estimate(program(forward, dtype, image, kernel)),
        estimate(program(by_input, dtype, image, kernel, image)),
        estimate(program(by_kernel, dtype, image, kernel, image)),
    ]
    cut = tiling(side, side, KERNEL_SIZE)
    pixels = (side * side, channels, -(-images // LANES) * LANES)

    def filtered(x, kernel):
        return filter_call(x, bands(kernel.astype(jnp.float32), side), cut, False)

    def gradient(x, g):
        return taps(gradient_call(x, g, cut, False), KERNEL_SIZE)

    ours = [
        kernel_cycles(program(filtered, dtype, pixels, kernel), cut, channels, images, dtype),
        kernel_cycles(program(gradient, dtype, pixels, pixels), cut, channels, images, dtype),
    ]
    return xla, ours, bounds(cut, channels, images, dtype)


def main():
    """Prints the table."""
    atexit.register(shutil.rmtree, DUMP, ignore_errors=True)
    dump_bundles(DUMP)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=range(4), choices=range(4))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    images, dtype = arguments.images, jnp.dtype(arguments.dtype)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")]
    print(f"{images} images on one v5e chip, {dtype}, cycles; {', '.join(versions)}\n")
    heads = ["XLA forward", "by the input", "by the kernel"]
    heads += ["Pallas forward, by the input", "by the kernel", "all three, ÷ XLA"]
    heads += ["vector bound", "matrix bound", "memory bound"]
    print(f"| stage | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    xla_total = pallas_total = 0
    for side, channels, blocks in (STAGES[i] for i in arguments.stages):
        xla, (filtered, gradient), bound = stage(side, channels, images, dtype)
        pallas = 2 * filtered + gradient
        xla_total, pallas_total = xla_total + blocks * sum(xla), pallas_total + blocks * pallas
        cells = [f"{n:,}" for n in (*xla, filtered, gradient)]
        cells += [f"{pallas / sum(xla):.3f}", *(f"{n:,.0f}" for n in bound)]
        print(f"| {side} × {side} × {channels} | {' | '.join(cells)} |", flush=True)
    print(
        f"\nSummed over the blocks of these stages, forward and backward: XLA {xla_total:,}, the "
        f"kernels {pallas_total:,}, a ratio of {pallas_total / xla_total:.3f}."
    )


if __name__ == "__main__":
    main()
