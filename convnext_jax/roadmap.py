"""Shows the road from ResNet to ConvNeXt: python -m convnext_jax.roadmap.

    python -m convnext_jax.roadmap --road b --chart roadmap_b.png
    python -m convnext_jax.roadmap --estimates estimates.json --csv roadmap.csv

Prints the steps of the paper's tables 10 (--road t, from ResNet-50) and 11 (--road b, from
ResNet-200): what changed, parameters and GFLOPs as they are counted in the networks, and the
paper's figures. See docs/roadmap.md.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convnext_jax import cli, roadmap_report, tpu_estimates
from convnext_jax.analysis.roadmap_table import reference_row, roadmap_rows
from convnext_jax.errors import UserError
from convnext_jax.models.roadmap_steps import ROADS, STEPS, Road, Step
from convnext_jax.output_files import check_output
from convnext_jax.roadmap_chart import draw_roadmap
from convnext_jax.tpu_estimates import TpuEstimates

_IMAGE_SIZE = 224
_ENDS: dict[Road, tuple[str, str, str]] = {
    "t": ("ResNet-50", "ConvNeXt-T", "Swin-T"),
    "b": ("ResNet-200", "ConvNeXt-B", "Swin-B"),
}

_EXAMPLES = """
the steps to ConvNeXt-T, and their picture
  python -m convnext_jax.roadmap --chart roadmap_t.svg
those to ConvNeXt-B, their figures as CSV
  python -m convnext_jax.roadmap --road b --csv roadmap_b.csv
"""


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The program; `argv` are the arguments after its name."""
    parser = cli.make_parser(
        "roadmap", "Print the steps from ResNet to ConvNeXt, and draw them.", _EXAMPLES
    )
    parser.add_argument("--road", choices=ROADS, default="t", help="t, to ConvNeXt-T, or b")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="some steps, as 07_dw_first")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw it, a .png or .svg")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table's figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace FILEs that exist")
    tpu_estimates.add_arguments(parser)
    arguments = parser.parse_args(argv)
    road: Road = arguments.road

    # Whatever can be wrong, before the first compilation.
    steps = _steps(arguments.steps)
    if arguments.chart is not None and arguments.chart.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"--chart {arguments.chart}: give a name that ends in .png or .svg")
    for path in (arguments.chart, arguments.csv, arguments.json):
        check_output(path, overwrite=arguments.overwrite)
    tpu = TpuEstimates(arguments, _IMAGE_SIZE)

    rows, reference = roadmap_rows(road, steps), reference_row(road)
    shown = [*rows, reference]
    estimates = tpu.of([row.model for row in shown])

    start, end, swin = _ENDS[road]
    print(f"From {start} to {end} at {_IMAGE_SIZE} × {_IMAGE_SIZE} pixels (arXiv 2201.03545)\n")
    print(roadmap_report.table(road, shown, estimates, tpu.heading))
    print(tpu.note, flush=True)

    records = roadmap_report.records(shown, estimates)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    if arguments.chart is not None:
        title = f"From {start} to {end}, step by step"
        draw_roadmap(rows, reference, arguments.chart, title=title, reference_name=swin)
        print(f"wrote {arguments.chart}")
    return records


def _steps(names: Sequence[str] | None) -> tuple[Step, ...]:
    known = [step.name for step in STEPS]
    for name in names or ():
        if name not in known:
            raise UserError(f"--steps: there is no {name!r}; there are {', '.join(known)}")
    return tuple(step for step in STEPS if not names or step.name in names)


if __name__ == "__main__":
    sys.exit(cli.run(main))
