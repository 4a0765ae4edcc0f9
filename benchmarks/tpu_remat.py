"""What rematerialisation costs and saves on a TPU chip, by the compiler's own estimate.

    pip install 'convnext-jax[plan]'
    python benchmarks/tpu_remat.py tiny base --chips v5e v4 --images 256 64 --results remat.json

Compiles the training step of configs/ for one chip of each type under each policy of
`config.model.remat`, and prints a table: estimated cycles and images per second, bytes read and
written in the chip's memory, temporaries, and whether all that a run keeps there fits. No TPU is
needed; a compilation takes minutes. With --results each one is kept, and what is there already is
not compiled again, unless the library's source or the compiler has changed. These are estimates,
not measurements. The last table is in benchmarks/README.md.
"""

import argparse
import hashlib
import json
import logging
from pathlib import Path

from convnext_jax import config_files
from convnext_jax.analysis.hlo import operations
from convnext_jax.analysis.inference_cost import compiler_versions
from convnext_jax.analysis.tpu import OutOfHbmError, tpu_topology
from convnext_jax.models.remat import POLICIES
from convnext_jax.planning.planned_run import PlannedRun
from convnext_jax.planning.training_sets import training_set

ROOT = Path(__file__).parents[1]
# One chip is a topology of its own only where it does not have to be part of a cube.
TOPOLOGIES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v4": "v4:1x1x1", "v5p": "v5p:1x1x1"}
REMAT = {"none": False, **{name: name for name in POLICIES}, "all": True}


class Results:
    """Figures in a JSON file, each under the program and the versions that it is of."""

    def __init__(self, path):
        self._path = None if path is None else Path(path)
        self._entries = {}
        if self._path is not None and self._path.exists():
            self._entries = json.loads(self._path.read_text(encoding="utf-8"))
        digest = hashlib.sha256()
        for folder in ("models", "training", "data"):
            for file in sorted((ROOT / "convnext_jax" / folder).rglob("*.py")):
                digest.update(file.read_bytes())
        versions = " ".join(f"{name} {version}" for name, version in compiler_versions().items())
        self._stamp = f"{versions}, source {digest.hexdigest()[:12]}"

    def get(self, name):
        """The figures kept under a name, or None."""
        return self._entries.get(f"{name} [{self._stamp}]")

    def put(self, name, figures):
        """Keeps figures, and writes the file at once."""
        self._entries[f"{name} [{self._stamp}]"] = figures
        if self._path is not None:
            draft = self._path.with_name(f"{self._path.name}.tmp")
            draft.write_text(json.dumps(self._entries, indent=1) + "\n", encoding="utf-8")
            draft.replace(self._path)


def figures_of(config_name, topology, images, remat, scan):
    """What the compiler says of one step."""
    config = config_files.load_config(str(ROOT / "configs" / f"{config_name}.py"))
    config.model.remat, config.model.scan_blocks = remat, scan
    config.batch_size = config.eval_batch_size = config.mix.group_size = images
    run = PlannedRun(config, topology, training_set(config))
    memory = run.memory(images)
    try:
        compiled = run.compile(images)
    except OutOfHbmError as error:
        return {"needed": error.needed and error.needed + memory.waiting}
    memory = memory.with_program(compiled)
    program = operations(compiled.as_text())
    return {
        "cycles": sum(one.total_cycles for one in program),
        "without_estimate": sum(one.runs for one in program if not one.known),
        # The compiler counts a loop's body once, so this says nothing of scanned blocks.
        "bytes": None if scan else compiled.cost_analysis()["bytes accessed"],
        "temporaries": memory.temporaries,
        "needed": memory.total,
    }


def row(figures, images, chip):
    """The cells of a table that tell the figures."""
    needed = figures["needed"]
    room = "?" if needed is None else f"{needed / 2**30:.2f} GiB"
    fits = needed is not None and "cycles" in figures and needed <= chip.usable_hbm_bytes
    verdict = "yes" if fits else "no"
    if "cycles" not in figures:
        return ["", "", "", "", room, verdict]
    # Kernels are such runs: their own cycles must be added.
    without = figures["without_estimate"]
    more = f" + {without:,.0f} runs without estimate" if without else ""
    gigabytes = "" if figures["bytes"] is None else f"{figures['bytes'] / 1e9:.1f} GB"
    return [
        f"{figures['cycles'] / 1e6:.1f} M{more}",
        f"{images * chip.clock / figures['cycles']:,.0f}",
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
    parser.add_argument("--results", metavar="FILE", help="JSON, to keep and take figures")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    results = Results(arguments.results)
    print(
        "| config | chip | images | remat | cycles | images/s | HBM traffic | temporaries", end=""
    )
    print(" | together | fits |\n|---|---|---:|---|---:|---:|---:|---:|---:|---|")
    for config in arguments.configs:
        for chip in arguments.chips:
            topology = tpu_topology(TOPOLOGIES[chip])
            for images in arguments.images:
                for policy in arguments.policies:
                    name = f"{config} {chip} {images} {policy}"
                    name += " scanned" * arguments.scan_blocks
                    figures = results.get(name)
                    if figures is None:
                        figures = figures_of(
                            config, topology, images, REMAT[policy], arguments.scan_blocks
                        )
                        results.put(name, figures)
                    cells = row(figures, images, topology.chip)
                    kind = policy + ", scanned" * arguments.scan_blocks
                    print("|", " | ".join([config, chip, str(images), kind, *cells]), "|")


if __name__ == "__main__":
    main()
