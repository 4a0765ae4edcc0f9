"""Converts weights: python -m convnext_jax.convert SOURCE DEST.

From the files of others to a checkpoint of this library, or back to a safetensors file in the names
of others. The layout and the model are read off the tensors.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convnext_jax import cli
from convnext_jax.convert.families import WAYS_BACK, family_of
from convnext_jax.convert.mapping import format_mapping, from_params, mapping_table
from convnext_jax.convert.stored import (
    CheckpointWeights,
    ForeignWeights,
    Provenance,
    find_weights,
)
from convnext_jax.convert.writing import write_safetensors
from convnext_jax.errors import UserError
from convnext_jax.training.weight_checkpoints import save_weights


def main(argv: Sequence[str] | None = None) -> None:
    """The program; `argv` are the arguments after its name."""
    parser = cli.make_parser(
        "convert",
        "Convert published weights of ConvNeXt, ResNet and Swin, without PyTorch. The "
        "layout (official, timm, torchvision, transformers, …) and the model are read off the "
        "tensors.",
        """
        python -m convnext_jax.convert convnext_tiny_1k_224_ema.pth weights/tiny
        python -m convnext_jax.convert hf://timm/convnext_tiny.fb_in1k weights/tiny
        python -m convnext_jax.convert model.safetensors --dry-run
        python -m convnext_jax.convert runs/tiny tiny.safetensors --to safetensors --layout timm
        """,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a .pth, .pt, .bin or .safetensors file, a directory or index.json of a sharded "
        "checkpoint, a URL, hf://owner/name, a converted directory or the workdir of a run",
    )
    parser.add_argument("dest", metavar="DEST", nargs="?", help="directory, or file, to write")
    parser.add_argument(
        "--to",
        choices=("checkpoint", "safetensors"),
        default="checkpoint",
        help="a checkpoint of this library (the default), or a safetensors file for PyTorch",
    )
    parser.add_argument(
        "--layout",
        choices=WAYS_BACK,
        metavar="NAME",
        help=f"whose names a safetensors file gets: {', '.join(WAYS_BACK)}; by default the "
        "source's own, else the authors'",
    )
    parser.add_argument("--sha256", help="what the source file must hash to")
    parser.add_argument(
        "--raw", action="store_true", help="of a run, the raw weights, not their moving average"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the mapping, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace what lies at DEST")
    arguments = parser.parse_args(argv)
    if arguments.layout and arguments.to != "safetensors":
        raise UserError("--layout names the tensors of a safetensors file; add --to safetensors")
    if not arguments.dry_run:
        if arguments.dest is None:
            raise UserError("DEST is missing; say where to write, or give --dry-run")
        if Path(arguments.dest).exists() and not arguments.overwrite:
            raise UserError(f"{arguments.dest} exists already; give another path, or --overwrite")

    started = time.perf_counter()
    weights = find_weights(arguments.source, sha256=arguments.sha256, averaged=not arguments.raw)
    _print_what_was_found(weights)
    if arguments.dry_run:
        _print_mapping(weights)
        return
    if arguments.to == "checkpoint":
        release = weights.release if isinstance(weights, ForeignWeights) else lambda: None
        save_weights(
            arguments.dest,
            weights.arrays(),
            weights.provenance.to_dict(),
            overwrite=arguments.overwrite,
            written=release,
        )
    else:
        found = weights.provenance
        layout = arguments.layout or _own_layout(found)
        variables = weights.arrays()
        tensors = from_params(
            variables["params"],
            found.model,
            layout,
            batch_stats=variables.get("batch_stats"),
        )
        about = {"format": "pt", "convnext_jax": json.dumps(found.to_dict())}
        write_safetensors(arguments.dest, tensors, about, overwrite=arguments.overwrite)
    _row("written", f"{arguments.dest} in {time.perf_counter() - started:.1f} s")
    if arguments.to == "checkpoint" and weights.provenance.model.num_classes:
        _row("try", f"python -m convnext_jax.predict --weights {arguments.dest} IMAGE")


def _print_what_was_found(weights: CheckpointWeights | ForeignWeights) -> None:
    found = weights.provenance
    kinds = sorted({np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(weights.shapes)})
    count = _count(weights.shapes["params"])
    model, size = found.model, found.preprocessing
    _row("source", found.source)
    if found.sha256:
        _row("sha256", found.sha256)
    if isinstance(weights, ForeignWeights):
        _row("layout", found.layout)
        if weights.file.metadata["group"]:
            _row("tensors of", weights.file.metadata["group"])
    classes = f"{model.num_classes:,} classes" if model.num_classes else "no head"
    _row("model", f"{found.model_name or 'unnamed'}: depths {model.depths}, dims {model.dims}")
    _row("", f"{count:,} parameters, {', '.join(kinds)}, {classes}")
    if "batch_stats" in weights.shapes:
        _row("", f"{_count(weights.shapes['batch_stats']):,} running averages of batch norms")
    resize = (
        f"resize to {size.image_size}×{size.image_size}"
        if size.resize_size is None
        else f"short side to {size.resize_size}, centre crop of {size.image_size}"
    )
    _row("images", f"{resize}, {size.interpolation}; mean {size.mean}, std {size.std}")
    if found.licence:
        _row("licence", found.licence)
    for note in found.notes:
        _row("note", note)


def _count(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _print_mapping(weights: CheckpointWeights | ForeignWeights) -> None:
    if isinstance(weights, CheckpointWeights):
        for path, leaf in jax.tree_util.tree_flatten_with_path(weights.shapes)[0]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            print(f"  {name:60} {list(leaf.shape)}")
        return
    print(format_mapping(mapping_table(weights.file.tensors, weights.detected)))


def _own_layout(found: Provenance) -> str | None:
    """The way back to the names that a source bore, or None."""
    # The more specific ones go before "timm", which is either.
    ways = family_of(found.model).ways_back
    for way in sorted(ways, key=lambda way: way == "timm"):
        if any(layout.name == found.layout for layout in ways[way]):
            return way
    return None


def _row(label: str, text: object) -> None:
    print(f"{label:11} {text}")


if __name__ == "__main__":
    # Nothing here computes; an accelerator that another program holds must not stop it.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(cli.run(main))
