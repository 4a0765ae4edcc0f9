"""Sets networks side by side: python -m convnext_jax.compare.

    python -m convnext_jax.compare
    python -m convnext_jax.compare --models convnext_tiny swin_tiny resnet50 --batch_size 32

Prints parameters, multiply-accumulates, published top-1, the throughput of inference as it is
measured on this machine, and as the TPU compiler estimates it. Without --models these are the
paper's comparison: T, S and B of ConvNeXt and of Swin. See docs/roadmap.md.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from convnext_jax import cli, compare_report, tpu_estimates
from convnext_jax.analysis.published import PUBLISHED_TOP1
from convnext_jax.analysis.throughput import inference_call, seconds_in_turns
from convnext_jax.analysis.traced_counts import traced_counts
from convnext_jax.compare_report import Compared
from convnext_jax.errors import UserError
from convnext_jax.models.registry import create_model
from convnext_jax.output_files import check_output
from convnext_jax.tpu_estimates import TpuEstimates

# Run as a program this module is called "__main__", whose lines nobody shows.
_log = logging.getLogger("convnext_jax.compare")
_PAPERS = [
    f"{family}_{size}" for size in ("tiny", "small", "base") for family in ("convnext", "swin")
]
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

_EXAMPLES = """
the paper's comparison: T, S and B of ConvNeXt and of Swin
  python -m convnext_jax.compare
others
  python -m convnext_jax.compare --models convnext_tiny swin_tiny resnet50 --batch_size 32
"""


def main(argv: Sequence[str] | None = None) -> list[Compared]:
    """The program; `argv` are the arguments after its name."""
    parser = cli.make_parser(
        "compare",
        "Set networks side by side: size, accuracy as published, throughput.",
        _EXAMPLES,
    )
    parser.add_argument(
        "--models", nargs="+", default=_PAPERS, metavar="NAME", help="of the registry"
    )
    parser.add_argument("--image_size", type=int, default=224, help="side in pixels; 224")
    parser.add_argument("--batch_size", type=int, default=8, help="images of a measured batch; 8")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each is measured in; 7")
    parser.add_argument("--dtype", choices=_DTYPES, help="float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    tpu_estimates.add_arguments(parser)
    arguments = parser.parse_args(argv)
    names: list[str] = list(dict.fromkeys(arguments.models))
    size, batch_size = arguments.image_size, arguments.batch_size

    # Whatever can be wrong, before the first compilation.
    for field in ("image_size", "batch_size", "rounds"):
        if getattr(arguments, field) < 1:
            raise UserError(f"--{field} is {getattr(arguments, field)}; it must be 1 or more")
    check_output(arguments.json, overwrite=arguments.overwrite)
    # The device is taken up first: estimates hold JAX to the CPU from then on.
    device = jax.devices()[0]
    dtype = arguments.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    tpu = TpuEstimates(arguments, size)
    try:
        models = {name: create_model(name, dtype=_DTYPES[dtype]) for name in names}
        counts = {name: traced_counts(model, size) for name, model in models.items()}
    except ValueError as error:
        raise UserError(str(error)) from error

    calls = {}
    try:
        for i, name in enumerate(names, start=1):
            _log.info(f"compiling {i} of {len(names)} for this machine: {name}")
            calls[name] = inference_call(models[name], size, batch_size)
        _log.info(f"measuring, {arguments.rounds} rounds")
        seconds = seconds_in_turns(calls, arguments.rounds)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the networks do not fit the memory of {_machine(device)} together; give fewer "
            "--models, or a smaller --batch_size"
        ) from error
    calls.clear()
    estimates = tpu.of(names)

    networks = [
        Compared(
            model=name,
            parameters=counts[name].parameters,
            macs=counts[name].macs,
            published_top1=PUBLISHED_TOP1.get(name),
            images_per_second=tuple(batch_size / one for one in seconds[name]),
            estimate=estimates.get(name),
        )
        for name in names
    ]
    kind = device.platform.upper()
    print(compare_report.table(networks, kind, tpu.heading))
    print(
        f"\n{kind}: inference in {dtype}, {batch_size} images of {size} × {size} a batch, "
        f"{_machine(device)}; median and range of {arguments.rounds} rounds in turn "
        f"(jax {jax.__version__})"
    )
    print(tpu.note)
    print("top-1: at 224 × 224, trained on ImageNet-1K alone", flush=True)
    if arguments.json is not None:
        content = {
            "device": _machine(device),
            "dtype": dtype,
            "batch_size": batch_size,
            "image_size": size,
            "jax": jax.__version__,
            "tpu": tpu.note,
            "networks": [compare_report.record(one) for one in networks],
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return networks


def _machine(device: jax.Device) -> str:
    """What was measured on. XLA takes all cores of a CPU that the process may use."""
    if device.platform != "cpu":
        return f"one {device.device_kind}"
    if hasattr(os, "sched_getaffinity"):
        return f"{len(os.sched_getaffinity(0))} cores"
    return f"{os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(cli.run(main))
