"""What rematerialisation costs and saves on a TPU chip, by the compiler's own estimate.

    pip install 'convnext-jax[plan]'
    python benchmarks/tpu_remat.py tiny base --chips v5e v4 --images 256 64 --results remat.json

Compiles the training step of configs/ for one chip of each type under each policy of
`config.model.remat`, and prints a table: estimated cycles and images per second, bytes read and
written in the chip's memory, temporaries, and whether all that a run keeps there fits. By XLA
alone, or on a v5e with --kernels by "auto", which takes Pallas kernels from 64 or 96 images on;
then cycles are the compiler's and the kernels' static ones (`tpu_kernels.py`). No TPU is needed; a
compilation takes minutes. With --results each one is kept, and what is there already is not
compiled again, unless the library's source or the compiler has changed. These are estimates, not
measurements. The last table is in benchmarks/README.md.
"""

import argparse
import itertools
import logging
from pathlib import Path

from kept_results import Results
from tpu_program_kernels import kernels_in, static_cycles

from convnext_jax import config_files
from convnext_jax.analysis.hlo import operations
from convnext_jax.analysis.tpu import OutOfHbmError, tpu_topology
from convnext_jax.models.remat import POLICIES
from convnext_jax.planning.planned_run import PlannedRun
from convnext_jax.planning.training_sets import training_set

ROOT = Path(__file__).parents[1]
# One chip is a topology of its own only where it does not have to be part of a cube.
TOPOLOGIES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v4": "v4:1x1x1", "v5p": "v5p:1x1x1"}
REMAT = {"none": False, **{name: name for name in POLICIES}, "all": True}


def figures_of(config_name, topology, images, remat, *, scan, kernels):
    """What the compiler says of one step."""
    config = config_files.load_config(str(ROOT / "configs" / f"{config_name}.py"))
    config.model.remat, config.model.scan_blocks = remat, scan
    config.batch_size = config.eval_batch_size = config.mix.group_size = images
    run = PlannedRun(config, topology, training_set(config))
    if kernels:
        # A plan leaves them out, having no estimate of theirs.
        run.model = run.model.clone(depthwise="auto", mlp="auto")
    memory = run.memory(images)
    try:
        compiled = run.compile(images)
    except OutOfHbmError as error:
        return {"needed": error.needed and error.needed + memory.waiting}
    memory = memory.with_program(compiled)
    text = compiled.as_text()
    program = operations(text)
    return {
        "cycles": sum(one.total_cycles for one in program),
        "kernels": kernels_in(text, program),
        # The compiler counts a loop's body once, so this says nothing of scanned blocks.
        "bytes": None if scan else compiled.cost_analysis()["bytes accessed"],
        "temporaries": memory.temporaries,
        "needed": memory.total,
    }


def row(figures, static, images, chip):
    """The cells of a table that tell the figures, with so many static cycles of kernels."""
    needed = figures["needed"]
    room = "?" if needed is None else f"{needed / 2**30:.2f} GiB"
    fits = needed is not None and "cycles" in figures and needed <= chip.usable_hbm_bytes
    verdict = "yes" if fits else "no"
    if "cycles" not in figures:
        return ["", "", "", "", room, verdict]
    cycles = figures["cycles"] + static
    gigabytes = "" if figures["bytes"] is None else f"{figures['bytes'] / 1e9:.1f} GB"
    return [
        f"{cycles / 1e6:.1f} M",
        f"{images * chip.clock / cycles:,.0f}",
        gigabytes,
        f"{figures['temporaries'] / 2**30:.2f} GiB",
        room,
        verdict,
    ]


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", help="names in configs/")
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=["v5e"])
    parser.add_argument("--images", nargs="+", type=int, default=[256], help="on the chip")
    parser.add_argument("--policies", nargs="+", choices=REMAT, default=list(REMAT))
    parser.add_argument("--scan_blocks", action="store_true", help="the blocks in loops")
    parser.add_argument("--kernels", action="store_true", help="where they pay; on v5e alone")
    parser.add_argument("--results", metavar="FILE", help="JSON, to keep and take figures")
    arguments = parser.parse_args()
    if arguments.kernels and arguments.chips != ["v5e"]:
        parser.error("--kernels: their static cycles are known of v5e alone")
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    results = Results(arguments.results)
    print("| config | chip | images | remat | cycles | images/s | bytes accessed |", end="")
    print(" temporaries | together | fits |\n|---|---|---:|---|---:|---:|---:|---:|---:|---|")
    combinations = itertools.product(
        arguments.configs, arguments.chips, arguments.images, arguments.policies
    )
    ways = [way for way in ("scan_blocks", "kernels") if getattr(arguments, way)]
    for config, chip, images, policy in combinations:
        topology = tpu_topology(TOPOLOGIES[chip])
        name = " ".join([config, chip, str(images), policy, *ways])
        figures = results.get(name)
        if figures is None:
            figures = figures_of(
                config,
                topology,
                images,
                REMAT[policy],
                scan=arguments.scan_blocks,
                kernels=arguments.kernels,
            )
            results.put(name, figures)
        static = static_cycles(figures.get("kernels", {}), results)
        cells = row(figures, static, images, topology.chip)
        kind = ", ".join([policy, *ways])
        print("|", " | ".join([config, chip, str(images), kind, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
