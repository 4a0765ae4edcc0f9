"""Names what is on images: python -m convnext_jax.predict --weights W IMAGE.

Opens images as a person would see them (`data.photographs`), prepares them as the weights want it,
and prints the likeliest classes of each; or writes what the head reads, the pooled features.
"""

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convnext_jax import cli
from convnext_jax.compilation_cache import use_compilation_cache
from convnext_jax.convert.pretrained import Pretrained, open_pretrained
from convnext_jax.data.photographs import find_photographs
from convnext_jax.errors import UserError
from convnext_jax.inference import at_size, batches, embed, load_image, predict

_EXAMPLES = """
  the five likeliest classes of each image, as a table
    python -m convnext_jax.predict --weights convnext_tiny_1k_224_ema.pth cat.jpg dog.png
  of all images in a folder, as one JSON document
    python -m convnext_jax.predict --weights runs/flowers --json holiday/ > holiday.json
  embeddings, for a search or a linear probe
    python -m convnext_jax.predict --weights W --features holiday.npz holiday/
"""


def _shown(path: Path) -> str:
    # A name that is no UTF-8 must not end the program when it is printed.
    return str(path).encode("utf-8", "backslashreplace").decode()


def format_table(path: Path, predictions: Sequence[dict[str, Any]]) -> str:
    """An image's path, and a line for each of its classes."""
    width = len(str(max(p["class"] for p in predictions)))
    lines = [f"  {p['probability']:7.2%}  {p['class']:>{width}}  {p['name']}" for p in predictions]
    return "\n".join([_shown(path), *lines])


def _write_features(
    file: Path, paths: Sequence[Path], features: np.ndarray, pretrained: Pretrained
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    with open(part, "wb") as stream:
        np.savez(
            stream,
            features=features,
            paths=np.array([_shown(path) for path in paths], np.str_),
            model=np.str_(pretrained.model_name or ""),
            source=np.str_(pretrained.source),
            sha256=np.str_(pretrained.sha256 or ""),
        )
    part.replace(file)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(
        "predict",
        "Name what is on images, or write their features.",
        _EXAMPLES,
        "An image that can't be read is reported on standard error and left out; the exit status "
        "is then 1.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, folders of them, or glob patterns"
    )
    cli.add_weights_arguments(parser)
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes shown (5)")
    parser.add_argument("--size", type=int, metavar="S", help="of the images; the weights' own")
    parser.add_argument("--batch_size", type=int, default=32, metavar="B", help="at once (32)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    form.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="write the pooled features to this .npz instead: features (N, C) float32, paths, "
        "model, source, sha256",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    arguments = parser.parse_args(argv)
    for name in ("top", "size", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be 1 or more")
    file = arguments.features
    if file is not None and file.suffix != ".npz":
        raise UserError(f"--features {file}: the file is an .npz, so give it that suffix")
    if file is not None and file.exists() and not arguments.overwrite:
        raise UserError(f"{file} exists; give --overwrite to replace it, or another name")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """The program; `argv` are the arguments after its name.

    Raises:
      SystemExit: with status 1, after all else, if images were left out.
    """
    arguments = _arguments(argv)
    use_compilation_cache()
    paths = list(find_photographs(arguments.images))
    pretrained = open_pretrained(arguments.weights, sha256=arguments.sha256)
    if not pretrained.model.num_classes and arguments.features is None:
        raise UserError(
            f"the weights of {pretrained.source} have no head, so they name no classes; give "
            "--features FILE.npz for what they compute"
        )
    if arguments.size is not None:
        pretrained = at_size(pretrained, arguments.size)

    errors: list[dict[str, str]] = []

    def on_error(path: Path, error: str) -> None:
        errors.append({"path": _shown(path), "error": error})
        print(f"{_shown(path)}: {error}", file=sys.stderr)

    started = time.perf_counter()
    with warnings.catch_warnings():
        # Pillow warns of large images, odd EXIF and the like: none of it changes what is seen.
        warnings.filterwarnings("ignore", module="PIL")
        found = batches(
            paths,
            functools.partial(load_image, pretrained=pretrained),
            min(arguments.batch_size, len(paths)),
            on_error,
        )
        if arguments.features is not None:
            done, features = embed(pretrained, found)
            if done:
                _write_features(arguments.features, done, features, pretrained)
                print(f"wrote {arguments.features}: features {features.shape}, float32")
        else:
            top = min(arguments.top, pretrained.model.num_classes)
            predictions = []
            for path, best in predict(pretrained, found, top):
                if arguments.json:
                    predictions.append({"path": _shown(path), "predictions": best})
                else:
                    print(format_table(path, best), flush=True)
            if arguments.json:
                document = {
                    "model": pretrained.model_name,
                    "weights": pretrained.source,
                    "sha256": pretrained.sha256,
                    "images": predictions,
                    "errors": errors,
                }
                print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    count, seconds = len(paths) - len(errors), time.perf_counter() - started
    print(f"{count} images in {seconds:.1f} s, compilation included", file=sys.stderr)
    if errors:
        print(f"left out {len(errors)} of {len(paths)} images, see above", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(cli.run(main))
