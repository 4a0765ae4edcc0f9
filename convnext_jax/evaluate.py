"""Evaluates a model: python -m convnext_jax.evaluate --weights W --dataset imagenet2012.

Every image counts exactly once, whatever the batch size and the number of devices. Data sets that
come with a protocol of their own (ImageNet-A, -R and -C, ReaL labels) are held to it; see
`data.benchmarks`.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax import cli, evaluation_report
from convnext_jax.analysis.confidence import wilson_interval
from convnext_jax.analysis.corruption_error import (
    ALEXNET_ERRORS,
    SEVERITIES,
    corruption_errors,
    mean_corruption_error,
)
from convnext_jax.analysis.per_class import per_class, write_csv
from convnext_jax.compilation_cache import use_compilation_cache
from convnext_jax.convert.preprocessing import Preprocessing
from convnext_jax.convert.pretrained import open_pretrained
from convnext_jax.data.benchmarks import (
    IMAGENET_C,
    Benchmark,
    open_benchmark,
    open_imagenet_c,
)
from convnext_jax.data.class_matching import ClassMatch, match_classes
from convnext_jax.data.loader import eval_loader
from convnext_jax.data.targets import add_targets
from convnext_jax.distributed import joining
from convnext_jax.errors import UserError
from convnext_jax.training import sharding
from convnext_jax.training.batch_size import FittingBatch, device_memory, fitting_batch
from convnext_jax.training.console import block
from convnext_jax.training.progress import ProgressBar
from convnext_jax.training.scoring import Scores, jit_score_step, make_score_step, score

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_FIELDS = ("image", "target", "label", "mask")


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluates as the command line says, and prints what comes out.

    Args:
      arguments: from `_parser`.

    Returns:
      What --json writes.

    Raises:
      UserError: for a mistake in the arguments, the data or the weights.
    """
    for path in (arguments.csv, arguments.json):
        _check_output(path, overwrite=arguments.overwrite)
    if arguments.csv is not None and arguments.dataset == IMAGENET_C:
        raise UserError(
            "--csv goes with one data set; give --dataset imagenet2012_corrupted/fog_3 or another"
        )

    # Data first, since most mistakes are made there.
    if arguments.dataset == IMAGENET_C:
        parts = open_imagenet_c(
            tuple(ALEXNET_ERRORS), SEVERITIES, arguments.split, arguments.data_dir
        )
        benchmarks = {f"{name} {severity}": part for (name, severity), part in parts.items()}
    else:
        benchmark = open_benchmark(
            arguments.dataset,
            arguments.split,
            arguments.data_dir,
            restrict=arguments.restrict_classes,
        )
        benchmarks = {arguments.dataset: benchmark}
    first = next(iter(benchmarks.values()))

    # Model, and what its classes are in the data set.
    pretrained = open_pretrained(
        arguments.weights,
        sha256=arguments.sha256,
        dtype=_DTYPES[arguments.dtype],
        averaged=not arguments.raw,
    )
    model = pretrained.model
    if not model.num_classes:
        raise UserError(
            f"{arguments.weights} has no classifier (it is an encoder alone): there is no accuracy "
            "to measure before it has been fine-tuned"
        )
    matched = match_classes(
        first.source.class_names, pretrained.class_names, model.num_classes, among=first.among
    )
    preprocessing = _at_size(
        pretrained.preprocessing, arguments.size, arguments.crop_ratio, whole=first.cropped
    )

    # Devices, and the step compiled for a batch that fits them.
    mesh = sharding.create_mesh()
    variables = _on_every_device(pretrained.variables, mesh)
    step = jit_score_step(
        make_score_step(
            model, answers=matched.answers, mean=preprocessing.mean, std=preprocessing.std
        ),
        mesh,
    )

    def compile_for(batch_size: int) -> Any:
        batch = _abstract_batch(batch_size, preprocessing.image_size, model.num_classes, mesh)
        return step.lower(variables, batch).compile()

    if arguments.batch_size is None:
        batch = fitting_batch(
            compile_for,
            max(len(benchmark.source) for benchmark in benchmarks.values()),
            mesh.size,
            bytes_available=device_memory(jax.local_devices()[0]),
        )
    else:
        if arguments.batch_size < 1 or arguments.batch_size % mesh.size:
            raise UserError(
                f"--batch_size {arguments.batch_size} can't be divided evenly among {mesh.size} "
                f"devices; give a multiple of {mesh.size}"
            )
        batch = FittingBatch(arguments.batch_size, compile_for(arguments.batch_size), None, None)

    primary = jax.process_index() == 0
    facts = evaluation_report.facts(
        arguments, pretrained, benchmarks, matched, preprocessing, batch, mesh
    )
    if primary:
        print(block(facts) + "\n", flush=True)

    # The pass over the data.
    results: dict[str, dict[str, Any]] = {}
    for label, benchmark in benchmarks.items():
        bar = ProgressBar(len(benchmark.source), label=label) if primary else None
        began = time.monotonic()
        scores = _score_all(
            batch, variables, benchmark, matched, preprocessing, arguments.workers, mesh, bar
        )
        results[label] = {
            **_metrics(scores, benchmark, matched),
            "seconds": round(time.monotonic() - began, 3),
            "images_per_second": bar and bar.images_per_second,
        }
    report = {
        "weights": str(arguments.weights),
        "sha256": pretrained.sha256,
        "model": pretrained.model_name,
        "dtype": arguments.dtype,
        "preprocessing": preprocessing.to_dict(),
        "batch_size": batch.size,
        "dataset": arguments.dataset,
    }
    if arguments.dataset == IMAGENET_C:
        errors = {key: 1 - r["accuracy"] for key, r in zip(parts, results.values(), strict=True)}
        report |= {
            "mean_corruption_error": mean_corruption_error(errors),
            "corruption_errors": corruption_errors(errors),
            "parts": results,
        }
        text = evaluation_report.corruption_table(errors)
    else:
        result = results[arguments.dataset]
        report |= {"data": first.source.identity, **result}
        text = block(evaluation_report.summary(result, benchmark))
    if not primary:
        return report
    print(text, flush=True)
    if arguments.csv is not None:
        write_csv(arguments.csv, per_class(scores, first.source.class_names, matched))
    if arguments.json is not None:
        if not math.isfinite(report.get("loss") or 0.0):
            report["loss"] = None  # JSON knows no other way to say so
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _score_all(
    batch: FittingBatch,
    variables: Any,
    benchmark: Benchmark,
    matched: ClassMatch,
    preprocessing: Preprocessing,
    workers: int,
    mesh: jax.sharding.Mesh,
    bar: ProgressBar | None,
) -> Scores:
    """One pass over one data set."""
    hits = seen = 0

    def advance(scores: Scores) -> None:
        nonlocal hits, seen
        hits, seen = hits + int(scores.top1.sum()), seen + len(scores)
        if bar is not None:
            bar.advance(len(scores), f"top-1 {hits / max(seen, 1):.2%}")

    host_batches = eval_loader(
        benchmark.source,
        preprocessing.transform(),
        batch_size=batch.size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=workers,
    )
    with contextlib.closing(host_batches):
        batches = sharding.prefetch_to_device(
            add_targets(host_batches, benchmark, matched),
            sharding.batch_sharding(mesh),
            _FIELDS,
        )
        scores = score(batch.compiled, variables, batches, progress=advance)
    if bar is not None:
        bar.close()
    if not len(scores):
        raise UserError("the data set holds no image that can be read; look at its files")
    return scores


def _metrics(scores: Scores, benchmark: Benchmark, matched: ClassMatch) -> dict[str, Any]:
    """Accuracies with their intervals, the loss, and how many images they are of."""
    count, top1, top5 = len(scores), int(scores.top1.sum()), int(scores.top5.sum())
    # Where the model lacks a class the loss of its images would be infinite.
    complete = bool((matched.columns >= 0).all())
    return {
        "examples": count,
        "left_out": len(benchmark.source) - count,
        "accuracy": top1 / count,
        "accuracy_interval": wilson_interval(top1, count),
        "top5": top5 / count,
        "top5_interval": wilson_interval(top5, count),
        "loss": float(scores.loss.mean(dtype="float64")) if complete else None,
    }


def _at_size(
    preprocessing: Preprocessing, size: int | None, crop_ratio: float | None, *, whole: bool
) -> Preprocessing:
    """The model's preprocessing for another image size, the crop's share of the image kept."""
    if size is not None:
        if size < 1:
            raise UserError(f"--size must be positive, and it is {size}")
        preprocessing = preprocessing.at_size(size)
    if crop_ratio is not None:
        if not 0 < crop_ratio <= 1:
            raise UserError(f"--crop_ratio must be in (0, 1], and it is {crop_ratio}")
        resized = int(preprocessing.image_size / crop_ratio)
        preprocessing = dataclasses.replace(preprocessing, resize_size=resized)
    return dataclasses.replace(preprocessing, resize_size=None) if whole else preprocessing


def _on_every_device(variables: Any, mesh: jax.sharding.Mesh) -> Any:
    """Each process gives its own copy: `device_put` would send one process's to the others."""
    on = sharding.replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(on, np.asarray(x)), variables
    )


def _abstract_batch(
    batch_size: int, size: int, num_classes: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    on = sharding.batch_sharding(mesh)
    make: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct
    return {
        "image": make((batch_size, size, size, 3), jnp.uint8, sharding=on),
        "target": make((batch_size, num_classes), jnp.bool_, sharding=on),
        "label": make((batch_size,), jnp.int32, sharding=on),
        "mask": make((batch_size,), jnp.float32, sharding=on),
    }


def _check_output(path: Path | None, *, overwrite: bool) -> None:
    """Hours of evaluation should not end at a file that can't be written."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} is no file in an existing directory; give another name")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; give another name, or --overwrite")


_EXAMPLES = """
published weights on ImageNet's validation images
  python -m convnext_jax.evaluate --weights convnext_tiny_1k_224_ema.pth --dataset imagenet2012
a run's weights on a folder with one folder a class
  python -m convnext_jax.evaluate --weights runs/photos --dataset folder --data_dir PHOTOS
at another size, with each class's accuracy
  python -m convnext_jax.evaluate --weights W --dataset imagenet2012 --size 288 --csv classes.csv
"""


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(
        "evaluate",
        "Measure a model's top-1 and top-5 accuracy and its loss, every image once. "
        "Accuracies come with Wilson's 95 % score interval: what another draw of as many images "
        "could have given.",
        _EXAMPLES,
        "Data sets are those of python -m convnext_jax.train, and by their TFDS names "
        "imagenet_v2/matched-frequency, imagenet_a and imagenet_r (answers among their 200 "
        "classes), imagenet_sketch, imagenet2012_real (one of several right labels must be "
        "hit), imagenet2012_corrupted/fog_3 and its like; imagenet_c means all 15 corruptions at 5 "
        "severities, also as the authors' own folders, and gives the mean corruption error.",
    )
    cli.add_weights_arguments(parser)
    parser.add_argument("--dataset", required=True, help='its name, or "folder"; see below')
    parser.add_argument(
        "--split",
        help='"validation" by default, "test" where there is no such; of a folder also "all"',
    )
    parser.add_argument("--data_dir", help="where the data sets lie, or the folder of images")
    parser.add_argument("--size", type=int, help="of the images in pixels; the model's by default")
    parser.add_argument(
        "--crop_ratio",
        type=float,
        help="the centre crop's share of the short side; the model's by default",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        help="of all devices together; by default the largest that fits, up to 256 a device, "
        "and 32 on a CPU",
    )
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32", help="of computation")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that decode; 0 for threads in this one"
    )
    average = parser.add_mutually_exclusive_group()
    average.add_argument(
        "--ema", action="store_true", help="of a run the moving average, if it has one: the default"
    )
    average.add_argument("--raw", action="store_true", help="of a run the raw weights")
    parser.add_argument(
        "--restrict_classes",
        action="store_true",
        help="look for answers among the data set's classes only (imagenet_a and _r always do)",
    )
    parser.add_argument("--csv", type=Path, help="write accuracy and chief mistake of each class")
    parser.add_argument("--json", type=Path, help="write the result")
    parser.add_argument("--overwrite", action="store_true", help="of --csv and --json")
    joining.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The program; `argv` are the arguments after its name."""
    arguments = _parser().parse_args(argv)
    with joining.joined(arguments):
        use_compilation_cache()
        return evaluate(arguments)


if __name__ == "__main__":
    sys.exit(cli.run(main))
