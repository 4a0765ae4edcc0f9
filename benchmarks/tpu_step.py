"""What a whole training step of ConvNeXt-T costs on a TPU v5e, by the way it is computed.

    pip install 'convnext-jax[plan]'
    python benchmarks/tpu_step.py --results step.json

Compiles the project's training step, 256 images of 224 pixels in bfloat16 on one chip, normalised
and not otherwise augmented, AdamW and an average of the weights: first with `nn.Conv`,
`nn.LayerNorm` and `nn.gelu(approximate=False)` in the blocks, then with one of this library's
paths after the other. No TPU is needed. A compilation takes minutes; with --results each one is
kept, and what is there already is not compiled again unless the library's source or the compiler
has changed.

The cycles are those that the compiler estimates for XLA's operations, and for Pallas kernels, of
which it has no estimate, the bundles of their code times how often these run (`tpu_kernels.py`).
Of memory there are two counts: XLA's "bytes accessed", which takes the kernels' figures from their
own `CostEstimate`, and the operands and results that lie in HBM, of every instruction and kernel
alike (`convnext_jax/analysis/hbm.py`). These are estimates, not measurements. The last table is in
benchmarks/README.md.
"""

import argparse
import contextlib
from pathlib import Path

from kept_results import Results
from plain_flax import exact_gelu, plain_flax
from tpu_program_kernels import kernels_in, static_cycles
from tpu_tiny_step import IMAGES, XLA, compiled_step

from convnext_jax.analysis.hbm import traffic
from convnext_jax.analysis.hlo import operations
from convnext_jax.analysis.inference_cost import compiler_versions

VARIANTS = {
    "plain Flax": (XLA, plain_flax),
    "this library, by XLA, `nn.gelu`": (XLA, exact_gelu),
    "and its GELU": (XLA, contextlib.nullcontext),
    "and the depthwise kernels": ({"depthwise": "pallas", "mlp": "xla"}, contextlib.nullcontext),
    "and the kernels of the second half": (
        {"depthwise": "pallas", "mlp": "pallas"},
        contextlib.nullcontext,
    ),
}


def figures_of(variant, images, keep):
    """What the compiler says of a variant's step."""
    options, patched = VARIANTS[variant]
    with patched():
        compiled = compiled_step(options=options, images=images)
    text = compiled.as_text()
    if keep:
        Path(keep, f"{list(VARIANTS).index(variant)}.hlo").write_text(text, encoding="utf-8")
    program = operations(text)
    return {
        "cycles": sum(one.total_cycles for one in program),
        "kernels": kernels_in(text, program),
        "accessed": compiled.cost_analysis()["bytes accessed"],
        "flops": compiled.cost_analysis()["flops"],
        "hbm": hbm_bytes(text),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }


def hbm_bytes(text):
    """HBM traffic of the program, or None where it has a loop."""
    try:
        return sum(one.bytes for one in traffic(text))
    except ValueError:
        return None


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", type=int, nargs="+", default=range(len(VARIANTS)))
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--results", help="JSON file of what has been compiled")
    parser.add_argument("--keep", help="folder for the programs' texts")
    arguments = parser.parse_args()
    results, rows = Results(arguments.results), []
    for variant in (list(VARIANTS)[i] for i in arguments.variants):
        name = f"{variant}, {arguments.images} images"
        if (figures := results.get(name)) is None:
            figures = figures_of(variant, arguments.images, arguments.keep)
            results.put(name, figures)
        rows.append((variant, figures, static_cycles(figures["kernels"], results)))

    versions = ", ".join(f"{name} {version}" for name, version in compiler_versions().items())
    print(f"ConvNeXt-T, {arguments.images} images on one v5e chip, bfloat16; {versions}\n")
    heads = ("XLA, M cycles", "kernels, M cycles", "ratio", "accessed, GB", "ratio")
    heads += ("HBM operands, GB", "temporaries, GB")
    print(f"| step | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    _, first, _ = rows[0]
    for variant, figures, static in rows:
        hbm = "" if figures["hbm"] is None else f"{figures['hbm'] / 1e9:.1f}"
        cells = (
            f"{figures['cycles'] / 1e6:.1f}",
            f"{static / 1e6:.1f}",
            f"{(figures['cycles'] + static) / first['cycles']:.2f}",
            f"{figures['accessed'] / 1e9:.1f}",
            f"{figures['accessed'] / first['accessed']:.2f}",
            hbm,
            f"{figures['temporaries'] / 1e9:.1f}",
        )
        print(f"| {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
