"""Plans a run on TPUs that are not there: python -m convnext_jax.plan --config configs/base.py.

    python -m convnext_jax.plan --config configs/base.py --topology v5e:16x16
    python -m convnext_jax.plan --config configs/base.py --compare v4:2x2x2 v5e:4x4 v6e:4x4

Compiles the very training step of the config by the TPU compiler, which needs no TPU, and prints
what it says: memory, time, what costs most, what is exchanged. How to read it: docs/plan.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from convnext_jax import cli, config_files
from convnext_jax.analysis.tpu import tpu_topology
from convnext_jax.output_files import check_output
from convnext_jax.plan_report import page, table
from convnext_jax.planning.planned_run import PlannedRun
from convnext_jax.planning.planner import Plan, make_plan
from convnext_jax.planning.training_sets import training_set

_EXAMPLES = """
a page on one topology
  python -m convnext_jax.plan --config configs/base.py --topology v5e:16x16
the same run on several, side by side
  python -m convnext_jax.plan --config configs/base.py --compare v4:2x2x2 v5e:4x4 v6e:4x4
with another batch, and its blocks rematerialised
  python -m convnext_jax.plan --config configs/large.py --topology v5e:8x8 \\
    --config.batch_size=1024 --config.model.remat=true
"""


def main(argv: Sequence[str] | None = None) -> list[Plan]:
    """The program; `argv` are the arguments after its name."""
    parser = cli.make_parser(
        "plan",
        "Plan a run on TPUs, by compiling its training step. No TPU is needed.",
        _EXAMPLES,
        "Any field of the config is set by --config.FIELD=VALUE. All figures are the TPU "
        "compiler's estimates.",
    )
    cli.add_config_argument(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="chip and shape, as v5e:16x16 or v4:4x4x8: a page")
    where.add_argument("--compare", nargs="+", metavar="TOPOLOGY", help="several: a table")
    parser.add_argument(
        "--max-batch",
        action="store_true",
        help="find the largest batch that fits, by some further compilations",
    )
    parser.add_argument("--examples", type=int, help="images of a training set that is not known")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    arguments, overrides = parser.parse_known_args(argv)

    # Whatever can be wrong, before the first compilation.
    config = config_files.load_config(arguments.config, overrides)
    data = training_set(config, arguments.examples)
    check_output(arguments.json, overwrite=arguments.overwrite)
    runs = [
        PlannedRun(config, tpu_topology(name), data)
        for name in arguments.compare or [arguments.topology]
    ]

    plans = [
        make_plan(
            run,
            find_largest=arguments.max_batch,
            compile_remedies=arguments.compare is None,
        )
        for run in runs
    ]
    print(page(plans[0]) if arguments.compare is None else table(plans), flush=True)
    if arguments.json is not None:
        text = json.dumps([plan.as_json() for plan in plans], indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return plans


if __name__ == "__main__":
    sys.exit(cli.run(main))
