"""Writes a network for programs without this library: python -m convnext_jax.export --weights W F.

As StableHLO, which any program with JAX runs on any backend, or as ONNX; beside the file a JSON
text says what goes in and what comes out. What was written is read again, run, and compared with
the network before it gets its name.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax import cli
from convnext_jax.convert.pretrained import Pretrained, open_pretrained
from convnext_jax.errors import UserError
from convnext_jax.exporting.checking import TOLERANCE, check_file
from convnext_jax.exporting.interface import Interface, describe
from convnext_jax.exporting.onnx_graph import OPSET, export_onnx
from convnext_jax.exporting.stablehlo import PLATFORMS, export_stablehlo
from convnext_jax.inference import at_size

_EXAMPLES = """
  one program for CPU, TPU and CUDA, of any batch size
    python -m convnext_jax.export --weights convnext_tiny_1k_224_ema.pth tiny.stablehlo
  with the weights in a file of their own, for bfloat16 on TPUs
    python -m convnext_jax.export --weights W --platforms tpu --dtype bfloat16 \\
      --weights_as_arguments tiny.stablehlo
  for onnxruntime, of any image size
    python -m convnext_jax.export --weights W --format onnx --size any tiny.onnx
"""

_STABLEHLO_USE = """use it without this library:
  from jax import export
  network = export.deserialize(bytearray(open({file!r}, "rb").read()))
  {output} = network.call({arguments}images)"""

_ONNX_USE = """use it without this library:
  import onnxruntime
  network = onnxruntime.InferenceSession({file!r})
  ({output},) = network.run(None, {{"images": images}})"""

# What may lie beside the file: its description, and weights that are not in it.
_COMPANIONS = (".json", ".npz", ".data")

# ONNX is written by protobuf, whose messages end at 2 GB; beyond, the weights get their own file.
_LARGEST_ONNX = 2**31 - 2**26


def write_stablehlo(
    file: Path, pretrained: Pretrained, interface: Interface, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Writes `file`, with the weights beside it if they are arguments, and says what it is."""
    result = export_stablehlo(
        pretrained,
        interface,
        platforms=arguments.platforms,
        weights_as_arguments=arguments.weights_as_arguments,
    )
    file.write_bytes(result.serialized)
    weights = None
    if result.weights is not None:
        weights = _beside(file, ".npz")
        np.savez(weights, allow_pickle=False, **result.weights)
    return {
        "format": "stablehlo",
        "calling_convention_version": result.calling_convention_version,
        "platforms": list(result.platforms),
        "dtype": arguments.dtype,
        "weights_as_first_argument": weights and weights.name,
    }


def write_onnx(file: Path, pretrained: Pretrained, interface: Interface) -> dict[str, Any]:
    """Writes `file`, with the weights beside it if they are too large, and says what it is."""
    model = export_onnx(pretrained, interface)
    import onnx

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pretrained.variables))
    outside = _beside(file, ".data").name if size > _LARGEST_ONNX else None
    onnx.save_model(model, file, save_as_external_data=outside is not None, location=outside)
    onnx.checker.check_model(file)
    return {"format": "onnx", "opset": OPSET, "dtype": "float32", "external_data": outside}


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _at_size(pretrained: Pretrained, size: str | None) -> tuple[Pretrained, int | None]:
    """The network for images of --size, and that size; None for any."""
    if size == "any":
        return pretrained, None
    if size is not None:
        if not size.isdecimal():
            raise UserError(f'--size is {size!r}; it must be a number of pixels, or "any"')
        pretrained = at_size(pretrained, int(size))
    return pretrained, pretrained.preprocessing.image_size


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(
        "export",
        "Write a network as StableHLO or ONNX.",
        _EXAMPLES,
        "By default the file takes uint8 pixels and normalises them itself: a caller who forgets "
        "to, or does it with another mean, gets plausible nonsense, and bytes cost a quarter of "
        "the transfer.",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="to write; FILE.json goes beside it"
    )
    cli.add_weights_arguments(parser)
    parser.add_argument("--format", choices=("stablehlo", "onnx"), default="stablehlo")
    parser.add_argument(
        "--size",
        metavar="S",
        help='side of the images, or "any" to leave it to each call; the weights\' own by default',
    )
    parser.add_argument(
        "--input",
        choices=("uint8", "float32"),
        default="uint8",
        help="pixels, or normalised floats (uint8)",
    )
    parser.add_argument(
        "--features", action="store_true", help="pooled features come out rather than logits"
    )
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32", help="of StableHLO")
    parser.add_argument(
        "--platforms",
        type=lambda names: names.split(","),
        default=list(PLATFORMS[:3]),
        metavar="P,…",
        help=f"of StableHLO: any of {', '.join(PLATFORMS)} ({','.join(PLATFORMS[:3])})",
    )
    parser.add_argument(
        "--weights_as_arguments",
        action="store_true",
        help="StableHLO that is called with the weights, which are written to FILE.npz",
    )
    parser.add_argument("--no_check", action="store_true", help="don't run what was written")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The program; `argv` are the arguments after its name.

    Raises:
      UserError: for a mistake in the arguments.
      RunStoppedError: if what was written does not give what the network gives.
    """
    arguments = _arguments(argv)
    file = arguments.file
    if file.is_dir():
        raise UserError(f"{file} is a directory; give the file to write, {file / 'convnext'}")
    there = [path for path in (file, *(_beside(file, s) for s in _COMPANIONS)) if path.exists()]
    if there and not arguments.overwrite:
        raise UserError(f"{there[0]} exists; give --overwrite to replace it, or another name")
    if arguments.format == "onnx" and (
        arguments.weights_as_arguments or arguments.dtype != "float32"
    ):
        raise UserError("--weights_as_arguments and --dtype bfloat16 are for --format stablehlo")

    pretrained = open_pretrained(
        arguments.weights, sha256=arguments.sha256, dtype=jnp.dtype(arguments.dtype)
    )
    pretrained, size = _at_size(pretrained, arguments.size)
    features = arguments.features or not pretrained.model.num_classes
    interface = Interface(size, arguments.input, features)

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as directory:
        part = Path(directory, file.name)
        if arguments.format == "onnx":
            form = write_onnx(part, pretrained, interface)
        else:
            form = write_stablehlo(part, pretrained, interface, arguments)
        checked = ""
        if not arguments.no_check:
            checked = check_file(part, form, pretrained, interface)
        with open(part, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        description = {"file": file.name, "sha256": digest, **form}
        description |= describe(pretrained, interface)
        text = json.dumps(description, indent=2, ensure_ascii=False)
        _beside(part, ".json").write_text(text + "\n", encoding="utf-8")
        for old in there:
            old.unlink()
        written = [path.replace(file.parent / path.name) for path in _written(part)]
    _report(description, written, checked)


def _written(part: Path) -> list[Path]:
    # The file itself last: where it is, its companions are.
    return [*sorted(p for p in part.parent.iterdir() if p != part), part]


def _report(description: dict[str, Any], written: Sequence[Path], checked: str) -> None:
    for role in ("input", "output"):
        value = description[role]
        shape = ", ".join(str(side) for side in value["shape"])
        print(f"{value['name']:7} {value['dtype']} ({shape})  {value.get('values', '')}".rstrip())
    if checked:
        print(checked)
    for path in written:
        print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")
    outside = description.get("weights_as_first_argument")
    use = _ONNX_USE if description["format"] == "onnx" else _STABLEHLO_USE
    print(
        use.format(
            file=str(written[-1]),
            output=description["output"]["name"],
            arguments=f"dict(numpy.load({str(written[-1].with_name(outside))!r})), "
            if outside
            else "",
        )
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
