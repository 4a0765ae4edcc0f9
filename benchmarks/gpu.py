"""ConvNeXt on one GPU: this library against timm under torch.compile, in one run.

    pip install -e '.[parity]' "jax[cuda12]"
    python benchmarks/gpu.py --batch_sizes 128 256 --json gpu.json
    python benchmarks/gpu.py --device cpu --tiny_shapes --timm eager   # whether the script works

Inference and the whole training step of ConvNeXt-T and -B in bfloat16: of timm with channels_last,
autocast and its weights in float32, of this library with `dtype=bfloat16`, which keeps them so. A
training step is forward pass, cross entropy, backward pass and AdamW, with stochastic depth .1, on
images that lie on the GPU already. Each contender has its turn in each round; a figure is the
median of the rounds. Peak memory is of one contender alone: of JAX what the compiled program takes,
of PyTorch the allocator's peak over one call, all that lies there counted (so compare one --timm).

Behind the table stands where a step's time goes: of JAX by part of the network, from a trace of
three steps; of PyTorch by operation.
"""

import argparse
import gc
import json
import statistics
from pathlib import Path

import jax
import torch
from gpu_contenders import JaxContender, TimmContender, imported_timm

from convnext_jax.analysis.throughput import Spread, seconds_in_turns
from convnext_jax.tables import markdown_table

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


def measure(name, mode, batch_size, arguments):
    """One comparison; a record for each contender."""
    torch_device = "cuda" if arguments.device == "gpu" else "cpu"
    overrides = SMALL if arguments.tiny_shapes else {}
    setting = (name, mode, batch_size, arguments.image_size, overrides)
    contenders = {"convnext_jax": JaxContender(*setting)}
    for way in arguments.timm:
        contenders[f"timm, {way}"] = TimmContender(
            *setting, device=torch_device, compiled=way == "compiled"
        )
    turns = {} if arguments.turn_seconds is None else {"turn_seconds": arguments.turn_seconds}
    seconds = seconds_in_turns(contenders, arguments.rounds, **turns)
    records = []
    for contender, call in contenders.items():
        records.append(
            {
                "model": name,
                "mode": mode,
                "batch_size": batch_size,
                "contender": contender,
                "images_per_second": [batch_size / one for one in seconds[contender]],
                "peak_bytes": call.peak_bytes(),
                "profile": call.profile()[: arguments.profile],
            }
        )
    del call, contenders
    gc.collect()
    if torch_device == "cuda":
        torch.cuda.empty_cache()
    return records


def table(records):
    """A row for each contender; the ratio is this library's pace over the contender's."""
    ours = {
        (one["model"], one["mode"], one["batch_size"]): statistics.median(one["images_per_second"])
        for one in records
        if one["contender"] == "convnext_jax"
    }
    rows = []
    for one in records:
        rate, peak = Spread.of(one["images_per_second"]), one["peak_bytes"]
        rows.append(
            [
                f"{one['model']} {one['mode']}, {one['batch_size']} images",
                one["contender"],
                f"{rate.median:,.1f}",
                f"{rate.low:,.1f} to {rate.high:,.1f}",
                f"{ours[one['model'], one['mode'], one['batch_size']] / rate.median:.2f}",
                "" if peak is None else f"{peak / 2**30:.2f}",
            ]
        )
    header = ["", "", "images/s", "range", "ours ÷ this", "peak, GiB"]
    return markdown_table(header, rows, left=(0, 1))


def profiles(records):
    """Where the time goes, a paragraph for each contender."""
    lines = []
    for one in records:
        if not one["profile"]:
            continue
        lines.append(
            f"\n{one['model']} {one['mode']}, {one['batch_size']} images, {one['contender']}; "
            "milliseconds of a call:"
        )
        lines += [f"  {1e3 * seconds:9.3f}  {part}" for part, seconds in one["profile"]]
    return "\n".join(lines)


def main(argv=None):
    """Prints the table and the profiles."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["convnext_tiny", "convnext_base"])
    parser.add_argument("--modes", nargs="+", default=["inference", "training"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--turn_seconds", type=float, help="that a turn takes at least")
    parser.add_argument("--timm", nargs="+", choices=("compiled", "eager"), default=["compiled"])
    parser.add_argument("--profile", type=int, default=12, help="lines of each profile; 0 for none")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument(
        "--tiny_shapes", action="store_true", help="a few narrow blocks, 32 pixels, 2 images"
    )
    parser.add_argument("--json", type=Path, help="write every round's figures")
    arguments = parser.parse_args(argv)
    if arguments.tiny_shapes:
        arguments.batch_sizes, arguments.image_size = [2], 32
    if arguments.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif not torch.cuda.is_available() or jax.default_backend() != "gpu":
        parser.error(
            "both JAX and PyTorch must see a GPU: install jax[cuda12] and a PyTorch with CUDA, or "
            "give --device cpu --tiny_shapes to try the script"
        )

    records = []
    for name in arguments.models:
        for mode in arguments.modes:
            for batch_size in arguments.batch_sizes:
                records += measure(name, mode, batch_size, arguments)
    device = jax.devices()[0].device_kind
    print(
        f"{device}, {arguments.image_size} pixels, bfloat16, medians of {arguments.rounds} rounds; "
        f"jax {jax.__version__}, torch {torch.__version__}, timm {imported_timm().__version__}\n"
    )
    print(table(records))
    print(profiles(records))
    if arguments.json is not None:
        content = {"device": device, "image_size": arguments.image_size, "records": records}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return records


if __name__ == "__main__":
    main()
