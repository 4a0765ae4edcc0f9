"""Static cycles of this library's Pallas kernels, one by one, on a TPU v5e; no TPU needed.

    python benchmarks/tpu_kernels.py FOLDER "mlp_forward 3136x96x256" "mlp_backward 3136x96x256"

Compiles each kernel for arrays of (pixels, channels, images) in bfloat16, has the compiler write
down its code in FOLDER, and prints as JSON how many bundles run in a call: those of each loop times
the trips of the loops around it. A core issues about one bundle a cycle; waiting for memory is not
in the count. `tpu_step.py` calls it.
"""

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from tpu_bundles import dump_bundles, read_schedule
from tpu_depthwise import KERNEL_SIZE, TOPOLOGY, counts

from convnext_jax.analysis.tpu import compile_for_tpu, tpu_topology
from convnext_jax.models.depthwise_pallas_filter import filter_call
from convnext_jax.models.depthwise_pallas_gradient import gradient_call
from convnext_jax.models.depthwise_pallas_tiles import LANES, bands, tiling
from convnext_jax.models.depthwise_pallas_words import channels_in_block
from convnext_jax.models.mlp_pallas_kernels import backward_call, forward_call
from convnext_jax.models.mlp_pallas_tiles import mlp_tiling

_TRIPS = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+(\w\w)?\s*:([\s>]*)\{")


@dataclasses.dataclass
class Loop:
    """A loop of a kernel's code.

    Attributes:
      around: the loop that it lies in.
      depth: loops around it, and itself; 0 for what is in none.
      bundles: its own, without those of the loops in it.
      trips: that the code holds as a constant, if it does. The grid's are more than its steps,
        since its loop runs on to empty the pipeline.
    """

    around: "Loop | None"
    depth: int
    bundles: int = 0
    trips: int | None = None

    def runs(self, steps, groups):
        """How often it runs, of so many grid steps with so many groups of pixels."""
        if self.around is None:
            return 1
        trips = steps if self.depth == 1 else self.trips or groups
        return self.around.runs(steps, groups) * trips


def read_loops(text):
    """The loops of a "final_bundles" file, in the order of their code; first what is in none.

    A loop goes on to the last bundle of its depth: between them the compiler may put others, which
    are marked as being in no such loop and do nothing but in its last trip.
    """
    bundles = []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            trips = _TRIPS.search(line)
            begins = match[1] in ("LB", "LH")
            bundles.append((match[2].count(">"), begins, trips and int(trips[1])))
    loops, ends = [Loop(None, 0)], [len(bundles)]
    inner = loops[0]
    for i, (depth, begins, trips) in enumerate(bundles):
        while i >= ends[-1] or (begins and inner.depth >= depth):
            inner = inner.around
            ends.pop()
        if begins:
            inner = Loop(inner, depth)
            loops.append(inner)
            ends.append(_end(bundles, i))
        inner.bundles += 1
        if trips is not None:
            inner.trips = trips
    return loops


def _end(bundles, start):
    """Where the loop ends that begins there."""
    depth, _, _ = bundles[start]
    end = start
    for i, (other, begins, _) in enumerate(bundles[start + 1 :], start + 1):
        if begins and other <= depth:
            break
        if other >= depth:
            end = i
    return end + 1


def mlp_cycles(text, name, cut):
    """Of a kernel of a block's second half; that of the gradients begins by clearing the sums."""
    steps, groups = math.prod(cut.grid), cut.step_pixels // cut.group
    once = sum(read_schedule(text).parts) if name == "mlp_backward" else 0
    every = sum(loop.bundles * loop.runs(steps, groups) for loop in read_loops(text))
    return every - once * (steps - 1)


def depthwise_cycles(text, name, cut, channels, images):
    """Of a kernel of the depthwise convolution, which has no loop but its grid."""
    blocks = channels // channels_in_block(jnp.bfloat16)
    steps, times = counts(cut, blocks, images // LANES)[name]
    schedule = read_schedule(text)
    if len(schedule.parts) == 1 and len(set(times)) == 1:
        times = times[:1]  # a step that is both first and last has one part for both
    assert len(times) == len(schedule.parts), (times, schedule)
    parts = zip(schedule.parts, times, strict=True)
    return schedule.always * steps + sum(n * m for n, m in parts)


def cycles(name, pixels, channels, images, folder):
    """Bundles that run in one call."""
    for file in folder.iterdir():
        file.unlink()
    sharding = SingleDeviceSharding(tpu_topology(TOPOLOGY).devices[0])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x = array(pixels, channels, images)
    side = math.isqrt(pixels)
    cut = tiling(side, side, KERNEL_SIZE)
    mlp = mlp_tiling(pixels, channels, images, 2, 1e-6)
    keep = array(1, images, dtype=jnp.float32)
    bias = array(channels, LANES, dtype=jnp.float32)
    expand = array(mlp.chunks, mlp.chunk, channels)
    expand_bias = array(mlp.chunks, mlp.chunk, LANES, dtype=jnp.float32)
    project = array(mlp.chunks, channels, mlp.chunk)
    calls = {
        "mlp_forward": (
            lambda *operands: forward_call(*operands, mlp, False),
            (x, x, keep, (bias, expand, expand_bias, project, bias)),
        ),
        "mlp_backward": (
            lambda *operands: backward_call(*operands, mlp, False),
            (x, x, keep, (bias, expand, expand_bias, project, expand)),
        ),
        "depthwise_filter": (
            lambda x, kernel: filter_call(x, bands(kernel, side), cut, False),
            (x, array(KERNEL_SIZE, KERNEL_SIZE, 1, channels, dtype=jnp.float32)),
        ),
        "depthwise_gradient": (lambda x, g: gradient_call(x, g, cut, False), (x, x)),
    }
    function, operands = calls[name]
    compile_for_tpu(jax.jit(function), *operands)
    (file,) = (
        file
        for file in folder.glob(f"*-{name}*-final_bundles.txt")
        if "schedule-analysis" not in file.name
    )
    text = file.read_text(encoding="utf-8")
    if name.startswith("mlp"):
        return mlp_cycles(text, name, mlp)
    return depthwise_cycles(text, name, cut, channels, images)


def main():
    """Prints a JSON object of cycles by kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the compiler's code; emptied")
    parser.add_argument("kernels", nargs="+", help='such as "mlp_forward 3136x96x256"')
    arguments = parser.parse_args()
    dump_bundles(arguments.folder)
    found = {}
    for key in arguments.kernels:
        name, _, shape = key.partition(" ")
        found[key] = cycles(name, *(int(n) for n in shape.split("x")), arguments.folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
