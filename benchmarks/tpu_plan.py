"""What training ConvNeXt-T to -XL takes on TPU slices, by the TPU compiler's own estimate.

    pip install 'convnext-jax[plan]'
    python benchmarks/tpu_plan.py v5e:16x16 v4:4x4x8 v6e:16x16

Plans the paper's recipes, T to L on ImageNet-1K and XL on ImageNet-22K, on each topology given, and
prints a page for each and one table. No TPU is needed; a compilation takes minutes, from four for T
to fifteen for XL on two cores. These are estimates, not measurements. The last table is in
docs/plan.md.
"""

import argparse
import logging
from pathlib import Path

from convnext_jax import config_files
from convnext_jax.analysis.tpu import tpu_topology
from convnext_jax.plan_report import page, table
from convnext_jax.planning.planned_run import PlannedRun
from convnext_jax.planning.planner import make_plan
from convnext_jax.planning.training_sets import training_set

CONFIGS = ("tiny", "small", "base", "large", "xlarge_22k")


def main():
    """Prints the pages and the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("topologies", nargs="+", metavar="TOPOLOGY", help="such as v5e:16x16")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="names in configs/")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    folder = Path(__file__).parents[1] / "configs"
    configs = [config_files.load_config(str(folder / f"{name}.py")) for name in arguments.configs]
    runs = [
        PlannedRun(config, topology, training_set(config))
        for config in configs
        for topology in map(tpu_topology, arguments.topologies)
    ]
    plans = []
    for run in runs:
        plans.append(make_plan(run))
        print(page(plans[-1]), end="\n\n", flush=True)
    print(table(plans))


if __name__ == "__main__":
    main()
